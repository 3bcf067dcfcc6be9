"""Shared code of the benchmarks: models, steps of ours and of the reference, timing, FLOPs, memory, result files."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PRECISIONS = ("float32", "bfloat16")
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from reference_towers import reference_encode_image, reference_encode_text  # noqa: E402

from pipeline.clip.class_tokens import class_tokens  # noqa: E402
from pipeline.clip.torchvision_compat import ensure_torchvision  # noqa: E402
from pipeline.clip.towers import ClipTowers  # noqa: E402
from pipeline.config import ClipConfig, MmapConfig  # noqa: E402
from pipeline.data.index import read_class_names  # noqa: E402
from pipeline.data.preprocessing import Preprocessing  # noqa: E402
from pipeline.methods.mmap import GroupMmap, MmapShape  # noqa: E402

ensure_torchvision()

import open_clip  # noqa: E402

TEMPLATE = "a photo of a {}."
Name = TypeVar("Name", bound=Hashable)
Step = Callable[[], list[torch.Tensor]]
"""Runs a forward and backward pass and returns the gradients of the trained parameters."""


def job_environment() -> dict[str, str]:
    """Return the environment of a job that a benchmark starts: this checkout, and a Ray without a token."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def load(name: str, device: torch.device, precision: str = "float32") -> tuple[torch.nn.Module, ClipTowers]:
    """Load open_clip's model with random weights, the same in every process, and our towers, like load_clip."""
    torch.manual_seed(1)
    model = open_clip.create_model(name).eval().to(device)
    gib = ClipConfig.model_fields["activation_memory_gib"].default
    preprocessing = Preprocessing(open_clip.get_model_config(name)["vision_cfg"]["image_size"])
    towers = ClipTowers(model, open_clip.get_tokenizer(name), preprocessing, activation_memory_gib=gib).to(device)
    if precision == "bfloat16":
        towers.cast_weights_to_bfloat16()
    return model, towers


def class_names(count: int) -> list[str]:
    """Return Office-Home's 65 class names, MiniDomainNet's 126, or another number by numbering those."""
    folder = REPOSITORY / "configs" / "class_names"
    file = {65: "office_home", 126: "mini_domainnet"}.get(count, "mini_domainnet")
    names = list(read_class_names(folder / f"{file}.txt").values())
    return [names[i % len(names)] + (f" {i // len(names)}" if i >= len(names) else "") for i in range(count)]


def random_batch(towers: ClipTowers, num_images: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    size, device = towers.preprocessing.image_size, towers.device
    labels = torch.arange(num_images, device=device) % num_classes
    return torch.randn(num_images, 3, size, size, device=device), labels


def our_step(
    towers: ClipTowers,
    prompts: GroupMmap,
    class_names: Sequence[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: str = "float32",
) -> Step:
    """Return a step of all tasks at once; images and labels are ordered by task, equally many of each."""
    num_tasks, num_classes = len(prompts.tasks), len(class_names)
    batch = len(images) // num_tasks
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [class_names] * num_tasks).to(towers.device)
    parameters = list(prompts.parameters())

    def step() -> list[torch.Tensor]:
        with autocast(towers.device, precision):
            adaptation = prompts()
            x = adaptation.encode_image(towers, images, [batch] * num_tasks).split(batch)
            z = adaptation.encode_text(towers, tokens).split(num_classes)
        losses = [F.cross_entropy(towers.logits(*pair), label) for *pair, label in zip(x, z, labels.split(batch))]
        return list(torch.autograd.grad(sum(losses), parameters))

    return step


def reference_step(
    model: torch.nn.Module,
    towers: ClipTowers,
    prompts: GroupMmap,
    class_names: Sequence[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: str = "float32",
) -> Step:
    """Return a step of one task after another, every class at 77 tokens, prompts concatenated at every layer."""
    batch = len(images) // len(prompts.tasks)
    ids = open_clip.tokenize([TEMPLATE.format(name) for name in class_names]).to(towers.device)
    parameters = list(prompts.parameters())

    def step() -> list[torch.Tensor]:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for t, (task_images, label) in enumerate(zip(images.split(batch), labels.split(batch))):
            with autocast(towers.device, precision):
                adaptation = prompts()
                x = reference_encode_image(model, task_images, adaptation.vision_prompts[t])
                z = reference_encode_text(model, ids, adaptation.text_prompts[t])
            loss = F.cross_entropy(towers.logits(x, z), label)
            total = [a + b for a, b in zip(total, torch.autograd.grad(loss, parameters))]
        return total

    return step


def group_prompts(towers: ClipTowers, num_tasks: int) -> GroupMmap:
    tasks = [f"task {number}" for number in range(num_tasks)]
    return GroupMmap(MmapShape.of(MmapConfig(), towers), tasks, seed=1).to(towers.device)


def largest_difference(ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two lists of tensors, relative to the largest entry."""
    scale = max(tensor.abs().max() for tensor in reference)
    return max(((a - b).abs().max() / scale).item() for a, b in zip(ours, reference))


def time_call(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(steps: Mapping[Name, Callable[[], Any]], repeats: int, device: torch.device) -> dict[Name, float]:
    """Return the median seconds of each step, interleaved so that load on the machine affects all; needs a warm-up."""
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(time_call(step, device))
    return {name: median(values) for name, values in seconds.items()}


def gflop(step: Callable[[], Any]) -> tuple[Any, float]:
    """Return a step's result and its GFLOP by torch's counter: matrix products, convolutions, attention."""
    with FlopCounterMode(display=False) as counter:
        result = step()
    return result, counter.get_total_flops() / 1e9


def peak_gib(step: Callable[[], Any], device: torch.device) -> float:
    """Return the peak GiB of a step beyond what was allocated; the FLOP counter, which keeps tensors, must be off."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device) / 2**30
        step()
        return torch.cuda.max_memory_allocated(device) / 2**30 - allocated
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory
    resident = _status_gib("VmRSS")
    step()
    return _status_gib("VmHWM") - resident


def _status_gib(name: str) -> float:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def release_memory() -> None:
    """Return what is no longer referenced to the device and the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def write_results(name: str, device: torch.device, values: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>_<device>.json, with a description of the machine."""
    suffix = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name())
    RESULTS.mkdir(exist_ok=True)
    machine = {"device": device_name(device), "torch": torch.__version__, "processor": platform.machine()}
    (RESULTS / f"{name}_{suffix}.json").write_text(json.dumps({**values, **machine}, indent=1) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table, its first column aligned left, the others right."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
