"""Figures of the stability of a grouping: affinities during training, and the partitions with the highest scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from matplotlib.figure import Figure

from pipeline.grouping.search.problem import Groups
from pipeline.grouping.stability import RankedPartition
from pipeline.grouping.text import format_groups
from pipeline.report.grouping_figures import NEGATIVE, POSITIVE

MAX_TASKS_WITH_LINES = 6
"""Up to this many tasks (15 pairs) every pair has its own line."""
WITHIN, BETWEEN = "#0072b2", "#999999"


def affinity_over_training(
    affinities: np.ndarray, steps: Sequence[int], task_names: Sequence[str], groups: Groups
) -> Figure:
    """Plot affinities by step, smoothed over a tenth of the snapshots: pairs in one group blue, all others gray; for
    many tasks the median of both kinds, with the middle 80 %.

    Args:
        affinities: (S, T, T), by snapshot.
    """
    pairs = list(combinations(range(len(task_names)), 2))
    is_within = [any(i in group and j in group for group in groups) for i, j in pairs]
    width = max(1, len(affinities) // 10)
    kernel = np.ones(width) / width
    x = np.asarray(steps)[width - 1 :]
    lines = np.array([np.convolve(affinities[:, i, j], kernel, "valid") for i, j in pairs])
    lines = lines.reshape(len(pairs), len(x))  # also without pairs, for a single task
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    kinds = ((False, BETWEEN, "different groups"), (True, WITHIN, "same group"))
    for kind, color, label in kinds:
        indices = [index for index, within in enumerate(is_within) if within == kind]
        if not indices:
            continue
        if len(task_names) <= MAX_TASKS_WITH_LINES:
            for index in indices:
                line_label = label if index == indices[0] else None
                axes.plot(x, lines[index], color=color, linewidth=1.8 if kind else 1.0, label=line_label)
        else:
            low, middle, high = np.quantile(lines[indices], (0.1, 0.5, 0.9), axis=0)
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(x, middle, color=color, linewidth=2, label=label)
    if len(task_names) <= MAX_TASKS_WITH_LINES:
        named = [index for index, within in enumerate(is_within) if within]
        named.sort(key=lambda index: lines[index, -1])
        for rank, index in enumerate(named):
            name = format_groups([pairs[index]], task_names)
            height = 0.5 + 0.055 * (rank - (len(named) - 1) / 2)
            axes.text(
                1.01, height, name, transform=axes.transAxes, fontsize=8, color=WITHIN, va="center", parse_math=False
            )
    axes.axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
    # Under dot products the large gradients of the first steps would compress the scale of all later ones.
    ends = np.abs(lines[:, len(x) // 2 :]).max(initial=0)
    if np.abs(lines).max(initial=0) > 20 * ends > 0:
        axes.set_yscale("symlog", linthresh=ends)
    axes.set_xlabel("training step of the global prompt")
    axes.set_ylabel("affinity")
    axes.set_title("Affinity of each pair during training", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    if pairs:
        axes.legend(frameon=False, fontsize=9)
    return figure


def ranked_partitions_figure(ranked: Sequence[RankedPartition]) -> Figure:
    """Plot the scores of the best partitions as bars, the chosen one on top."""
    names = [item.title if len(item.title) <= 90 else item.title[:89] + "…" for item in ranked]
    figure = Figure(figsize=(4.5 + 0.075 * max(map(len, names)), 0.36 * len(ranked) + 1.0), layout="constrained")
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
