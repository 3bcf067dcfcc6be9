#!/usr/bin/env python
"""Fraction of a device's peak that training and evaluation reach in each precision, and differences of the precisions.

    python benchmarks/utilization.py                                  ViT-B/16, 64 images per step, 65 classes
    python benchmarks/utilization.py --model ViT-B-32 --images 16 --compile

The peak is measured first: the fastest large matrix product in that precision. Training is a step of 4 tasks (forward
and backward to the prompts), evaluation the image tower with prompts on a batch and its class probabilities.
`difference` is the largest difference of the step's gradients from those in float32, relative to the largest gradient.
--compile adds torch.compile of the training step, and --cuda-graph its CUDA graph, with what the first call takes.
The median of repeated calls counts, timed alternately.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import (
    TEMPLATE,
    Step,
    autocast,
    class_names,
    default_device,
    device_name,
    gflop,
    group_prompts,
    largest_difference,
    load,
    median_seconds,
    our_step,
    random_batch,
    table,
    time_call,
    write_results,
)

from pipeline.clip.class_tokens import class_tokens
from pipeline.methods.classifier import Classifier

NUM_TASKS = 4
ALL_PRECISIONS = ("float32", "tf32", "bfloat16")
COMPILED, CUDA_GRAPH = "compiled training", "training as CUDA graph"
MAX_MATMUL_SECONDS = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    model: str
    images: int
    """Images of a training step, of NUM_TASKS tasks."""
    evaluated: int
    """Images of an evaluation batch."""
    classes: int
    repeats: int
    device: torch.device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--images", type=int, default=64, help="images of a training step, of 4 tasks")
    parser.add_argument("--evaluated", type=int, default=128, help="images of an evaluation batch")
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each; the median counts")
    parser.add_argument("--precision", nargs="+", choices=ALL_PRECISIONS, help="default: all of the device")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the training step")
    parser.add_argument("--cuda-graph", action="store_true", help="also capture the training step in a CUDA graph")
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.cuda_graph and device.type != "cuda":
        parser.error(f"--cuda-graph: needs a GPU, and the device is {arguments.device}")
    chosen = {COMPILED: arguments.compile, CUDA_GRAPH: arguments.cuda_graph}
    variants = [name for name, is_chosen in chosen.items() if is_chosen]
    options = (arguments.model, arguments.images, arguments.evaluated, arguments.classes, arguments.repeats)
    setting = Setting(*options, device)

    rows: list[Row] = []
    reference: list[torch.Tensor] | None = None
    for precision in arguments.precision or device_precisions(device):
        measured, gradients = measure(setting, precision, variants, reference)
        reference = gradients if reference is None else reference
        rows += measured
        print(*measured, sep="\n", file=sys.stderr, flush=True)

    print(
        f"{arguments.model}, {device_name(device)}, torch {torch.__version__}; {arguments.images} images per training"
    )
    print(f"step of {NUM_TASKS} tasks with {arguments.classes} classes, {arguments.evaluated} per evaluation batch\n")
    print(rows_table(rows))
    write_results(f"utilization_{arguments.model}", device, {**vars(arguments), "rows": rows})


def device_precisions(device: torch.device) -> list[str]:
    return [precision for precision in ALL_PRECISIONS if precision != "tf32" or device.type == "cuda"]


def measure(
    setting: Setting, precision: str, variants: Sequence[str] = (), reference: list[torch.Tensor] | None = None
) -> tuple[list[Row], list[torch.Tensor]]:
    """Return a row each of training, evaluation and variants of training, and the gradients of the training step.

    Args:
        variants: COMPILED, CUDA_GRAPH.
        reference: gradients to compare with; None: these gradients.
    """
    device, words = setting.device, class_names(setting.classes)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    autocast_to = precision if precision == "bfloat16" else "float32"
    _, towers = load(setting.model, device, autocast_to)
    images, labels = random_batch(towers, setting.images, setting.classes)
    pixels = torch.randint(0, 256, (setting.evaluated, *images.shape[1:]), dtype=torch.uint8, device=device)
    prompts = group_prompts(towers, NUM_TASKS)
    peak = matmul_tflops(device, autocast_to)
    train = our_step(towers, prompts, words, images, labels, autocast_to)
    with torch.no_grad():
        tokens = class_tokens(towers.tokenizer, TEMPLATE, [words] * len(prompts.tasks))
        groups = [(prompts.tasks, tokens, prompts())]
    classifier = Classifier(towers, groups, autocast_to)
    calls: dict[str, Callable[[], Any]] = {
        "training": train,
        "evaluation": partial(classifier.probabilities, prompts.tasks[0], pixels),
    }
    gradients, training_gflop = gflop(train)
    gflops = {"evaluation": gflop(calls["evaluation"])[1]}
    first_calls = {}
    for name in variants:
        calls[name], first_calls[name] = MAKE_VARIANT[name](train, device)
    seconds = median_seconds(calls, setting.repeats, device)
    torch.set_float32_matmul_precision("highest")
    rows = []
    for name in calls:
        num_images, count = (
            (setting.evaluated, gflops[name]) if name == "evaluation" else (setting.images, training_gflop)
        )
        rows.append(
            {
                "what": name,
                "precision": precision,
                "gflop": count,
                "seconds": seconds[name],
                "images_per_second": num_images / seconds[name],
                "peak_tflops": peak,
                "fraction_of_peak": count / 1e3 / seconds[name] / peak,
                "difference": largest_difference(gradients, reference or gradients),
                "first_call_seconds": first_calls.get(name),
            }
        )
    return rows, gradients


def compile_step(train: Step, device: torch.device) -> tuple[Step, float]:
    """Return the compiled step and the seconds of its first call."""
    compiled = torch.compile(train)
    return compiled, time_call(compiled, device)


class CapturedStep:
    """A step as a CUDA graph. It returns the same gradients, which each call updates in place."""

    def __init__(self, train: Step, device: torch.device):
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                train()
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.gradients = train()

    def __call__(self) -> list[torch.Tensor]:
        self.graph.replay()
        return self.gradients


def capture_step(train: Step, device: torch.device) -> tuple[Step, float]:
    """Return the captured step and the seconds of warm-up, capture and first call."""
    captured: list[CapturedStep] = []

    def capture() -> None:
        captured.append(CapturedStep(train, device))
        captured[0]()

    seconds = time_call(capture, device)
    return captured[0], seconds


MAKE_VARIANT = {COMPILED: compile_step, CUDA_GRAPH: capture_step}


def rows_table(rows: Sequence[Row]) -> str:
    columns = ["", "precision", "s", "images/s", "TFLOP/s", "peak TFLOP/s", "fraction", "difference", "first call s"]
    lines = [
        [
            row["what"],
            row["precision"],
            f"{row['seconds']:.3f}",
            f"{row['images_per_second']:.1f}",
            f"{row['gflop'] / 1e3 / row['seconds']:.2f}",
            f"{row['peak_tflops']:.2f}",
            f"{100 * row['fraction_of_peak']:.0f} %",
            f"{row['difference']:.0e}" if row["what"] == "training" else "",
            "" if row["first_call_seconds"] is None else f"{row['first_call_seconds']:.1f}",
        ]
        for row in rows
    ]
    return table(columns, lines)


def matmul_tflops(device: torch.device, precision: str) -> float:
    """Return the TFLOP/s of the fastest square matrix product among some sizes, under autocast."""
    fastest, total = 0.0, 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = torch.randn(2, size, size, device=device)
        with autocast(device, precision):
            total += time_call(lambda a=a, b=b: a @ b, device)  # warm-up
            for _ in range(10):
                seconds = time_call(lambda a=a, b=b: a @ b, device)
                fastest, total = max(fastest, 2 * size**3 / 1e12 / seconds), total + seconds
                if total > MAX_MATMUL_SECONDS:  # a CPU that does not support the precision
                    return fastest
    return fastest


if __name__ == "__main__":
    main()
