#!/usr/bin/env python
"""Time or memory of one training step (forward, backward to the trained parameters), ours and others'.

    python benchmarks/step_time.py                                        all cases on ViT-B/16, in both precisions
    python benchmarks/step_time.py --model ViT-B-32 --cases 1x16x65       tasks x images per task x classes
    python benchmarks/step_time.py --precision float32                    bfloat16 is slow on CPUs without support
    python benchmarks/step_time.py --memory                               peak memory instead of time
    python benchmarks/step_time.py --maple ../multimodal-prompt-learning --coop ../CoOp     also the authors' code

The plain version (tests/reference_towers.py) runs every class at 77 tokens, concatenates the prompts at every layer and
runs one task after the other; it trains the same group and task prompts as ours. MaPLe, CoOp, PromptSRC and CLIP-LoRA
train their own parameters with the authors' code from checkouts (official_peers.py); they train on one task, so with
several they run a step for each. Images and weights are random, which does not affect the time. All versions and
precisions are timed alternately in one process, and the median counts. FLOPs are counted by torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    PRECISIONS,
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
    release_memory,
    table,
    write_results,
)
from official_peers import add_peer_options, build_peers, given_checkouts

from pipeline.clip.towers import ClipTowers

CASES = ["1x4x65", "1x16x65", "1x4x126", "1x16x126", "4x4x65", "4x16x65", "4x4x126", "4x16x126"]
Models = Mapping[str, tuple[torch.nn.Module, ClipTowers]]
"""Precision → open_clip's model and our towers."""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each; the median counts")
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead of the time")
    add_peer_options(parser)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device, checkouts = torch.device(arguments.device), given_checkouts(arguments)
    models = {precision: load(arguments.model, device, precision) for precision in arguments.precision}

    rows: list[Row] = []
    for case in arguments.cases:
        rows += measure_case(case, models, checkouts, arguments.repeats, arguments.memory)
        print(*rows[-len(models) :], sep="\n", file=sys.stderr, flush=True)
        release_memory()

    print(f"{arguments.model}, {device_name(device)}, torch {torch.__version__}, median of {arguments.repeats}\n")
    print("\n\n".join(memory_tables(rows) if arguments.memory else time_tables(rows)))
    values = {"model": arguments.model, "repeats": arguments.repeats, "rows": rows}
    write_results(f"step_{'memory' if arguments.memory else 'time'}_{arguments.model}", device, values)


def measure_case(
    case: str, models: Models, checkouts: Mapping[str, Path], repeats: int, memory: bool = False
) -> list[Row]:
    """Return a row per precision, with name → GiB, or name → GFLOP and seconds."""
    steps: dict[str, dict[str, Step]] = {
        precision: make_steps(case, model, towers, checkouts, precision)
        for precision, (model, towers) in models.items()
    }
    device = next(towers.device for _, towers in models.values())
    if memory:
        rows = []
        for precision, named in steps.items():
            gib = {name: peak_gib(step, device) for name, step in named.items()}
            rows.append({"case": case, "precision": precision, "gib": gib})
        return rows
    rows = []
    for precision in steps:
        results, gflops = zip(*map(gflop, steps[precision].values()))  # warms up as well
        row = {"case": case, "precision": precision, "difference": largest_difference(*results[:2])}
        rows.append({**row, "gflop": dict(zip(steps[precision], gflops))})
    alternating = {(precision, name): step for precision in steps for name, step in steps[precision].items()}
    seconds = median_seconds(alternating, repeats, device)
    return [{**row, "seconds": {name: seconds[row["precision"], name] for name in row["gflop"]}} for row in rows]


def make_steps(
    case: str, model: torch.nn.Module, towers: ClipTowers, checkouts: Mapping[str, Path], precision: str
) -> dict[str, Step]:
    num_tasks, batch, num_classes = map(int, case.split("x"))
    words = class_names(num_classes)
    images, labels = random_batch(towers, num_tasks * batch, num_classes)
    prompts = group_prompts(towers, num_tasks)
    peers = build_peers(checkouts, model, words, precision)
    return {
        "ours": our_step(towers, prompts, words, images, labels, precision),
        "plain": reference_step(model, towers, prompts, words, images, labels, precision),
        **{name: peer.step(images, labels, num_tasks) for name, peer in peers.items()},
    }


def time_tables(rows: Sequence[Row]) -> list[str]:
    """Return the tables of seconds, of the best precision of each side, and of GFLOP."""
    _, *rivals = names = list(rows[0]["seconds"])
    lines, best_lines, gflop_lines = [], [], []
    for row in rows:
        seconds = row["seconds"]
        line = [case_title(row), row["precision"], *(f"{seconds[name]:.3f}" for name in names)]
        lines.append([*line, *(ratio(seconds[name] / seconds["ours"]) for name in rivals)])
    for case in dict.fromkeys(row["case"] for row in rows):
        case_rows = [row for row in rows if row["case"] == case]
        best = {name: min((row["seconds"][name], row["precision"]) for row in case_rows) for name in names}
        cells = [f"{ratio(best[name][0] / best['ours'][0])} ({best[name][1]})" for name in rivals]
        best_lines.append([case_title(case_rows[0]), f"{best['ours'][0]:.3f} ({best['ours'][1]})", *cells])
        gflops = case_rows[0]["gflop"]
        line = [case_title(case_rows[0]), *(f"{gflops[name]:.0f}" for name in names)]
        gflop_lines.append([*line, *(f"{gflops[name] / gflops['ours']:.1f}" for name in rivals)])
    title, ratios = "tasks x images x classes", [f"{name} / ours" for name in rivals]
    return [
        table([title, "precision", *(f"{name}, s" for name in names), *ratios], lines),
        "Best precision of each side:",
        table([title, "ours, s", *ratios], best_lines),
        table([title, *(f"{name}, GFLOP" for name in names), *ratios], gflop_lines),
    ]


def memory_tables(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0]["gib"])
    lines = [[case_title(row), row["precision"], *(f"{row['gib'][name]:.2f}" for name in names)] for row in rows]
    return [table(["tasks x images x classes", "precision", *(f"{name}, GiB" for name in names)], lines)]


def case_title(row: Row) -> str:
    return row["case"].replace("x", " x ")


def ratio(value: float) -> str:
    return f"**{value:.1f}**"


if __name__ == "__main__":
    main()
