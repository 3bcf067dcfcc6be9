"""Loading CLIP: built-in model, config files, weights files without pickle, QuickGELU; adapter files."""

from __future__ import annotations

import json
import logging
import os
import pickle
import threading
import warnings

import pytest
import torch
from safetensors.torch import save_file
from small_clip import open_clip

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import build_meta_towers, clip_identity, load_clip, weights_fingerprint
from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, MmapConfig
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, merge_adapters, save_adapter
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import GroupMmap, MmapShape

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "tiny.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def test_random_weights_are_always_the_same(model_file):
    config = ClipConfig(model=model_file, pretrained=None)
    rng_state = torch.random.get_rng_state()
    fingerprint = weights_fingerprint(load_clip(config))
    assert weights_fingerprint(load_clip(config.model_copy(update={"precision": "bfloat16"}))) == fingerprint
    load_clip.cache_clear()
    torch.manual_seed(123)
    assert weights_fingerprint(load_clip(config)) == fingerprint
    torch.random.set_rng_state(rng_state)
    assert clip_identity(config).weights == "random:0"
    assert (build_meta_towers(config).text_width, build_meta_towers(config).vision_width) == (16, 32)


def test_concurrent_loads_suppress_only_open_clips_warnings(model_file, monkeypatch, caplog):
    """The first load ends while the second is at work, as those of a benchmark's runs do."""
    barrier, earlier_ended = threading.Barrier(2), threading.Event()

    class SlowClip(open_clip.CLIP):
        def __init__(self, **config):
            barrier.wait()
            if threading.current_thread().name != "earlier":
                earlier_ended.wait()
            logging.warning("open_clip tells of a load")
            super().__init__(**config)

    monkeypatch.setattr(open_clip, "CLIP", SlowClip)
    config = ClipConfig(model=model_file, pretrained=None)
    earlier, later = (threading.Thread(target=build_meta_towers, args=[config], name=n) for n in ("earlier", "later"))
    earlier.start(), later.start()
    earlier.join()
    logging.warning("a warning of ours")
    earlier_ended.set()
    later.join()
    logging.warning("a later one")
    assert [record.message for record in caplog.records] == ["a warning of ours", "a later one"]


def test_two_model_files_of_one_name_are_two_models(tmp_path):
    configs = {}
    for length, width in ((77, 16), (50, 32)):
        file = tmp_path / str(length) / "same.json"
        file.parent.mkdir()
        file.write_text(
            json.dumps({**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": length, "width": width}})
        )
        configs[length, width] = ClipConfig(model=str(file), pretrained=None)
    for (length, width), config in [*configs.items(), *configs.items()]:
        towers = build_meta_towers(config)
        assert (towers.tokenizer.context_length, towers.text_width) == (length, width)
        assert json.loads(clip_identity(config).model_config)["text_cfg"]["width"] == width


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_files(model_file, tmp_path, suffix):
    towers = load_clip(ClipConfig(model=model_file, pretrained=None))
    state = {name: torch.full_like(value, 0.01) for name, value in open_clip.CLIP(**TINY).state_dict().items()}
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = load_clip(ClipConfig(model=model_file, pretrained=str(file)))
    assert all(torch.all(p == 0.01) for p in loaded.parameters())
    assert weights_fingerprint(loaded) != weights_fingerprint(towers)
    identity = clip_identity(ClipConfig(model=model_file, pretrained=str(file)))
    assert identity.weights.startswith("sha256:")


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL_FOLDER"],))


def test_a_pickle_with_code_is_refused(model_file, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "made by the pickle"))
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": Evil()}, file)
    with pytest.raises(UserError, match="weights.pt.*not a plain file of tensors"):
        load_clip(ClipConfig(model=model_file, pretrained=str(file)))
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="weights.pt"):
        load_clip(ClipConfig(model=model_file, pretrained=str(file)))
    assert not (tmp_path / "made by the pickle").exists()


def test_weights_of_another_model_are_reported(model_file, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"visual.proj": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match="does not fit clip.model="):
        load_clip(ClipConfig(model=model_file, pretrained=str(file)))
    with pytest.raises(UserError, match="no such file"):
        clip_identity(ClipConfig(model=model_file, pretrained=str(tmp_path / "absent.safetensors")))


def test_quick_gelu_follows_the_weights():
    def quick(**options) -> bool:
        return json.loads(clip_identity(ClipConfig(**options)).model_config)["quick_gelu"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quick(model="ViT-B-16", pretrained="openai")  # the plain config, weights that need QuickGELU
        assert quick(model="ViT-B-16-quickgelu", pretrained="openai")
        assert not quick(model="ViT-B-16", pretrained="laion2b_s34b_b88k")
        assert quick(model="ViT-B-16", pretrained=None, quick_gelu=True)
    with pytest.raises(UserError, match="do not: use clip.model=ViT-B-32$"):
        quick(model="ViT-B-32-quickgelu", pretrained="openai", quick_gelu=False)


def test_quick_gelu_is_used(model_file):
    plain = load_clip(ClipConfig(model=model_file, pretrained=None))
    quick = load_clip(ClipConfig(model=model_file, pretrained=None, quick_gelu=True))
    assert type(plain.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assert type(quick.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-H-14", "ViT-L-14-336"])
def test_open_clips_vit_models_are_supported(name):
    towers = build_meta_towers(ClipConfig(model=name, pretrained=None))
    assert MmapShape.of(MmapConfig(), towers).depth == min(towers.text_depth, towers.vision_depth)


def test_a_text_tower_of_no_family_is_refused(tmp_path):
    with pytest.raises(UserError, match="this CoCa cannot be used: CoCa's towers also return the tokens"):
        build_meta_towers(ClipConfig(model="coca_ViT-B-32", pretrained=None))
    file = tmp_path / "own token.json"
    file.write_text(json.dumps({**TINY, "custom_text": True, "text_cfg": {**TINY["text_cfg"], "embed_cls": True}}))
    with pytest.raises(UserError, match="cannot be used: the text feature is not one of the text's tokens"):
        build_meta_towers(ClipConfig(model=str(file), pretrained=None))


# Prompts files


@pytest.fixture
def trained():
    config = Config(
        clip=ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS),
        mmap=MmapConfig(prompt_length=4, source_rows=4),
    )
    towers = load_clip(config.clip)
    parts = []
    for seed, group in enumerate(
        [{"ink": ["one", "two"], "neon": ["one", "two", "three"]}, {"chalk": ["six", "nine"]}]
    ):
        prompts = GroupMmap(MmapShape.of(config.mmap, towers), tuple(group), seed)
        parts.append(TrainedAdapter("mmap", config, weights_fingerprint(towers), (group,), (prompts.state_dict(),)))
    return towers, parts


def test_adapters_round_trip_with_identical_probabilities(trained, tmp_path):
    towers, parts = trained
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, merge_adapters(parts))
    loaded = load_adapter(file)
    assert loaded.class_names == {"ink": ["one", "two"], "neon": ["one", "two", "three"], "chalk": ["six", "nine"]}
    assert loaded.num_parameters == 5 * 4 * (4 * 64 + 3)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    classifier = loaded.classifier()
    for part in parts:
        (group,), (state,) = part.groups, part.states
        prompts = GroupMmap(MmapShape.of(part.config.mmap, towers), tuple(group), seed=9)
        prompts.load_state_dict(state)
        with torch.no_grad():
            tokens = class_tokens(towers.tokenizer, part.config.clip.template, list(group.values()))
            original = Classifier(towers, [(group, tokens, prompts())])
        for task in group:
            torch.testing.assert_close(classifier.probabilities(task, pixels), original.probabilities(task, pixels))


def test_adapters_reject_another_clip(trained, tmp_path):
    _, (part, _) = trained
    foreign_adapter = TrainedAdapter("mmap", part.config, "0" * 64, part.groups, part.states)
    with pytest.raises(UserError, match="not those that this adapter was trained on"):
        foreign_adapter.classifier()


def test_files_that_are_not_adapters_are_rejected(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_adapter(tmp_path / "absent.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(UserError, match="not an adapter file of this project"):
        load_adapter(foreign)
    foreign.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not an adapter file of this project"):
        load_adapter(foreign)
