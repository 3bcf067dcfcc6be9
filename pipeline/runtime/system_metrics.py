"""System metrics of a worker's machine, under the names that MLflow's UI shows."""

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
    """Samples this process, its machine and its visible GPUs.

    A sample takes a fraction of a millisecond, so it is taken between two steps, without a thread.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started = time.monotonic()
        self._next = self._started + EVERY_S
        self._gpus = _visible_gpus()
        psutil.cpu_percent()  # starts the measurement

    def sample(self, final: bool = False) -> tuple[int, dict[str, float]] | None:
        """Return (seconds since the start, name → value) if the last sample is EVERY_S old or this is the final one."""
        time_now = time.monotonic()
        if time_now < self._next and not final:
            return None
        self._next = time_now + EVERY_S
        memory = psutil.virtual_memory()
        metrics = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": self._process.memory_info().rss / MB,
        }
        for number, gpu in enumerate(self._gpus):
            metrics |= {f"gpu_{number}_{name}": value for name, value in _gpu_metrics(gpu).items()}
        return round(time_now - self._started), {f"system/{name}": value for name, value in metrics.items()}


def _visible_gpus() -> list[Any]:
    """Return NVML handles of the GPUs in CUDA_VISIBLE_DEVICES; none without an NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible is not None else [str(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name.encode())
            for name in names
            if name
        ]
    except pynvml.NVMLError:
        return []


def _gpu_metrics(gpu: Any) -> dict[str, float]:
    """Return what the driver reports; some drivers lack a value."""
    import pynvml

    metrics: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        metrics["memory_usage_megabytes"] = memory.used / MB
        metrics["memory_usage_percentage"] = 100 * memory.used / memory.total
    with suppress(pynvml.NVMLError):
        metrics["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with suppress(pynvml.NVMLError):
        metrics["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return metrics
