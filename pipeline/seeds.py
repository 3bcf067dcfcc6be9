"""Random numbers as functions of a seed and a purpose, identical on every machine."""

from __future__ import annotations

import hashlib

from pipeline.lazy_torch import torch


def derive_seed(seed: int, *names: str) -> int:
    """Derive a seed for one purpose, independent of all others."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:7], "big")


def normal(*shape: int, std: float, seed: int, purpose: str) -> torch.Tensor:
    """Sample a float32 tensor from N(0, std²)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, purpose))) * std


def uniform(*shape: int, bound: float, seed: int, purpose: str) -> torch.Tensor:
    """Sample a float32 tensor uniformly from [-bound, bound)."""
    unit = torch.rand(shape, generator=torch.Generator().manual_seed(derive_seed(seed, purpose)))
    return (2 * unit - 1) * bound
