"""What adding a task to a finished run gave, beside training all tasks again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.grouping.text import format_groups
from pipeline.report.summary import AVERAGE_ROW, PARAMETERS_ROW, Summary, markdown_table, report_footer

AVERAGE_BEFORE_ROW, SECONDS_ROW = "average of the tasks before", "seconds"


@dataclass(frozen=True)
class AddedTask:
    """`before`, `rerun`: summaries of the finished run, and of one with all tasks, as in summary.json; `groups`: with
    the new task; accuracies 0 to 1; `trained_parameters`: of the new task."""

    before: dict[str, Any]
    task: str
    groups: list[list[str]]
    zero_shot: float
    accuracy: float
    trained_parameters: int
    stages: dict[str, float]
    rerun: dict[str, Any] | None

    @property
    def tasks(self) -> list[str]:
        return sorted([*self.before["tasks"], self.task])

    def summary(self) -> Summary:
        """Of the run with the new task, as of one that had it from the start."""
        before = self.before["methods"]
        new = {"zero_shot": (self.zero_shot, 0), "grouped": (self.accuracy, self.trained_parameters)}
        methods = {}
        for name, (accuracy, parameters) in new.items():
            of_task = {**before[name]["accuracy"], self.task: accuracy}
            methods[name] = {
                "accuracy": {task: of_task[task] for task in self.tasks},
                "average": sum(of_task.values()) / len(of_task),
                "trained_parameters": before[name]["trained_parameters"] + parameters,
            }
        named = {name: self.before[name] for name in ("name", "shots", "seed", "clip")}
        return Summary(**named, tasks=self.tasks, groups=self.groups, stages=self.stages, methods=methods, warnings=[])

    def placement(self) -> str:
        """Where the new task is, in words."""
        group = next(group for group in self.groups if self.task in group)
        others = [name for name in group if name != self.task]
        return f"{self.task} joined {format_groups([others])}" if others else f"{self.task} is a group of its own"


def added_task_table(added: AddedTask) -> Table:
    header, *rows = _cells(added)
    table = Table(title=f"{added.before['name']}: test accuracy in %; {escape(added.placement())}")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        if row[0] in (AVERAGE_BEFORE_ROW, PARAMETERS_ROW):
            table.add_section()
        cells = [escape(cell) for cell in row]
        table.add_row(*([f"[bold]{cell}[/]" for cell in cells] if row[0] == added.task else cells))
    return table


def added_task_to_markdown(added: AddedTask) -> str:
    header, *rows = _cells(added)
    before = added.before
    lines = [
        f"# {before['name']}, with {added.task} added",
        "",
        f"Test accuracy in %; {before['shots']} training images a class and task; seed {before['seed']}; "
        f"CLIP {before['clip']}.",
        "",
        *markdown_table(header, rows),
        "",
        f"{added.placement()}. Groups: {format_groups(added.groups)}; [how sure they are](grouping.html).",
    ]
    if added.rerun:
        lines += ["", f"Groups of all trained again: {format_groups(added.rerun['groups'])}."]
    lines += [
        "",
        "The prompts of the tasks before are as they were, to the bit; their accuracies are those of the run before. "
        "The parameters of a column are those that it trained, its seconds the time of its stages.",
        *report_footer(added.stages),
    ]
    return "\n".join(lines)


def _cells(added: AddedTask) -> list[list[str]]:
    """Header and rows: a task, an average, parameters or seconds a row; columns zero-shot, before, added, and all tasks
    trained again."""
    with_task, before = added.summary(), added.before
    columns = [
        ("zero-shot", with_task.methods["zero_shot"]["accuracy"], 0, None),
        ("before", before["methods"]["grouped"]["accuracy"], *_cost(before)),
        (
            f"{added.task} added",
            with_task.methods["grouped"]["accuracy"],
            added.trained_parameters,
            sum(added.stages.values()),
        ),
    ]
    if added.rerun:
        again = added.rerun
        columns.append(("all trained again", again["methods"]["grouped"]["accuracy"], *_cost(again)))
    titles, accuracies, parameters, seconds = zip(*columns)
    return [
        ["task", *titles],
        *([task, *(_percent(of, [task]) for of in accuracies)] for task in added.tasks),
        [AVERAGE_BEFORE_ROW, *(_percent(of, before["tasks"]) for of in accuracies)],
        [AVERAGE_ROW, *(_percent(of, added.tasks) for of in accuracies)],
        [PARAMETERS_ROW, *(f"{count:,}" for count in parameters)],
        [SECONDS_ROW, *("" if value is None else f"{value:.0f}" for value in seconds)],
    ]


def _cost(summary: dict[str, Any]) -> tuple[int, float]:
    """Trained parameters, and seconds of all stages."""
    return summary["methods"]["grouped"]["trained_parameters"], sum(summary["stages"].values())


def _percent(accuracy: dict[str, float], tasks: list[str]) -> str:
    """Mean over tasks; empty where one of them is lacking."""
    if not accuracy.keys() >= set(tasks):
        return ""
    return f"{100 * sum(accuracy[task] for task in tasks) / len(tasks):.1f}"
