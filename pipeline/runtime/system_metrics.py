"""How busy a worker's machine is, under the names by which MLflow's page shows system metrics."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

import psutil

EVERY_S = 10.0
"""MLflow's own interval."""
MB = 1e6


class SystemSampler:
    """Of this process, its machine, and the GPUs that it may use.

    A look takes a fraction of a millisecond, so it is taken between two steps, in no thread of its own.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._began = time.monotonic()
        self._next = self._began + EVERY_S
        self._gpus = _visible_gpus()
        psutil.cpu_percent()  # from now on

    def look(self, last: bool = False) -> tuple[int, dict[str, float]] | None:
        """(seconds since the beginning, name → value), if the last look is EVERY_S ago, or this is to be the last."""
        now = time.monotonic()
        if now < self._next and not last:
            return None
        self._next = now + EVERY_S
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": self._process.memory_info().rss / MB,
        }
        for number, gpu in enumerate(self._gpus):
            found |= {f"gpu_{number}_{name}": value for name, value in _of_gpu(gpu).items()}
        return round(now - self._began), {f"system/{name}": value for name, value in found.items()}


def _visible_gpus() -> list[Any]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves; none where there is no such driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        asked = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = asked.split(",") if asked is not None else [str(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name.encode())
            for name in names
            if name
        ]
    except pynvml.NVMLError:
        return []


def _of_gpu(gpu: Any) -> dict[str, float]:
    """What the driver tells of it; some do not tell all."""
    import pynvml

    found: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        found["memory_usage_megabytes"] = memory.used / MB
        found["memory_usage_percentage"] = 100 * memory.used / memory.total
    with suppress(pynvml.NVMLError):
        found["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with suppress(pynvml.NVMLError):
        found["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return found
