"""Weights under the names of an open_clip model: from the names of open_clip, of OpenAI or of Hugging Face."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch

from pipeline.clip.files.checkpoint import Checkpoint, State
from pipeline.clip.files.hugging_face import TOKEN_EMBEDDING, to_open_clip_state
from pipeline.clip.files.source import ModelSource, import_open_clip
from pipeline.clip.files.weights import Weights
from pipeline.config import brings_weights
from pipeline.errors import UserError

_CONSTANTS = (".position_ids", "attn_mask")
"""Ends of names of tensors that a model makes itself."""


def fit_to_model(
    checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor], weights: Weights, source: ModelSource, model: str
) -> State:
    """Return the weights under the names of a model.

    Args:
        expected: the model's state dict, of which only names and shapes matter.
        model: value of `clip.model`, for messages.

    Raises:
        UserError: they do not fit.
    """
    option = f"{weights.option} does not fit clip.model={model}"
    shapes = {name: value.to("meta") for name, value in checkpoint.state.items()}  # no memory, whatever is expanded
    try:
        named = _named_as(expected, shapes)
    except RuntimeError as error:
        raise UserError(f"{option}: {str(error).partition(chr(10))[0]:.200}") from None
    if misfit := _misfit(named, expected):
        raise UserError(
            f"{option}: {misfit}; {_remedy(checkpoint, named, expected, model, weights.option.endswith(f'={model}'))}"
        )
    sizes = {
        "input_resolution": source.model_config["vision_cfg"].get("image_size", 224),
        "context_length": source.model_config["text_cfg"].get("context_length", 77),
        "vocab_size": source.model_config["text_cfg"].get("vocab_size", 49408),
    }
    for name, number in checkpoint.numbers.items():
        if number != sizes[name]:
            raise UserError(f"{option}: {name} is {number} there, {sizes[name]} in the model; correct the model config")
    return _named_as(expected, checkpoint.state)


def _named_as(expected: Mapping[str, torch.Tensor], state: State) -> State:
    """Return weights under the names of a model: from Hugging Face's names, and with `text.` before the names of the
    text tower or without it, as the model has them. Constants are left out."""
    if TOKEN_EMBEDDING in state:
        state = to_open_clip_state(state)
    named: State = {}
    for name, value in state.items():
        other = name.removeprefix("text.") if name.startswith("text.") else f"text.{name}"
        if name not in expected and other in expected and other not in state:
            name = other
        elif name not in expected and name.endswith(_CONSTANTS):
            continue
        if name in expected and value.numel() == expected[name].numel() == 1:  # a logit_scale of shape () or (1,)
            value = value.reshape(expected[name].shape)
        named[name] = value
    return named


def _misfit(state: State, expected: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first misfit in words, or None."""
    shapes = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if shapes:
        first = shapes[0]
        others = f" (and {len(shapes) - 1} other tensors)" if len(shapes) > 1 else ""
        return f"{first} is {tuple(state[first].shape)} there, {tuple(expected[first].shape)} in the model{others}"
    for names, fact in ((missing, f"of its {len(expected)} tensors are missing"), (unexpected, "tensors are not its")):
        if names:
            text = f"{len(names)} {fact} ({_examples(names)})"
            if missing and unexpected:
                text += f"; the file has {len(unexpected)} others ({_examples(unexpected)})"
            return text
    return None


def _examples(names: Collection[str]) -> str:
    return ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])])


def _remedy(
    checkpoint: Checkpoint, state: State, expected: Mapping[str, torch.Tensor], model: str, has_its_weights: bool
) -> str:
    if names := _fitting_models(checkpoint, state):
        return f"use clip.model={' or '.join(names[:3])}"
    positions = "visual.positional_embedding"
    if positions in state and positions in expected and not _misfit(state | {positions: expected[positions]}, expected):
        side = math.isqrt(len(state[positions])) * state["visual.conv1.weight"].shape[-1]
        return f"set image_size to {side} in the model config (clip.image_size then resizes the position embedding)"
    if brings_weights(model) and not has_its_weights:
        return f"set clip.pretrained to {model} for its own weights"
    return "give the weights of a whole CLIP, and as clip.model the one that they were trained as"


def _fitting_models(checkpoint: Checkpoint, state: State) -> list[str]:
    """Return open_clip's models of its own towers that weights fit; of both activations, unless it is known."""
    if "visual.conv1.weight" not in state:
        return []
    open_clip, names = import_open_clip(), []
    width = state["visual.conv1.weight"].shape[0]
    widths = (width, 2 * width)  # of a ViT, a ResNet
    for name in open_clip.list_models():
        source = ModelSource(open_clip.get_model_config(name), name)
        vision, text = source.model_config["vision_cfg"], source.model_config["text_cfg"]
        if "timm_model_name" in vision or "hf_model_name" in text or vision.get("width", 768) not in widths:
            continue
        quick_gelu = bool(source.model_config.get("quick_gelu"))
        if checkpoint.quick_gelu in (None, quick_gelu):
            expected = source.build(quick_gelu, "meta").state_dict()
            shapes = {key: value.to("meta") for key, value in checkpoint.state.items()}
            if not _misfit(_named_as(expected, shapes), expected):
                names.append(name)
    return names


def content_hash(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of weights by their names and values in float32, which is independent of the file's format and
    of its precision."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {list(value.shape)}\n".encode())
        value = value.to(torch.float32) if value.is_floating_point() else value
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
