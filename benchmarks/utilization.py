#!/usr/bin/env python
"""Fraction of a device's peak that training and evaluation reach in each precision, and differences of the precisions.

    python benchmarks/utilization.py                                  ViT-B/16, 64 images per step, 65 classes
    python benchmarks/utilization.py --model ViT-B-32 --images 16 --compile

The peak is measured first: the fastest large matrix product in that precision. Training is a step of 4 tasks (forward
and backward to the prompts), evaluation the image tower with prompts on a batch and its class probabilities.
`difference` is the largest difference of the step's gradients from those in float32, relative to the largest gradient.
--compile adds torch.compile of the training step, with what its first call takes.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from common import (
    TEMPLATE,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--images", type=int, default=64, help="images of a training step, of 4 tasks")
    parser.add_argument("--evaluated", type=int, default=128, help="images of an evaluation batch")
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also torch.compile the training step")
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precisions = ["float32", "tf32", "bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]
    words = class_names(arguments.classes)

    rows, gradients_by_precision = [], {}
    for precision in precisions:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        autocast_to = precision if precision == "bfloat16" else "float32"
        torch.manual_seed(0)
        _, towers = load(arguments.model, device, autocast_to)
        images, labels = random_batch(towers, arguments.images, arguments.classes)
        shape = (arguments.evaluated, *images.shape[1:])
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        prompts = group_prompts(towers, NUM_TASKS)
        peak = matmul_tflops(device, autocast_to)
        train = our_step(towers, prompts, words, images, labels, autocast_to)
        with torch.no_grad():
            tokens = class_tokens(towers.tokenizer, TEMPLATE, [words] * len(prompts.tasks))
            groups = [(prompts.tasks, tokens, prompts())]
        classifier = Classifier(towers, groups, autocast_to)
        calls = {"training": train, "evaluation": partial(classifier.probabilities, prompts.tasks[0], pixels)}
        gradients_by_precision[precision], training_gflop = gflop(train)
        flops = {"training": training_gflop, "evaluation": gflop(calls["evaluation"])[1]}
        first_call = None
        if arguments.compile:
            compiled = torch.compile(train)
            first_call = time_call(compiled, device)
            calls["compiled training"], flops["compiled training"] = compiled, flops["training"]
        seconds = median_seconds(calls, arguments.repeats, device)
        for name in calls:
            row = {
                "what": name,
                "precision": precision,
                "gflop": flops[name],
                "seconds": seconds[name],
                "images_per_second": (arguments.images if "training" in name else arguments.evaluated) / seconds[name],
                "peak_tflops": peak,
                "fraction_of_peak": flops[name] / 1e3 / seconds[name] / peak,
                "difference": largest_difference(gradients_by_precision[precision], gradients_by_precision["float32"]),
                "first_call_seconds": first_call if name == "compiled training" else None,
            }
            rows.append(row)
            print(row, file=sys.stderr, flush=True)

    print(
        f"{arguments.model}, {device_name(device)}, torch {torch.__version__}; {arguments.images} images per training"
    )
    print(f"step of {NUM_TASKS} tasks with {arguments.classes} classes, {arguments.evaluated} per evaluation batch\n")
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
            "" if row["first_call_seconds"] is None else f"{row['first_call_seconds']:.0f}",
        ]
        for row in rows
    ]
    print(table(columns, lines))
    write_results(f"utilization_{arguments.model}", device, {**vars(arguments), "rows": rows})


def matmul_tflops(device: torch.device, precision: str) -> float:
    """Return the TFLOP/s of the fastest square matrix product among some sizes, under autocast."""
    fastest = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = torch.randn(2, size, size, device=device)
        with autocast(device, precision):
            a @ b
            for _ in range(10):
                fastest = max(fastest, 2 * size**3 / 1e12 / time_call(lambda a=a, b=b: a @ b, device))
    return fastest


if __name__ == "__main__":
    main()
