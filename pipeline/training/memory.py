"""Out of memory, said with what to change."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from pipeline.errors import UserError


class explain_out_of_memory(AbstractContextManager[object]):
    """Reusable context. Raises: UserError: the memory did not suffice for what is done in it; `remedy` says more."""

    def __init__(self, device: torch.device, remedy: str):
        self._device, self._remedy = device, remedy

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            return
        where = "this machine"
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            where = f"{torch.cuda.get_device_name(self._device)} ({total / 2**30:.0f} GiB, {free / 2**30:.1f} free)"
        raise UserError(f"{where} is out of memory during {self._remedy}") from error
