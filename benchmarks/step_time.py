#!/usr/bin/env python
"""Time or memory of one training step (forward, backward to the prompts), ours and others'.

    python benchmarks/step_time.py                                        all cases on ViT-B/16
    python benchmarks/step_time.py --model ViT-B-32 --cases 1x16x65       tasks x images per task x classes
    python benchmarks/step_time.py --memory                               peak memory instead of time
    python benchmarks/step_time.py --maple ../multimodal-prompt-learning --coop ../CoOp     also the authors' code

The plain version (tests/reference_towers.py) runs every class at 77 tokens, concatenates the prompts at every layer and
runs one task after the other; it trains the same group and task prompts as ours. MaPLe and CoOp train their own prompts
on one task, with the authors' code from checkouts. Images and weights are random, which does not affect the time. All
are timed alternately, and the median counts. FLOPs are counted by torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import (
    Step,
    class_names,
    default_device,
    device_name,
    gflop,
    group_prompts,
    largest_difference,
    load,
    median_seconds,
    our_step,
    peak_gib,
    random_batch,
    reference_step,
    table,
    write_results,
)
from official_peers import coop_step, maple_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--cases", nargs="+", default=["1x4x65", "1x16x65", "1x4x126", "1x16x126", "4x4x65"])
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each; the median counts")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="ours and plain")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead of the time")
    parser.add_argument("--maple", type=Path, help="checkout of the official MaPLe")
    parser.add_argument("--coop", type=Path, help="checkout of the official CoOp")
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model, towers = load(arguments.model, device, arguments.precision)

    rows = []
    for case in arguments.cases:
        num_tasks, batch, num_classes = map(int, case.split("x"))
        words = class_names(num_classes)
        images, labels = random_batch(towers, num_tasks * batch, num_classes)
        prompts = group_prompts(towers, num_tasks)
        steps: dict[str, Step] = {
            "ours": our_step(towers, prompts, words, images, labels, arguments.precision),
            "plain": reference_step(model, towers, prompts, words, images, labels, arguments.precision),
        }
        for name, checkout, make in (("MaPLe", arguments.maple, maple_step), ("CoOp", arguments.coop, coop_step)):
            if checkout and num_tasks == 1:
                steps[name] = make(checkout, model, words, images, labels, device)
        if arguments.memory:
            rows.append({"case": case, "gib": {name: peak_gib(step, device) for name, step in steps.items()}})
        else:
            results, gflops = zip(*map(gflop, steps.values()))
            row = {"case": case, "difference": largest_difference(*results[:2]), "gflop": dict(zip(steps, gflops))}
            rows.append({**row, "seconds": median_seconds(steps, arguments.repeats, device)})
        print(rows[-1], file=sys.stderr, flush=True)

    quantities = {"gib": "GiB"} if arguments.memory else {"gflop": "GFLOP", "seconds": "s"}
    names = [
        name
        for name in ("ours", "plain", "MaPLe", "CoOp")
        if any(name in row[key] for row in rows for key in quantities)
    ]
    columns = ["tasks x images x classes"]
    columns += [f"{name}, {unit}" for name in names for unit in quantities.values()]
    columns += [f"{name} to ours, {unit}" for name in names[1:] for unit in quantities.values()]
    lines = []
    for row in rows:
        line = [row["case"].replace("x", " x ")]
        line += [f"{row[key][name]:.2f}" if name in row[key] else "" for name in names for key in quantities]
        for name in names[1:]:
            line += [f"{row[key][name] / row[key]['ours']:.1f}" if name in row[key] else "" for key in quantities]
        lines.append(line)
    print(f"{arguments.model}, {arguments.precision}, {device_name(device)}, torch {torch.__version__}\n")
    print(table(columns, lines))
    name = f"step_{'memory' if arguments.memory else 'time'}_{arguments.model}_{arguments.precision}"
    write_results(name, device, {"model": arguments.model, "precision": arguments.precision, "rows": rows})


if __name__ == "__main__":
    main()
