"""Preprocessing of a CLIP's images: as the config says, else as recorded for the weights, else OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from pipeline.config import BUILTIN_DIGITS, ClipConfig
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError

_DEFAULT_IMAGE_SIZE = 224
"""open_clip's, of a model config without one."""
_CHOSEN_BY_WEIGHTS = ("resize_mode", "interpolation", "mean", "std")


def resolve_preprocessing(
    config: ClipConfig, model_config: Mapping[str, Any], recorded: Mapping[str, Any]
) -> Preprocessing:
    """Resolve the preprocessing as open_clip does: the image size is the model's, all else that of the weights.

    Args:
        model_config: open_clip's model config.
        recorded: what is recorded for weights and model, in terms of open_clip's preprocess_cfg.

    Raises:
        UserError: the model's images are not square; what is recorded cannot be done.
    """
    size = model_config["vision_cfg"].get("image_size", _DEFAULT_IMAGE_SIZE)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"clip.model={config.model}: its images are not square, but {size}: use another model")
    values: dict[str, Any] = {"image_size": sides.pop()}
    for name in Preprocessing.__dataclass_fields__:
        if (option := getattr(config, name)) is not None:
            values[name] = option
        elif name != "image_size" and recorded.get(name) is not None:
            values[name] = _as_here(name, recorded[name])
    try:
        return TypeAdapter(Preprocessing).validate_python(values)
    except ValidationError as error:
        details = error.errors()[0]
        name = str(details["loc"][0])
        raise UserError(
            f"clip.pretrained={config.pretrained}: its recorded preprocessing has {name}={values[name]!r} "
            f"({details['msg']}): set clip.{name}"
        ) from None


def is_left_to_weights(config: ClipConfig) -> bool:
    """Return whether what is recorded for the weights decides a part of the preprocessing."""
    return any(getattr(config, name) is None for name in Preprocessing.__dataclass_fields__ if name != "image_size")


def preprocessing_notes(
    config: ClipConfig, preprocessing: Preprocessing, recorded: Mapping[str, Any], recorded_for_model: Mapping[str, Any]
) -> list[str]:
    """Return notes for the user on what is assumed, where the config does not say and nothing is recorded.

    Args:
        recorded: what is recorded for the weights.
        recorded_for_model: what is recorded for the architecture.
    """
    assumed = [name for name in _CHOSEN_BY_WEIGHTS if getattr(config, name) is None and recorded.get(name) is None]
    if config.pretrained in (None, BUILTIN_DIGITS) or not assumed:
        return []
    values = ", ".join(f"clip.{name} {_in_words(getattr(preprocessing, name))}" for name in assumed)
    owner = "that of clip.model, else OpenAI's" if recorded_for_model else "OpenAI's"
    return [
        f"clip.pretrained={config.pretrained} has no record of its preprocessing: taking {owner}: {values}. If the "
        "weights were trained with another, set these options (docs/models.md)"
    ]


def resize_input(model: Any, image_size: int, name: str) -> None:
    """Change the size of the images that an open_clip model takes, with its position embedding resized as by
    open_clip.create_model(force_image_size=...).

    Args:
        model: the model, in place.
        name: value of `clip.model`, for messages.

    Raises:
        UserError: the model takes no images of this size.
    """
    visual = model.visual
    if _takes(visual, image_size):
        return
    is_timm, is_vit = hasattr(visual, "set_input_size"), hasattr(visual, "grid_size")
    patches = getattr(visual.trunk, "patch_embed", None) if is_timm else visual
    patch_size = getattr(patches, "patch_size", (1, 1))[0]
    if not is_timm and not is_vit:
        raise _impossible_size(image_size, name, f"a {type(visual).__name__} has one size")
    if image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise _impossible_size(image_size, name, f"not a multiple of its patch size {patch_size}, such as {nearest}")
    if is_timm:
        visual.set_input_size(image_size)
        return
    from open_clip.model import resize_pos_embed

    visual.image_size, visual.grid_size = (image_size,) * 2, (image_size // patch_size,) * 2
    state = {"visual.positional_embedding": visual.positional_embedding.detach()}
    resize_pos_embed(state, model)
    visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])


def check_input_size(model: Any, image_size: int, name: str) -> None:
    """Raises: UserError: a model on torch's meta device takes no images of this size; `name` as in `resize_input`."""
    if _takes(model.visual, image_size):
        return
    try:
        resize_input(model, image_size, name)
        model.visual(torch.empty(1, 3, image_size, image_size, device="meta"))
    except UserError:
        raise
    except Exception as error:  # models of other libraries raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _impossible_size(image_size, name, f"{reason:.200}") from None


def _takes(visual: Any, image_size: int) -> bool:
    return visual.image_size in (image_size, (image_size, image_size))


def _impossible_size(image_size: int, name: str, reason: str) -> UserError:
    return UserError(
        f"clip.image_size={image_size} is not possible for clip.model={name} ({reason}): use another, or none for the "
        "model's own"
    )


def _as_here(name: str, value: Any) -> Any:
    if name == "interpolation" and value == "random":  # in open_clip bicubic, except when it trains
        return "bicubic"
    if name in ("mean", "std") and isinstance(value, int | float):
        return (value,) * 3
    return tuple(value) if isinstance(value, list) else value


def _in_words(value: Any) -> str:
    return " ".join(f"{number:.4g}" for number in value) if isinstance(value, tuple) else str(value)
