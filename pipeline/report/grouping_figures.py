"""Figures of a task grouping: affinity and co-assignment matrices as heat maps, and the tasks as a graph.

Design choices:
- Figures are plain `matplotlib.figure.Figure` objects, without pyplot and its global state; `savefig` works
  anywhere, with no display.
- Blue is positive and red is negative, with zero in the middle of the scale.
- The color scale ignores the diagonal: under dot products it holds squared gradient norms, often far above
  all other values, and would leave their cells pale. Diagonal cells are gray.
- Positions in the graph are computed, not simulated: the same grouping always gives the same figure.
"""

from collections.abc import Sequence
from math import atan2, cos, degrees, floor, log10, pi, sin
from typing import Any, cast

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from pipeline.data.names import pluralize, shorten

MAX_TASKS_WITH_VALUES = 12
"""Maximum number of tasks for which the heat map shows the numbers."""

MAX_LEGEND_GROUPS = 12
"""Above this number of groups the graph has no legend for them."""

POSITIVE, NEGATIVE = "#2166ac", "#b2182b"  # the ends of the RdBu color map


def affinity_heat_map(affinity: np.ndarray, task_names: Sequence[str], groups: Sequence[Sequence[int]]) -> Figure:
    """Plot the affinity matrix with tasks ordered by group and every group outlined.

    Args:
        affinity: (T, T), finite.
        task_names: T names; long ones are shortened.
        groups: disjoint groups of task indices that cover all tasks, as in `Partition.groups`.
    """
    matrix = np.array(affinity, dtype=np.float64)
    between_tasks = matrix[~np.eye(len(matrix), dtype=bool)]
    exponent = _shared_exponent(between_tasks)
    limit = np.abs(between_tasks).max(initial=0) / 10.0**exponent or 1.0
    scale = f" (×10$^{{{exponent}}}$)" if exponent else ""
    figure = _matrix_map(matrix / 10.0**exponent, task_names, groups, "RdBu", (-limit, limit), f"affinity{scale}")
    axes = figure.axes[0]
    title = f"Affinity of {pluralize(len(matrix), 'task')} in {pluralize(len(groups), 'group')}"
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("diagonal (gray) excluded from the color scale", fontsize=8, color="#555555")
    return figure


def co_assignment_map(co_assignment: np.ndarray, task_names: Sequence[str], groups: Sequence[Sequence[int]]) -> Figure:
    """Plot the co-assignment frequencies over bootstrap resamples, with tasks ordered by group.

    Args:
        co_assignment: (T, T), 0 to 1, as in `Bootstrap.co_assignment`.
    """
    matrix = 100 * np.asarray(co_assignment, dtype=np.float64)
    figure = _matrix_map(matrix, task_names, groups, "Blues", (0, 100), "co-assignment frequency (%)")
    figure.axes[0].set_title("Co-assignment over resamples", fontsize=12)
    return figure


def _matrix_map(
    matrix: np.ndarray,
    task_names: Sequence[str],
    groups: Sequence[Sequence[int]],
    color_map: str,
    limits: tuple[float, float],
    label: str,
) -> Figure:
    """Plot a matrix (T, T) with tasks ordered by group, every group outlined, and a gray diagonal."""
    order = [task for group in groups for task in group]
    num_tasks = len(order)
    matrix = matrix[np.ix_(order, order)]
    names = [shorten(task_names[task]) for task in order]
    show_values = num_tasks <= MAX_TASKS_WITH_VALUES
    cell, min_side = (0.68, 2.0) if show_values else (0.21, 5.0)
    side = max(num_tasks * cell, min_side)  # of the map, in inches
    font_size = 10 if show_values else min(9.0, 0.8 * 72 * side / num_tasks)
    name_width = _text_inches(max(names, key=len), font_size)
    bottom = name_width * (0.75 if show_values else 1.0)
    figure = Figure(figsize=(side + name_width + 2.2, side + bottom + 1.1), layout=_layout())
    axes = figure.add_subplot()
    colors = matplotlib.colormaps[color_map].with_extremes(bad="#d9d9d9")
    cells = np.ma.masked_array(matrix, mask=np.eye(num_tasks, dtype=bool))
    image = axes.imshow(cells, cmap=colors, vmin=limits[0], vmax=limits[1])

    axes.set_yticks(range(num_tasks), names, fontsize=font_size, parse_math=False)
    if show_values:
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(num_tasks), names, fontsize=font_size, parse_math=False, **slanted)
    else:
        axes.set_xticks(range(num_tasks), names, fontsize=font_size, parse_math=False, rotation=90)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    if show_values:
        for (row, column), value in np.ndenumerate(matrix):
            color = "white" if row != column and abs(value) > 0.6 * limits[1] else "#222222"
            axes.text(column, row, _format_number(value), ha="center", va="center", fontsize=8.5, color=color)

    sizes = np.array([len(group) for group in groups])
    starts = np.cumsum(sizes) - sizes - 0.5
    for start, size in zip(starts, sizes, strict=True):
        block = Rectangle((start, start), size, size, fill=False, linewidth=2, color="black", clip_on=False)
        axes.add_patch(block)
    group_axis = axes.secondary_yaxis("right")
    group_names = [f"group {index + 1}" for index in range(len(groups))]
    group_axis.set_yticks(starts + sizes / 2, group_names, fontsize=font_size, color="#555555")
    group_axis.tick_params(length=0, pad=6)
    group_axis.spines[:].set_visible(False)

    bar = figure.colorbar(image, ax=axes, aspect=25, pad=0.02, shrink=0.8)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure


def affinity_graph_figure(graph: nx.Graph) -> Figure:
    """Plot tasks as nodes, colored and placed by group, with edges as wide as their affinity is strong.

    Edge color and line style show the sign. Edges between groups are faint, behind the edges within groups.

    Args:
        graph: from `pipeline.grouping.graph.affinity_graph`.
    """
    num_tasks = graph.number_of_nodes()
    members: dict[int, list[str]] = {}
    for name, group in graph.nodes(data="group"):
        members.setdefault(group, []).append(name)
    members = dict(sorted(members.items()))
    crowded = num_tasks > MAX_TASKS_WITH_VALUES
    font_size, node_size = (8, 110) if crowded else (10, 260)  # points, square points
    inches = 0.75 if crowded else 1.25 if num_tasks > 4 else 1.7  # between neighbors of a group
    label = _text_inches(max(map(shorten, graph), key=len), font_size)
    positions, outwards = _positions(members, margin=0.4 + label / inches)

    points = np.array(list(positions.values()))
    low, high = points.min(axis=0) - 0.3, points.max(axis=0) + 0.3
    width, height = (high - low) * inches
    figure = Figure(figsize=(max(width + 2 * label + 1.4, 5.0), max(height + 1.6, 3.2)), layout=_layout())
    axes = figure.add_subplot()
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.axis("off")
    title = f"Affinity graph of {pluralize(num_tasks, 'task')} in {pluralize(len(members), 'group')}"
    figure.suptitle(title, fontsize=12)

    _draw_edges(axes, graph, positions)
    colors = _group_colors(len(members))
    for color, names in zip(colors, members.values(), strict=True):
        x, y = np.array([positions[name] for name in names]).T
        axes.scatter(x, y, s=node_size, color=color, edgecolor="white", zorder=4, clip_on=False)
        # Horizontal labels of a large ring overlap at its top and bottom; radial ones never do.
        ring_size = len(names) if len(names) > 1 else len(members)
        for name in names:
            _label_node(axes, name, positions[name], outwards[name], font_size, node_size, ring_size > 12)

    if len(members) <= MAX_LEGEND_GROUPS:
        handles = [
            Line2D([], [], linestyle="", marker="o", markersize=9, color=color, label=f"group {group + 1}")
            for color, group in zip(colors, members, strict=True)
        ]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    handles = _edge_legend(graph)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _label_node(
    axes: Axes,
    name: str,
    position: np.ndarray,
    outward: np.ndarray,
    font_size: float,
    node_size: float,
    radial: bool,
) -> None:
    """Write a task's name beside its node, on the side away from the group's center."""
    style: dict[str, Any] = {"fontsize": font_size, "parse_math": False, "zorder": 5}
    style["path_effects"] = [withStroke(linewidth=3, foreground="white")]
    horizontal = "center" if abs(outward[0]) < 0.35 else "left" if outward[0] > 0 else "right"
    vertical = "center" if abs(outward[1]) < 0.35 else "bottom" if outward[1] > 0 else "top"
    if radial:
        angle = degrees(atan2(outward[1], outward[0]))
        leftward = outward[0] < -1e-9
        style |= {"rotation": angle + 180 * leftward, "rotation_mode": "anchor"}
        horizontal, vertical = "right" if leftward else "left", "center"
    offset = outward * (node_size**0.5 / 2 + 4)
    point = (position[0], position[1])
    axes.annotate(shorten(name), point, xytext=offset, textcoords="offset points", ha=horizontal, va=vertical, **style)


def _draw_edges(axes: Axes, graph: nx.Graph, positions: dict[str, np.ndarray]) -> None:
    """Draw lines between tasks, strong ones on top; zero affinities have no line."""
    strongest = max((abs(weight) for _, _, weight in graph.edges(data="weight")), default=0) or 1.0
    crowded = graph.number_of_nodes() > MAX_TASKS_WITH_VALUES
    edges = sorted(graph.edges(data=True), key=lambda edge: (edge[2]["within_group"], abs(edge[2]["weight"])))
    for order, (source, target, edge) in enumerate(edges):
        strength = abs(edge["weight"]) / strongest
        if strength == 0:
            continue
        opacity = 0.95 if edge["within_group"] else 0.3
        axes.plot(
            *zip(positions[source], positions[target], strict=True),
            **_edge_style(edge["weight"]),
            linewidth=(0.2 + 2.3 * strength) if crowded else (0.6 + 5.4 * strength),
            # Otherwise hundreds of weak edges hide the strong ones.
            alpha=opacity * (0.2 + 0.8 * strength if crowded else 0.35 + 0.65 * strength),
            clip_on=False,
            zorder=2 + order / len(edges),
        )


def _edge_style(weight: float) -> dict[str, Any]:
    if weight > 0:
        return {"color": POSITIVE, "linestyle": "-"}
    return {"color": NEGATIVE, "linestyle": (0, (2.5, 1.5))}


def _edge_legend(graph: nx.Graph) -> list[Line2D]:
    """Return one legend entry for each kind of edge in the graph."""
    handles = []
    edges = [(edge["within_group"], edge["weight"]) for _, _, edge in graph.edges(data=True)]
    for within, scope in ((True, "within a group"), (False, "between groups")):
        for sign, sign_name in ((1, "positive"), (-1, "negative")):
            if any(edge_within == within and weight * sign > 0 for edge_within, weight in edges):
                style = _edge_style(sign)
                alpha = 0.95 if within else 0.35
                handles.append(Line2D([], [], **style, linewidth=2.5, alpha=alpha, label=f"{sign_name}, {scope}"))
    return handles


def _positions(members: dict[int, list[str]], margin: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return task positions, and unit vectors that point away from the center of each task's group.

    Every group is a ring with a distance of 1 between neighbors; the rings lie on a circle, with `margin` free
    around each.
    """
    radii = np.array([0.5 / sin(pi / len(names)) if len(names) > 1 else 0.0 for names in members.values()])
    all_singletons = not radii.any()
    extents = radii + (0.5 if all_singletons else margin)
    angles = 2 * pi * (np.cumsum(extents) - extents / 2 - extents[0] / 2) / extents.sum()
    # (G, 2): clockwise, from the first group on the left
    directions = np.stack([-np.cos(angles), np.sin(angles)], axis=1)
    min_distances = extents[:, None] + extents[None, :]
    np.fill_diagonal(min_distances, 0)
    chords = np.linalg.norm(directions[:, None] - directions[None, :], axis=2)
    circle = 0.0 if len(members) == 1 else (min_distances / np.where(chords == 0, 1, chords)).max()

    positions, outwards = {}, {}
    for direction, radius, names in zip(directions, radii, members.values(), strict=True):
        for index, name in enumerate(names):
            angle = pi / 2 - 2 * pi * index / len(names)
            outward = np.array([cos(angle), sin(angle)])
            positions[name] = circle * direction + radius * outward
            outwards[name] = outward if len(names) > 1 else direction
    return positions, outwards


def _group_colors(num_groups: int) -> list[Any]:
    if num_groups <= 10:
        return list(cast(Any, matplotlib.colormaps["tab10"]).colors[:num_groups])  # this map is a list of colors
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, num_groups)))


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)


def _shared_exponent(values: np.ndarray) -> int:
    """Return the power of ten by which values are divided so that few digits suffice; 0 if not needed."""
    largest = np.abs(values).max(initial=0)
    if largest == 0 or 0.05 <= largest < 1000:
        return 0
    return floor(log10(largest))


def _format_number(value: float) -> str:
    """Format a number in at most about six characters, with a true minus sign."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    text = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.0e}"
    return text.replace("-", "−") if float(text) else "0"


def _text_inches(text: str, font_size: float) -> float:
    """Estimate the width of a text: 0.6 of the font size per letter."""
    return 0.6 * font_size / 72 * len(text)
