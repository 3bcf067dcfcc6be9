"""Loading of a frozen CLIP: open_clip's architecture, and weights that are read here, no pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.clip.files.checkpoint import State, read_checkpoint
from pipeline.clip.files.model_files import announcing_downloads
from pipeline.clip.files.model_state import content_hash, fit_to_model
from pipeline.clip.files.source import ModelSource, import_open_clip, resolve_model
from pipeline.clip.files.text_files import text_files_hash, tokenizer_folder
from pipeline.clip.files.weights import Weights, download_tag, resolve_weights
from pipeline.clip.precision import uses_bfloat16
from pipeline.clip.preprocessing import (
    check_input_size,
    is_left_to_weights,
    preprocessing_notes,
    resize_input,
    resolve_preprocessing,
)
from pipeline.clip.towers import ClipTowers
from pipeline.config import ClipConfig, brings_weights
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError

log = logging.getLogger(__name__)
RANDOM_WEIGHTS_SEED = 0
MAX_PARAMETERS = 10**10
"""Far above every CLIP; a model config with more is a mistake."""


@dataclass(frozen=True)
class ClipIdentity:
    """Identity of a loaded CLIP, which determines its outputs; part of the key of every artifact computed with it."""

    model_config: str
    """JSON of open_clip's model config, with the activation in use, and a hash of the files of `text_files_hash`."""
    weights: str
    """`tag:<model>/<tag>`, `hf-hub:<repository>@<commit>/<file>`, `random:<seed>`, or for files on disk
    `sha256:<content_hash>`: the same for all formats and places of the same weights. It takes as long as a hash of the
    file in float32, a second for ViT-B/16."""
    preprocessing: str
    """JSON of the images' Preprocessing."""


def clip_identity(config: ClipConfig) -> ClipIdentity:
    """Resolve and check a ClipConfig; weights in files are read, a tag's are not downloaded.

    Raises:
        UserError: unknown model or tag, missing file, file with more than tensors, weights that do not fit the model,
            activation that contradicts the weights, preprocessing that cannot be done.
    """
    source = resolve_model(config.model)
    weights = resolve_weights(config, source)
    if not weights:
        identity, quick_gelu = f"random:{RANDOM_WEIGHTS_SEED}", _uses_quick_gelu(config, source, None)
    elif not weights.files:
        identity, quick_gelu = weights.identity, _uses_quick_gelu(config, source, weights.quick_gelu)
    else:
        state, quick_gelu = _read_weights(config, source, weights)
        identity = weights.identity or f"sha256:{content_hash(state)}"
    model_config = {**source.model_config, "quick_gelu": quick_gelu}
    if text_files := _of_model(config, text_files_hash, source.model_config["text_cfg"], source.folder):
        model_config["text_files"] = text_files
    preprocessing = json.dumps(asdict(_preprocessing(config, source)), sort_keys=True)
    return ClipIdentity(json.dumps(model_config, sort_keys=True), identity, preprocessing)


def fetch_weights(config: ClipConfig, say: Callable[[str], None]) -> None:
    """Download weights that are on the Hugging Face Hub and not in its cache, and check that they fit the model, once
    and before any work; workers of this machine then read that file. `say` is told what is downloaded.

    Raises:
        UserError: they cannot be downloaded, or do not fit.
    """
    with announcing_downloads(say):
        source = resolve_model(config.model)
        weights = resolve_weights(config, source)
        if weights and not weights.files:
            _read_weights(config, source, download_tag(weights, config, source))


def assumed_preprocessing(config: ClipConfig) -> list[str]:
    """Return notes on what is assumed about the preprocessing of weights without a record of it."""
    source = resolve_model(config.model)
    recorded, preprocessing = _recorded_preprocessing(config, source), _preprocessing(config, source)
    return preprocessing_notes(config, preprocessing, recorded, source.preprocess_config)


def build_meta_towers(config: ClipConfig) -> ClipTowers:
    """Build towers on torch's meta device, which checks a model within moments, without weights.

    Raises:
        UserError: the model's towers cannot take prompts, or are absurdly large; it takes no images of clip.image_size.
    """
    source = resolve_model(config.model)
    model, preprocessing = _build_meta(source, config), _preprocessing(config, source)
    if config.image_size:
        check_input_size(model, config.image_size, config.model)
    return ClipTowers(model, load_tokenizer(config), preprocessing)


@lru_cache(maxsize=1)  # so that a Ray worker loads CLIP once for all its trainings
def load_clip(
    config: ClipConfig,
    text_prompt_position: str = "after_sos",
    device: str = "cpu",
    float32: bool = False,
    inference: bool = False,
) -> ClipTowers:
    """Load the frozen towers on `device`, without executing pickled code.

    Args:
        float32: keep float32 weights, for towers that are trained; otherwise config.precision decides.
        inference: as of `uses_bfloat16`.
    """
    source = resolve_model(config.model)
    model, _ = load_open_clip(config)
    tokenizer, preprocessing = load_tokenizer(config), _preprocessing(config, source)
    towers = ClipTowers(model, tokenizer, preprocessing, text_prompt_position, config.activation_memory_gib).to(device)
    if uses_bfloat16(towers, config.precision, inference) and not float32:
        towers.fingerprint = weights_fingerprint(towers)
        towers.cast_weights_to_bfloat16()
    return towers


def load_open_clip(config: ClipConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Load open_clip's model and its model config, with the activation and the image size in use."""
    source = resolve_model(config.model)
    weights = resolve_weights(config, source)
    if weights:
        weights = weights if weights.files else download_tag(weights, config, source)
        state, quick_gelu = _read_weights(config, source, weights)
    else:
        state, quick_gelu = None, _uses_quick_gelu(config, source, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        model = _build(source, quick_gelu, config, random_weights=state is None)
    if state is not None:
        model.load_state_dict(state)  # strict: nothing is left uninitialized
    if config.image_size:
        resize_input(model, config.image_size, config.model)
    vision_config = {**source.model_config["vision_cfg"], "image_size": _preprocessing(config, source).image_size}
    return model, {**source.model_config, "quick_gelu": quick_gelu, "vision_cfg": vision_config}


def load_tokenizer(config: ClipConfig) -> Any:
    """Load open_clip's tokenizer of the model, without its weights."""
    source = resolve_model(config.model)
    text_config = source.model_config["text_cfg"]
    folder = _of_model(config, tokenizer_folder, text_config, source.folder)
    return _of_model(config, _tokenizer, json.dumps(text_config), folder)


@lru_cache(maxsize=1)  # building a vocabulary takes 0.25 s, and a run needs it several times
def _tokenizer(text_config: str, folder: Path | None) -> Any:
    """Build the tokenizer of open_clip.get_tokenizer.

    Args:
        text_config: JSON of open_clip's text_cfg.
        folder: folder with a tokenizer of Hugging Face. None: CLIP's own.
    """
    import_open_clip()
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
    from open_clip.tokenizer import _tokenizer as default_tokenizer

    values = json.loads(text_config)
    options = {"context_length": values.get("context_length", 77), **(values.get("tokenizer_kwargs") or {})}
    with _suppress_warnings():
        if folder:
            return HFTokenizer(str(folder), tokenizer_mode=values.get("tokenizer_mode"), **options)
        if options == {"context_length": DEFAULT_CONTEXT_LENGTH}:
            return default_tokenizer  # which open_clip builds on import
        return SimpleTokenizer(**options)


def weights_fingerprint(towers: ClipTowers) -> str:
    """Return the SHA-256 of all frozen weights: an adapter fits only the CLIP it was trained on."""
    if towers.fingerprint:
        return towers.fingerprint
    digest = hashlib.sha256()
    for name, value in sorted(towers.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_absolute_paths(config: ClipConfig) -> ClipConfig:
    """Make paths absolute, and pin repositories of the Hub to their commit, for workers elsewhere and later.

    Raises:
        UserError: as `clip_identity`.
    """
    source = resolve_model(config.model)
    model = str(source.path or source.repository or config.model)
    if config.pretrained == config.model and brings_weights(model):
        return config.model_copy(update={"model": model, "pretrained": model})
    weights = resolve_weights(config, source)
    pretrained = str(weights.path or weights.repository or config.pretrained) if weights else None
    return config.model_copy(update={"model": model, "pretrained": pretrained})


def local_paths(config: ClipConfig) -> list[Path]:
    """Return the user's files and folders of model and weights, which all machines must see."""
    source = resolve_model(config.model)
    weights = resolve_weights(config, source)
    return [path for path in dict.fromkeys((source.path, weights.path if weights else None)) if path]


def _read_weights(config: ClipConfig, source: ModelSource, weights: Weights) -> tuple[State, bool]:
    """Return the weights under the model's names, and whether to use QuickGELU.

    Raises:
        UserError: they cannot be read, do not fit the model, or contradict its activation.
    """
    checkpoint = read_checkpoint(weights)
    expected = _build_meta(source, config).state_dict()
    state = fit_to_model(checkpoint, expected, weights, source, config.model)
    quick_gelu = _uses_quick_gelu(config, source, checkpoint.quick_gelu)
    if not quick_gelu and checkpoint.quick_gelu is None and config.quick_gelu is None and _has_quick_gelu_twin(source):
        log.warning(
            "%s has no record of its activation: taking GELU; weights of OpenAI need --clip.quick_gelu true",
            weights.option,
        )
    return state, quick_gelu


def _has_quick_gelu_twin(source: ModelSource) -> bool:
    return f"{source.name}-quickgelu" in import_open_clip().list_models()


def _build_meta(source: ModelSource, config: ClipConfig) -> nn.Module:
    """Build the model without weights, on torch's meta device.

    Raises:
        UserError: open_clip cannot build it, or it is absurdly large.
    """
    model = _build(source, bool(source.model_config.get("quick_gelu", False)), config, "meta")
    if (count := sum(value.numel() for value in (*model.parameters(), *model.buffers()))) > MAX_PARAMETERS:
        raise UserError(
            f"clip.model={config.model} has {count:,} parameters, more than {MAX_PARAMETERS:,}: correct its sizes"
        )
    return model


def _build(
    source: ModelSource, quick_gelu: bool, config: ClipConfig, device: str = "cpu", random_weights: bool = True
) -> nn.Module:
    with _suppress_warnings():
        model: nn.Module = _of_model(config, source.build, quick_gelu, device, random_weights)
    return model


def _preprocessing(config: ClipConfig, source: ModelSource) -> Preprocessing:
    recorded = dict(source.preprocess_config)
    if is_left_to_weights(config):  # else they need not be here
        recorded |= _recorded_preprocessing(config, source)
    return resolve_preprocessing(config, source.model_config, recorded)


def _recorded_preprocessing(config: ClipConfig, source: ModelSource) -> Mapping[str, Any]:
    weights = resolve_weights(config, source)
    return weights.preprocess_config if weights else {}


def _of_model(config: ClipConfig, build: Callable[..., Any], *arguments: Any) -> Any:
    """Return build(*arguments).

    Raises:
        UserError: it fails; the message begins with the model.
    """
    try:
        return build(*arguments)
    except UserError as error:
        raise UserError(f"clip.model={config.model}: {error}") from None
    except Exception as error:  # models and tokenizers of other libraries raise anything
        raise UserError(f"clip.model={config.model} cannot be built: {error}") from None


def _uses_quick_gelu(config: ClipConfig, source: ModelSource, weights_quick_gelu: bool | None) -> bool:
    """Return whether to use QuickGELU: as told, or else as the weights need, or else as the model has it.

    Raises:
        UserError: not to be used, by a model that is defined with it.
    """
    model_quick_gelu = bool(source.model_config.get("quick_gelu", False))
    needed = model_quick_gelu if weights_quick_gelu is None else weights_quick_gelu
    quick_gelu = needed if config.quick_gelu is None else config.quick_gelu
    if model_quick_gelu and not quick_gelu:
        remedy = "set quick_gelu to false in its model config"
        if source.name:
            remedy = f"use clip.model={source.name.removesuffix('-quickgelu')}"
        raise UserError(f"clip.model={config.model} uses QuickGELU, the weights {config.pretrained!r} do not: {remedy}")
    return quick_gelu


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
