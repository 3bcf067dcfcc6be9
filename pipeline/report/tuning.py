"""The trials of a search, as a table, CSV and a picture."""

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

STATES = {"whole": "trained to the end", "stopped": "ended early", "running": "not ended", "failed": "failed"}
_COLORS = {"whole": "#1f5a85", "stopped": "#b3b3b3"}
SHOWN = 20
"""Trials in the terminal; the CSV has all."""


def trials_table(search: Search, trials: Sequence[Trial], title: str) -> Table:
    """The best trials first; those that failed say why in the CSV."""
    table = Table(title=title)
    for name in ("trial", *_short(list(search.space)), "parameters", "epochs", "validation accuracy, %"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("", no_wrap=True)
    for trial in ranked(trials)[:SHOWN]:
        measured = trial.epochs and trial.state != "failed"
        table.add_row(
            str(trial.number),
            *(escape(shown(trial.point[name])) if name in trial.point else "" for name in search.space),
            f"{trial.trained_parameters:,}" if measured else "",
            str(trial.epochs),
            f"{100 * trial.validation_accuracy:.1f}" if measured else "",
            STATES[trial.state],
        )
    return table


def trials_to_csv(search: Search, tasks: Sequence[str], trials: Sequence[Trial]) -> str:
    """One row a trial, the best first; accuracies (0 to 1) are those after its last epoch. A field that does not matter
    to a trial's method is empty."""
    text = io.StringIO()
    names = ["trial", "state", *search.space, "trained_parameters", "epochs", "validation_accuracy"]
    writer = csv.writer(text)
    writer.writerow([*names, *(f"validation_accuracy/{task}" for task in tasks), "fault"])
    for trial in ranked(trials):
        measured = trial.epochs and trial.state != "failed"
        writer.writerow(
            [
                trial.number,
                trial.state,
                *(_exact(trial.point[name]) if name in trial.point else "" for name in search.space),
                trial.trained_parameters if measured else "",
                trial.epochs,
                trial.validation_accuracy if measured else "",
                *(trial.accuracy[task] if measured else "" for task in tasks),
                trial.fault,
            ]
        )
    return text.getvalue()


def search_figure(search: Search, trials: Sequence[Trial]) -> Figure:
    """Validation accuracy of the measured trials against each searched field."""
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
        of = search.space[name]
        with_field = [trial for trial in measured if name in trial.point]
        positions = {trial.number: trial.point[name] for trial in with_field}
        if of.kind == "choice":
            positions = {at: of.values.index(value) for at, value in positions.items()}
            labels = [shown(value) for value in of.values]
            turned = sum(map(len, labels)) > 30
            axes.set_xticks(
                range(len(labels)), labels, rotation=30 if turned else 0, ha="right" if turned else "center"
            )
            axes.set_xlim(-0.5, len(labels) - 0.5)
        elif of.kind == "loguniform":
            axes.set_xscale("log")
        for state, color in _COLORS.items():
            of_state = [trial for trial in with_field if trial.state == state]
            axes.scatter(
                [positions[trial.number] for trial in of_state],
                [100 * trial.validation_accuracy for trial in of_state],
                s=22,
                alpha=0.8,
                color=color,
                label=STATES[state] if number == 0 else None,
            )
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    for row in grid:
        row[0].set_ylabel("validation accuracy, %")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _short(names: Sequence[str]) -> list[str]:
    """Without their sections, where that leaves them different."""
    last = [name.rpartition(".")[2] for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names)]


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def shown(value: Any) -> str:
    """A field's value, short."""
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def described(point: dict[str, Any]) -> str:
    """A point in one line."""
    return " · ".join(f"{name}={shown(value)}" for name, value in point.items())
