"""The architecture of a CLIP, from an open_clip name, a model config, a folder, or the Hugging Face Hub.

A folder, or a repository of the Hub, is of open_clip (open_clip_config.json) or a CLIPModel of Hugging Face
(config.json). All are described by open_clip's model config.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pipeline.clip.files.hugging_face import to_model_config, to_preprocess_config
from pipeline.clip.files.model_files import ModelFiles, is_commit, open_model_files
from pipeline.clip.files.text_files import TEXT_CONFIG, text_config_folder
from pipeline.clip.initialization import SkipInitialization
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import BUILTIN_DIGITS, MAX_YAML_BYTES, OPENAI_NAMES, brings_weights, did_you_mean, read_text
from pipeline.errors import UserError
from pipeline.imports import deferred, no_garbage_collection

MAX_DIMENSION = 10**6
"""Limit of a width, a vocabulary, an image side."""
MAX_LAYERS = 1000
OPEN_CLIP_CONFIG = "open_clip_config.json"
DEMO = Path(__file__).resolve().parents[2] / "demo"
CONFIG_NAMES = OPEN_CLIP_CONFIG, "config.json"
_BUILTIN_MODEL = DEMO / "digits_clip.json"


@dataclass(frozen=True)
class ModelSource:
    """A CLIP's architecture, and what its source says about preprocessing."""

    model_config: dict[str, Any]
    """open_clip's model config."""
    name: str | None = None
    """open_clip's name, which has tags of weights; None: the architecture is from files."""
    preprocess_config: Mapping[str, Any] = field(default_factory=dict)
    """open_clip's preprocess_cfg of a folder or repository: those of mean, std, interpolation, resize_mode and size
    that it has."""
    folder: Path | None = None
    """Folder with the files of the model; None: a name or a model config."""
    path: Path | None = None
    """The user's model config or folder, absolute."""
    repository: str | None = None
    """hf-hub:ORG/NAME@COMMIT of a repository on the Hub."""

    def build(self, quick_gelu: bool, device: str = "cpu", random_weights: bool = True) -> nn.Module:
        """Build the model with random weights, as open_clip.create_model does without any.

        Args:
            quick_gelu: use QuickGELU.
            device: cpu, or meta for names and shapes only.
            random_weights: False: leave the weights as memory was, for others to be loaded.

        Raises:
            UserError: as `text_config_folder`, or that config is invalid.
        """
        open_clip, values = import_open_clip(), copy.deepcopy(self.model_config)
        values["vision_cfg"]["timm_model_pretrained"] = values["text_cfg"]["hf_model_pretrained"] = False
        if text_folder := text_config_folder(values["text_cfg"], self.folder):
            name = f"{TEXT_CONFIG} of its text tower"
            _check_sizes(_read_json(text_folder / TEXT_CONFIG, name).items(), name)
            values["text_cfg"]["hf_model_name"] = str(text_folder)
        has_text_tower = values.pop("custom_text", False) or "hf_model_name" in values["text_cfg"]
        model_class = open_clip.CLIP
        if has_text_tower:
            model_class = open_clip.CoCa if "multimodal_cfg" in values else open_clip.CustomTextCLIP
        is_skipped = device == "meta" or not random_weights  # the context costs time, too
        with torch.device(device), SkipInitialization(not random_weights) if is_skipped else nullcontext():
            model: nn.Module = model_class(**values | {"quick_gelu": quick_gelu})
        return model


def resolve_model(model: str) -> ModelSource:
    """Resolve and check a value of `clip.model`; of a repository on the Hub only configs are downloaded.

    Raises:
        UserError: an unknown name, a missing or invalid file, a repository that cannot be read.
    """
    name = f"clip.model={model}"
    if brings_weights(model):
        return _read_commit(model) if is_commit(model) else read_model_files(open_model_files("clip.model", model))
    if model == BUILTIN_DIGITS or model.endswith(".json"):
        path = _BUILTIN_MODEL if model == BUILTIN_DIGITS else Path(model).expanduser()
        if not path.is_file():
            raise UserError(f"{name}: no such model-config file")
        model_config = _read_json(path, name)
        _check_model_config(model_config, name)
        return ModelSource(model_config, path=None if model == BUILTIN_DIGITS else path.absolute())
    open_clip_name, open_clip = OPENAI_NAMES.get(model, model), import_open_clip()
    model_config = open_clip.get_model_config(open_clip_name)
    if model_config is None:
        hint = did_you_mean(model, open_clip.list_models())
        raise UserError(f"clip.model={model!r} is not an open_clip model{hint} All models: mmap-clip list-models")
    return ModelSource(model_config, open_clip_name)


def import_open_clip() -> ModuleType:
    """Import open_clip on first use: it takes half a second, and three times that with what only some towers need."""
    if "open_clip" not in sys.modules:
        with no_garbage_collection(), deferred("torch._dynamo", "timm", "transformers"):
            ensure_torchvision()
            import_module("open_clip")
    import open_clip

    module: ModuleType = open_clip
    return module


def read_model_files(model_files: ModelFiles) -> ModelSource:
    """Read the configs of a folder or repository.

    Raises:
        UserError: it has none, or invalid ones.
    """
    file = model_files.find(*CONFIG_NAMES)
    if not file:
        raise model_files.missing(" or ".join(CONFIG_NAMES))
    name = f"{model_files.option}: {file.name}"
    if file.name == OPEN_CLIP_CONFIG:
        values = _read_json(file, name)
        model_config, preprocess_config = values.get("model_cfg", values), values.get("preprocess_cfg") or {}
    else:
        model_config, preprocess_config = (
            _translate(to_model_config, file, name, "use a model with an open_clip_config.json"),
            {},
        )
        if file := model_files.find("preprocessor_config.json"):
            remedy = "remove it from the folder, and set clip.resize_mode, interpolation, mean and std"
            preprocess_config = _translate(to_preprocess_config, file, f"{model_files.option}: {file.name}", remedy)
    _check_model_config(model_config, name)
    return ModelSource(
        model_config,
        preprocess_config=preprocess_config,
        folder=model_files.folder,
        path=model_files.path,
        repository=model_files.repository,
    )


@lru_cache(maxsize=8)  # a commit does not change, and a missing file is asked for only once
def _read_commit(model: str) -> ModelSource:
    return read_model_files(open_model_files("clip.model", model))


def _translate(
    translate: Callable[[Mapping[str, Any]], dict[str, Any]], file: Path, name: str, remedy: str
) -> dict[str, Any]:
    """Read Hugging Face's config and return it in open_clip's terms.

    Raises:
        UserError: the file is invalid, or open_clip cannot express it.
    """
    values = _read_json(file, name)
    try:
        return translate(values)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(f"{name} cannot be used ({reason}): {remedy}") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path, name, limit=MAX_YAML_BYTES))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({type(error).__name__}: {error}): correct or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} is not an object of JSON: correct or download it again")
    return values


def _check_model_config(values: dict[str, Any], name: str) -> None:
    """Raises: UserError: not a CLIP's model config, or sizes that would take all memory."""
    try:
        sections = [values, values["vision_cfg"], values["text_cfg"]]
        sizes = [(key, size) for section in sections for key, size in section.items()]
        values["embed_dim"]
    except (TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{name} is not a model config ({type(error).__name__}: {error}); needed: embed_dim, vision_cfg, text_cfg"
        ) from None
    _check_sizes(sizes, name)


def _check_sizes(sizes: Iterable[tuple[str, Any]], name: str) -> None:
    """Raises: UserError: sizes that would take all memory."""
    for key, size in sizes:
        limit = MAX_LAYERS if key in ("layers", "num_hidden_layers") else MAX_DIMENSION
        if isinstance(size, int | float) and not abs(size) <= limit:
            raise UserError(f"{name}: {key}={size} exceeds {limit:,}: correct it")
