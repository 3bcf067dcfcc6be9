"""Loading of a frozen CLIP with open_clip: a model name or model-config file, and weights by tag or file, no pickle."""

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

from pipeline.clip.precision import uses_bfloat16
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, MAX_YAML_BYTES, ClipConfig, read_text
from pipeline.errors import UserError

RANDOM_WEIGHTS_SEED = 0
MAX_PARAMETERS = 10**10
"""Far above every CLIP; a model config with more is a mistake."""
MAX_DIMENSION = 10**6
"""Limit of a width, a vocabulary, an image side."""
MAX_LAYERS = 1000
_DEMO = Path(__file__).resolve().parent.parent / "demo"
_BUILTIN_MODEL = _DEMO / "digits_clip.json"
_BUILTIN_WEIGHTS = _DEMO / "digits_clip.safetensors"


@dataclass(frozen=True)
class ClipIdentity:
    """Identity of a loaded CLIP, which determines its outputs; part of the key of every artifact computed with it."""

    model: str
    """open_clip's name; for a model-config file, its stem."""
    model_config: str
    """JSON of open_clip's model config, with the activation in use."""
    weights: str
    """`tag:<tag>`, `sha256:<hash of the file>`, or `random:<seed>`."""


def clip_identity(config: ClipConfig) -> ClipIdentity:
    """Resolve and check a ClipConfig without loading weights.

    Raises:
        UserError: unknown model or tag, missing file, file with more than tensors, activation that contradicts the
            weights.
    """
    model_config, quick_gelu = _resolve_model_config(config)
    if config.pretrained is None:
        weights = f"random:{RANDOM_WEIGHTS_SEED}"
    elif (file := weights_file(config)) is not None:
        _check_tensors_only(file, config)
        with open(file, "rb") as stream:
            weights = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        weights = f"tag:{config.pretrained}"
    text = json.dumps({**model_config, "quick_gelu": quick_gelu}, sort_keys=True)
    return ClipIdentity(_register(config.model), text, weights)


def build_meta_towers(config: ClipConfig) -> ClipTowers:
    """Build towers on torch's meta device, which checks a model within moments, without weights.

    Raises:
        UserError: the model's towers cannot take prompts, or are absurdly large.
    """
    name = _register(config.model)
    try:
        with torch.device("meta"), _suppress_warnings():
            model = _open_clip().create_model(name, load_weights=False, pretrained_text=False, device="meta")
        tokenizer = load_tokenizer(config)
    except Exception as error:  # models of other libraries raise anything
        raise UserError(f"clip.model={config.model} cannot be built: {error}") from None
    if (count := sum(value.numel() for value in (*model.parameters(), *model.buffers()))) > MAX_PARAMETERS:
        raise UserError(
            f"clip.model={config.model} has {count:,} parameters, more than {MAX_PARAMETERS:,}: correct its sizes"
        )
    return ClipTowers(model, tokenizer)


@lru_cache(maxsize=1)  # so that a Ray worker loads CLIP once for all its trainings
def load_clip(
    config: ClipConfig, text_prompt_position: str = "after_sos", device: str = "cpu", float32: bool = False
) -> ClipTowers:
    """Load the frozen towers on `device`, without executing pickled code.

    Args:
        float32: keep float32 weights, for towers that are trained; otherwise config.precision decides.
    """
    name = _register(config.model)
    model_config, quick_gelu = _resolve_model_config(config)
    if file := weights_file(config):
        _check_tensors_only(file, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        try:
            with _suppress_warnings():
                model = _open_clip().create_model(
                    name,
                    pretrained=str(file) if file else config.pretrained,
                    force_quick_gelu=quick_gelu and not model_config.get("quick_gelu", False),
                    pretrained_text=False,
                    weights_only=True,
                )
        except Exception as error:  # a mismatched state dict raises many types
            raise UserError(
                f"clip.pretrained={config.pretrained!r} cannot be loaded into {config.model}: {error}"
            ) from None
    towers = ClipTowers(model, load_tokenizer(config), text_prompt_position, config.activation_memory_gib).to(device)
    if uses_bfloat16(towers.device, config.precision) and not float32:
        towers.fingerprint = weights_fingerprint(towers)
        towers.cast_weights_to_bfloat16()
    return towers


def load_tokenizer(config: ClipConfig) -> Any:
    """Load open_clip's tokenizer of the model, without its weights."""
    name = _register(config.model)
    return _tokenizer(name, json.dumps(_open_clip().get_model_config(name)))


@lru_cache(maxsize=1)  # building a vocabulary takes 0.25 s, and a run needs it several times
def _tokenizer(name: str, model_config: str) -> Any:
    """Args: model_config: part of the cache key, since another model-config file may take the same name."""
    with _suppress_warnings():
        return _open_clip().get_tokenizer(name)


def weights_fingerprint(towers: ClipTowers) -> str:
    """Return the SHA-256 of all frozen weights: an adapter fits only the CLIP it was trained on."""
    if towers.fingerprint:
        return towers.fingerprint
    digest = hashlib.sha256()
    for name, value in sorted(towers.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_file(config: ClipConfig) -> Path | None:
    """Return the file that `clip.pretrained` names, or None for a tag or random weights."""
    if config.pretrained is None:
        return None
    if config.pretrained == BUILTIN_DIGITS:
        return _BUILTIN_WEIGHTS
    path = Path(config.pretrained).expanduser()
    looks_like_file = path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or len(path.parts) > 1
    if looks_like_file and not path.is_file():
        raise UserError(f"clip.pretrained={config.pretrained}: no such file")
    return path if looks_like_file else None


def _check_tensors_only(file: Path, config: ClipConfig) -> None:
    """Check the file before open_clip, which retries a failed load as a pickle that runs code with old versions of
    torch or by an environment variable.

    Raises:
        UserError: the file holds more than tensors.
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
                    raise ValueError("its records are compressed, which torch.save never does")
        torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a pickle can raise anything
        reason = str(error).partition("\n")[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # torch's message says how to run it anyway
            reason = "not a pickle, or one that could run code"
        raise UserError(
            f"clip.pretrained={config.pretrained!r} is not a plain file of tensors ({reason}): "
            "save the weights as safetensors"
        ) from None


def _resolve_model_config(config: ClipConfig) -> tuple[dict[str, Any], bool]:
    """Return open_clip's config of the model, and whether to use QuickGELU."""
    open_clip = _open_clip()
    name = _register(config.model)
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        vit = [model for model in open_clip.list_models() if model.startswith("ViT-")]
        raise UserError(f"clip.model={config.model!r} is not an open_clip model; its ViT models: {', '.join(vit)}")
    model_quick_gelu = bool(model_config.get("quick_gelu", False))
    weights_quick_gelu = model_quick_gelu
    if config.pretrained is not None and weights_file(config) is None:
        tag = open_clip.get_pretrained_cfg(name, config.pretrained)
        if not tag:
            raise UserError(
                f"clip.pretrained={config.pretrained!r} is neither a file nor a tag of {name}; "
                f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}"
            )
        weights_quick_gelu = bool(tag.get("quick_gelu", False))
    quick_gelu = weights_quick_gelu if config.quick_gelu is None else config.quick_gelu
    if model_quick_gelu and not quick_gelu:
        raise UserError(
            f"clip.model={config.model} uses QuickGELU, the weights {config.pretrained!r} do not: "
            f"use clip.model={config.model.removesuffix('-quickgelu')}"
        )
    return model_config, quick_gelu


def _register(model: str) -> str:
    """Register a model-config file or the built-in model, and return open_clip's name of the model."""
    if model.startswith(("hf-hub:", "local-dir:")):  # open_clip would load weights from there in any case
        raise UserError(f"clip.model={model!r}: expected an open_clip model name, or the path of a model-config JSON")
    path = _BUILTIN_MODEL if model == BUILTIN_DIGITS else Path(model).expanduser()
    if path.suffix != ".json":
        return model
    if not path.is_file():
        raise UserError(f"clip.model={model}: no such model-config file")
    values = _read_model_config(path, f"clip.model={model}")
    if _open_clip().get_model_config(path.stem) != values:  # adding one makes open_clip read all its config files again
        _open_clip().add_model_config(path)
    return path.stem


def _read_model_config(path: Path, name: str) -> dict[str, Any]:
    """Raises: UserError: not the JSON of a CLIP, or sizes that would take all memory."""
    try:
        values: dict[str, Any] = json.loads(read_text(path, name, limit=MAX_YAML_BYTES))
        sections = [values, values["vision_cfg"], values["text_cfg"]]
        sizes = [(key, size) for section in sections for key, size in section.items()]
        values["embed_dim"]
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name} is not a model config ({type(error).__name__}: {error}); needed: embed_dim, vision_cfg, text_cfg"
        ) from None
    for key, size in sizes:
        limit = MAX_LAYERS if key == "layers" else MAX_DIMENSION
        if isinstance(size, int | float) and not abs(size) <= limit:
            raise UserError(f"{name}: {key}={size} exceeds {limit:,}: correct it")
    return values


def _open_clip() -> ModuleType:
    """Import open_clip on first use: it takes seconds."""
    ensure_torchvision()
    import open_clip

    module: ModuleType = open_clip
    return module


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Drop this thread's log records below ERROR: open_clip logs each step of a load to the root logger. A filter,
    since two threads that set and restore the level could leave it changed."""
    logger, thread_id = logging.getLogger(), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != thread_id

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
