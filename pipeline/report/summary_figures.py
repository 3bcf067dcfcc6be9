"""Figures of a run's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from matplotlib import colormaps
from matplotlib.figure import Figure

from pipeline.report.summary import method_title

COLORS = {"zero_shot": "#b3b3b3", "all_in_one": "#7aa6c2", "grouped": "#1f5a85"}
OTHER_COLORS: Sequence[Any] = cast(Any, colormaps["Set2"]).colors  # a list of colors


def accuracy_figure(tasks: Sequence[str], methods: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot bars of every method's accuracy for each task and on average, with their standard errors."""
    columns = [*tasks, "average"]
    figure = Figure(figsize=(max(6.0, (0.5 + 0.2 * len(methods)) * len(columns) + 1.5), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for number, (name, method) in enumerate(methods.items()):
        values = [100 * method["accuracy"][task] for task in tasks] + [100 * method["average"]]
        errors = [100 * method["standard_error"][task] for task in tasks] + [100 * method["average_standard_error"]]
        positions = [column + (number - (len(methods) - 1) / 2) * width for column in range(len(columns))]
        color = COLORS.get(name, OTHER_COLORS[number % len(OTHER_COLORS)])
        axes.bar(positions, values, width, label=method_title(name), color=color)
        axes.errorbar(positions, values, errors, fmt="none", ecolor="#555555", elinewidth=0.8)
        if len(methods) <= 4:  # more do not fit
            for position, value, error in zip(positions, values, errors):
                axes.text(position, value + error + 1, f"{value:.0f}", fontsize=7, ha="center")
    axes.set_xticks(range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 10 else 0)
    axes.axvline(len(tasks) - 0.5, color="#cccccc", linewidth=1)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 110)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(methods), 4), frameon=False)
    return figure
