"""The summary of a run: its shape, and its tables for the terminal and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.data.names import pluralize
from pipeline.grouping.text import format_groups
from pipeline.methods.registry import VARIANTS


def title(method: str) -> str:
    """Of a method's column."""
    return VARIANTS[method].title


AVERAGE_ROW, PARAMETERS_ROW = "average", "trained parameters"


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
    """The best method of each task in bold."""
    header, *rows = _cells(summary)
    marked = [header]
    for name, *cells in rows:
        best = max(cells, key=float) if name != PARAMETERS_ROW else None
        marked.append([escape(name), *(f"[bold]{cell}[/]" if cell == best else cell for cell in cells)])
    header, *rows = _transpose_if_wide(summary, marked)
    table = Table(title=f"{summary.name}: test accuracy in %, {pluralize(summary.shots, 'shot')} a class")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", no_wrap=position == 0, overflow="fold")
    for row in rows:
        if row[0] in (AVERAGE_ROW, PARAMETERS_ROW):
            table.add_section()
        table.add_row(*row)
    return table


def to_markdown(summary: Summary) -> str:
    header, *rows = _transpose_if_wide(summary, _cells(summary))
    lines = [
        f"# {summary.name}",
        "",
        f"Test accuracy in %; {summary.shots} training images a class and task; seed {summary.seed}; "
        f"CLIP {summary.clip}.",
        "",
        *markdown_table(header, rows),
        "",
        f"Groups: {format_groups(summary.groups)}; [how sure they are](grouping.html).",
        *(["", *(f"Note: {warning}" for warning in summary.warnings)] if summary.warnings else []),
        "",
        "![accuracy](accuracy.png)",
        *report_footer(summary.stages),
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first column left, the others right."""
    rule = f"| --- |{' ---: |' * (len(header) - 1)}"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def report_footer(stages: Mapping[str, float]) -> list[str]:
    """Lines: pictures of the grouping, and each stage's seconds."""
    return [
        "",
        "![affinities](affinity_heat_map.png)",
        "",
        "![affinity graph](affinity_graph.png)",
        "",
        *markdown_table(("stage", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in stages.items()]),
        "",
    ]


def to_mlflow_description(summary: Summary) -> str:
    """For MLflow's page of the run: the same without pictures, which it does not show there."""
    lines = to_markdown(summary).replace("; [how sure they are](grouping.html)", "").splitlines()
    shown = [line for line in lines if not line.startswith("![")]
    return "\n".join([*shown, "", "Pictures, and how sure the groups are: under Artifacts, in `report`."])


def _cells(summary: Summary) -> list[list[str]]:
    """Header and rows: a task, the average, or the trained parameters a row; a method a column."""
    methods = summary.methods.values()
    return [
        ["task", *(title(name) for name in summary.methods)],
        *([task, *(f"{100 * method['accuracy'][task]:.1f}" for method in methods)] for task in summary.tasks),
        [AVERAGE_ROW, *(f"{100 * method['average']:.1f}" for method in methods)],
        [PARAMETERS_ROW, *(f"{method['trained_parameters']:,}" for method in methods)],
    ]


def _transpose_if_wide(summary: Summary, cells: list[list[str]]) -> list[list[str]]:
    """With a row for each method where those are more than the tasks."""
    if len(summary.methods) <= len(summary.tasks):
        return cells
    (_, *titles), *rows = cells
    return [["method", *(row[0] for row in rows)], *map(list, zip(titles, *(row[1:] for row in rows)))]
