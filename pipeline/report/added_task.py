"""Report of a task added to a finished run, compared with retraining all tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.grouping.text import format_groups
from pipeline.report.scores import average_standard_error, binomial_standard_error
from pipeline.report.summary import (
    AVERAGE_ROW,
    PARAMETERS_ROW,
    TEST_IMAGES,
    Summary,
    method_result,
    percent,
)

EXISTING_AVERAGE_ROW, SECONDS_ROW = "average of existing tasks", "seconds"


@dataclass(frozen=True)
class AddedTask:
    """`finished`, `rerun`: summary.json of the finished run and of a run with all tasks; `groups`: including the new
    task; accuracies 0 to 1, test losses in nats; `trained_parameters`: of the new task."""

    finished: dict[str, Any]
    task: str
    groups: list[list[str]]
    zero_shot: float
    accuracy: float
    zero_shot_test_loss: float
    test_loss: float
    trained_parameters: int
    num_test_images: int
    """Test images of the new task."""
    stages: dict[str, float]
    warnings: list[str]
    rerun: dict[str, Any] | None

    @property
    def tasks(self) -> list[str]:
        return sorted([*self.finished["tasks"], self.task])

    def summary(self) -> Summary:
        """Return the summary of the new run, with all tasks."""
        finished = self.finished["methods"]
        new = {
            "zero_shot": (self.zero_shot, self.zero_shot_test_loss, 0),
            "grouped": (self.accuracy, self.test_loss, self.trained_parameters),
        }
        num_test_images = {**self.finished["num_test_images"], self.task: self.num_test_images}
        counts = {task: num_test_images[task] for task in self.tasks}
        methods = {
            name: method_result(
                {**finished[name]["accuracy"], self.task: accuracy},
                {**finished[name]["test_loss"], self.task: test_loss},
                counts,
                finished[name]["trained_parameters"] + parameters,
            )
            for name, (accuracy, test_loss, parameters) in new.items()
        }
        shared = {name: self.finished[name] for name in ("name", "shots", "seed", "clip")}
        return Summary(
            **shared,
            tasks=self.tasks,
            groups=self.groups,
            stages=self.stages,
            methods=methods,
            warnings=self.warnings,
            num_test_images=counts,
        )

    def placement(self) -> str:
        """Describe the group of the new task."""
        group = next(group for group in self.groups if self.task in group)
        group_mates = [name for name in group if name != self.task]
        return f"{self.task} joined {format_groups([group_mates])}" if group_mates else f"{self.task} forms a new group"


def added_task_table(added: AddedTask) -> Table:
    header, *rows = added_task_cells(added)
    table = Table(title=f"{added.finished['name']}: test accuracy (%); {escape(added.placement())}")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        if row[0] in (EXISTING_AVERAGE_ROW, PARAMETERS_ROW):
            table.add_section()
        cells = [escape(cell) for cell in row]
        table.add_row(*([f"[bold]{cell}[/]" for cell in cells] if row[0] == added.task else cells))
    return table


def added_task_notes(added: AddedTask) -> list[str]:
    """Return sentences about the groups and the numbers of the table."""
    notes = [f"{added.placement()}. Groups: {format_groups(added.groups)}."]
    if added.rerun:
        notes.append(f"Groups when all are retrained: {format_groups(added.rerun['groups'])}.")
    return [
        *notes,
        "The prompts of the existing tasks are bit-identical; their accuracies are those of the finished run. "
        "Parameters are those that a column trained, seconds the time of its stages.",
    ]


def added_task_cells(added: AddedTask) -> list[list[str]]:
    """Return header and rows: a row per task, average, parameters and seconds; columns zero-shot, finished run, task
    added, and all retrained."""
    summary, finished = added.summary(), added.finished
    columns = [
        ("zero-shot", summary.methods["zero_shot"]["accuracy"], 0, None),
        ("finished run", finished["methods"]["grouped"]["accuracy"], *_cost(finished)),
        (
            f"{added.task} added",
            summary.methods["grouped"]["accuracy"],
            added.trained_parameters,
            sum(added.stages.values()),
        ),
    ]
    if added.rerun:
        columns.append(("all retrained", added.rerun["methods"]["grouped"]["accuracy"], *_cost(added.rerun)))
    titles, accuracies, parameters, seconds = zip(*columns)
    counts = summary.num_test_images

    def row(name: str, tasks: list[str]) -> list[str]:
        cells = (_percent(accuracy, tasks, counts) for accuracy in accuracies)
        return [name, *cells, f"{sum(counts[task] for task in tasks):,}"]

    return [
        ["task", *titles, TEST_IMAGES],
        *(row(task, [task]) for task in added.tasks),
        row(EXISTING_AVERAGE_ROW, finished["tasks"]),
        row(AVERAGE_ROW, added.tasks),
        [PARAMETERS_ROW, *(f"{count:,}" for count in parameters), ""],
        [SECONDS_ROW, *("" if value is None else f"{value:.0f}" for value in seconds), ""],
    ]


def _cost(summary: dict[str, Any]) -> tuple[int, float]:
    """Return the trained parameters, and the seconds of all stages."""
    return summary["methods"]["grouped"]["trained_parameters"], sum(summary["stages"].values())


def _percent(accuracy: dict[str, float], tasks: list[str], num_test_images: dict[str, int]) -> str:
    """Format the mean over tasks with its standard error; empty if one of them is missing."""
    if not accuracy.keys() >= set(tasks):
        return ""
    errors = [binomial_standard_error(accuracy[task], num_test_images[task]) for task in tasks]
    return percent(sum(accuracy[task] for task in tasks) / len(tasks), average_standard_error(errors))
