"""Several models on one CLIP: which can be, and loading them so that its weights are in memory once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch

from pipeline.clip.load import clip_identity
from pipeline.clip.precision import uses_bfloat16
from pipeline.clip.towers import ClipTowers
from pipeline.config import ClipConfig
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.methods.registry import get_method
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import ModelOptions

Trained = Mapping[str, tuple[TrainedAdapter, ModelOptions]]
"""Name of a model → what `pipeline.prediction.load.read_model` found."""


def check_one_clip(trained: Trained) -> None:
    """Raises: UserError: two models that cannot share a CLIP, or a CLIP that is not there."""

    @cache  # for it reads the whole file of weights
    def model_config(model: str, pretrained: str | None, quick_gelu: bool | None) -> str:
        return clip_identity(ClipConfig(model=model, pretrained=pretrained, quick_gelu=quick_gelu)).model_config

    first, *others = trained
    expected = _clip_of(*trained[first], model_config)
    for name in others:
        for what, value in _clip_of(*trained[name], model_config).items():
            if value != expected[what]:
                raise UserError(
                    f"models {first!r} and {name!r} cannot share a CLIP: their {what} differ: "
                    f"{expected[what]:.80}, {value:.80}. Serve them apart, on two ports"
                )


def load_models(trained: Trained, device: str) -> dict[str, TrainedModel]:
    """Models that `check_one_clip` has seen, which share the frozen weights. Where the device computes in bfloat16,
    methods that train weights share a second CLIP in float32, as it is in their training.

    Raises:
        UserError: as `TrainedModel`.
    """
    towers: dict[bool, ClipTowers] = {}
    models = {}
    for name, (prompts, options) in trained.items():
        cast = uses_bfloat16(torch.device(device), prompts.config.clip.precision)
        in_float32 = get_method(prompts.method).trains_weights and cast
        if in_float32 not in towers:
            towers[in_float32] = prompts.towers(device, options.pretrained)
        models[name] = TrainedModel(prompts, options, device, towers=towers[in_float32])
    return models


def _clip_of(
    prompts: TrainedAdapter, options: ModelOptions, model_config: Callable[[str, str | None, bool | None], str]
) -> dict[str, str]:
    """What must be the same in models that share a CLIP."""
    clip = prompts.config.clip
    return {
        "weights": prompts.weights,
        "clip.model": clip.model,
        "model configs": model_config(clip.model, options.pretrained or clip.pretrained, clip.quick_gelu),
        "clip.precision": clip.precision,
        "mmap.text_prompt_position": prompts.config.mmap.text_prompt_position,
    }
