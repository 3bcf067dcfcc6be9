"""The summary of a run: its shape, and its tables for the terminal and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

TITLES = {"zero_shot": "zero-shot CLIP", "all_in_one": "MmAP, all tasks in one group", "grouped": "MmAP, grouped"}


@dataclass(frozen=True)
class Summary:
    """summary.json. `stages`: name → seconds; `methods`: name → accuracy (task → 0-1), average, trained_parameters."""

    name: str
    tasks: list[str]
    groups: list[list[str]]
    stages: dict[str, float]
    methods: dict[str, dict[str, Any]]
    shots: int
    seed: int
    clip: str
    warnings: list[str]


def method_result(tasks: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method's entry from its groups' results; accuracies in the order of `tasks`, their plain mean."""
    accuracy = {task: value for result in results for task, value in result["accuracy"].items()}
    return {
        "accuracy": {task: accuracy[task] for task in tasks},
        "average": sum(accuracy.values()) / len(accuracy),
        "trained_parameters": sum(result["trained_parameters"] for result in results),
    }


def accuracy_table(summary: Summary) -> Table:
    header, *rows = _cells(summary)
    table = Table(title=f"{summary.name}: test accuracy in % ({summary.shots} shots a class)")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    best = _best_columns(rows)
    for number, row in enumerate(rows):
        table.add_row(*(f"[bold]{cell}[/]" if number in best.get(at, ()) else cell for at, cell in enumerate(row)))
    return table


def to_markdown(summary: Summary) -> str:
    header, *rows = _cells(summary)
    lines = [
        f"# {summary.name}",
        "",
        f"Test accuracy in %, {summary.shots} training images a class and task, seed {summary.seed}, CLIP {summary.clip}.",
        "",
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Groups: " + "; ".join(" + ".join(group) for group in summary.groups) + ".",
        *(["", *(f"Note: {warning}" for warning in summary.warnings)] if summary.warnings else []),
        "",
        "![accuracy](accuracy.png)",
        "",
        "![affinities](affinity_heat_map.png)",
        "",
        "![affinity graph](affinity_graph.png)",
        "",
        "| stage | seconds |",
        "| --- | ---: |",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in summary.stages.items()),
        "",
    ]
    return "\n".join(lines)


def _cells(summary: Summary) -> list[list[str]]:
    rows = [["method", *summary.tasks, "average", "trained parameters"]]
    for name, method in summary.methods.items():
        values = [*(method["accuracy"][task] for task in summary.tasks), method["average"]]
        rows.append([TITLES[name], *(f"{100 * value:.1f}" for value in values), f"{method['trained_parameters']:,}"])
    return rows


def _best_columns(rows: Sequence[Sequence[str]]) -> dict[int, list[int]]:
    """Column → rows with the highest accuracy; not for the method's name and parameters."""
    best = {}
    for at in range(1, len(rows[0]) - 1):
        top = max(float(row[at]) for row in rows)
        best[at] = [number for number, row in enumerate(rows) if float(row[at]) == top]
    return best
