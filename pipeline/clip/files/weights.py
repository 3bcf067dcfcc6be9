"""The files of a CLIP's weights, from a tag of open_clip, a file, a folder, or the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.clip.files.model_files import (
    WEIGHT_SUFFIXES,
    HubRepository,
    LocalFolder,
    ModelFiles,
    check_weights_exist,
    first_line,
    folder_path,
    open_model_files,
)
from pipeline.clip.files.source import (
    CONFIG_NAMES,
    DEMO,
    ModelSource,
    import_open_clip,
    read_model_files,
    resolve_model,
)
from pipeline.config import (
    BUILTIN_DIGITS,
    FOLDER_PREFIX,
    HUB_PREFIX,
    MAX_YAML_BYTES,
    ClipConfig,
    brings_weights,
    read_text,
)
from pipeline.errors import UserError

_DEFAULT_NAME = "open_clip_pytorch_model.bin"
_SAFETENSORS = {_DEFAULT_NAME: "open_clip_model.safetensors"}
"""Name of weights on the Hub → that of their safetensors, where it is not the same with another suffix."""
_NAMES_IN_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Weights:
    """Location and identity of the weights of a CLIP."""

    option: str
    """The option with its value, which messages begin with."""
    files: tuple[Path, ...] = ()
    """One file, or all parts of a model in several; none if they are still to be downloaded."""
    identity: str = ""
    """What determines the content: a tag, or a repository's commit and file; empty: the files themselves."""
    path: Path | None = None
    """The user's file or folder, absolute."""
    repository: str | None = None
    """hf-hub:ORG/NAME@COMMIT of a repository on the Hub."""
    quick_gelu: bool | None = None
    """Whether they need QuickGELU; None: not known before they are read."""
    preprocess_config: Mapping[str, Any] = field(default_factory=dict)
    """open_clip's preprocess_cfg that is recorded for them, as of ModelSource; empty: nothing is, as for a file."""


def resolve_weights(config: ClipConfig, source: ModelSource) -> Weights | None:
    """Resolve a value of `clip.pretrained`; None: random weights. Files of the Hub are downloaded, tags are not.

    Raises:
        UserError: neither a tag of the model nor files.
    """
    pretrained = config.pretrained
    if pretrained is None:
        return None
    option = f"clip.pretrained={pretrained}"
    if pretrained == BUILTIN_DIGITS:
        return Weights(option, (DEMO / "digits_clip.safetensors",))
    if source.name and (tag := import_open_clip().get_pretrained_cfg(source.name, pretrained)):
        identity, quick_gelu = f"tag:{source.name}/{pretrained}", bool(tag.get("quick_gelu"))
        return Weights(option, identity=identity, quick_gelu=quick_gelu, preprocess_config=tag)
    path = folder_path(pretrained)
    if pretrained.startswith((HUB_PREFIX, FOLDER_PREFIX)) or path.is_dir():
        model_files = open_model_files("clip.pretrained", pretrained)
        files = _files_in(model_files)
        identity = f"{model_files.repository}/{files[0].name}" if model_files.repository else ""
        weights = Weights(option, files, identity, model_files.path, model_files.repository)
        if not model_files.find(*CONFIG_NAMES):
            return weights
        described = read_model_files(model_files)
        quick_gelu = bool(described.model_config.get("quick_gelu", False))
        return replace(weights, quick_gelu=quick_gelu, preprocess_config=described.preprocess_config)
    if path.is_file():
        return Weights(option, _parts(path, LocalFolder(option, path.parent)), path=path.absolute())
    check_weights_exist(pretrained)
    raise _unknown_tag(pretrained, source, config.model)


def download_tag(weights: Weights, config: ClipConfig, source: ModelSource) -> Weights:
    """Return the weights of a tag with their file, downloaded unless it is in the cache.

    Raises:
        UserError: the download failed.
    """
    open_clip = import_open_clip()
    tag = open_clip.get_pretrained_cfg(source.name, config.pretrained)
    repository_name, name = os.path.split(tag.get("hf_hub") or "")
    repository = HubRepository(weights.option, repository_name, prefers_cache=True)
    try:
        if repository_name:
            name = name or _DEFAULT_NAME
            file = repository.find(_SAFETENSORS.get(name, f"{Path(name).stem}.safetensors"), name)
            if file is None:
                raise OSError(repository.unreachable or f"{repository_name} has no {name}")
        else:
            file = Path(open_clip.download_pretrained(tag))
    except UserError:
        raise
    except Exception as error:  # of any library that downloads
        raise UserError(
            f"{weights.option} cannot be downloaded ({first_line(error)}): download the weights where there is a "
            f"network ({repository_name and f'hf download {repository_name}' or tag['url']}), and give their file with "
            "--clip.pretrained FILE"
        ) from None
    return replace(weights, files=(file,))


def base_repository(config: ClipConfig) -> str | None:
    """Return the repository OWNER/NAME of the Hub with the weights of `clip.pretrained`, which may be those of a tag;
    None: they are elsewhere."""
    pretrained = config.pretrained or ""
    if pretrained.startswith(HUB_PREFIX):
        return pretrained.removeprefix(HUB_PREFIX).partition("@")[0]
    source = resolve_model(config.model)
    tag = source.name and import_open_clip().get_pretrained_cfg(source.name, pretrained)
    return os.path.split(tag.get("hf_hub") or "")[0] or None if tag else None


def _files_in(model_files: ModelFiles) -> tuple[Path, ...]:
    """Return the files of weights in a folder or repository, open_clip's before Hugging Face's."""
    if file := model_files.find(*_NAMES_IN_FOLDER):
        return _parts(file, model_files)
    if isinstance(model_files, LocalFolder):
        others = sorted(file for file in model_files.folder.iterdir() if file.suffix.lower() in WEIGHT_SUFFIXES)
        if len(others) > 1:
            raise UserError(
                f"{model_files.option} has several weights ({', '.join(file.name for file in others[:3])}, ...): "
                f"set clip.pretrained to one of them"
            )
        if others:
            return (others[0],)
    raise model_files.missing("weights (model.safetensors, open_clip_pytorch_model.bin, ...)")


def _parts(file: Path, model_files: ModelFiles) -> tuple[Path, ...]:
    """Return the files that an index of Hugging Face names; a file that is no index is the only one."""
    with open(file, "rb") as stream:
        if stream.read(1) != b"{":
            return (file,)
    name = model_files.option if model_files.option.endswith(file.name) else f"{model_files.option}: {file.name}"
    try:
        index = json.loads(read_text(file, name, limit=64 * MAX_YAML_BYTES))
        names = sorted({str(part) for part in index["weight_map"].values()})
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        raise UserError(f"{name} is JSON, but not the index of a model in several files: give the weights") from None
    if outside := [part for part in names if Path(part).name != part]:
        raise UserError(f"{name} names {outside[0]!r}, which is not in its folder: download the model again")
    parts = {part: model_files.find(part) for part in names}
    if absent := [part for part, path in parts.items() if path is None]:
        raise UserError(
            f"{name} names {len(names)} files, of which {len(absent)} are missing ({', '.join(absent[:3])}): "
            "download them into its folder"
        )
    return tuple(path for path in parts.values() if path)


def _unknown_tag(pretrained: str, source: ModelSource, model: str) -> UserError:
    if source.name is None:
        remedy = f"set it to {model} for its own weights" if brings_weights(model) else "give a file or a folder"
        return UserError(
            f"clip.pretrained={pretrained!r} is not a file, and clip.model={model} has no tags of open_clip: {remedy}"
        )
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(source.name)
    models = open_clip.list_pretrained_models_by_tag(pretrained)
    others = [name for name in models if name.removesuffix("-quickgelu") == source.name.removesuffix("-quickgelu")]
    return UserError(
        f"clip.pretrained={pretrained!r} is neither a file nor a tag of {source.name}; "
        f"tags: {', '.join(tags) or 'none'}" + (f". It is a tag of clip.model={others[0]}" if others else "")
    )
