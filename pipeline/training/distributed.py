"""Data-parallel training: which images and classes of a step a worker takes, and how the workers' shard_slices add up;
which batches it evaluates.

Every worker knows the whole step (all tasks' batches, all classes) and computes a share of its images and of its class
texts. Text features and gradients are added up, so the numbers are those of one worker at the same total batch, up to
the rounding of another order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from pipeline.clip.class_tokens import counts_in_range


@dataclass(frozen=True)
class DistributedShard:
    """Worker `rank` of `world_size` workers."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def current() -> DistributedShard:
        """By torch.distributed's process group; the whole where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return DistributedShard()
        return DistributedShard(dist.get_rank(), dist.get_world_size())

    @property
    def is_main_process(self) -> bool:
        """Whether this worker is the one that reports and writes files."""
        return self.rank == 0

    def row_range(self, count: int) -> tuple[int, int]:
        """This worker's part of `count` rows: from, to."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def shard_slices(self, rows_per_task: Sequence[int]) -> list[slice]:
        """Of each task's rows, those that are this worker's: all tasks' rows in a row are divided, not each task's."""
        before, until = (counts_in_range(rows_per_task, 0, bound) for bound in self.row_range(sum(rows_per_task)))
        return [slice(start, stop) for start, stop in zip(before, until)]

    def all_gather_rows(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """All workers' rows (count, ...) from each one's own; a gradient goes back to the worker whose row it is."""
        if self.world_size == 1:
            return own
        start, stop = self.row_range(count)
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        before, after = own.new_zeros(start, *own.shape[1:]), own.new_zeros(count - stop, *own.shape[1:])
        return _summed(torch.cat([before, own, after]))

    def all_reduce_sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over the workers, in one exchange."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))

    def gather_interleaved(self, own: list[Any]) -> list[Any]:
        """All workers' items, where item i of worker r is the (i · world + r)-th."""
        if self.world_size == 1:
            return own
        of_all: list[Any] = [None] * self.world_size
        dist.all_gather_object(of_all, own)
        nothing = object()
        return [item for turn in zip_longest(*of_all, fillvalue=nothing) for item in turn if item is not nothing]


class _Sum(torch.autograd.Function):
    """Sum over the workers. Each one's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(context, gradient.contiguous())


_summed: Callable[[torch.Tensor], torch.Tensor] = _Sum.apply
