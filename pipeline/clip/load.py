"""Loads a frozen CLIP by open_clip: a model name or model-config file, and weights by tag or file, without pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from pipeline.clip.class_tokens import Tokenizer
from pipeline.clip.precision import uses_bfloat16
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, MAX_YAML_BYTES, ClipConfig, read_text
from pipeline.errors import UserError

RANDOM_WEIGHTS_SEED = 0
MAX_PARAMETERS = 10**10
"""Far above all CLIPs; a model config that asks for more is a mistake."""
MAX_SIZE = 10**6
"""Of a width, a vocabulary, a side of an image."""
MAX_LAYERS = 1000
_DEMO = Path(__file__).resolve().parent.parent / "demo"
_BUILTIN_MODEL = _DEMO / "digits_clip.json"
_BUILTIN_WEIGHTS = _DEMO / "digits_clip.safetensors"


@dataclass(frozen=True)
class ClipIdentity:
    """What decides the numbers of a loaded CLIP; part of every artifact's name that was made with it."""

    model: str
    """open_clip's name; of a model-config file its own, wherever it lies."""
    model_config: str
    """JSON of open_clip's model config, with the activation that is used."""
    weights: str
    """`tag:<tag>`, `sha256:<hash of the file>`, or `random:<seed>`."""


def clip_identity(config: ClipConfig) -> ClipIdentity:
    """Resolves and checks a ClipConfig without loading weights.

    Raises:
        UserError: unknown model or tag, missing file, one that holds more than tensors, activation that contradicts
            the weights.
    """
    model_config, quick_gelu = _resolve(config)
    if config.pretrained is None:
        weights = f"random:{RANDOM_WEIGHTS_SEED}"
    elif (file := weights_file(config)) is not None:
        _refuse_more_than_tensors(file, config)
        with open(file, "rb") as stream:
            weights = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        weights = f"tag:{config.pretrained}"
    text = json.dumps({**model_config, "quick_gelu": quick_gelu}, sort_keys=True)
    return ClipIdentity(_register(config.model), text, weights)


def towers_without_weights(config: ClipConfig) -> ClipTowers:
    """Towers of the right shapes and no numbers (torch's meta device): tells in no time whether a model can be used.

    Raises:
        UserError: the model has no towers that prompts can be put into, or absurdly large ones.
    """
    name = _register(config.model)
    try:
        with torch.device("meta"), _errors_only():
            model = _open_clip().create_model(name, load_weights=False, pretrained_text=False, device="meta")
        tokenizer = load_tokenizer(config)
    except Exception as error:  # models of other libraries fail in their own ways
        raise UserError(f"clip.model={config.model} cannot be built: {error}") from None
    if (count := sum(value.numel() for value in (*model.parameters(), *model.buffers()))) > MAX_PARAMETERS:
        raise UserError(
            f"clip.model={config.model} has {count:,} numbers, more than {MAX_PARAMETERS:,}: correct its sizes"
        )
    return ClipTowers(model, tokenizer)


@lru_cache(maxsize=1)  # a Ray worker that trains one group after another loads CLIP once
def load_clip(
    config: ClipConfig, text_prompt_position: str = "after_sos", device: str = "cpu", float32: bool = False
) -> ClipTowers:
    """The frozen towers on `device`; weights files are read without executing pickled code.

    Args:
        float32: for towers whose own weights are to be trained; else config.precision says how they are held.
    """
    name = _register(config.model)
    model_config, quick_gelu = _resolve(config)
    if file := weights_file(config):
        _refuse_more_than_tensors(file, config)
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
        except Exception as error:  # a state dict can fail to fit in many ways
            raise UserError(
                f"clip.pretrained={config.pretrained!r} cannot be loaded into {config.model}: {error}"
            ) from None
    towers = ClipTowers(model, load_tokenizer(config), text_prompt_position, config.activation_memory_gib).to(device)
    if uses_bfloat16(towers.device, config.precision) and not float32:
        towers.fingerprint = weights_fingerprint(towers)
        towers.cast_weights_to_bfloat16()
    return towers


def load_tokenizer(config: ClipConfig) -> Tokenizer:
    """The model's tokenizer, without its weights."""
    name = _register(config.model)
    return _tokenizer(name, json.dumps(_open_clip().get_model_config(name)))


@lru_cache(maxsize=1)  # a vocabulary takes a quarter of a second to build, and a run asks several times
def _tokenizer(name: str, model_config: str) -> Tokenizer:
    """Args: model_config: what the name stands for now; another model-config file may take it."""
    with _errors_only():
        tokenizer: Tokenizer = _open_clip().get_tokenizer(name)
    return tokenizer


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


def _refuse_more_than_tensors(file: Path, config: ClipConfig) -> None:
    """Before open_clip sees the file: where that fails it loads again, and with old versions of torch, or by an
    environment variable, as a pickle whose code is run.

    Raises:
        UserError: the file is no plain file of tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                tensors.keys()
            return
        zipped = zipfile.is_zipfile(file)
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise ValueError("its records are compressed, as torch.save never does")
        torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a pickle can fail in any way
        reason = str(error).partition("\n")[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # torch tells how to run it all the same
            reason = "a pickle that could run code, or none"
        raise UserError(
            f"clip.pretrained={config.pretrained!r} is refused: it is not a plain file of tensors ({reason}). "
            "Save the weights as safetensors"
        ) from None


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
    if model.startswith(("hf-hub:", "local-dir:")):  # open_clip would take weights from there, whatever we ask for
        raise UserError(f"clip.model={model!r}: give a name that open_clip has, or the path of a model-config JSON")
    path = _BUILTIN_MODEL if model == BUILTIN_DIGITS else Path(model).expanduser()
    if path.suffix != ".json":
        return model
    if not path.is_file():
        raise UserError(f"clip.model={model}: no such model-config file")
    values = _checked_model_config(path, f"clip.model={model}")
    if _open_clip().get_model_config(path.stem) != values:  # else it has it, and would read all its own files again
        _open_clip().add_model_config(path)
    return path.stem


def _checked_model_config(path: Path, name: str) -> dict[str, Any]:
    """Raises: UserError: no JSON of a CLIP, or absurd sizes, which would take all memory or forever."""
    try:
        values: dict[str, Any] = json.loads(read_text(path, name, limit=MAX_YAML_BYTES))
        sections = [values, values["vision_cfg"], values["text_cfg"]]
        sizes = [(key, size) for section in sections for key, size in section.items()]
        values["embed_dim"]
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name} is no model config: {type(error).__name__}: {error}; it needs embed_dim, vision_cfg and text_cfg"
        ) from None
    for key, size in sizes:
        most = MAX_LAYERS if key == "layers" else MAX_SIZE
        if isinstance(size, int | float) and not abs(size) <= most:
            raise UserError(f"{name}: {key}={size} is more than {most:,}: correct it")
    return values


def _open_clip() -> ModuleType:
    """open_clip, imported when it is needed: it takes seconds."""
    ensure_torchvision()
    import open_clip

    module: ModuleType = open_clip
    return module


@contextmanager
def _errors_only() -> Iterator[None]:
    """open_clip tells each step of a load, and that random weights are random, to the root logger. Only what this
    thread tells is kept back: a level that two threads set and restore would stay at the other's."""
    logger, this_thread = logging.getLogger(), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != this_thread

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
