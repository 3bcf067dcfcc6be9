"""Figures of the stability of a grouping: affinities during training, and the partitions with the highest scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.data.names import pluralize, shorten
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.stability import RankedPartition, early_share, num_early_snapshots
from pipeline.grouping.text import first_snapshots
from pipeline.report.grouping_figures import NEGATIVE, POSITIVE

LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Color-blind safe (Okabe and Ito)."""
MAX_TITLE_WIDTH = 70
"""Letters in a line of the name of a partition."""
MAX_PAIRS_WITH_LINES = 15
"""Up to this many pairs (6 tasks) every pair has its own line."""
WITHIN, BETWEEN = "#0072b2", "#8a8a8a"


def affinity_over_training(
    affinities: np.ndarray, steps: Sequence[int], task_names: Sequence[str], groups: Groups
) -> Figure:
    """Plot how the affinities that the grouping uses add up over the snapshots, and below the affinities by step: of
    each pair in one group in its own color, of all others in gray; for many tasks the median of both kinds, with the
    middle 80 %.

    Args:
        affinities: (S, T, T), by snapshot.
    """
    pairs = list(combinations(range(len(task_names)), 2))
    values = np.array([affinities[:, i, j] for i, j in pairs]).reshape(len(pairs), len(affinities))
    width = num_early = num_early_snapshots(len(affinities))
    smooth = np.array([_trailing_mean(line, width) for line in values]).reshape(values.shape)
    figure = Figure(figsize=(9.0, 7.0), layout="constrained")
    sums, by_step = figure.subplots(2, sharex=True)
    names = [" + ".join(shorten(task_names[task], 18) for task in pair) for pair in pairs]
    is_within = [any(i in group and j in group for group in groups) for i, j in pairs]
    for axes in (sums, by_step):
        axes.axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
        axes.axvspan(steps[0], steps[num_early - 1], color="#fff1c9", zorder=-1)
        axes.spines[["top", "right"]].set_visible(False)
    ends = _draw_pairs(sums, steps, values.cumsum(axis=1) / len(affinities), names, is_within)
    _label_ends(sums, steps[-1], ends)
    _draw_pairs(by_step, steps, smooth, names, is_within)
    share = f"{100 * early_share(affinities):.0f} % from {first_snapshots(num_early, len(affinities))}"
    sums.set_title(f"Affinity up to each step: {share}", fontsize=11, loc="left")
    averaging = f", mean of the last {width} snapshots" if width > 1 else ""
    by_step.set_title(f"Affinity of each step{averaging}", fontsize=11, loc="left")
    # Under dot products the large gradients of the first steps would compress the scale of all later ones.
    late = np.abs(smooth[:, len(affinities) // 2 :]).max(initial=0)
    if np.abs(smooth).max(initial=0) > 20 * late > 0:
        by_step.set_yscale("symlog", linthresh=late)
        by_step.set_ylabel(f"affinity, logarithmic beyond ±{late:.2g}")
    else:
        by_step.set_ylabel("affinity")
    sums.set_ylabel("sum of affinities / snapshots")
    by_step.set_xlabel("training step of the global prompt")
    by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of each value and the `width` - 1 before it; of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(stops - width, 0)
    return np.asarray((sums[stops] - sums[starts]) / (stops - starts))


def _draw_pairs(
    axes: Axes, steps: Sequence[int], lines: np.ndarray, names: Sequence[str], is_within: Sequence[bool]
) -> list[tuple[float, str, Any]]:
    """Draw the lines (N, S) of pairs; return the ends that need a label: height, label, color."""
    within = [index for index, same_group in enumerate(is_within) if same_group]
    between = [index for index, same_group in enumerate(is_within) if not same_group]
    ends: list[tuple[float, str, Any]] = []
    if len(lines) <= MAX_PAIRS_WITH_LINES:
        for index in between:
            axes.plot(steps, lines[index], color=BETWEEN, linewidth=0.9)
        for index, color in zip(within, _line_colors(len(within)), strict=True):
            axes.plot(steps, lines[index], color=color, linewidth=1.8)
            ends.append((lines[index, -1], names[index], color))
        if between:
            middle = sorted(between, key=lambda index: float(lines[index, -1]))[len(between) // 2]
            ends.append((lines[middle, -1], "different groups", BETWEEN))
    else:
        for indices, color, label in ((between, BETWEEN, "different groups"), (within, WITHIN, "same group")):
            if indices:
                low, median, high = np.quantile(lines[indices], (0.1, 0.5, 0.9), axis=0)
                axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
                axes.plot(steps, median, color=color, linewidth=2)
                ends.append((median[-1], f"{label}, {pluralize(len(indices), 'pair')}", color))
    axes.margins(x=0.01)
    return ends


def _isotonic_regression(values: np.ndarray) -> np.ndarray:
    """Return the closest values (N,) that never fall: at each position, the largest of the means from any start up to
    it, each over the end from it on that makes it smallest. SciPy's takes half a second to import."""
    sums, positions = np.append(0, np.cumsum(values)), np.arange(len(values))
    means = (sums[1:] - sums[:-1, None]) / np.maximum(1, 1 + positions - positions[:, None])
    return np.array([means[: position + 1, position:].min(axis=1).max() for position in positions])


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, Any]], gap: float = 0.075) -> None:
    """Write labels right of the ends (y, label, color) of lines, `gap` of the height apart, tied to their ends."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0])
    axes.set_ylim(axes.get_ylim())  # labels move no limits
    axes_transform = axes.transData + axes.transAxes.inverted()
    heights = np.array([axes_transform.transform((x, y))[1] for y, _, _ in ends])
    offsets = min(gap, 1 / len(ends)) * np.arange(len(ends))
    # The closest positions in this order with the gap between neighbors.
    positions = np.clip(_isotonic_regression(heights - offsets), 0, max(0.0, 1 - offsets[-1])) + offsets
    for (y, label, color), position in zip(ends, positions, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.04, position),
            textcoords="axes fraction",
            fontsize=8.5,
            color=color,
            va="center",
            parse_math=False,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )


def _line_colors(count: int) -> list[Any]:
    """Return distinct colors, none of them gray."""
    if count <= len(LINE_COLORS):
        return list(LINE_COLORS[:count])
    colors = colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [(*(0.8 * color[:3]),) for color in colors]  # darker, since labels have them too


def ranked_partitions_figure(ranked: Sequence[RankedPartition]) -> Figure:
    """Plot the scores of the best partitions as bars, the chosen one on top."""
    names = [textwrap.fill(item.title, MAX_TITLE_WIDTH, break_on_hyphens=False) for item in ranked]
    width = max(len(line) for name in names for line in name.splitlines())
    num_lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(4.5 + 0.075 * width, 0.18 * (len(ranked) + num_lines) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    scores = [item.score for item in ranked]
    colors = [(POSITIVE if score >= 0 else NEGATIVE) for score in scores]
    bars = axes.barh(range(len(ranked)), scores, color=colors, alpha=0.45)
    bars[0].set_alpha(1.0)
    axes.set_yticks(range(len(ranked)), names, fontsize=9, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.axvline(0, color="#888888", linewidth=1)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    axes.set_xlabel("score")
    axes.set_title("Partitions with the highest scores", fontsize=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
