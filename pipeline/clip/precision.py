"""Precision of the towers: float32, or bfloat16 autocast; trained parameters and optimizer state are always float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from pipeline.lazy_torch import torch

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers

LARGE_EMBED_DIM = 512
"""Of ViT-B and larger. `auto` takes bfloat16 on CPUs for these alone: in small towers, casts take most of the time."""


def uses_bfloat16(towers: ClipTowers, precision: str, inference: bool = False) -> bool:
    """Return True if `precision` is bfloat16; or auto on a GPU that supports it; or auto for the inference of a large
    CLIP on a CPU that multiplies bfloat16 in tiles (AMX). On a CPU, `auto` trains in float32, so that the trained
    weights do not depend on the processor.

    Args:
        inference: evaluation, prediction or serving.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if towers.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    has_tiles = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return inference and has_tiles and bool(towers.embed_dim >= LARGE_EMBED_DIM)


def autocast(towers: ClipTowers, precision: str, inference: bool = False) -> AbstractContextManager[object]:
    """Return the context in which the towers compute; arguments as of `uses_bfloat16`."""
    is_cast = uses_bfloat16(towers, precision, inference)
    return torch.autocast(towers.device.type, torch.bfloat16) if is_cast else nullcontext()
