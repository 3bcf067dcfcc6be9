"""Small models with random weights, one for each family of text towers that open_clip has."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from small_clip import PREPROCESSING
from small_clip import tokenizer as clip_tokenizer
from small_tokenizers import write_tokenizer

from pipeline.clip.torchvision_compat import ensure_torchvision

ensure_torchvision()

from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP  # noqa: E402
from open_clip.tokenizer import HFTokenizer  # noqa: E402
from transformers import BertConfig, RobertaConfig, XLMRobertaConfig  # noqa: E402

from pipeline.clip.towers import ClipTowers  # noqa: E402

CANONICALIZE = {"clean": "canonicalize"}


@dataclass(frozen=True)
class Family:
    tokenizer: str | None
    """One of small_tokenizers; None: CLIP's."""
    context_length: int
    text_config: dict[str, Any]
    """open_clip's text_cfg, without sizes."""
    tokenizer_options: dict[str, Any]
    hf_config: type | None = None
    """Config of transformers' text tower."""
    num_begin: int = 1
    custom_text: bool = True


SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
FAMILIES = {
    "SigLIP": Family("t5", 64, SIGLIP, CANONICALIZE, num_begin=0),
    "SigLIP2": Family("gemma", 64, SIGLIP | {"act_kwargs": {"approximate": "tanh"}}, CANONICALIZE, num_begin=0),
    "CLIPA": Family("bert", 32, {"no_causal_mask": True, "pool_type": "last"}, {"strip_sep_token": True}),
    "MobileCLIP": Family(None, 77, {"no_causal_mask": True}, {}),
    "MetaCLIP2": Family("xlm_roberta", 77, {"pool_type": "eos", "eos_id": 2}, {}, custom_text=False),
    "BiomedCLIP": Family("bert", 80, {"hf_pooler_type": "cls_last_hidden_state_pooler"}, {}, BertConfig),
    "BERT's pooler": Family("bert", 80, {"hf_pooler_type": "cls_pooler"}, {}, BertConfig),
    "XLM-RoBERTa": Family("xlm_roberta", 77, {"hf_pooler_type": "mean_pooler"}, {}, XLMRobertaConfig),
    "RoBERTa": Family("roberta", 77, {"hf_pooler_type": "mean_pooler"}, {}, RobertaConfig),
}


@lru_cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@lru_cache
def _open_clip_tokenizer(family: str) -> Any:
    values = FAMILIES[family]
    if values.tokenizer is None:
        return clip_tokenizer()
    folder = Path(_folder().name) / values.tokenizer
    write_tokenizer(values.tokenizer, folder)
    return HFTokenizer(str(folder), context_length=values.context_length, **values.tokenizer_options)


@lru_cache
def _random_model(family: str, layers: int) -> torch.nn.Module:
    values, tokenizer = FAMILIES[family], _open_clip_tokenizer(family)
    vocab_size = 49408 if values.tokenizer is None else len(tokenizer.tokenizer)
    text_config = {"context_length": values.context_length, **values.text_config}
    if values.hf_config:
        config = values.hf_config(
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=96,
            pad_token_id=tokenizer.tokenizer.pad_token_id,
        )
        folder = Path(_folder().name) / family
        config.save_pretrained(folder)
        text_config |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    else:
        text_config |= {"vocab_size": vocab_size, "width": 16, "heads": 2, "layers": layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (CustomTextCLIP if values.custom_text else CLIP)(
            embed_dim=12,
            vision_cfg=CLIPVisionCfg(layers=2, width=24, head_width=8, patch_size=8, image_size=16),
            text_cfg=CLIPTextCfg(**text_config),
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def small_text_towers(
    family: str, text_prompt_position: str = "after_sos", layers: int = 3
) -> tuple[ClipTowers, torch.nn.Module, Any]:
    """Return towers, open_clip's model that they are of, and its tokenizer."""
    model, tokenizer = copy.deepcopy(_random_model(family, layers)), _open_clip_tokenizer(family)
    return ClipTowers(model, tokenizer, PREPROCESSING, text_prompt_position), model, tokenizer
