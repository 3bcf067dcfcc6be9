#!/usr/bin/env python
"""Time of one training step of MmAP in which the tasks are weighed (training.aggregation), beside that of the sum.

    python benchmarks/aggregation.py                                      four tasks on ViT-B/16
    python benchmarks/aggregation.py --model ViT-B-32 --cases 4x16x65     tasks x images per task x classes

Steps are the trainer's own, with batches, augmentation and optimizer, on random images with random weights of CLIP.
`added` is what an aggregation itself takes, in the same steps: the tasks' gradients from the one backward pass, their
weights, and the shared prompt's update. `passes` is a forward and backward pass for each task, as a training must take
that has no gradients of tasks. All are timed alternately in one process, and medians count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, get_args

import torch
from common import (
    TEMPLATE,
    class_names,
    default_device,
    device_name,
    group_prompts,
    load,
    median_seconds,
    release_memory,
    table,
    write_results,
)

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.training.batches import TrainingSet
from pipeline.training.trainer import Trainer

CASES = ["2x16x65", "4x16x65", "8x4x65"]
AGGREGATIONS = get_args(TrainingConfig.model_fields["aggregation"].annotation)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each; the median counts")
    parser.add_argument("--aggregations", nargs="+", default=AGGREGATIONS[1:], choices=AGGREGATIONS[1:])
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    towers = load(arguments.model, device)[1]

    rows: list[Row] = []
    for case in arguments.cases:
        rows.append(measure_case(case, towers, arguments.aggregations, arguments.repeats))
        print(rows[-1], file=sys.stderr, flush=True)
        release_memory()

    print(f"{arguments.model}, {device_name(device)}, torch {torch.__version__}, median of {arguments.repeats}\n")
    print(format_table(rows))
    write_results(f"aggregation_{arguments.model}", device, {"model": arguments.model, "rows": rows})


def measure_case(case: str, towers: ClipTowers, aggregations: Sequence[str], repeats: int) -> Row:
    """Return name → seconds of a step, and name → seconds that the aggregation added to it."""
    num_tasks, batch_size, num_classes = map(int, case.split("x"))
    trainers = {name: new_trainer(towers, name, num_tasks, batch_size, num_classes) for name in ("sum", *aggregations)}
    added: dict[str, list[float]] = {name: [] for name in aggregations}
    for name in aggregations:
        time_aggregation(trainers[name], added[name])
    single = [new_trainer(towers, "sum", 1, batch_size, num_classes) for _ in range(num_tasks)]
    steps: dict[str, Callable[[], Any]] = {name: trainer.step for name, trainer in trainers.items()}
    steps["passes"] = lambda: [trainer.step() for trainer in single]
    for step in steps.values():
        step()  # a warm-up
    for seconds in added.values():
        seconds.clear()
    return {
        "case": case,
        "seconds": median_seconds(steps, repeats, towers.device),
        "added": {name: median(seconds) for name, seconds in added.items()},
    }


def new_trainer(towers: ClipTowers, name: str, num_tasks: int, batch_size: int, num_classes: int) -> Trainer:
    prompts, size = group_prompts(towers, num_tasks), towers.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    sets = []
    for task in prompts.tasks:
        images = torch.randint(0, 256, (batch_size, 3, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(batch_size, device=towers.device) % num_classes
        sets.append(TrainingSet((task,), tuple(images.to(towers.device)), (labels,)))
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [class_names(num_classes)] * num_tasks).to(towers.device)
    config = TrainingConfig(aggregation=name, batch_size=batch_size, warmup_epochs=0)
    return Trainer(towers, prompts, sets, tokens, config, epochs=1000, seed=1)


def time_aggregation(trainer: Trainer, seconds: list[float]) -> None:
    """Append, in every step, the seconds of what the aggregation does besides the optimizer's step."""
    aggregation, method = trainer.aggregation, trainer.method
    update, task_gradients, optimizer_step = aggregation.update, method.task_gradients, trainer.optimizer.step

    def timed(function: Callable[..., Any], sign: int, starts: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if trainer.towers.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            result = function(*arguments)
            if trainer.towers.device.type == "cuda":
                torch.cuda.synchronize()
            if starts:
                seconds.append(0.0)
            seconds[-1] += sign * (time.perf_counter() - started)
            return result

        return call

    method.task_gradients = timed(task_gradients, 1, starts=True)
    aggregation.update = timed(update, 1)
    trainer.optimizer.step = timed(optimizer_step, -1)


def format_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        base = row["seconds"]["sum"]
        for name, seconds in row["seconds"].items():
            added = row["added"].get(name)
            cells = ["", ""] if added is None else [f"{1000 * added:.1f}", f"{added / base:.1%}"]
            lines.append([row["case"].replace("x", " x "), name, f"{seconds:.3f}", f"{seconds / base:.3f}", *cells])
    return table(
        ["tasks x images x classes", "aggregation", "s", "to the sum", "added, ms", "added, of the sum"], lines
    )


if __name__ == "__main__":
    main()
