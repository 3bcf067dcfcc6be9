"""Bounded memory of the towers: rows in chunks, recomputed in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.clip.blocks import Block


def checkpointed_chunks(
    encode: Callable[[int, int], torch.Tensor], num_rows: int, bytes_per_row: int, memory_gib: float
) -> torch.Tensor:
    """Return encode(0, num_rows), in as few equal chunks as fit `memory_gib`, recomputed backwards."""
    rows_per_chunk = max(memory_gib * 2**30 / bytes_per_row, 1)
    if num_rows <= rows_per_chunk:
        return encode(0, num_rows)
    num_chunks = math.ceil(num_rows / math.floor(rows_per_chunk))
    bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
    # Without a graph, checkpoint() only calls.
    return torch.cat(
        [
            checkpoint(encode, start, stop, use_reentrant=False, preserve_rng_state=False)
            for start, stop in zip(bounds, bounds[1:])
        ]
    )


def activation_bytes(
    blocks: Sequence[Block], num_tokens: int, num_keys: int, prototype: torch.Tensor, num_layers: int | None = None
) -> int:
    """Return the bytes that a row of `num_tokens` tokens, whose queries see `num_keys` keys, keeps for its backward
    pass or, without one, needs at a time: less than two layers' worth.

    Args:
        prototype: a tensor with the device and the dtype of the LayerNorms.
        num_layers: number of layers whose activations are kept; None: all blocks'.
    """
    width, hidden = blocks[0].width, blocks[0].mlp_values
    itemsize = 2 if torch.is_autocast_enabled(prototype.device.type) else prototype.dtype.itemsize
    norms = 2 * num_tokens * width * prototype.dtype.itemsize
    attention = 2 * (num_tokens + num_keys) * width  # query, attended; keys, values
    if prototype.device.type == "cpu":  # `attention` computes in float32
        attention *= prototype.dtype.itemsize // itemsize
    values = attention + num_tokens * hidden  # of the MLP
    if any(block.trains_matrices for block in blocks):
        values += num_tokens * (3 * width + hidden)  # inputs of the trained matrices
    elif any(block.has_update for block in blocks):
        values += 2 * num_tokens * width  # its inputs
    return (norms + values * itemsize) * ((num_layers or len(blocks)) if torch.is_grad_enabled() else 2)


def measured_activation_bytes(module: nn.Module, row: torch.Tensor) -> int:
    """Return the bytes that a module of unknown layers keeps for the backward pass of one row (1, ...) or, without one,
    needs at a time, from the outputs of its layers in a forward pass of that row."""
    sizes: list[int] = []

    def record(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    handles = [layer.register_forward_hook(record) for layer in module.modules() if not list(layer.children())]
    try:
        with torch.no_grad():
            module(row)
    finally:
        for handle in handles:
            handle.remove()
    return 2 * sum(sizes) if torch.is_grad_enabled() else 4 * max(sizes)
