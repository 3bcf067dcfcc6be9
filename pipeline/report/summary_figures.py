"""Figures of a run's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, cast

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.data.names import shorten
from pipeline.report.metrics import metric_of
from pipeline.report.summary import AVERAGE_ROW, method_title

COLORS = {"zero_shot": "#b3b3b3", "each_alone": "#bcd6e6", "all_in_one": "#7aa6c2", "grouped": "#1f5a85"}
OTHER_COLORS: Sequence[Any] = cast(Any, colormaps["Set2"]).colors  # a list of colors


MAX_ROW_INCHES = 12.0
"""Width of the bars in a row; more tasks take several rows, which stay legible on a page."""


def accuracy_figure(tasks: Sequence[str], methods: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot bars of every method's accuracy or mAP for each task and on average, with their standard errors."""
    num_columns, column_inches = len(tasks) + 1, 0.5 + 0.2 * len(methods)
    row_length = ceil(num_columns / ceil(num_columns * column_inches / MAX_ROW_INCHES))
    num_rows = ceil(num_columns / row_length)
    figure = Figure(figsize=(max(8.0, row_length * column_inches + 1.5), 3.2 * num_rows + 0.8), layout="constrained")
    panels = figure.subplots(num_rows, squeeze=False)[:, 0]
    for row, axes in enumerate(panels):
        start, stop = row * row_length, (row + 1) * row_length
        _draw_bars(axes, tasks, methods, range(start, min(stop, num_columns)))
        if start < len(tasks) < stop:
            axes.axvline(len(tasks) - start - 0.5, color="#cccccc", linewidth=1)
        axes.set_xlim(-0.6, row_length - 0.4)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(methods), 4), frameon=False)
    return figure


def _draw_bars(axes: Axes, tasks: Sequence[str], methods: Mapping[str, Mapping[str, Any]], columns: range) -> None:
    """Draw the bars of columns, given by number: the tasks, then the average."""
    width, metric = 0.8 / len(methods), metric_of(next(iter(methods.values())))
    for number, (name, method) in enumerate(methods.items()):
        accuracies = [*(method[metric][task] for task in tasks), method["average"]]
        standard_errors = [*(method["standard_error"][task] for task in tasks), method["average_standard_error"]]
        values = [100 * accuracies[column] for column in columns]
        errors = [100 * standard_errors[column] for column in columns]
        positions = [column + (number - (len(methods) - 1) / 2) * width for column in range(len(columns))]
        color = COLORS.get(name, OTHER_COLORS[number % len(OTHER_COLORS)])
        axes.bar(positions, values, width, label=method_title(name), color=color)
        axes.errorbar(positions, values, errors, fmt="none", ecolor="#555555", elinewidth=0.8)
        if len(methods) <= 4:  # more do not fit
            for position, value, error in zip(positions, values, errors):
                axes.text(position, value + error + 1, f"{value:.0f}", fontsize=7, ha="center")
    names = [shorten([*tasks, AVERAGE_ROW][column]) for column in columns]
    rotation: dict[str, Any] = {}
    if max(map(len, names)) > 10:
        rotation = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), names, parse_math=False, **rotation)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"test {metric} (%)")
    axes.set_ylim(0, 110)
    axes.spines[["top", "right"]].set_visible(False)
