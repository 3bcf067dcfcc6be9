"""Loads a frozen CLIP by open_clip: a model name or model-config file, and weights by tag or file, without pickle."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pipeline.clip.class_tokens import Tokenizer
from pipeline.clip.precision import uses_bfloat16
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, ClipConfig
from pipeline.errors import UserError

RANDOM_WEIGHTS_SEED = 0
_DEMO = Path(__file__).resolve().parent.parent / "demo"
_BUILTIN_MODEL = _DEMO / "digits_clip.json"
_BUILTIN_WEIGHTS = _DEMO / "digits_clip.safetensors"


@dataclass(frozen=True)
class ClipIdentity:
    """What decides the numbers of a loaded CLIP; part of every artefact's name that was made with it."""

    model: str
    model_config: str
    """JSON of open_clip's model config, with the activation that is used."""
    weights: str
    """`tag:<tag>`, `sha256:<hash of the file>`, or `random:<seed>`."""


def clip_identity(config: ClipConfig) -> ClipIdentity:
    """Resolves and checks a ClipConfig without loading weights.

    Raises:
        UserError: unknown model or tag, missing file, activation that contradicts the weights.
    """
    model_config, quick_gelu = _resolve(config)
    if config.pretrained is None:
        weights = f"random:{RANDOM_WEIGHTS_SEED}"
    elif (file := weights_file(config)) is not None:
        with open(file, "rb") as stream:
            weights = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        weights = f"tag:{config.pretrained}"
    text = json.dumps({**model_config, "quick_gelu": quick_gelu}, sort_keys=True)
    return ClipIdentity(config.model, text, weights)


def towers_without_weights(config: ClipConfig) -> ClipTowers:
    """Towers of the right shapes and no numbers (torch's meta device): tells in no time whether a model can be used.

    Raises:
        UserError: the model has no towers that prompts can be put into.
    """
    name = _register(config.model)
    try:
        with torch.device("meta"), _errors_only():
            model = _open_clip().create_model(name, load_weights=False, pretrained_text=False, device="meta")
            tokenizer = load_tokenizer(config)
    except Exception as error:  # models of other libraries fail in their own ways
        raise UserError(f"clip.model={config.model} cannot be built: {error}") from None
    return ClipTowers(model, tokenizer)


@lru_cache(maxsize=1)  # a Ray worker that trains one group after another loads CLIP once
def load_clip(
    config: ClipConfig, text_order: str = "after_sos", device: str = "cpu", float32: bool = False
) -> ClipTowers:
    """The frozen towers on `device`; weights files are read without executing pickled code.

    Args:
        float32: for towers whose own weights are to be trained; else config.precision says how they are held.
    """
    name = _register(config.model)
    model_config, quick_gelu = _resolve(config)
    file = weights_file(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        try:
            with _errors_only():
                model = _open_clip().create_model(
                    name,
                    pretrained=str(file) if file else config.pretrained,
                    force_quick_gelu=quick_gelu and not model_config.get("quick_gelu", False),
                    pretrained_text=False,
                    weights_only=True,
                )
        except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(
                f"clip.pretrained={config.pretrained!r} cannot be loaded into {config.model}: {error}"
            ) from None
        except Exception as error:  # pickle.UnpicklingError: the file holds more than tensors
            raise UserError(
                f"clip.pretrained={config.pretrained!r} is refused: it is not a plain file of tensors ({error}). "
                "Save the weights as safetensors"
            ) from None
    towers = ClipTowers(model, load_tokenizer(config), text_order, config.activations_gib).to(device)
    if uses_bfloat16(towers.device, config.precision) and not float32:
        towers.fingerprint = weights_fingerprint(towers)
        towers.hold_matrices_in_bfloat16()
    return towers


def load_tokenizer(config: ClipConfig) -> Tokenizer:
    """The model's tokenizer, without its weights."""
    with _errors_only():
        return _open_clip().get_tokenizer(_register(config.model))


def weights_fingerprint(towers: ClipTowers) -> str:
    """SHA-256 over all frozen numbers: prompts fit only the CLIP that they were trained on."""
    if towers.fingerprint:
        return towers.fingerprint
    digest = hashlib.sha256()
    for name, value in sorted(towers.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_file(config: ClipConfig) -> Path | None:
    """The file that `clip.pretrained` names, or None for a tag or random weights."""
    if config.pretrained is None:
        return None
    if config.pretrained == BUILTIN_DIGITS:
        return _BUILTIN_WEIGHTS
    path = Path(config.pretrained).expanduser()
    looks_like_file = path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or len(path.parts) > 1
    if looks_like_file and not path.is_file():
        raise UserError(f"clip.pretrained={config.pretrained}: no such file")
    return path if looks_like_file else None


def _resolve(config: ClipConfig) -> tuple[dict[str, Any], bool]:
    """open_clip's config of the model, and whether QuickGELU is to be used."""
    open_clip = _open_clip()
    name = _register(config.model)
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        vit = [model for model in open_clip.list_models() if model.startswith("ViT-")]
        raise UserError(f"clip.model={config.model!r} is not known to open_clip; its ViT models: {', '.join(vit)}")
    of_model = bool(model_config.get("quick_gelu", False))
    of_weights = of_model
    if config.pretrained is not None and weights_file(config) is None:
        tag = open_clip.get_pretrained_cfg(name, config.pretrained)
        if not tag:
            raise UserError(
                f"clip.pretrained={config.pretrained!r} is neither a file nor a tag of {name}; "
                f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}"
            )
        of_weights = bool(tag.get("quick_gelu", False))
    quick_gelu = of_weights if config.quick_gelu is None else config.quick_gelu
    if of_model and not quick_gelu:
        raise UserError(
            f"clip.model={config.model} uses QuickGELU, the weights {config.pretrained!r} do not: "
            f"use clip.model={config.model.removesuffix('-quickgelu')}"
        )
    return model_config, quick_gelu


def _register(model: str) -> str:
    """open_clip's name for a model name, a model-config file, or the built-in model."""
    path = _BUILTIN_MODEL if model == BUILTIN_DIGITS else Path(model).expanduser()
    if path.suffix != ".json":
        return model
    if not path.is_file():
        raise UserError(f"clip.model={model}: no such model-config file")
    _open_clip().add_model_config(path)
    return path.stem


def _open_clip() -> ModuleType:
    """open_clip, imported when it is needed: it takes seconds."""
    ensure_torchvision()
    import open_clip

    return open_clip


@contextmanager
def _errors_only() -> Iterator[None]:
    """open_clip tells each step of a load, and that random weights are random, to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
