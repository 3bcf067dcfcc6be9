"""Precision of the towers: float32, or bfloat16 autocast; trained parameters and optimizer state are always float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from pipeline.lazy_torch import torch


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Return True if `precision` is bfloat16, or is auto on a GPU that supports it."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if uses_bfloat16(device, precision) else nullcontext()
