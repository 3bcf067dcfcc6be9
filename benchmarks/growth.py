#!/usr/bin/env python
"""Time and memory of our training step, and length of a training, by tasks, classes and shots.

    python benchmarks/growth.py                                     ViT-B/16, around 2 tasks x 4 images x 65 classes
    python benchmarks/growth.py --cases 4x4x1000 --activation-memory-gib 6
    python benchmarks/growth.py --cases 4x4x1000 --activation-memory-gib 1 2 6 inf      memory against time

A case is tasks x images per task x classes per task. Shots only change the number of steps of an epoch. Memory is the
peak of a step beyond the loaded model.
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import (
    class_names,
    default_device,
    device_name,
    gflop,
    group_prompts,
    load,
    median_seconds,
    our_step,
    peak_gib,
    random_batch,
    table,
    write_results,
)

CASES = ["1x4x65", "2x4x65", "4x4x65", "8x4x65", "2x4x16", "2x4x256", "2x4x1000", "2x8x65", "2x16x65"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument(
        "--activation-memory-gib", nargs="+", type=float, default=[6.0], help="clip.activation_memory_gib"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="growth", help="name of the result file")
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    _, towers = load(arguments.model, device, arguments.precision)

    rows = []
    for case in arguments.cases:
        num_tasks, batch, num_classes = map(int, case.split("x"))
        images, labels = random_batch(towers, num_tasks * batch, num_classes)
        prompts = group_prompts(towers, num_tasks)
        step = our_step(towers, prompts, class_names(num_classes), images, labels, arguments.precision)
        for limit in arguments.activation_memory_gib:
            towers.activation_memory_gib = limit
            row = {
                "case": case,
                "activation_memory_gib": str(limit),
                "gib": peak_gib(step, device),
                "gflop": gflop(step)[1],
            }
            row["seconds"] = median_seconds({"step": step}, arguments.repeats, device)["step"]
            rows.append(row)
            print(row, file=sys.stderr, flush=True)

    print(f"{arguments.model}, {arguments.precision}, {device_name(device)}, torch {torch.__version__}\n")
    columns = ["tasks x images x classes", "activation_memory_gib", "GFLOP", "s per step", "peak GiB"]
    lines = [
        [
            row["case"].replace("x", " x "),
            row["activation_memory_gib"],
            f"{row['gflop']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['gib']:.2f}",
        ]
        for row in rows
    ]
    print(table(columns, lines))
    values = {"model": arguments.model, "precision": arguments.precision, "rows": rows}
    write_results(f"{arguments.name}_{arguments.model}_{arguments.precision}", device, values)


if __name__ == "__main__":
    main()
