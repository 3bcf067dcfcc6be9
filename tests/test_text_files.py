"""Tokenizers and text towers of Hugging Face: where their files come from, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from small_text_towers import SIGLIP
from small_tokenizers import write_tokenizer
from transformers import BertConfig, MT5Config, RobertaConfig
from weight_files import hub_cache, open_clip, open_clip_folder

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import build_meta_towers, clip_identity, load_clip, load_tokenizer
from pipeline.config import ClipConfig
from pipeline.errors import UserError
from pipeline.prediction.mlflow_model import requirements

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = BertConfig(vocab_size=220, max_position_embeddings=96, pad_token_id=0, **SIZES)
VISION = {"image_size": 16, "patch_size": 8, "width": 24, "head_width": 8, "layers": 2}
BIOMED = {
    "embed_dim": 12,
    "vision_cfg": VISION,
    "text_cfg": {
        "hf_model_name": "org/bert",
        "hf_tokenizer_name": "org/bert",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 80,
    },
}
NAMES = ["cat", "tricycle", "great wall of china"]
TEMPLATE = "a photo of a {}."


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory; the cache of the Hub is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load_clip.cache_clear()
    return tmp_path


def write_text_files(folder: Path, tokenizer: str = "bert", config: Any = BERT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    config.save_pretrained(folder)
    return folder


def biomedclip(folder: Path) -> torch.nn.Module:
    """Write a snapshot like BiomedCLIP's, of which the text tower's config has been downloaded too; return the model
    that open_clip makes of it."""
    write_text_files(folder / "files")
    config = copy.deepcopy(BIOMED)
    config["text_cfg"] |= {"hf_model_name": str(folder / "files"), "hf_model_pretrained": False}
    torch.manual_seed(3)
    model = open_clip.CustomTextCLIP(**config).eval()
    constants = {"text.transformer.embeddings.position_ids": torch.arange(96)[None]}  # of older versions
    open_clip_folder(folder / "biomed", model.state_dict() | constants, BIOMED)
    for file in (folder / "files").iterdir():
        shutil.copy(file, folder / "biomed")
    return model


def test_a_folder_has_all_that_biomedclip_needs(folder):
    model = biomedclip(folder)
    config = ClipConfig(model="./biomed", pretrained="./biomed", precision="float32")
    assert build_meta_towers(config).text_depth == 2
    towers = load_clip(config)
    texts = open_clip.get_tokenizer("local-dir:biomed")([TEMPLATE.format(name) for name in NAMES])
    features = towers.encode_text(class_tokens(towers.tokenizer, TEMPLATE, [NAMES]))
    torch.testing.assert_close(features, model.encode_text(texts), rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(towers.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-5)


def test_files_are_part_of_the_identity(folder):
    config = BIOMED | {"text_cfg": BIOMED["text_cfg"] | {"hf_tokenizer_name": "org/words"}}
    Path("model.json").write_text(json.dumps(config))
    hub_cache(folder / "hub", "org/bert", write_text_files)
    hub_cache(folder / "hub", "org/words", write_text_files)
    identities = [clip_identity(ClipConfig(model="model.json", pretrained=None))]
    uncased, cased = '"lowercase": true', '"lowercase": false'
    changes = ("words", "tokenizer.json", uncased, cased), ("bert", "config.json", "gelu", "relu")
    for repository, name, old, new in changes:
        (file,) = Path("hub").glob(f"models--org--{repository}/snapshots/*/{name}")
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        identities.append(clip_identity(ClipConfig(model="model.json", pretrained=None)))
    assert len(set(identities)) == 3
    shutil.move("model.json", "other.json")
    assert clip_identity(ClipConfig(model="other.json", pretrained=None)) == identities[-1]


@pytest.mark.parametrize(
    "model, tokenizer, repository, context_length",
    [
        ("ViT-B-16-SigLIP", "t5", "timm/ViT-B-16-SigLIP", 64),
        ("ViT-B-16-SigLIP2", "gemma", "timm/ViT-B-16-SigLIP2", 64),
        ("ViT-L-14-CLIPA", "bert", "bert-base-uncased", 32),
        ("ViT-H-14-worldwide-quickgelu", "xlm_roberta", "facebook/xlm-v-base", 77),
        ("roberta-ViT-B-32", "roberta", "roberta-base", 77),
    ],
)
def test_open_clips_models_take_text_prompts_with_files_in_the_cache(
    folder, model, tokenizer, repository, context_length
):
    def write(snapshot: Path) -> Path:
        vocab_size = write_tokenizer(tokenizer, snapshot)
        RobertaConfig(vocab_size=vocab_size, pad_token_id=1, **SIZES).save_pretrained(snapshot)
        return snapshot

    hub_cache(folder / "hub", repository, write)
    towers = build_meta_towers(ClipConfig(model=model, pretrained=None))
    assert towers.tokenizer.context_length == context_length and towers.text_depth > 1


def refused(model: str) -> str:
    """Return the message of a model that is refused at the plan."""
    with pytest.raises(UserError) as error:
        build_meta_towers(ClipConfig(model=model, pretrained=None))
    assert str(error.value).startswith(f"clip.model={model}: ")
    return str(error.value)


def test_what_is_missing_without_a_network_is_named_and_the_remedy_works(folder):
    Path("model.json").write_text(json.dumps(BIOMED))
    message = refused("model.json")
    assert "its text tower org/bert is not in the cache" in message and "run `hf download org/bert`" in message
    assert f"copy its folder in the cache there to {folder}/hub here" in message
    hub_cache(folder / "elsewhere", "org/bert", write_text_files)
    shutil.copytree("elsewhere", "hub", symlinks=True)
    build_meta_towers(ClipConfig(model="model.json", pretrained=None))


def test_what_a_folder_lacks_is_named_and_the_remedy_works(folder):
    model = biomedclip(folder)
    shutil.rmtree("biomed")
    open_clip_folder(folder / "biomed", model.state_dict(), BIOMED)
    for part, remedy in (
        ("text tower", "config.json"),
        ("tokenizer", "tokenizer.json and tokenizer_config.json"),
    ):
        message = refused("./biomed")
        assert f"its {part} org/bert is not in the cache" in message and message.endswith(f"copy {remedy} to biomed")
        for file in remedy.split(" and "):
            shutil.copy(folder / "files" / file, "biomed")
    build_meta_towers(ClipConfig(model="./biomed", pretrained=None))


def test_a_text_tower_that_would_take_all_memory_is_refused(folder):
    biomedclip(folder)
    config = json.loads(Path("biomed", "config.json").read_text())
    Path("biomed", "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    assert refused("./biomed").endswith(
        "config.json of its text tower: num_hidden_layers=1000000000 exceeds 1,000: correct it"
    )


def test_without_transformers_the_remedy_is_named(folder, monkeypatch):
    Path("text.json").write_text(json.dumps(BIOMED))
    siglip = {
        "embed_dim": 12,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {"hf_tokenizer_name": "x", **SIGLIP},
    }
    Path("tokenizer.json").write_text(json.dumps(siglip))
    monkeypatch.setitem(sys.modules, "transformers", None)
    for model, part in (("text.json", "text tower"), ("tokenizer.json", "tokenizer")):
        first, second = refused(model).split("\n")
        assert first == f"clip.model={model}: its {part} is one of Hugging Face, and transformers is not installed:"
        assert second == "pip install 'mmap-clip[hugging-face]'"
    with pytest.raises(UserError, match="transformers is not installed"):
        load_tokenizer(ClipConfig(model="tokenizer.json"))


def test_a_registered_model_requires_transformers_if_its_clip_does(folder):
    def packages(model: str) -> set[str]:
        return {requirement.partition("==")[0] for requirement in requirements(ClipConfig(model=model))}

    assert "transformers" in packages("ViT-B-16-SigLIP2") - packages("ViT-B-16")
    assert packages("./on-another-machine") == packages("ViT-B-16-SigLIP2")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"hf_pooler_type": "max_pooler"}, "the text feature is that of a MaxPooler"),
        ({"context_length": 97}, "the context length is 97, and the text tower has 96 positions"),
        ({"tokenizer_mode": "clips"}, "its tokenizer_mode clips is not known"),
        ({"tokenizer_kwargs": {"padding_side": "left"}}, "its tokenizer pads on the left with token 0"),
        ({"tokenizer_kwargs": {"pad_token": "a"}}, "the tokenizer pads with token 20, the text tower masks 0"),
        ({"hf_model_name": None}, "the text feature is that of the highest token"),
        ({"hf_model_name": None, "pool_type": "eos"}, "that of token 2, and its tokenizer ends texts with (3,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_text_towers_that_would_differ_from_open_clip_are_refused(folder, changes, reason):
    hub_cache(folder / "hub", "org/bert", write_text_files)
    config = copy.deepcopy(BIOMED)
    config["text_cfg"] |= {"width": 16, "heads": 2, "layers": 2, "custom_text": True} | changes
    config["custom_text"] = config["text_cfg"].pop("custom_text")
    if config["text_cfg"]["hf_model_name"] is None:
        config["text_cfg"] = {key: value for key, value in config["text_cfg"].items() if not key.startswith("hf_m")}
    Path("model.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(reason)):
        build_meta_towers(ClipConfig(model="model.json", pretrained=None))


def test_other_text_towers_of_transformers_are_refused_by_name(folder):
    mt5 = MT5Config(vocab_size=220, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    hub_cache(folder / "hub", "org/bert", lambda snapshot: write_text_files(snapshot, config=mt5))
    Path("model.json").write_text(json.dumps(BIOMED))
    with pytest.raises(UserError, match="the text tower is transformers' MT5Stack, not an encoder like BertModel"):
        build_meta_towers(ClipConfig(model="model.json", pretrained=None))
