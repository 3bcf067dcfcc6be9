"""Several models on one CLIP, whose weights are in memory once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache

from pipeline.clip.load import ClipIdentity, clip_identity
from pipeline.clip.precision import uses_bfloat16
from pipeline.clip.towers import ClipTowers
from pipeline.config import ClipConfig, values_affecting
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.methods.registry import get_method
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import ModelOptions

NamedAdapters = Mapping[str, tuple[TrainedAdapter, ModelOptions]]
"""Name of a model → its adapter and options, from `pipeline.prediction.load.read_model`."""


def check_one_clip(adapters: NamedAdapters) -> None:
    """Raises: UserError: two models cannot share a CLIP, or a CLIP is missing."""

    identity = cache(clip_identity)  # it reads the weights
    reference, *names = adapters
    expected = _clip_properties(*adapters[reference], identity)
    for name in names:
        for key, value in _clip_properties(*adapters[name], identity).items():
            if value != expected[key]:
                raise UserError(
                    f"models {reference!r} and {name!r} cannot share a CLIP: their {key} differ "
                    f"({expected[key]:.80}, {value:.80}); serve them separately, on two ports"
                )


def load_models(adapters: NamedAdapters, device: str) -> dict[str, TrainedModel]:
    """Load models that passed `check_one_clip`, with shared frozen weights. If the device computes in bfloat16, methods
    that train weights share a second CLIP in float32, as in training.

    Raises:
        UserError: as `TrainedModel`.
    """
    towers: dict[bool, ClipTowers] = {}
    models = {}
    for name, (adapter, options) in adapters.items():
        trains_weights = get_method(adapter.method).trains_weights
        if trains_weights not in towers:
            loaded = next(iter(towers.values()), None)
            if loaded is None or uses_bfloat16(loaded, _clip(adapter, options).precision, inference=True):
                loaded = adapter.towers(device, options.pretrained, options.precision)
            towers[trains_weights] = loaded
        models[name] = TrainedModel(adapter, options, device, towers=towers[trains_weights])
    return models


def _clip_properties(
    adapter: TrainedAdapter, options: ModelOptions, identity: Callable[[ClipConfig], ClipIdentity]
) -> dict[str, str]:
    """Return the properties that must be equal in models that share a CLIP."""
    clip = _clip(adapter, options)
    loaded = identity(ClipConfig(**values_affecting(clip, "clip")))
    return {
        "weights": adapter.weights,
        "model configs": loaded.model_config,
        **{f"clip.{name}": str(value) for name, value in json.loads(loaded.preprocessing).items()},
        "clip.precision": clip.precision,
        "mmap.text_prompt_position": adapter.config.mmap.text_prompt_position,
    }


def _clip(adapter: TrainedAdapter, options: ModelOptions) -> ClipConfig:
    return adapter.config.clip.with_weights(options.pretrained).with_precision(options.precision)
