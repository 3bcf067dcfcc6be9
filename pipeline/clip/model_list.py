"""Descriptions of open_clip's models: which towers take prompts, sizes, weights to download."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

from pipeline.clip.families import COCA, describe_image_tower, describe_text_tower
from pipeline.clip.families.base import UnsupportedTower
from pipeline.clip.files.source import ModelSource, import_open_clip, resolve_model
from pipeline.clip.files.text_files import needs_transformers
from pipeline.config import OPENAI_NAMES, did_you_mean
from pipeline.errors import UserError

Prompts = Literal["both", "text", "refused"]
"""Towers that take prompts: image and text, only the text; refused: the model cannot be used."""

_BERT_TOWERS = ("roberta-base", "xlm-roberta-base", "xlm-roberta-large")
"""Text towers of open_clip's models that `families.hugging_face_bert` describes. Their configs are on Hugging Face's
Hub."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model; None: unknown, as the model is refused, the image tower takes no prompts, or the config of the
    text tower is on Hugging Face's Hub."""

    parameters: int | None = None
    image_size: int | None = None
    image_layers: int | None = None
    image_width: int | None = None
    text_layers: int | None = None
    text_width: int | None = None
    context_length: int | None = None
    embed_dim: int | None = None
    """Width of the features."""


@dataclass(frozen=True)
class Tag:
    """Weights that open_clip can download, with the preprocessing of their images, in its terms (PreprocessCfg)."""

    tag: str
    resize_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ModelDescription:
    """A model of open_clip."""

    name: str
    prompts: Prompts
    reason: str
    """Why not both towers take prompts."""
    needs: tuple[str, ...]
    """Packages that it needs besides."""
    shapes: Shapes
    tags: tuple[Tag, ...]


def find_models(patterns: tuple[str, ...]) -> list[str]:
    """Return open_clip's names that match any of the patterns, or all if there are none.

    Args:
        patterns: parts of names, or names with wildcards (`ViT-B*`), in any case.

    Raises:
        UserError: a pattern matches no name.
    """
    names: list[str] = import_open_clip().list_models()
    matches = set() if patterns else set(names)
    for pattern in patterns:
        lower = OPENAI_NAMES.get(pattern, pattern).lower()
        wildcard = lower if set("*?[") & set(lower) else f"*{lower}*"
        found = [name for name in names if fnmatchcase(name.lower(), wildcard)]
        if not found:
            raise UserError(f"no model of open_clip matches {pattern!r}{did_you_mean(pattern, names)}")
        matches.update(found)
    return [name for name in names if name in matches]


def describe_model(name: str) -> ModelDescription:
    """Describe a model of open_clip, without weights and network."""
    model_config = resolve_model(name).model_config
    needs = ("transformers",) if needs_transformers(model_config["text_cfg"]) else ()
    same_shapes = {key: value for key, value in model_config.items() if key != "quick_gelu"}
    prompts, reason, shapes = _describe(json.dumps(same_shapes, sort_keys=True))
    return ModelDescription(name, prompts, reason, needs, shapes, _tags(name))


@cache  # models that differ in the activation are built once
def _describe(model_config: str) -> tuple[Prompts, str, Shapes]:
    """Return towers that take prompts, why not both do, and sizes of the model with this config (JSON)."""
    values = json.loads(model_config)
    text_config = values["text_cfg"]
    if "multimodal_cfg" in values:
        return "refused", COCA, Shapes()
    if text_name := text_config.get("hf_model_name"):
        if text_name not in _BERT_TOWERS:
            return "refused", "the text tower is not an encoder like BertModel", Shapes()
        values["text_cfg"] = {}
    try:
        model: Any = ModelSource(values).build(quick_gelu=False, device="meta")
        image, text = describe_image_tower(model.visual), describe_text_tower(model)[1]
    except UnsupportedTower as error:
        return "refused", str(error), Shapes()
    except Exception as error:  # models of other libraries raise anything
        return "refused", f"it cannot be built: {error}", Shapes()
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        return "refused", f"its images are not square, but {height}x{width}", Shapes()
    image_shapes = {
        "image_size": height,
        "image_layers": len(image.blocks) or None,
        "image_width": image.blocks[0].width if image.blocks else None,
        "embed_dim": values["embed_dim"],
    }
    text_shapes = {
        "parameters": sum(value.numel() for value in model.parameters()),
        "text_layers": len(text.blocks),
        "text_width": text.token_embedding.embedding_dim,
        "context_length": text_config.get("context_length", 77),
    }
    shapes = Shapes(**image_shapes, **({} if text_name else text_shapes))
    return ("both", "", shapes) if image.blocks else ("text", image.reason, shapes)


def _tags(name: str) -> tuple[Tag, ...]:
    open_clip = import_open_clip()
    tags = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        defaults, recorded = asdict(open_clip.transform.PreprocessCfg()), open_clip.get_pretrained_cfg(name, tag)
        values = open_clip.transform.merge_preprocess_dict(defaults, recorded)
        mean, std = tuple(values["mean"]), tuple(values["std"])
        tags.append(Tag(tag, values["resize_mode"], values["interpolation"], mean, std))
    return tuple(tags)
