"""Draw the schematic figures of docs/concepts.md, with made-up values: `python docs/make_pictures.py`."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.methods.mmap import kronecker

PICTURES = Path(__file__).with_name("pictures")
BLUE, ORANGE, GREEN, GRAY = "#1f5a85", "#c8702a", "#4a8a4a", "#777777"
matplotlib.rcParams.update({"svg.hashsalt": "mmap-clip", "svg.fonttype": "none", "font.size": 10})


def kronecker_figure() -> Figure:
    """Plot how one source prompt and two small scaling matrices give the prompts of both towers."""
    rng = np.random.default_rng(3)
    source = rng.normal(0, 1, (4, 6))
    text, vision = np.array([[1.0, 0.4]]), np.array([[0.5, 1.0, -0.8]])
    figure = Figure(figsize=(9.0, 3.9))
    grid = figure.add_gridspec(2, 5, width_ratios=[1.5, 0.3, 0.8, 0.3, 4.2], hspace=0.75, wspace=0.25)

    def show(cell, values: np.ndarray, title: str, color: str) -> None:
        axes = figure.add_subplot(cell)
        axes.imshow(values, cmap="RdBu", vmin=-2.2, vmax=2.2, aspect="equal")
        axes.set_title(title, fontsize=9.5, color=color)
        axes.set_xticks([])
        axes.set_yticks([])
        for edge in axes.spines.values():
            edge.set_color(color)
            edge.set_linewidth(1.5)

    def show_sign(cell, text: str) -> None:
        axes = figure.add_subplot(cell)
        axes.axis("off")
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=18)

    show(grid[:, 0], source, "source prompt P_s, m × n\n(trained)", GRAY)
    for row, (name, scaling, color, letter) in enumerate([("text", text, BLUE, "l"), ("vision", vision, ORANGE, "v")]):
        show_sign(grid[row, 1], "⊗")
        show(grid[row, 2], scaling, f"scaling M_{letter}\n(trained)", color)
        show_sign(grid[row, 3], "=")
        prompts = kronecker(torch.tensor(scaling), torch.tensor(source)).numpy()
        show(grid[row, 4], prompts, f"{name} prompts, b × d_{letter}", color)
    return figure


def gradients_figure() -> Figure:
    """Plot gradients of a shared prompt, their affinities, and the groups."""
    tasks = ["art", "photo", "sketch", "clip art"]
    colors = [BLUE, ORANGE, GREEN, GRAY]
    angles = np.deg2rad([20, 160, 50, 95])
    lengths = np.array([1.0, 0.9, 0.8, 0.55])
    gradients = lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    affinity = gradients @ gradients.T
    figure = Figure(figsize=(9.0, 3.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1, 0.9])

    for task, color, (x, y) in zip(tasks, colors, gradients, strict=True):
        left.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2})
        left.text(1.12 * x, 1.1 * y, task, color=color, ha="center", va="center")
    left.set_xlim(-1.2, 1.3)
    left.set_ylim(-0.2, 1.1)
    left.set_aspect("equal")
    left.axis("off")
    left.set_title("gradient of each task's loss\nw.r.t. the shared prompt", fontsize=9.5)

    middle.imshow(affinity, cmap="RdBu", vmin=-1, vmax=1)
    for i in range(4):
        for j in range(4):
            middle.text(
                j,
                i,
                f"{affinity[i, j]:+.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color="w" if affinity[i, j] > 0.9 else "k",
            )
    middle.set_xticks(range(4), tasks, rotation=30, fontsize=9)
    middle.set_yticks(range(4), tasks, fontsize=9)
    middle.set_title("affinities: inner products,\nmean over snapshots", fontsize=9.5)

    for row, (group, names) in enumerate([("group 1", [0, 2, 3]), ("group 2", [1])]):
        top = 0.95 - 0.62 * row
        height = 0.12 + 0.13 * len(names)
        box = Rectangle((0.1, top - height), 0.8, height, facecolor="#e8f0f8", edgecolor=BLUE)
        right.add_patch(box)
        right.text(0.15, top - 0.08, f"{group}: one group prompt", fontsize=9, color=BLUE)
        for index, task in enumerate(names):
            right.text(
                0.2, top - 0.2 - 0.13 * index, f"{tasks[task]}: its own task prompt", fontsize=9, color=colors[task]
            )
    right.set_ylim(0, 1)
    right.axis("off")
    right.set_title("partition with the highest\naffinity inside groups", fontsize=9.5)
    return figure


if __name__ == "__main__":
    for name, figure in (("kronecker", kronecker_figure()), ("gradients_to_groups", gradients_figure())):
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
