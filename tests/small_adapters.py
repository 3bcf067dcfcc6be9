"""Untrained adapters of the demo's tiny CLIP, for tests of prediction."""

from __future__ import annotations

from pipeline.clip.load import load_clip
from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, MmapConfig
from pipeline.methods.adapter_file import TrainedAdapter, merge_adapters
from pipeline.methods.registry import METHODS

DIGITS = ["seven", "two", "nine", "zero", "four", "eight", "one", "six", "three", "five"]
"""Not in alphabetical order, so that sorted labels are noticed."""


def trained(method: str, *groups: dict[str, list[str]]) -> TrainedAdapter:
    """Build an adapter with initial parameters."""
    config = Config(
        clip=ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS, template="a photo of the digit {}."),
        mmap=MmapConfig(prompt_length=2, source_rows=2),
    )
    towers = load_clip(config.clip)
    adapters = []
    for seed, group in enumerate(groups):
        module = METHODS[method].build(config.model_copy(update={"seed": seed}), towers, group)
        adapters.append(TrainedAdapter.on_towers(towers, method, config, (group,), (module.state_dict(),)))
    return merge_adapters(adapters)
