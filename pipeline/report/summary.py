"""Summary of a run, with tables for the terminal and Markdown, and warnings about the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.data.names import pluralize
from pipeline.methods.registry import VARIANTS
from pipeline.report.metrics import ACCURACY, metric_of
from pipeline.report.scores import (
    ScoresByTask,
    TaskScores,
    average_standard_error,
    binomial_standard_error,
    paired_difference,
)

ZERO_SHOT, MAIN = "zero_shot", "grouped"
AVERAGE_ROW, PARAMETERS_ROW, TEST_IMAGES = "average", "trained parameters", "test images"
NUMBER_WIDTH = len("77.5 ± 1.4")
MAX_STANDARD_ERROR = 0.05
"""Test sets whose standard error can be larger are reported as small: those of fewer than 100 images."""


def method_title(method: str) -> str:
    """Return the title of a method's column."""
    return VARIANTS[method].title


@dataclass(frozen=True)
class Summary:
    """Content of summary.json.

    Args:
        stages: name → seconds.
        methods: name → result, see `method_result`.
        num_test_images: task → number.
        differences: strategy → other method → mean over tasks of the strategy's accuracy minus the other's, on the
            same images: see report/recommendation.py.
        recommended: strategy that follows; empty if nothing was compared, as `conclusion`.
        conclusion: the sentence that names it.
        grouping: sentence about the groups that were taken, and those of other affinities.
    """

    name: str
    tasks: list[str]
    groups: list[list[str]]
    stages: dict[str, float]
    methods: dict[str, dict[str, Any]]
    shots: int
    seed: int
    clip: str
    warnings: list[str]
    num_test_images: dict[str, int]
    differences: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    recommended: str = ""
    conclusion: str = ""
    grouping: str = ""

    @property
    def metric(self) -> str:
        """ACCURACY or MAP."""
        return metric_of(next(iter(self.methods.values())))


def method_result(
    accuracy: Mapping[str, float],
    test_loss: Mapping[str, float],
    num_test_images: Mapping[str, int],
    trained_parameters: int,
    metric: str = ACCURACY,
    standard_error: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return a method's entry: accuracies (task → 0-1), their plain mean, standard errors of both, test losses (task →
    nats), their plain mean, trained parameters.

    Args:
        num_test_images: task → number, in the order of the result.
        metric: MAP if these are mAPs; then with `standard_error`, task → number.
    """
    errors = {
        task: standard_error[task] if standard_error else binomial_standard_error(accuracy[task], number)
        for task, number in num_test_images.items()
    }
    return {
        metric: {task: accuracy[task] for task in num_test_images},
        "standard_error": errors,
        "average": sum(accuracy.values()) / len(accuracy),
        "average_standard_error": average_standard_error(list(errors.values())),
        "test_loss": {task: test_loss[task] for task in num_test_images},
        "average_test_loss": sum(test_loss.values()) / len(test_loss),
        "trained_parameters": trained_parameters,
    }


def merge_results(results: Sequence[Mapping[str, Any]], num_test_images: Mapping[str, int]) -> dict[str, Any]:
    """Return a method's entry from the result.json of each of its groups."""
    metric = metric_of(results[0])
    accuracy, test_loss, standard_error = (
        {task: value for result in results for task, value in result.get(name, {}).items()}
        for name in (metric, "test_loss", "standard_error")
    )
    parameters = sum(result["trained_parameters"] for result in results)
    return method_result(accuracy, test_loss, num_test_images, parameters, metric, standard_error)


def result_warnings(scores: Mapping[str, ScoresByTask]) -> list[str]:
    """Return a line per method that is at chance, predicts one class only, or is below zero-shot CLIP on some tasks,
    and one about small test sets."""
    warnings = []
    for method, by_task in scores.items():
        chance_tasks = [task for task, task_scores in by_task.items() if task_scores.is_at_chance]
        if chance_tasks:
            warnings.append(
                f"{method_title(method)} is not better than chance on {_accuracies(by_task, chance_tasks)}: check the "
                "labels, the CLIP weights and the learning rate"
            )
        constant = {task: label for task, s in by_task.items() if (label := s.only_predicted_class) is not None}
        if constant:
            classes = ", ".join(f"{label!r} ({task})" for task, label in constant.items())
            warnings.append(f"{method_title(method)} predicts the same class for every image: {classes}")
        if method != ZERO_SHOT and ZERO_SHOT in scores:
            differences = {task: paired_difference(by_task[task], scores[ZERO_SHOT][task]) for task in by_task}
            declines = [
                f"{task} ({100 * difference.value:.1f} ± {100 * difference.standard_error:.1f} points)"
                for task, difference in differences.items()
                if difference.value < 0
            ]
            if declines:
                warnings.append(f"{method_title(method)} is below zero-shot CLIP on {', '.join(declines)}")
    counts = {
        task: task_scores.num_images
        for by_task in scores.values()
        for task, task_scores in by_task.items()
        if isinstance(task_scores, TaskScores)  # mAPs have no such bound
    }
    small = [
        f"{task} {number}"
        for task, number in counts.items()
        if binomial_standard_error(0.5, number) > MAX_STANDARD_ERROR
    ]
    if small:
        error = binomial_standard_error(0.5, min(counts.values()))
        warnings.append(f"few test images: {', '.join(small)} (standard error up to {100 * error:.0f} points)")
    return warnings


def _accuracies(by_task: ScoresByTask, tasks: Sequence[str]) -> str:
    return ", ".join(
        f"{task} ({100 * by_task[task].value:.1f} %, {len(by_task[task].class_names)} classes)" for task in tasks
    )


def accuracy_table(summary: Summary) -> Table:
    """Return the table for the terminal, with the best method of each task in bold."""
    header, *rows = accuracy_cells(summary)
    marked = [
        [escape(name), *(f"[bold]{cell}[/]" if column in best else cell for column, cell in enumerate(cells, 1))]
        for (name, *cells), best in zip(rows, best_columns(rows))
    ]
    titles, *lines = transpose_if_wide(summary, [header, *marked])
    num_results = len(lines) - 1 if is_transposed(summary) else len(summary.tasks)
    table = Table(title=f"{summary.name}: {summary.shots}-shot test {summary.metric} (%)")
    for position, title in enumerate(titles):
        table.add_column(
            escape(fill(title, NUMBER_WIDTH, break_long_words=False) if position else title),
            justify="right" if position else "left",
            no_wrap=not position and is_transposed(summary),  # titles of methods, which are shorter than tasks may be
            overflow="fold",
        )
    for position, line in enumerate(lines):
        if position >= num_results:  # average and parameters, or the numbers of test images
            table.add_section()
        table.add_row(*line)
    return table


def to_mlflow_description(summary: Summary) -> str:
    """Return the results as Markdown, for the description of the run in MLflow, which shows no figures."""
    header, *rows = transpose_if_wide(summary, accuracy_cells(summary))
    lines = [
        f"# {summary.name}",
        "",
        f"Test {summary.metric} (%) ± standard error; {pluralize(summary.shots, 'shot')} per class and task; "
        f"seed {summary.seed}; CLIP {summary.clip}.",
        "",
        *markdown_table(header, rows),
        "",
        *([summary.conclusion, ""] if summary.conclusion else []),
        summary.grouping,
        *(line for warning in summary.warnings for line in ("", f"Note: {warning}")),
        "",
        *markdown_table(("stage", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in summary.stages.items()]),
        "",
        "The whole report is under Artifacts: `report/report.html`.",
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, its first column aligned left, the others right."""
    rule = f"| --- |{' ---: |' * (len(header) - 1)}"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def accuracy_cells(summary: Summary) -> list[list[str]]:
    """Return header and rows: a row per task, the average and the trained parameters; a column per method, and the
    number of test images."""
    methods, counts = summary.methods.values(), summary.num_test_images
    return [
        ["task", *(method_title(name) for name in summary.methods), TEST_IMAGES],
        *(
            [
                task,
                *(percent(method[summary.metric][task], method["standard_error"][task]) for method in methods),
                f"{counts[task]:,}",
            ]
            for task in summary.tasks
        ),
        [
            AVERAGE_ROW,
            *(percent(method["average"], method["average_standard_error"]) for method in methods),
            f"{sum(counts.values()):,}",
        ],
        [PARAMETERS_ROW, *(f"{method['trained_parameters']:,}" for method in methods), ""],
    ]


def best_columns(rows: Sequence[Sequence[str]]) -> list[set[int]]:
    """Return the columns with the highest accuracy, as printed, for each row of `accuracy_cells` but the header."""
    best = []
    for _, *cells, _ in rows[:-1]:
        values = [float(cell.split()[0]) for cell in cells]
        best.append({column for column, value in enumerate(values, 1) if value == max(values)})
    return [*best, set()]


def percent(accuracy: float, standard_error: float) -> str:
    return f"{100 * accuracy:.1f} ± {100 * standard_error:.1f}"


def is_transposed(summary: Summary) -> bool:
    """Return True if the table has a row per method, and average and parameters as columns, as that is narrower."""
    return len(summary.tasks) + 2 < len(summary.methods) + 1


def transpose_if_wide(summary: Summary, cells: list[list[str]]) -> list[list[str]]:
    """Return a row per method if that has fewer columns."""
    if not is_transposed(summary):
        return cells
    (_, *titles), *rows = cells
    return [["method", *(row[0] for row in rows)], *map(list, zip(titles, *(row[1:] for row in rows)))]
