"""The list of open_clip's models: what each can do, as the plan of a run has it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from contextlib import nullcontext
from fnmatch import fnmatchcase

import pytest
import torch
from pipelines import REPOSITORY
from small_clip import open_clip

from jobs.__main__ import run_script
from pipeline.clip.files import source
from pipeline.clip.initialization import SkipInitialization
from pipeline.clip.load import build_meta_towers
from pipeline.config import ClipConfig, Config
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.methods.registry import VARIANTS
from pipeline.stages.plan import check_methods

INDEX = DatasetIndex(REPOSITORY, "folders", (), {"ink": ("cat", "dog")}, {"cat": "cat", "dog": "dog"}, (), ())
BOTH = ("ViT-B-32", "EVA02-B-16", "PE-Core-T-16-384", "ViTamin-S", "MobileCLIP-B", "vit_medium_patch16_gap_256")
TEXT = ("RN50", "convnext_tiny", "MobileCLIP2-S0", "swin_base_patch4_window7_224", "vit_relpos_medium_patch16_cls_224")
WITH_TRANSFORMERS = (
    *("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-L-14-CLIPA", "ViT-H-14-worldwide-quickgelu"),
    *("roberta-ViT-B-32", "xlm-roberta-large-ViT-H-14"),
)
REFUSED = {
    "coca_ViT-B-32": "CoCa",
    "coca_roberta-ViT-B-32": "CoCa",
    "mt5-base-ViT-B-32": "not an encoder like BertModel",
    "nllb-clip-base-siglip": "not an encoder like BertModel",
}


def list_models(*arguments: str) -> tuple[str, str]:
    """Run the job; return stdout and stderr."""
    output, errors, command_line = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["list_models.py", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            run_script("list_models")
    except SystemExit as end:
        assert end.code == 2
    finally:
        sys.argv = command_line
    return output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, dict]:
    """Name → object of `--json`, of all models: each is built once for all tests of this file."""
    return {model["name"]: model for model in json.loads(list_models("--json")[0])}


def listed_names(*arguments: str) -> list[str]:
    return [model["name"] for model in json.loads(list_models(*arguments, "--json")[0])]


def towers_of(name: str):
    return build_meta_towers(ClipConfig(model=name, pretrained=None))


def test_every_model_is_listed_and_at_least_120_can_be_used(models):
    assert list(models) == open_clip.list_models()
    assert {model["prompts"] for model in models.values()} == {"both", "text", "refused"}
    assert sum(model["prompts"] != "refused" for model in models.values()) >= 120


def test_the_towers_that_take_prompts_and_the_packages_that_are_needed(models):
    for name in (*BOTH, *WITH_TRANSFORMERS):
        assert (models[name]["prompts"], models[name]["reason"]) == ("both", "")
    for name in TEXT:
        assert models[name]["prompts"] == "text" and "no tokens" in models[name]["reason"]
    for name in (*BOTH, *TEXT, *WITH_TRANSFORMERS):
        assert models[name]["needs"] == (["transformers"] if name in WITH_TRANSFORMERS else [])
    for name, reason in REFUSED.items():
        assert models[name]["prompts"] == "refused" and reason in models[name]["reason"]
        assert models[name]["methods"] == [] and models[name]["parameters"] is None


def test_sizes_are_those_of_the_model_with_weights(models):
    model = open_clip.create_model("ViT-S-16-alt", pretrained=None)
    assert {name: value for name, value in models["ViT-S-16-alt"].items() if isinstance(value, int)} == {
        "parameters": sum(value.numel() for value in model.parameters()),
        "image_size": 224,
        "image_layers": 12,
        "image_width": 384,
        "text_layers": 10,
        "text_width": 256,
        "context_length": 77,
        "embed_dim": model.encode_text(torch.zeros(1, 77, dtype=torch.long)).shape[1],
    }
    assert models["RN50"]["image_layers"] is models["RN50"]["image_width"] is None
    assert models["roberta-ViT-B-32"]["parameters"] is models["roberta-ViT-B-32"]["text_width"] is None


def test_tags_have_their_preprocessing(models):
    for name, tag, expected in [
        ("ViT-H-14-378-quickgelu", "dfn5b", ("squash", "bicubic", 0.48145466, 0.26862954)),
        ("ViT-L-14", "laion2b_s32b_b82k", ("shortest", "bicubic", 0.5, 0.5)),
        ("MobileCLIP2-S0", "dfndr2b", ("shortest", "bilinear", 0, 1)),
    ]:
        values = {tag["tag"]: tag for tag in models[name]["tags"]}[tag]
        assert (values["resize_mode"], values["interpolation"], values["mean"][0], values["std"][0]) == expected
    assert {name: [tag["tag"] for tag in model["tags"]] for name, model in models.items() if model["tags"]} == {
        name: tags for name in models if (tags := open_clip.list_pretrained_tags_by_model(name))
    }


@pytest.mark.parametrize("name", ["ViT-B-32", "PE-Core-T-16-384", "ViTamin-S", "RN50", "MobileCLIP2-S0"])
def test_the_plan_accepts_the_listed_methods_and_refuses_the_others(models, name):
    towers, config = towers_of(name), Config(clip=ClipConfig(model=name, pretrained=None))
    accepted, errors = [], []
    for variant in VARIANTS:
        try:
            check_methods(config, INDEX, towers, [variant])
        except UserError as error:
            errors.append(str(error))
        else:
            accepted.append(variant)
    assert models[name]["methods"] == accepted
    assert bool(errors) == (models[name]["prompts"] == "text")
    for error in errors:
        assert models[name]["reason"] in error
        check_methods(config, INDEX, towers, re.search(r"--methods (.*)$", error)[1].split())
    for method in {re.search(r"mmap-clip list-models --method (\w+)\)", error)[1] for error in errors}:
        assert "ViT-B-32" in listed_names("--method", method) and name not in listed_names("--method", method)


def test_the_plan_refuses_a_refused_model_with_the_same_reason(models):
    with pytest.raises(UserError, match=re.escape(models["coca_ViT-B-32"]["reason"])) as error:
        towers_of("coca_ViT-B-32")
    for name in re.search(r"such as (.*?) or (.*?);", str(error.value)).groups():
        assert models[name]["prompts"] == "both" and not models[name]["needs"]


@pytest.mark.parametrize(("name", "valid"), [("ViT-B-61", "ViT-B-16"), ("vit-b-16", "ViT-B-16"), ("xyz", None)])
def test_an_unknown_model_is_reported_with_the_closest_name_and_the_list(name, valid):
    with pytest.raises(UserError, match=re.escape("All models: mmap-clip list-models")) as error:
        source.resolve_model(name)
    assert valid is None or source.resolve_model(re.search(r"did you mean (\S+)\?", str(error.value))[1]).name == valid


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["RN50*", "convnext_l"], r"RN50.*|convnext_l.*"),
        (["siglip"], r".*-[Ss]ig[Ll][Ii][Pp].*"),
        (["ViT-B/16"], "ViT-B-16-quickgelu"),
        (["ViT-?-3[2-9]"], r"ViT-.-32"),
    ],
)
def test_models_are_found_by_parts_of_names_and_wildcards(models, patterns, names):
    listed = json.loads(list_models(*patterns, "--json")[0])
    assert listed == [model for name, model in models.items() if re.fullmatch(names, name)] != []


@pytest.mark.parametrize(("option", "method"), [("coop", "coop"), ("coop_mt", "coop"), ("mmap", "grouped")])
def test_models_are_found_by_a_method(models, option, method):
    expected = [name for name, model in models.items() if method in model["methods"]]
    assert listed_names("--method", option) == expected != list(models)


def test_a_pattern_without_a_model_is_an_error():
    output, errors = list_models("SigLIP", "ViT-B-61")
    assert output == "" and "no model of open_clip matches 'ViT-B-61'; did you mean ViT-B-16?" in errors


def test_the_table_fits_80_columns(models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output, errors = list_models("--tags")
    table = output.partition("\n\n")[0].splitlines()
    assert errors and max(map(len, table)) <= 80
    rows = [line for line in table[1:] if not line.startswith(" ")]
    assert [row.split()[0] for row in rows] == list(models)
    assert [re.match("[a-z]+", row.split()[1])[0] for row in rows] == [model["prompts"] for model in models.values()]
    assert [line.split()[0] for line in table[1:] if line.startswith(" ")] == [
        tag["tag"] for model in models.values() if model["prompts"] != "refused" for tag in model["tags"]
    ]
    assert "ViTamin-S                          both        62M   224   14x384   12x384   384" in rows
    legend = dict(line.split(maxsplit=1) for line in output.partition("\n\n")[2].splitlines())
    for name, model in models.items():
        if model["reason"]:
            (row,) = (row for row in rows if row.split()[0] == name)
            assert legend[row.split()[2]] == model["reason"]


def test_the_table_of_families_in_the_docs(models):
    """Each model belongs to the first row that names it."""
    section = (REPOSITORY / "docs" / "models.md").read_text().partition("\n## Models\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "`" in line]
    families = [
        (re.findall("`(.*?)`", row[1]), int(row[2]), re.match(r"\w+", row[3])[0])
        for row in rows
        if row[2:] and row[2].isdecimal()
    ]
    unnamed = list(models.values())
    for patterns, number, prompts in families:
        named = [m for m in unnamed if any(fnmatchcase(m["name"], pattern) for pattern in patterns)]
        assert (len(named), {model["prompts"] for model in named}) == (number, {prompts}), patterns
        unnamed = [model for model in unnamed if model not in named]
    assert not unnamed
    usable = [model["prompts"] for model in models.values() if model["prompts"] != "refused"]
    numbers = f"{len(usable)} of the {len(models)} names of open_clip {open_clip.__version__} can be used"
    assert f"{numbers}, {usable.count('both')} with all methods" in section
    assert f"{len(usable)} models of" in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("name", ["RN50", "EVA02-B-16", "ViTamin-S", "MobileCLIP2-S0"])
def test_a_model_without_initialization_has_the_same_tensors(name, monkeypatch):
    def tensors():
        model = source.resolve_model(name).build(False, "meta")
        assert all(value.is_meta for value in model.parameters())
        return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}

    skipped = tensors()
    monkeypatch.setattr(source, "SkipInitialization", nullcontext)
    assert tensors() == skipped


def test_only_tensors_on_the_meta_device_are_not_initialized():
    torch.manual_seed(0)
    expected, scaled = torch.nn.Linear(3, 2).weight, 0.5 * torch.randn(3)
    torch.manual_seed(0)
    with SkipInitialization():
        assert torch.equal(torch.nn.Linear(3, 2).weight, expected) and torch.equal(0.5 * torch.randn(3), scaled)
        assert torch.equal(torch.nn.init.constant_(tensor=torch.zeros(2), val=3).mul_(2), torch.full((2,), 6.0))


def test_random_values_are_skipped_where_weights_are_loaded_next():
    with SkipInitialization(random=True):
        init, zeros = torch.nn.init, torch.zeros(3, 2)
        for name in ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "kaiming_uniform_"):
            assert torch.equal(getattr(init, name)(zeros), torch.zeros(3, 2)), name
        assert torch.equal(init.constant_(zeros, 3), torch.full((3, 2), 3.0))


@pytest.mark.parametrize("vision", [{"layers": 2, "width": 64, "patch_size": 16}, {"timm_model_name": "test_vit"}])
def test_loaded_weights_are_all_of_a_model_that_was_built_without_random_ones(vision):
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 160, **vision}, "text_cfg": text}
    model, empty = (source.ModelSource(config).build(False, random_weights=random) for random in (True, False))
    empty.load_state_dict(model.state_dict())
    for tensors in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        for (name, value), (_, loaded) in zip(tensors(model), tensors(empty), strict=True):
            assert torch.equal(value, loaded), name
