"""Summary of a run, with tables for the terminal and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.data.names import pluralize
from pipeline.grouping.text import format_groups
from pipeline.methods.registry import VARIANTS


def method_title(method: str) -> str:
    """Return the title of a method's column."""
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
    """Return a method's entry from its groups' results: accuracies in the order of `tasks`, and their plain mean."""
    accuracy = {task: value for result in results for task, value in result["accuracy"].items()}
    return {
        "accuracy": {task: accuracy[task] for task in tasks},
        "average": sum(accuracy.values()) / len(accuracy),
        "trained_parameters": sum(result["trained_parameters"] for result in results),
    }


def accuracy_table(summary: Summary) -> Table:
    """Return the table for the terminal, with the best method of each task in bold."""
    header, *rows = _cells(summary)
    highlighted = [header]
    for name, *cells in rows:
        best = max(cells, key=float) if name != PARAMETERS_ROW else None
        highlighted.append([escape(name), *(f"[bold]{cell}[/]" if cell == best else cell for cell in cells)])
    header, *rows = _transpose_if_wide(summary, highlighted)
    table = Table(title=f"{summary.name}: {summary.shots}-shot test accuracy (%)")
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
        f"Test accuracy (%); {pluralize(summary.shots, 'shot')} per class and task; seed {summary.seed}; "
        f"CLIP {summary.clip}.",
        "",
        *markdown_table(header, rows),
        "",
        f"Groups: {format_groups(summary.groups)}; [stability of the groups](grouping.html).",
        *(["", *(f"Note: {warning}" for warning in summary.warnings)] if summary.warnings else []),
        "",
        "![accuracy](accuracy.png)",
        *report_footer(summary.stages),
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, its first column aligned left, the others right."""
    rule = f"| --- |{' ---: |' * (len(header) - 1)}"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def report_footer(stages: Mapping[str, float]) -> list[str]:
    """Return the lines of the figures of the grouping and the seconds of each stage."""
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
    """Return the Markdown without figures, which MLflow's run description cannot show."""
    lines = to_markdown(summary).replace("; [stability of the groups](grouping.html)", "").splitlines()
    text_lines = [line for line in lines if not line.startswith("![")]
    return "\n".join([*text_lines, "", "Figures and the stability of the groups: under Artifacts, in `report`."])


def _cells(summary: Summary) -> list[list[str]]:
    """Return header and rows: a row per task, the average and the trained parameters; a column per method."""
    methods = summary.methods.values()
    return [
        ["task", *(method_title(name) for name in summary.methods)],
        *([task, *(f"{100 * method['accuracy'][task]:.1f}" for method in methods)] for task in summary.tasks),
        [AVERAGE_ROW, *(f"{100 * method['average']:.1f}" for method in methods)],
        [PARAMETERS_ROW, *(f"{method['trained_parameters']:,}" for method in methods)],
    ]


def _transpose_if_wide(summary: Summary, cells: list[list[str]]) -> list[list[str]]:
    """Return a row per method if there are more methods than tasks."""
    if len(summary.methods) <= len(summary.tasks):
        return cells
    (_, *titles), *rows = cells
    return [["method", *(row[0] for row in rows)], *map(list, zip(titles, *(row[1:] for row in rows)))]
