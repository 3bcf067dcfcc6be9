"""Data-parallel training and evaluation: each worker's shard of a step's images and classes, and their reduction.

Every worker knows the whole step (all tasks' batches, all classes) and computes a shard of its images and of its class
texts. Text features are gathered and gradients summed, so the results are those of one worker at the same total batch,
up to rounding in another order of sums.
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
    """Shard of worker `rank` of `world_size` workers."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def current() -> DistributedShard:
        """Return this process's shard in torch.distributed's process group, or the only one without a group."""
        if not (dist.is_available() and dist.is_initialized()):
            return DistributedShard()
        return DistributedShard(dist.get_rank(), dist.get_world_size())

    @property
    def is_main_process(self) -> bool:
        """True for the worker that reports and writes files."""
        return self.rank == 0

    def row_range(self, count: int) -> tuple[int, int]:
        """Return start and stop of this worker's part of `count` rows."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def shard_slices(self, rows_per_task: Sequence[int]) -> list[slice]:
        """Return this worker's slice of each task's rows, where all tasks' rows are divided as one sequence."""
        starts, stops = (counts_in_range(rows_per_task, 0, bound) for bound in self.row_range(sum(rows_per_task)))
        return [slice(start, stop) for start, stop in zip(starts, stops)]

    def all_gather_rows(self, local: torch.Tensor, count: int) -> torch.Tensor:
        """Gather all workers' rows (count, ...); gradients flow back to the worker of each row."""
        if self.world_size == 1:
            return local
        start, stop = self.row_range(count)
        local = local.to(torch.promote_types(local.dtype, torch.float32))
        head, tail = local.new_zeros(start, *local.shape[1:]), local.new_zeros(count - stop, *local.shape[1:])
        return _all_reduce(torch.cat([head, local, tail]))

    def all_reduce_sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the workers, in one all-reduce."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))

    def gather_interleaved(self, local: list[Any]) -> list[Any]:
        """Gather all workers' items; item i of worker r is the (i · world_size + r)-th."""
        if self.world_size == 1:
            return local
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, local)
        missing = object()
        return [item for turn in zip_longest(*gathered, fillvalue=missing) for item in turn if item is not missing]


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is the sum of the workers' gradients, since each worker's loss depends on it."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(context, gradient.contiguous())


_all_reduce: Callable[[torch.Tensor], torch.Tensor] = _Sum.apply
