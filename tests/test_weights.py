"""CLIP's architecture and weights in the forms that people have: the same tensors, the same CLIP."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import (
    COMMIT,
    CONFIG,
    HUGGING_FACE_CONFIG,
    NUMBERS,
    PREPROCESS,
    PROCESSOR,
    QUICK,
    OpenaiClip,
    QuickGELU,
    State,
    hub_cache,
    hugging_face_folder,
    hugging_face_state,
    open_clip,
    open_clip_folder,
    openai_archive,
    openai_state,
    other_archive,
    random_state,
    sharded,
    with_text_tower,
)

from pipeline.clip.files.checkpoint import read_checkpoint
from pipeline.clip.files.hugging_face import to_model_config, to_preprocess_config
from pipeline.clip.files.model_state import content_hash, fit_to_model
from pipeline.clip.files.source import resolve_model
from pipeline.clip.files.weights import resolve_weights
from pipeline.clip.load import (
    build_meta_towers,
    clip_identity,
    fetch_weights,
    load_clip,
    local_paths,
    weights_fingerprint,
    with_absolute_paths,
)
from pipeline.config import BUILTIN_DIGITS, OPENAI_NAMES, ClipConfig, Config
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter

MODEL = "model.json"


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with model configs; the cache of the Hub is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write_models(tmp_path)
    load_clip.cache_clear()
    return tmp_path


def write_models(folder: Path) -> None:
    (folder / MODEL).write_text(json.dumps(QUICK))
    (folder / "plain.json").write_text(json.dumps(CONFIG))
    (folder / "with_text_tower.json").write_text(json.dumps(QUICK | {"custom_text": True}))


@pytest.fixture(scope="module")
def expected(state, tmp_path_factory) -> tuple[str, str]:
    """Identity of the weights, and fingerprint of the towers, of the state dict in the simplest file."""
    folder = tmp_path_factory.mktemp("expected")
    write_models(folder)
    save_file(state, folder / "a.safetensors")
    config = ClipConfig(model=str(folder / MODEL), pretrained=str(folder / "a.safetensors"))
    towers = load_clip(config)
    model = open_clip.CLIP(**QUICK).eval()
    model.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(towers.encode_image(images), model.encode_image(images))
    return clip_identity(config).weights, weights_fingerprint(towers)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(name: str, content: object, **options) -> str:
    torch.save(content, name, **options)
    return name


def safely_saved(name: str, state: State) -> str:
    save_file(state, name)
    return name


def archive(name: str, state: State, **options) -> str:
    openai_archive(Path(name), state, **options)
    return name


def sharded_file(state: State) -> str:
    sharded(Path(), hugging_face_state(state), save_file, "model", ".safetensors")
    return "model.safetensors.index.json"


FILES = {
    "safetensors": lambda state: safely_saved("a.safetensors", state),
    "upper-case suffix": lambda state: safely_saved("a.SAFETENSORS", state),
    "safetensors without suffix": lambda state: safely_saved("./weights", state),
    "safetensors named .bin": lambda state: safely_saved("a.bin", state),
    "pt": lambda state: saved("a.pt", state),
    "pth": lambda state: saved("a.pth", state),
    "bin": lambda state: saved("a.bin", state),
    "ckpt": lambda state: saved("a.ckpt", state),
    "pt without suffix": lambda state: saved("./weights", state),
    "pt named .safetensors": lambda state: saved("a.safetensors", state),
    "torch.save before 1.6": lambda state: saved("a.pt", state, _use_new_zipfile_serialization=False),
    "float16": lambda state: saved("a.pt", {name: value.half() for name, value in state.items()}),
    "bfloat16": lambda state: safely_saved("a.pt", {name: value.bfloat16() for name, value in state.items()}),
    "float64": lambda state: saved("a.pt", {name: value.double() for name, value in state.items()}),
    "data parallel": lambda state: saved("a.pt", {"state_dict": prefixed(state, "module."), "epoch": 3}),
    "compiled": lambda state: saved("a.pt", prefixed(state, "_orig_mod.")),
    "compiled, then data parallel": lambda state: saved("a.pt", {"model": prefixed(state, "module._orig_mod.")}),
    "data parallel, then compiled": lambda state: saved("a.pt", prefixed(state, "_orig_mod.module.")),
    "a compiled tower": lambda state: saved(
        "a.pt", {name.replace("visual.", "visual._orig_mod."): value for name, value in state.items()}
    ),
    "Lightning": lambda state: saved(
        "a.ckpt", {"state_dict": prefixed(state, "model."), "global_step": 1, "pytorch-lightning_version": "2.5"}
    ),
    "another attribute": lambda state: safely_saved("a.safetensors", prefixed(state, "net.clip.")),
    "model_state_dict": lambda state: saved("a.pt", {"model_state_dict": state, "optimizer": {"lr": 1}}),
    "nested twice": lambda state: saved("a.pt", {"model": {"state_dict": prefixed(state, "module.model.")}}),
    "text tower": lambda state: saved("a.pt", with_text_tower(state)),
    "text tower, data parallel": lambda state: saved("a.pt", prefixed(with_text_tower(state), "module.")),
    "logit_scale of shape (1,)": lambda state: saved("a.pt", state | {"logit_scale": state["logit_scale"][None]}),
    "with the mask": lambda state: saved("a.pt", state | {"attn_mask": torch.zeros(77, 77)}),
    "OpenAI's archive": lambda state: archive("ViT-B-16.pt", state),
    "OpenAI's archive, traced": lambda state: archive("ViT-B-16.pt", state, trace=True),
    "OpenAI's state dict": lambda state: saved("a.pt", openai_state(state)),
    "OpenAI's state dict, safetensors": lambda state: safely_saved("a.safetensors", openai_state(state)),
    "OpenAI's state dict with numbers": lambda state: saved("a.pt", state | NUMBERS),
    "CLIPModel": lambda state: safely_saved("model.safetensors", hugging_face_state(state)),
    "CLIPModel, wrapped": lambda state: saved("a.pt", {"state_dict": prefixed(hugging_face_state(state), "model.")}),
    "CLIPModel in parts": sharded_file,
    "CLIPModel's folder": lambda state: str(hugging_face_folder(Path("a folder"), state)),
    "open_clip's folder": lambda state: f"local-dir:{open_clip_folder(Path('b'), state)}",
}
"""Form → a function that writes it into the working directory, and returns the value of clip.pretrained."""


@pytest.mark.parametrize("form", FILES)
def test_the_same_tensors_are_the_same_clip_in_every_form(folder, state, expected, form):
    config = ClipConfig(model=MODEL, pretrained=FILES[form](state))
    assert (clip_identity(config).weights, weights_fingerprint(load_clip(config))) == expected


# --- Models that bring their weights -------------------------------------------------------------------------------


def cached_on_the_hub(folder: Path, write, name: str = "clip") -> str:
    hub_cache(folder / "hub", f"org/{name}", write)
    return f"hf-hub:org/{name}"


SOURCES = {
    "open_clip's folder": lambda folder, state: str(open_clip_folder(folder / "snapshot", state)),
    "open_clip's folder, relative": lambda folder, state: "./" + open_clip_folder(Path("snapshot"), state).name,
    "open_clip's folder, local-dir:": lambda folder, state: f"local-dir:{open_clip_folder(Path('snapshot'), state)}",
    "open_clip's repository": lambda folder, state: cached_on_the_hub(
        folder, lambda snapshot: open_clip_folder(snapshot, state)
    ),
    "open_clip's repository at a commit": lambda folder, state: (
        cached_on_the_hub(folder, lambda snapshot: open_clip_folder(snapshot, state)) + f"@{COMMIT}"
    ),
    "the cache of a repository": lambda folder, state: (
        cached_on_the_hub(folder, lambda snapshot: open_clip_folder(snapshot, state))
        and f"{folder}/hub/models--org--clip/snapshots/{COMMIT}"
    ),
    "CLIPModel's folder": lambda folder, state: str(hugging_face_folder(folder / "snapshot", state)),
    "CLIPModel's repository": lambda folder, state: cached_on_the_hub(
        folder, lambda snapshot: hugging_face_folder(snapshot, state), "clip_model"
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_folders_and_repositories_are_models_with_weights(folder, state, expected, source):
    config = ClipConfig(model=SOURCES[source](folder, state))
    assert config.pretrained == config.model
    identity, fingerprint = expected
    pinned = with_absolute_paths(config)  # as a run does, for its workers
    assert clip_identity(pinned) == clip_identity(config)
    assert weights_fingerprint(load_clip(pinned)) == fingerprint
    assert json.loads(clip_identity(config).model_config)["quick_gelu"]
    towers = build_meta_towers(pinned)
    resize_mode = "shortest" if "CLIPModel" in source else "squash"
    expected_preprocessing = Preprocessing(16, resize_mode, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (towers.preprocessing, towers.vision_width) == (expected_preprocessing, 32)
    if config.model.startswith("hf-hub:"):
        assert re.fullmatch(rf"hf-hub:org/\w+@{COMMIT}", pinned.model)
        assert re.fullmatch(rf"{pinned.model}/\w+\.safetensors", clip_identity(config).weights)
    else:
        assert Path(pinned.model).is_absolute()
        assert clip_identity(config).weights == identity
    of_processor = {"size": 16, "resize_mode": "shortest"} if "CLIPModel" in source else {}
    assert resolve_model(pinned.model).preprocess_config == PREPROCESS | of_processor


def test_a_commit_in_the_cache_is_not_asked_for(folder, state, monkeypatch):
    """A worker, or a later job, needs no network; and a run's start downloads no weights before the data is checked."""
    model = SOURCES["open_clip's repository"](folder, state)
    download, names = huggingface_hub.hf_hub_download, []

    def recorded(repository, name, **options):
        names.append(name)
        return download(repository, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", recorded)
    pinned = with_absolute_paths(ClipConfig(model=model))
    assert names == ["open_clip_config.json"]
    load_clip(pinned)
    assert names == ["open_clip_config.json"]


def test_all_machines_must_see_the_users_files(folder, state):
    snapshot, file = open_clip_folder(folder / "snapshot", state), folder / safely_saved("a.safetensors", state)
    assert local_paths(ClipConfig(model="./snapshot")) == [snapshot]
    assert local_paths(ClipConfig(model=MODEL, pretrained="a.safetensors")) == [folder / MODEL, file]
    assert local_paths(ClipConfig(model="ViT-B-16")) == []
    assert local_paths(ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS)) == []
    assert local_paths(ClipConfig(model=SOURCES["open_clip's repository"](folder, state))) == []


def test_a_copy_of_a_clip_has_its_identity(folder):
    """So that finished work is reused."""
    builtin = ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS)
    demo = resolve_weights(builtin, resolve_model(BUILTIN_DIGITS)).files[0]
    open_clip_folder(folder / "copy", load_file(demo), resolve_model(BUILTIN_DIGITS).model_config)
    recorded = ClipConfig(**builtin.model_dump() | PREPROCESS)
    assert clip_identity(ClipConfig(model="./copy")) == clip_identity(recorded) != clip_identity(builtin)


def test_a_folder_may_have_other_weights_or_random_ones(folder, state):
    model = str(open_clip_folder(folder / "snapshot", state))
    save_file({name: value + 1 for name, value in state.items()}, folder / "tuned.safetensors")
    tuned = load_clip(ClipConfig(model=model, pretrained="tuned.safetensors"))
    assert torch.equal(tuned.logit_scale, state["logit_scale"] + 1)
    assert clip_identity(ClipConfig(model=model, pretrained=None)).weights == "random:0"


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.bin", "the only one.pth"])
def test_weights_in_a_folder_are_found(folder, state, name):
    snapshot = open_clip_folder(folder / "snapshot", state)
    (snapshot / "open_clip_model.safetensors").unlink()
    torch.save(state, snapshot / name)
    assert torch.equal(load_clip(ClipConfig(model=str(snapshot))).logit_scale, state["logit_scale"])


def test_a_model_moves_to_another_machine(folder, state, expected):
    """An adapter has the paths of the machine that trained it."""
    trained = with_absolute_paths(ClipConfig(model=str(open_clip_folder(folder / "here", state))))
    shutil.move(folder / "here", folder / "there")
    with pytest.raises(UserError, match=r"clip.model=.*/here: no such folder"):
        clip_identity(trained)
    assert torch.equal(load_clip(trained.with_weights("./there")).logit_scale, state["logit_scale"])
    assert trained.with_weights(None) == trained
    assert ClipConfig(model="ViT-B-16").with_weights("./there").model == "ViT-B-16"
    adapter = TrainedAdapter("mmap", Config(clip=trained), expected[1], (), ())
    assert adapter.towers(pretrained="./there").preprocessing.image_size == 16
    save_file({name: value + 1 for name, value in state.items()}, folder / "there" / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="not those that this adapter was trained on: give the same weights"):
        adapter.towers(pretrained="local-dir:there")


# --- Names and activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPENAI_NAMES)
def test_openais_spelling(name):
    source = resolve_model(name)
    assert source.name == OPENAI_NAMES[name] and source.model_config["quick_gelu"]
    assert clip_identity(ClipConfig(model=name)) == clip_identity(ClipConfig(model=source.name))


@pytest.mark.parametrize(
    "form", ["OpenAI's archive", "OpenAI's archive, traced", "OpenAI's state dict", "CLIPModel's folder"]
)
def test_weights_that_are_known_to_need_quickgelu_get_it(folder, state, form):
    pretrained = FILES[form](state)
    for model in ("plain.json", MODEL):
        config = ClipConfig(model=model, pretrained=pretrained)
        assert json.loads(clip_identity(config).model_config)["quick_gelu"]
        assert type(load_clip(config).visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    told = ClipConfig(model="plain.json", pretrained=pretrained, quick_gelu=False)
    assert not json.loads(clip_identity(told).model_config)["quick_gelu"]


def test_an_archive_says_its_activation(folder, state):
    """Even without the three numbers, by which OpenAI's are known."""
    for name, activation, quick_gelu in (("quick.pt", QuickGELU(), True), ("gelu.pt", torch.nn.GELU(), False)):
        other_archive(folder / name, state, activation)
        config = ClipConfig(model="plain.json", pretrained=name)
        assert json.loads(clip_identity(config).model_config)["quick_gelu"] == quick_gelu
    assert "uses QuickGELU, the weights 'gelu.pt' do not" in told(ClipConfig(model=MODEL, pretrained="gelu.pt"))


def test_weights_that_are_known_to_need_gelu_are_not_put_into_quickgelu(folder, state):
    config = HUGGING_FACE_CONFIG | {
        tower: HUGGING_FACE_CONFIG[tower] | {"hidden_act": "gelu"} for tower in ("text_config", "vision_config")
    }
    pretrained = str(hugging_face_folder(folder / "snapshot", state, config))
    with pytest.raises(UserError, match="uses QuickGELU, the weights .* do not: set quick_gelu to false"):
        load_clip(ClipConfig(model=MODEL, pretrained=pretrained))
    assert not json.loads(clip_identity(ClipConfig(model="plain.json", pretrained=pretrained)).model_config)[
        "quick_gelu"
    ]


@pytest.mark.parametrize("form", ["pt", "text tower", "OpenAI's archive", "CLIPModel"])
def test_a_model_with_a_text_tower_takes_all_forms(folder, state, expected, form):
    towers = load_clip(ClipConfig(model="with_text_tower.json", pretrained=FILES[form](state)))
    assert weights_fingerprint(towers) == expected[1]


# --- Configs of Hugging Face ---------------------------------------------------------------------------------------


def test_a_clip_config_is_a_model_config():
    assert to_model_config(HUGGING_FACE_CONFIG) == {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            **{"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 4.0}
        },
        "text_cfg": {
            **{"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 4.0}
        },
    }
    base = to_model_config({"model_type": "clip"})  # the defaults of transformers: openai/clip-vit-base-patch32
    sizes = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert all(base["vision_cfg"][name] == sizes["vision_cfg"][name] for name in sizes["vision_cfg"])
    assert all(base["text_cfg"][name] == sizes["text_cfg"][name] for name in sizes["text_cfg"])
    # That of older versions, in which the sections of *_dict count.
    older = {"model_type": "clip", "vision_config": {"patch_size": 14}, "vision_config_dict": {"patch_size": 16}}
    assert to_model_config(older)["vision_cfg"]["patch_size"] == 16


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_a_folder_that_transformers_saved_gives_its_features(folder, hidden_act):
    transformers = pytest.importorskip("transformers")
    towers = ("text_config", "vision_config")
    sections = {tower: HUGGING_FACE_CONFIG[tower] | {"hidden_act": hidden_act} for tower in towers}
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**HUGGING_FACE_CONFIG | sections)).double().eval()
    for parameter in theirs.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    theirs.save_pretrained("./saved", max_shard_size="1MB")
    assert len(list(Path("saved").glob("model-*.safetensors"))) > 1
    config = ClipConfig(model="./saved")
    source = resolve_model(config.model)
    checkpoint = read_checkpoint(weights := resolve_weights(config, source))
    ours = source.build(checkpoint.quick_gelu).double().eval()
    ours.load_state_dict(fit_to_model(checkpoint, ours.state_dict(), weights, source, config.model))
    images, texts = torch.randn(2, 3, 16, 16).double(), torch.zeros(2, 77, dtype=torch.long)
    texts[0, :4], texts[1, :3] = torch.tensor([49406, 320, 1125, 49407]), torch.tensor([49406, 539, 49407])
    with torch.no_grad():
        image_features = theirs.get_image_features(pixel_values=images).pooler_output
        text_features = theirs.get_text_features(input_ids=texts).pooler_output
        torch.testing.assert_close(ours.encode_image(images), image_features, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.encode_text(texts), text_features, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width, mlp_width", [(1664, 8192), (1792, 15360), (176, 240), (304, 1392)])
def test_the_width_of_an_mlp_survives_the_ratio(width, mlp_width):
    sizes = {"hidden_size": width, "intermediate_size": mlp_width}
    config = to_model_config({"model_type": "clip", "vision_config": sizes, "text_config": sizes})
    assert int(config["vision_cfg"]["width"] * config["vision_cfg"]["mlp_ratio"]) == mlp_width


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "siglip"}, "model_type is 'siglip', not 'clip'"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is gelu and quick_gelu"),
        ({"text_config": {"vocab_size": 250_002}}, "250,002 tokens"),
        ({"vision_config": {"num_channels": 4}}, "4 channels"),
        ({"vision_config": {"num_attention_heads": 0}}, "ZeroDivisionError"),
        ({"vision_config": "none"}, "TypeError"),
    ],
)
def test_other_configs_of_hugging_face_are_refused(folder, state, changes, reason):
    model = str(hugging_face_folder(folder / "snapshot", state, HUGGING_FACE_CONFIG | changes))
    with pytest.raises(UserError, match=f"clip.model=.*snapshot: config.json .*{reason}.*open_clip_config.json"):
        clip_identity(ClipConfig(model=model))
    # The remedy: a repository with open_clip's config.
    values = {"model_cfg": QUICK, "preprocess_cfg": {}}
    (folder / "snapshot" / "open_clip_config.json").write_text(json.dumps(values))
    assert torch.equal(load_clip(ClipConfig(model=model)).logit_scale, state["logit_scale"])


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"size": 16, "crop_size": 16}, {"resize_mode": "shortest"}),  # as older versions wrote it
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, {"resize_mode": "squash"}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"size": {"shortest_edge": 20}}, "whole square"),
        ({"do_center_crop": False}, "whole square"),
        ({"size": {"height": 16, "width": 20}}, "whole square"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1}, "rescale_factor is 1"),
        ({"resample": 9}, "resample is 9"),
    ],
)
def test_an_image_processor_is_a_preprocess_config(changes, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            to_preprocess_config(PROCESSOR | changes)
    else:
        config = to_preprocess_config(PROCESSOR | changes)
        assert config == PREPROCESS | {"size": 16, "resize_mode": "shortest"} | expected


# --- What cannot be read: told at the start, in two lines, with a remedy that works -----------------------------


def told(config: ClipConfig) -> str:
    """Return the message of both the check at the start and the load."""
    with pytest.raises(UserError) as error:
        load_clip(config)
    message = str(error.value)
    with pytest.raises(UserError, match=re.escape(message)):
        clip_identity(config)
    readable = message.replace(str(Path.cwd()), "")
    assert len(readable) <= 240 and "\n" not in readable, readable
    return message


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 605143316\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>ViT-B-16.pt</title>"


def truncated(name: str, write) -> None:
    write(name)
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: len(data) // 2])


UNREADABLE = {
    "a pointer": (
        lambda name, state: Path(name).write_text(POINTER),
        r"is a pointer of Git LFS \(72 bytes\), not the file of 605,143,316 bytes: run `git lfs pull`",
    ),
    "a page": (lambda name, state: Path(name).write_text(PAGE), "is a web page: download the file itself .*/resolve/"),
    "an error of a bucket": (lambda name, state: Path(name).write_text("<?xml ?><Error>"), "is a web page: download"),
    "nothing": (lambda name, state: Path(name).write_bytes(b""), "is empty: download it again"),
    "half a safetensors file": (
        lambda name, state: truncated(name, lambda name: save_file(state, name)),
        "is truncated .*: download it again",
    ),
    "the beginning of a safetensors file": (
        lambda name, state: Path(name).write_bytes((1000).to_bytes(8, "little") + b'{"x":'),
        r"is truncated \(its header has 1,000 bytes, the file 13\): download it again",
    ),
    "half a file of torch.save": (
        lambda name, state: truncated(name, lambda name: torch.save(state, name)),
        r"is truncated \(after [\d,]+ bytes\): download it again",
    ),
    "half an old file of torch.save": (
        lambda name, state: truncated(name, lambda name: torch.save(state, name, _use_new_zipfile_serialization=False)),
        "is truncated .*: download it again",
    ),
    "half an archive of OpenAI": (
        lambda name, state: truncated(name, lambda name: openai_archive(Path(name), state)),
        r"is truncated \(after [\d,]+ bytes\): download it again",
    ),
    "gzip": (lambda name, state: Path(name).write_bytes(gzip.compress(b"weights")), "compressed with gzip: unpack it"),
    "a zip of a file": (
        lambda name, state: zipfile.ZipFile(name, "w").writestr("clip/model.safetensors", b""),
        r"is an archive of other files \(clip/model.safetensors, ...\): unpack it",
    ),
    "npz": (
        lambda name, state: np.savez(open(name, "wb"), weight=np.ones(3)),
        "has arrays of NumPy: convert the weights to safetensors",
    ),
    "TensorFlow": (
        lambda name, state: Path(name).write_bytes(b"\x89HDF\r\n"),
        "HDF5 .*: download the weights of PyTorch",
    ),
    "a config": (
        lambda name, state: Path(name).write_text('{"model_type": "clip"}'),
        "JSON, but not the index .*: give",
    ),
    "a whole model": (
        lambda name, state: torch.save(torch.nn.Linear(2, 2), name),
        "not a plain file of tensors .*Linear.*: save the weights as safetensors",
    ),
    "two state dicts": (
        lambda name, state: torch.save({"model": state, "state_dict": state}, name),
        r"several state dicts \(state_dict, model\): save one of them as safetensors",
    ),
    "an optimizer": (
        lambda name, state: torch.save({"state_dict": {"lr": 0.1}}, name),
        r"'lr', which is float, not a tensor of numbers: save the model's state_dict\(\) as safetensors",
    ),
}


@pytest.mark.parametrize("form", UNREADABLE)
def test_what_cannot_be_read_is_named_with_a_remedy(folder, state, expected, form):
    write, message = UNREADABLE[form]
    write("ViT-B-16.bin", state)
    config = ClipConfig(model=MODEL, pretrained="ViT-B-16.bin")
    assert re.search(f"^clip.pretrained=ViT-B-16.bin .*{message}", told(config))
    # All remedies end in a whole file, or one of safetensors, in its place.
    save_file(state, "ViT-B-16.bin")
    assert weights_fingerprint(load_clip(config)) == expected[1]


def test_a_part_that_cannot_be_read_is_named(folder, state):
    config = ClipConfig(model=MODEL, pretrained=sharded_file(state))
    part = folder / "model-00002-of-00002.safetensors"
    data = part.read_bytes()
    part.write_text(POINTER)
    assert "model.safetensors.index.json: model-00002-of-00002.safetensors is a pointer of Git LFS" in told(config)
    part.unlink()
    assert "names 2 files, of which 1 are missing (model-00002-of-00002.safetensors): download them" in told(config)
    part.write_bytes(data)
    load_clip(config)
    load_clip.cache_clear()
    index = json.loads(Path("model.safetensors.index.json").read_text())
    index["weight_map"]["logit_scale"] = "../outside.safetensors"
    Path("model.safetensors.index.json").write_text(json.dumps(index))
    assert "names '../outside.safetensors', which is not in its folder" in told(config)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones([], dtype=torch.complex64),
        torch.ones(1).to_sparse(),
        torch.quantize_per_tensor(torch.ones(1), 1, 0, torch.qint8),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(folder, state, value):
    torch.save(state | {"logit_scale": value}, "a.pt")
    message = told(ClipConfig(model=MODEL, pretrained="a.pt"))
    assert "'logit_scale', which is Tensor, not a tensor of numbers" in message or "not a plain file" in message


def test_the_identity_of_weights_depends_on_names_and_shapes(state):
    swapped = state | {"ln_final.weight": state["ln_final.bias"], "ln_final.bias": state["ln_final.weight"]}
    reshaped = state | {"visual.proj": state["visual.proj"].reshape(24, 32)}
    hashes = {content_hash(weights) for weights in (state, swapped, reshaped, state | {"logit_scale": torch.ones([])})}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("ln_final.bias"), r"1 of its 62 tensors are missing \(ln_final.bias\)"),
        (
            lambda state: state.update({"text.ln_final.bias": torch.ones(16)}),
            r"1 tensors are not its \(text.ln_final.bias\)",
        ),
        (lambda state: state.update(head=torch.ones(1)), r"1 tensors are not its \(head\)"),
        (
            lambda state: state.update({"visual.proj": torch.ones(3, 3), "ln_final.bias": torch.ones(3)}),
            r"visual.proj is \(3, 3\) there, \(32, 24\) in the model \(and 1 other tensors\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if not name.startswith("visual.")],
            r"30 of its 62 tensors are missing \(ln_final.bias, ln_final.weight, logit_scale, ...\)",
        ),
    ],
)
def test_weights_of_another_model_are_named_by_their_first_misfit(folder, state, change, message):
    changed = dict(state)
    change(changed)
    save_file(changed, "a.safetensors")
    config = ClipConfig(model=MODEL, pretrained="a.safetensors")
    assert re.search(f"does not fit clip.model=model.json: {message}; give the weights of a whole CLIP", told(config))


def test_the_model_that_weights_fit_is_named(folder):
    """The remedy is followed: of each of the models that the message names the weights are taken."""
    with torch.device("meta"):
        shapes = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32-alt")).state_dict()
    torch.save({name: torch.zeros([]).expand(value.shape) for name, value in shapes.items()}, "a.pt")  # a small file
    message = told(ClipConfig(model="ViT-B-16", pretrained="a.pt"))
    assert "positional_embedding is (77, 256) there, (77, 512) in the model" in message
    names = re.search(r"use clip.model=(.*)$", message)[1].split(" or ")
    assert names == ["ViT-S-32-alt"]
    assert clip_identity(ClipConfig(model=names[0], pretrained="a.pt")).weights.startswith("sha256:")


def test_the_image_size_of_weights_is_named(folder, state):
    larger = state | {"visual.positional_embedding": torch.ones(10, 32)}  # 3 x 3 patches of 8 pixels
    save_file(larger, "a.safetensors")
    message = told(ClipConfig(model=MODEL, pretrained="a.safetensors"))
    assert "visual.positional_embedding is (10, 32) there, (5, 32) in the model" in message
    assert "; set image_size to 24 in the model config" in message
    (folder / MODEL).write_text(json.dumps(QUICK | {"vision_cfg": QUICK["vision_cfg"] | {"image_size": 24}}))
    assert load_clip(ClipConfig(model=MODEL, pretrained="a.safetensors")).preprocessing.image_size == 24
    towers = load_clip(ClipConfig(model=MODEL, pretrained="a.safetensors", image_size=16))
    assert towers.encode_image(torch.ones(1, 3, 16, 16)).shape == (1, 24)


@pytest.mark.parametrize("name, number", [("input_resolution", 24), ("context_length", 50), ("vocab_size", 1)])
def test_openais_numbers_must_be_those_of_the_model(folder, state, name, number):
    torch.save(openai_state(state) | {name: torch.tensor(number)}, "a.pt")
    message = told(ClipConfig(model=MODEL, pretrained="a.pt"))
    assert f"does not fit clip.model=model.json: {name} is {number} there, {NUMBERS[name]} in the model" in message


def test_memory_is_not_taken_by_tensors_that_are_small_in_the_file(folder, state):
    """The projections of a CLIPModel, which are joined, as one number that is repeated."""
    huge = hugging_face_state(state)
    for part in "qkv":
        name = f"text_model.encoder.layers.0.self_attn.{part}_proj.weight"
        huge[name] = torch.zeros(1).expand(1 << 20, 1 << 20)  # 4 TiB
    torch.save(huge, "a.pt")
    assert "attn.in_proj_weight is (3145728, 1048576) there" in told(ClipConfig(model=MODEL, pretrained="a.pt"))


# --- What cannot be found -------------------------------------------------------------------------------------------


def test_tags_belong_to_open_clips_names(folder, state):
    model = str(open_clip_folder(folder / "snapshot", state))
    # As options on the command line change one field of a config file.
    for other_weights in ("openai", BUILTIN_DIGITS):
        assert f"to {model} for its own weights" in told(ClipConfig(model=model, pretrained=other_weights))
    assert load_clip(ClipConfig(model=model, pretrained=model)).preprocessing.image_size == 16
    save_file({"visual.proj": torch.ones(3, 3)}, folder / "snapshot" / "open_clip_model.safetensors")
    load_clip.cache_clear()
    assert "give the weights of a whole CLIP" in told(ClipConfig(model=model))
    assert "has no tags of open_clip: give a file or a folder" in told(ClipConfig(model=MODEL))
    message = told(ClipConfig(model="ViT-B/16", pretrained="laion2b_s34b_b88k"))
    assert message.endswith("It is a tag of clip.model=ViT-B-16")
    assert clip_identity(ClipConfig(model="ViT-B-16", pretrained="laion2b_s34b_b88k")).weights.startswith("tag:")


def test_folders_without_a_model_are_named(folder, state):
    (folder / "empty").mkdir()
    assert "./empty has no open_clip_config.json or config.json: give the folder" in told(ClipConfig(model="./empty"))
    assert told(ClipConfig(model="./absent")).endswith("./absent: no such folder")
    for option in ({"model": "org/clip"}, {"model": MODEL, "pretrained": "org/clip"}):
        assert told(ClipConfig(**option)).endswith("; a repository of the Hugging Face Hub is hf-hub:org/clip")
    assert "./empty has no weights (model.safetensors" in told(ClipConfig(model=MODEL, pretrained="./empty"))
    snapshot = open_clip_folder(folder / "snapshot", state)
    (snapshot / "open_clip_model.safetensors").rename(snapshot / "a.safetensors")
    shutil.copy(snapshot / "a.safetensors", snapshot / "b.safetensors")
    message = told(ClipConfig(model="./snapshot"))
    assert "several weights (a.safetensors, b.safetensors, ...): set clip.pretrained to one of them" in message
    load_clip(ClipConfig(model="./snapshot", pretrained="./snapshot/a.safetensors"))


def test_a_repository_that_is_not_in_the_cache(folder, state, expected):
    config = ClipConfig(model="hf-hub:org/clip")
    message = told(config)
    assert "in the cache, and the Hugging Face Hub cannot be reached" in message
    assert "run `hf download org/clip` where it can" in message
    # The remedy: the command leaves this cache, and prints the folder.
    hub_cache(folder / "hub", "org/clip", lambda snapshot: open_clip_folder(snapshot, state))
    snapshot = folder / "hub" / "models--org--clip" / "snapshots" / COMMIT
    assert weights_fingerprint(load_clip(ClipConfig(model=str(snapshot)))) == expected[1]
    assert weights_fingerprint(load_clip(config)) == expected[1]
    message = told(ClipConfig(model=str(snapshot.parents[1])))
    assert message.endswith(f"use its {snapshot}")


def test_an_image_processor_that_cannot_be_used(folder, state):
    model = str(hugging_face_folder(folder / "model", state))
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"do_rescale": False}))
    message = told(ClipConfig(model=model))
    assert (
        "preprocessor_config.json cannot be used (do_rescale is false): remove it from the folder, and set" in message
    )
    (folder / "model" / "preprocessor_config.json").unlink()
    options = {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    assert load_clip(ClipConfig(model=model, **options)).preprocessing.resize_mode == "squash"


def test_names_that_are_no_repositories(folder):
    for name in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:org/a b"):
        assert f"clip.model={name} is not the name of a repository: expected hf-hub:ORG/NAME" in told(
            ClipConfig(model=name)
        )


@pytest.mark.parametrize(
    "error, message",
    [
        (
            "RepositoryNotFoundError",
            "is not on the Hugging Face Hub, or is private or gated: correct the name, or log in",
        ),
        ("RevisionNotFoundError", "cannot be downloaded .*: try again"),
        ("RemoteEntryNotFoundError", "has no open_clip_config.json or config.json: use the repository of a CLIP"),
    ],
)
def test_answers_of_the_hub(folder, monkeypatch, error, message):
    def answer(*arguments, **options):
        response = SimpleNamespace(headers={}, request=None)
        raise getattr(huggingface_hub.errors, error)("no", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    assert re.search(message, told(ClipConfig(model="hf-hub:org/clip")))


# --- The start of a run ---------------------------------------------------------------------------------------------

TAG = ClipConfig(model="ViT-B-16-quickgelu")


@pytest.fixture
def small_tag(monkeypatch):
    """The tag openai of ViT-B-16-quickgelu, of a small model."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: QUICK)
    tags = {"openai": {"hf_hub": "org/openai/", "quick_gelu": True}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))


def cached_tag(cache: Path, state, name="open_clip_model.safetensors") -> None:
    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        save_file(state, folder / name)
        return folder

    hub_cache(cache, "org/openai", write)


def test_weights_of_a_tag_come_from_the_cache_without_the_hub(folder, state, expected, small_tag, monkeypatch):
    cached_tag(folder / "hub", state)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    announced = []
    fetch_weights(TAG, announced.append)
    assert announced == [] and clip_identity(TAG).weights == "tag:ViT-B-16-quickgelu/openai"
    assert weights_fingerprint(load_clip(TAG)) == expected[1]


def test_weights_of_a_tag_are_announced_with_their_size(folder, state, small_tag, monkeypatch):
    metadata = SimpleNamespace(size=599_000_000, commit_hash=COMMIT)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: metadata)

    def download(repository, name, **options):
        cached_tag(folder / "hub", state)
        return huggingface_hub.try_to_load_from_cache(repository, name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    announced = []
    fetch_weights(TAG, announced.append)
    (line,) = announced
    assert "open_clip_model.safetensors of org/openai (599 MB)" in line and str(folder / "hub") in line


def test_weights_that_cannot_be_downloaded_are_told_at_once(folder, small_tag, monkeypatch):
    def fail(url, timeout):
        raise ConnectionError("403 Forbidden by the proxy\nat all")

    for reason in ("HF_HUB_OFFLINE is set", "403 Forbidden by the proxy"):
        with pytest.raises(UserError) as raised:
            fetch_weights(TAG, print)
        message = str(raised.value)
        assert message.startswith("clip.pretrained=openai cannot be downloaded (") and reason in message
        assert "hf download org/openai" in message and message.endswith("--clip.pretrained FILE")
        assert "\n" not in message and len(message) < 400
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)


def test_weights_of_a_tag_that_do_not_fit_are_refused_at_the_start(folder, small_tag):
    cached_tag(folder / "hub", {f"layer{number}.weight": torch.ones(1) for number in range(9)})
    with pytest.raises(UserError) as raised:
        fetch_weights(TAG, print)
    message = str(raised.value)
    assert "openai does not fit clip.model=ViT-B-16-quickgelu: 62 of its 62 tensors are missing" in message
    assert "the file has 9 others (layer0.weight, layer1.weight, layer2.weight, ...)" in message and len(message) < 500


def test_the_remedy_for_a_pickled_model_of_openai(folder, state, expected):
    """The remedy of the message is accepted."""
    model = OpenaiClip().eval()
    model.load_state_dict(openai_state(state))
    torch.save(model, "model.pt")
    assert "save the weights as safetensors" in told(ClipConfig(model=MODEL, pretrained="model.pt"))
    save_file(torch.load("model.pt", weights_only=False).state_dict(), "model.safetensors")
    config = ClipConfig(model=MODEL, pretrained="model.safetensors")
    assert json.loads(clip_identity(config).model_config)["quick_gelu"]


def test_an_activation_that_is_not_recorded_is_told(folder, state, monkeypatch, caplog):
    """OpenAI's weights without their three numbers cannot be known."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CONFIG)
    safely_saved("a.safetensors", state)
    for quick_gelu, num_warnings in ((None, 1), (True, 0), (False, 0)):
        caplog.clear()
        clip_identity(ClipConfig(model="ViT-B-16", pretrained="a.safetensors", quick_gelu=quick_gelu))
        assert caplog.text.count("no record of its activation: taking GELU") == num_warnings
