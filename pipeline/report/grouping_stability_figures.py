"""Pictures of how sure a grouping is: pairs over the training, and the partitions that come close."""

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
"""Up to this many tasks (15 pairs) every pair has a line of its own."""
WITHIN, BETWEEN = "#0072b2", "#999999"


def affinity_over_training(
    affinities: np.ndarray, steps: Sequence[int], task_names: Sequence[str], groups: Groups
) -> Figure:
    """Affinities by step, smoothed over a tenth of the snapshots: pairs that the groups join in blue, others in gray;
    for many tasks the median of both kinds, with the middle 80 %.

    Args:
        affinities: (S, T, T), by snapshot.
    """
    pairs = list(combinations(range(len(task_names)), 2))
    joined = [any(one in group and other in group for group in groups) for one, other in pairs]
    width = max(1, len(affinities) // 10)
    kernel = np.ones(width) / width
    at = np.asarray(steps)[width - 1 :]
    lines = np.array([np.convolve(affinities[:, one, other], kernel, "valid") for one, other in pairs])
    lines = lines.reshape(len(pairs), len(at))  # also of no pairs, where there is one task
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    kinds = ((False, BETWEEN, "in different groups"), (True, WITHIN, "in one group"))
    for kind, color, label in kinds:
        of_kind = [number for number, together in enumerate(joined) if together == kind]
        if not of_kind:
            continue
        if len(task_names) <= MAX_TASKS_WITH_LINES:
            for number in of_kind:
                once = label if number == of_kind[0] else None
                axes.plot(at, lines[number], color=color, linewidth=1.8 if kind else 1.0, label=once)
        else:
            low, middle, high = np.quantile(lines[of_kind], (0.1, 0.5, 0.9), axis=0)
            axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(at, middle, color=color, linewidth=2, label=label)
    if len(task_names) <= MAX_TASKS_WITH_LINES:
        shown = [number for number, together in enumerate(joined) if together]
        shown.sort(key=lambda number: lines[number, -1])
        for place, number in enumerate(shown):
            name = format_groups([pairs[number]], task_names)
            height = 0.5 + 0.055 * (place - (len(shown) - 1) / 2)
            axes.text(
                1.01, height, name, transform=axes.transAxes, fontsize=8, color=WITHIN, va="center", parse_math=False
            )
    axes.axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
    # Under dot products the first steps' large gradients would press all others flat.
    ends = np.abs(lines[:, len(at) // 2 :]).max(initial=0)
    if np.abs(lines).max(initial=0) > 20 * ends > 0:
        axes.set_yscale("symlog", linthresh=ends)
    axes.set_xlabel("step of the global prompt's training")
    axes.set_ylabel("affinity")
    axes.set_title("Affinity of each pair over the training", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    if pairs:
        axes.legend(frameon=False, fontsize=9)
    return figure


def ranked_partitions_figure(ranked: Sequence[RankedPartition]) -> Figure:
    """Bars of the best partitions' scores, the one found on top."""
    names = [of.title if len(of.title) <= 90 else of.title[:89] + "…" for of in ranked]
    figure = Figure(figsize=(4.5 + 0.075 * max(map(len, names)), 0.36 * len(ranked) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    scores = [of.score for of in ranked]
    colors = [(POSITIVE if score >= 0 else NEGATIVE) for score in scores]
    bars = axes.barh(range(len(ranked)), scores, color=colors, alpha=0.45)
    bars[0].set_alpha(1.0)
    axes.set_yticks(range(len(ranked)), names, fontsize=9, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.axvline(0, color="#888888", linewidth=1)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    axes.set_xlabel("score")
    axes.set_title("The groups found, and the next best", fontsize=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
