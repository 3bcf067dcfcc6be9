"""Actionable out-of-memory errors."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from pipeline.errors import UserError


class explain_out_of_memory(AbstractContextManager[object]):
    """Reusable context manager. Raises: UserError: out of memory; `remedy` says during what, and what to change."""

    def __init__(self, device: torch.device, remedy: str):
        self._device, self._remedy = device, remedy

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            return
        device = "this machine"
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            device = f"{torch.cuda.get_device_name(self._device)} ({total / 2**30:.0f} GiB, {free / 2**30:.1f} free)"
        raise UserError(f"{device} is out of memory during {self._remedy}") from error
