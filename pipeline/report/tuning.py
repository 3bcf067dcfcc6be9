"""Table, CSV and figure of a search's trials."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline.tuning.search_file import Search
from pipeline.tuning.trials import Trial, ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"completed": "#1f5a85", "pruned": "#b3b3b3"}
MAX_TRIALS_SHOWN = 20
"""In the terminal; the CSV has all."""


def trials_table(search: Search, trials: Sequence[Trial], title: str) -> Table:
    """Return a table of the best trials; the CSV has the errors of failed ones."""
    table = Table(title=title)
    for name in ("trial", *_short_names(list(search.space)), "parameters", "epochs", "validation accuracy (%)"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("state", no_wrap=True)
    for trial in ranked(trials)[:MAX_TRIALS_SHOWN]:
        measured = trial.epochs and trial.state != "failed"
        table.add_row(
            str(trial.number),
            *(escape(format_value(trial.params[name])) if name in trial.params else "" for name in search.space),
            f"{trial.trained_parameters:,}" if measured else "",
            str(trial.epochs),
            f"{100 * trial.validation_accuracy:.1f}" if measured else "",
            trial.state,
        )
    return table


def trials_to_csv(search: Search, tasks: Sequence[str], trials: Sequence[Trial]) -> str:
    """Return one row per trial, the best first, with accuracies (0 to 1) after its last epoch. Fields without effect on
    a trial's method are empty."""
    text = io.StringIO()
    names = ["trial", "state", *search.space, "trained_parameters", "epochs", "validation_accuracy"]
    writer = csv.writer(text)
    writer.writerow([*names, *(f"validation_accuracy/{task}" for task in tasks), "error"])
    for trial in ranked(trials):
        measured = trial.epochs and trial.state != "failed"
        writer.writerow(
            [
                trial.number,
                trial.state,
                *(_exact(trial.params[name]) if name in trial.params else "" for name in search.space),
                trial.trained_parameters if measured else "",
                trial.epochs,
                trial.validation_accuracy if measured else "",
                *(trial.accuracy[task] if measured else "" for task in tasks),
                trial.error,
            ]
        )
    return text.getvalue()


def search_figure(search: Search, trials: Sequence[Trial]) -> Figure:
    """Plot the validation accuracy of the measured trials against each searched field."""
    names = list(search.space)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns + 0.6, 2.8 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    measured = [trial for trial in trials if trial.epochs and trial.state in _COLORS]
    for number, (name, axes) in enumerate(zip(names, grid.flat)):
        value_range = search.space[name]
        field_trials = [trial for trial in measured if name in trial.params]
        positions = {trial.number: trial.params[name] for trial in field_trials}
        if value_range.kind == "choice":
            positions = {trial: value_range.values.index(value) for trial, value in positions.items()}
            labels = [format_value(value) for value in value_range.values]
            is_rotated = sum(map(len, labels)) > 30
            axes.set_xticks(
                range(len(labels)), labels, rotation=30 if is_rotated else 0, ha="right" if is_rotated else "center"
            )
            axes.set_xlim(-0.5, len(labels) - 0.5)
        elif value_range.kind == "loguniform":
            axes.set_xscale("log")
        elif value_range.kind == "integer":
            axes.xaxis.get_major_locator().set_params(integer=True)
        for state, color in _COLORS.items():
            state_trials = [trial for trial in field_trials if trial.state == state]
            axes.scatter(
                [positions[trial.number] for trial in state_trials],
                [100 * trial.validation_accuracy for trial in state_trials],
                s=22,
                alpha=0.8,
                color=color,
                label=state if number == 0 else None,
            )
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    for row in grid:
        row[0].set_ylabel("validation accuracy (%)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _short_names(names: Sequence[str]) -> list[str]:
    """Drop the sections of field names that stay unique."""
    fields = [name.rpartition(".")[2] for name in names]
    return [field if fields.count(field) == 1 else name for field, name in zip(fields, names)]


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def format_value(value: Any) -> str:
    """Return a field's value with at most 4 significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def format_params(params: dict[str, Any]) -> str:
    """Return a trial's params on one line."""
    return " · ".join(f"{name}={format_value(value)}" for name, value in params.items())
