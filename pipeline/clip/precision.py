"""Which arithmetic the towers use: float32, or bfloat16 autocast; prompts and optimizer state are float32 always."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from pipeline.lazy_torch import torch


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether bfloat16 is asked for, or `auto` finds a GPU that has it."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if uses_bfloat16(device, precision) else nullcontext()
