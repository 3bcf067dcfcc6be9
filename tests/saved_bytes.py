"""Memory that autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_bytes(towers: torch.nn.Module, encode: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that autograd saves in a forward pass, without weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*towers.parameters(), *towers.buffers())}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        features = encode()
    del features
    return sum(saved.values())
