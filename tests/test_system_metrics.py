"""System metrics of a worker's machine."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from pipeline.runtime import system_metrics
from pipeline.runtime.system_metrics import EVERY_S, SystemSampler


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    clock = SimpleNamespace(value=100.0)
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: clock.value)
    return clock


def test_samples_are_taken_every_ten_seconds_and_at_the_end(clock):
    sampler, steps = SystemSampler(), []
    for passed in range(0, 35):
        clock.value = 100 + passed
        if sample := sampler.sample(final=passed == 34):
            steps.append(sample[0])
    assert steps == [10, 20, 30, 34] and EVERY_S == 10
    _, values = sample
    assert values["system/process_memory_usage_megabytes"] > 10
    assert 0 < values["system/system_memory_usage_percentage"] < 100
    assert values["system/cpu_utilization_percentage"] >= 0


def test_a_machine_without_a_gpu_driver_tells_the_rest():
    _, values = SystemSampler().sample(final=True)
    assert not [name for name in values if "gpu" in name]


@pytest.mark.parametrize(("visible", "expected"), [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-b", ["GPU-b"]), ("", [])])
def test_gpus_are_those_that_the_process_may_use(monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    requested = []

    def power(gpu):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda number: requested.append(number),
        "nvmlDeviceGetHandleByUUID": lambda uuid: requested.append(uuid.decode()),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=3e9, total=12e9),
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=71),
        "nvmlDeviceGetPowerUsage": power,
    }.items():
        monkeypatch.setattr(pynvml, name, function)
    _, values = SystemSampler().sample(final=True)
    assert requested == expected
    of_gpus = {name: value for name, value in values.items() if "gpu" in name}
    assert len(of_gpus) == 3 * len(expected)  # but not the power, which this card does not tell
    for number in range(len(expected)):
        assert of_gpus[f"system/gpu_{number}_memory_usage_megabytes"] == 3000
        assert of_gpus[f"system/gpu_{number}_memory_usage_percentage"] == 25
        assert of_gpus[f"system/gpu_{number}_utilization_percentage"] == 71
