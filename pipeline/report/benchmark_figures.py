"""Figures of a benchmark, after the paper's Figures 1, 4 and 5.

Conventions:
- Figures are plain `matplotlib.figure.Figure` objects, without pyplot and its state.
- Colors are the color-blind safe palette of Okabe and Ito; lines also differ in their markers.
- MmAP, grouped is always vermilion and drawn on top.
- Accuracies are in %, means over seeds; error bars are sample standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import ceil, cos, floor, inf, log10, nan, pi, sin
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.report.benchmark_tables import (
    MULTI_TASK,
    OTHER_SECTION,
    OURS,
    SINGLE_TASK,
    ZERO_SHOT,
    ZERO_SHOT_SECTION,
    Benchmark,
    variant_section,
    variant_title,
)
from pipeline.report.paper_results import TRAINED_PARAMETERS
from pipeline.report.summary import AVERAGE_ROW

VERMILION, GRAY = "#d55e00", "#6f6f6f"
LINE_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#e69f00")
MARKERS = "osDv^PX"
SECTION_COLORS = {ZERO_SHOT_SECTION: GRAY, SINGLE_TASK: "#0072b2", MULTI_TASK: "#009e73", OTHER_SECTION: "#cc79a7"}


# --- Figure 1 -------------------------------------------------------------------------------------------


def accuracy_parameters_figure(benchmark: Benchmark, shots: int) -> Figure:
    """Plot average accuracy against trained parameters; a circle's area grows with the logarithm of the parameters.

    The paper's results are hollow circles: its printed parameters, and the mean of its tasks' accuracies.

    Raises: ValueError: no run with these shots has all tasks.
    """
    points = {}  # variant → trained parameters, accuracy in %
    for method in benchmark.methods:
        accuracies = benchmark.accuracy_by_seed(method, shots)
        if accuracies:
            parameters = fmean(run.trained_parameters for run in benchmark.runs(method, shots))
            points[method] = (parameters, 100 * fmean(accuracies.values()))
    if not points:
        raise ValueError(_no_runs(benchmark, shots))
    paper_points: dict[str, tuple[float, float]] = {}
    if paper := benchmark.paper:
        paper_points = {
            method: (1e6 * TRAINED_PARAMETERS.get(method, 0), paper.task_mean(shots, method))
            for method in points
            if method in paper.accuracy.get(shots, {})
        }
    positive = [parameters for parameters, _ in (*points.values(), *paper_points.values()) if parameters] or [1e4]
    lowest, highest = floor(log10(min(positive))), ceil(log10(max(positive)))
    zero = 10.0 ** (lowest - 1)  # position of 0 on the logarithmic axis
    circles, paper_circles = (
        {
            method: (parameters or zero, accuracy, _area(parameters))
            for method, (parameters, accuracy) in results.items()
        }
        for results in (points, paper_points)
    )
    all_circles = [*circles.values(), *paper_circles.values()]

    figure = Figure(figsize=(8.5 + len(points) / 12, 5.5 + len(points) / 12), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(zero / 2.5, 10.0**highest * 2)
    values = [accuracy for _, accuracy, _ in all_circles]
    margin = 0.12 * (max(values) - min(values)) or 1.0
    axes.set_ylim(min(values) - margin, max(values) + margin)
    decades = range(lowest, highest + 1)
    axes.set_xticks([zero, *(10.0**decade for decade in decades)], ["0", *map(_power_of_ten, decades)])
    axes.minorticks_off()
    axes.axvline(zero * 10**0.7, color="#bbbbbb", linewidth=1, linestyle=(0, (2, 3)))  # the axis is broken here
    axes.set_xlabel("trained parameters, sum over tasks")
    axes.set_ylabel(f"test {benchmark.metric} (%), average over tasks")
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

    for method, (x, y, area) in circles.items():
        color, zorder = _section_color(method), 4 if method == OURS else 3
        axes.scatter(x, y, area, color=color, alpha=0.8, edgecolor="white", linewidth=1, zorder=zorder)
        if method in paper_circles:
            paper_x, paper_y, paper_area = paper_circles[method]
            axes.plot([x, paper_x], [y, paper_y], color=color, linewidth=0.6, zorder=1)
            axes.scatter(paper_x, paper_y, paper_area, facecolor="none", edgecolor=color, linewidth=1, zorder=2)
    sections = [section for section in SECTION_COLORS if any(variant_section(method) == section for method in points)]
    handles = [_dot(section, color=SECTION_COLORS[section]) for section in sections]
    if OURS in points:
        handles.append(_dot(variant_title(OURS), color=VERMILION))
    if paper_points:
        handles.append(_dot("hollow: reported in the paper", markerfacecolor="none", markeredgecolor="#444444"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    _label_points(axes, circles, paper_circles)
    return figure


def _label_points(
    axes: Axes,
    circles: Mapping[str, tuple[float, float, float]],
    paper_circles: Mapping[str, tuple[float, float, float]],
) -> None:
    """Place each variant's title near its circle, at the nearest position that overlaps no circle, line or other title.

    Circles are x, y, area in square points. Freezes the layout.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)  # not a subfigure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    point = figure.dpi / 72  # all lengths are in pixels; a box is left, bottom, right, top
    bounds = axes.get_window_extent(renderer).extents

    def center_and_radius(circle: tuple[float, float, float]) -> tuple[np.ndarray, float]:
        return axes.transData.transform(circle[:2]), point * (circle[2] / pi) ** 0.5

    disks = {method: center_and_radius(circle) for method, circle in circles.items()}
    obstacles = np.empty((0, 4))
    for center, radius in (*disks.values(), *map(center_and_radius, paper_circles.values())):
        clearance = radius + 3 * point  # keeps titles away from neighboring circles
        obstacles = np.vstack([obstacles, np.hstack([center - clearance, center + clearance])])
    for method, circle in paper_circles.items():
        obstacles = np.vstack([obstacles, _boxes_along(disks[method][0], center_and_radius(circle)[0])])

    def num_neighbors(method: str) -> int:
        return sum(bool(np.linalg.norm(disks[method][0] - center) < 40 * point) for center, _ in disks.values())

    def is_drawn(leader: np.ndarray) -> bool:
        return bool(np.linalg.norm(leader[-1] - leader[0]) > 8 * point)

    labels = np.empty((0, 4))
    for method in sorted(circles, key=lambda name: (name != OURS, -num_neighbors(name), -circles[name][1])):
        center, radius = disks[method]
        style: dict[str, Any] = {"color": "#222222"}
        if method == OURS:
            style = {"fontweight": "bold", "color": VERMILION}
        position: dict[str, Any] = {"xytext": (0, 0), "textcoords": "offset points", "ha": "center", "va": "center"}
        label = axes.annotate(
            variant_title(method), circles[method][:2], fontsize=9, parse_math=False, zorder=6, **position, **style
        )
        extent = label.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2 + point
        min_overlaps: float = inf
        for gap, angle in product(range(4, 300, 5), np.arange(0, 2 * pi, pi / 12)):
            direction = np.array([cos(angle), sin(angle)])
            start = center + direction * radius
            middle = start + direction * gap * point + np.clip(1.5 * direction, -1, 1) * half
            box = np.hstack([middle - half, middle + half])
            leader = _boxes_along(start, np.clip(start, box[:2], box[2:]))
            is_outside = bool((box[:2] < bounds[:2]).any() or (box[2:] > bounds[2:]).any())
            # Among many circles a leader may have to cross a title: legible, which two titles in one place are not.
            overlaps = 100 * _count_overlaps(box, obstacles) + _count_overlaps(leader, labels) + 10_000 * is_outside
            if not is_drawn(leader):  # without one, a title belongs to the nearest circle
                overlaps += 10 * sum(_distance(disk, box) < _distance(disks[method], box) for disk in disks.values())
            if overlaps < min_overlaps:
                min_overlaps, best = overlaps, (middle, box, leader)
                if overlaps == 0:
                    break
        middle, box, leader = best
        label.set_position((middle - center) / point)
        if is_drawn(leader):
            ends = axes.transData.inverted().transform(leader[[0, -1], :2])
            axes.plot(*ends.T, color="#999999", linewidth=0.6, zorder=2)
        labels = np.vstack([labels, box])
        obstacles = np.vstack([obstacles, box, leader])


def _boxes_along(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return (N, 4) boxes of size 0 along a line, at most 4 pixels apart."""
    return np.tile(np.linspace(start, end, 2 + int(np.linalg.norm(end - start) / 4)), 2)


def _distance(disk: tuple[np.ndarray, float], box: np.ndarray) -> float:
    """Return the distance of a circle's edge, by center and radius, from a box."""
    center, radius = disk
    return float(np.linalg.norm(center - np.clip(center, box[:2], box[2:]))) - radius


def _count_overlaps(boxes: np.ndarray, obstacles: np.ndarray) -> int:
    """Count the pairs of a box and an obstacle that overlap."""
    a, b = np.atleast_2d(boxes)[:, None], obstacles[None]
    return int(((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(axis=2).sum())


def _area(parameters: float) -> float:
    """Return a circle's area in square points: 25 up to a thousand parameters, 900 at a thousand million."""
    return 25 + 146 * max(0.0, log10(max(parameters, 1)) - 3)


def _section_color(method: str) -> str:
    return VERMILION if method == OURS else SECTION_COLORS[variant_section(method)]


def _dot(label: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", markersize=8, label=label, **style)


def _power_of_ten(exponent: int) -> str:
    """Format a power of ten: 4 → "10 k", 8 → "100 M"."""
    return f"{10 ** (exponent % 3)} {('', 'k', 'M', 'G', 'T')[exponent // 3]}".strip()


def _no_runs(benchmark: Benchmark, shots: int) -> str:
    return f"{benchmark.name} has no complete run with {shots} shots; choose one of {benchmark.shots}"


# --- Figure 5 -------------------------------------------------------------------------------------------


def shots_figure(benchmark: Benchmark, methods: Sequence[str]) -> Figure:
    """Plot accuracy against shots, in one panel for the average and one per task. Readable for up to 8 methods.

    Zero-shot, if among the methods, is dashed and not constant, since the test images depend on the shots. Its star at
    0 shots uses the test images of the fewest shots.

    Raises: ValueError: none of the methods was run.
    """
    if not set(methods) & set(benchmark.methods):
        raise ValueError(f"{benchmark.name} has no run of {', '.join(methods)}")
    columns = (None, *benchmark.tasks)
    rows = max(1, round((len(columns) / 2) ** 0.5))
    num_columns = ceil((len(columns) + 1) / rows)  # one panel holds the legend
    figure = Figure(figsize=(3.2 * num_columns, 2.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, num_columns, squeeze=False).flat)
    trained = [method for method in methods if method not in (ZERO_SHOT, OURS)]
    offset = 0.008 * max(benchmark.shots)  # keeps error bars apart
    for axes, task in zip(panels, columns):
        for number, method in enumerate(methods):
            line = {shots: _mean_std(benchmark, method, shots, task) for shots in benchmark.shots}
            line = {shots: value for shots, value in line.items() if value is not None}
            if not line:
                continue
            means, deviations = zip(*line.values())
            if method == ZERO_SHOT:
                axes.plot([0, *line], [means[0], *means], color=GRAY, linestyle="--", zorder=1)
                axes.plot(0, means[0], color=GRAY, marker="*", markersize=10, clip_on=False)
                continue
            positions = [shots + (number - (len(methods) - 1) / 2) * offset for shots in line]
            style = _line_style(method, trained)
            axes.errorbar(positions, means, deviations, capsize=2, elinewidth=0.8, markeredgecolor="white", **style)
        axes.set_title(task or AVERAGE_ROW, fontsize=10, fontweight="normal" if task else "bold", parse_math=False)
        axes.set_xticks([0, *benchmark.shots] if ZERO_SHOT in methods else benchmark.shots)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(columns) :]:
        axes.axis("off")
    handles = [
        Line2D([], [], color=GRAY, linestyle="--", marker="*", markersize=10, label=variant_title(method))
        if method == ZERO_SHOT
        else Line2D([], [], markeredgecolor="white", label=variant_title(method), **_line_style(method, trained))
        for method in methods
        if method in benchmark.methods
    ]
    panels[len(columns)].legend(handles=handles, loc="center", frameon=False, fontsize=9)
    figure.supxlabel("shots per class", fontsize=10)
    figure.supylabel(f"test {benchmark.metric} (%)", fontsize=10)
    return figure


def _line_style(method: str, trained: Sequence[str]) -> dict[str, Any]:
    if method == OURS:
        return {"color": VERMILION, "marker": "o", "markersize": 7, "linewidth": 2.4, "zorder": 5}
    number = trained.index(method)
    color, marker = LINE_COLORS[number % len(LINE_COLORS)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 6, "linewidth": 1.2, "zorder": 3}


def _mean_std(benchmark: Benchmark, method: str, shots: int, task: str | None) -> tuple[float, float] | None:
    """Return mean and deviation over seeds in %; nan, which draws no error bar, for one seed; None without a run."""
    values = [100 * value for value in benchmark.accuracy_by_seed(method, shots, task).values()]
    return (fmean(values), stdev(values) if len(values) > 1 else nan) if values else None


# --- Figure 4 -------------------------------------------------------------------------------------------


def prompt_ablation_figure(benchmark: Benchmark, shots: int, ours: str = OURS) -> Figure:
    """Plot multi-task joint prompts and MLP prompts against `ours`, a variant of MmAP: bars per task and on average.

    Raises: ValueError: none of the three was run with these shots.
    """
    colors = {"joint_prompts_mt": "#56b4e9", "mlp_prompts_mt": "#0072b2", ours: VERMILION}
    columns = (*benchmark.tasks, None)
    bars = {
        method: {
            column: value for column, task in enumerate(columns) if (value := _mean_std(benchmark, method, shots, task))
        }
        for method in colors
    }
    bars = {method: method_bars for method, method_bars in bars.items() if method_bars}
    if not bars:
        raise ValueError(_no_runs(benchmark, shots))
    values = [mean for method_bars in bars.values() for mean, _ in method_bars.values()]
    top = max(
        mean + np.nan_to_num(deviation) for method_bars in bars.values() for mean, deviation in method_bars.values()
    )
    bottom = 10 * floor((min(values) - 5) / 10) if min(values) > 50 else 0
    figure = Figure(figsize=(1.5 * len(columns) + 1.5, 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(bars)
    for number, (method, method_bars) in enumerate(bars.items()):
        positions = [column + (number - (len(bars) - 1) / 2) * width for column in method_bars]
        means, deviations = zip(*method_bars.values())
        heights = np.array(means) - bottom
        axes.bar(positions, heights, 0.94 * width, bottom, color=colors[method], label=variant_title(method))
        axes.errorbar(positions, means, deviations, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=2)
        for x, mean, deviation in zip(positions, means, deviations):
            style: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{mean:.1f}", (x, mean + np.nan_to_num(deviation)), fontsize=8, **style)
    names = [task or AVERAGE_ROW for task in columns]
    rotation: dict[str, Any] = {}
    if max(map(len, names)) > 14:
        rotation = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), names, parse_math=False, **rotation)
    axes.tick_params(axis="x", length=0)
    axes.axvline(len(columns) - 1.5, color="#cccccc", linewidth=1)
    axes.set_ylim(bottom, top + 0.1 * (top - bottom))
    axes.set_ylabel(f"test {benchmark.metric} (%){f', from {bottom}' if bottom else ''}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(bars), frameon=False)
    return figure
