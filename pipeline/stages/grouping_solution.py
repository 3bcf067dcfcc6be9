"""Computation of stage 3; a separate module because it imports scipy and matplotlib, which trainings do not need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import GroupingConfig
from pipeline.errors import UserError
from pipeline.files import write_file, write_json
from pipeline.grouping.advice import grouping_warnings
from pipeline.grouping.affinity import affinity_matrix, snapshot_affinities
from pipeline.grouping.gradient_blocks import gradient_blocks, read_layout
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import best_partition
from pipeline.grouping.search.constraints import task_indices
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.stability import (
    bootstrap,
    early_share,
    groups_over_training,
    num_early_snapshots,
    ranked_partitions,
    resample_snapshots,
    satisfies,
)
from pipeline.report.grouping_figures import affinity_graph_figure, affinity_heat_map, co_assignment_map
from pipeline.report.grouping_page import grouping_page
from pipeline.report.grouping_stability_figures import affinity_over_training, ranked_partitions_figure
from pipeline.stages.finished_run import GROUPING
from pipeline.stages.grouping import FIGURES, PAGE, STABILITY_FIGURES, describe_search
from pipeline.training.snapshots import read_gradients, read_steps

MAX_RESAMPLED_PARTITIONS_SHOWN = 10
"""The most frequent ones."""
PIXELS_PER_INCH = 110
"""Of a figure on the page."""
RESAMPLE_TIME_LIMIT_S = 2.0
"""Per search on a bootstrap resample."""


def write_grouping(
    tasks: Sequence[str], files: Mapping[Path, Sequence[str]], options: GroupingConfig, folder: Path
) -> None:
    """Write grouping.json, the figures and the page; `files`: snapshot file → the tasks whose gradients it provides."""
    layout, steps, gradients = _read_snapshots(tasks, files)
    blocks = gradient_blocks(layout, per_layer=options.per_layer, scaling_matrices=options.scaling_matrices)
    affinity = affinity_matrix(gradients, options.affinity, tasks=tasks, blocks=blocks)
    partition = best_partition(
        affinity,
        objective=options.objective,
        **options.constraints,
        tasks=tasks,
        time_limit_s=options.time_limit_s,
    )
    warnings = grouping_warnings(
        affinity,
        partition,
        tasks,
        objective=options.objective,
        kind="gradient",
        similarity=options.affinity,
        per_layer=options.per_layer,
    )
    affinities = snapshot_affinities(gradients, options.affinity, blocks)

    def search(matrix: np.ndarray) -> Groups:
        seconds = min(options.time_limit_s, RESAMPLE_TIME_LIMIT_S)
        return best_partition(
            matrix, objective=options.objective, **options.constraints, tasks=tasks, time_limit_s=seconds
        ).groups

    def to_names(groups: Groups) -> list[list[str]]:
        return [[tasks[i] for i in group] for group in groups]

    links = {name: task_indices(tasks, name, options.constraints[name]) for name in ("must_link", "cannot_link")}
    stability = bootstrap(resample_snapshots(affinities), search)
    ranked = ranked_partitions(
        affinity, partition.groups, options.objective, tasks, partial(satisfies, **{**options.constraints, **links})
    )
    num_early = num_early_snapshots(len(steps))
    result = {
        "tasks": tasks,
        "groups": to_names(partition.groups),
        "score": partition.score,
        "upper_bound": partition.upper_bound,
        "is_optimal": partition.is_optimal,
        "method": partition.method,
        "num_candidates": partition.num_candidates,
        "objective": options.objective,
        "affinity_kind": options.affinity,
        "per_layer": options.per_layer,
        "scaling_matrices": options.scaling_matrices,
        "constraints": options.constraints,
        "num_snapshots": len(gradients),
        "affinity": affinity.tolist(),
        "warnings": warnings,
        "stability": {
            "num_resamples": stability.num_resamples,
            "co_assignment": stability.co_assignment.tolist(),
            "resampled": [
                {"groups": to_names(groups), "frequency": frequency}
                for groups, frequency in list(stability.frequencies.items())[:MAX_RESAMPLED_PARTITIONS_SHOWN]
            ],
            "ranked": [{"groups": to_names(item.groups), "score": float(item.score)} for item in ranked],
            "early": {
                "num_snapshots": num_early,
                "last_step": steps[num_early - 1],
                "share": early_share(affinities),
            },
            "over_training": [
                {"first_step": first_step, "last_step": last_step, "groups": to_names(groups)}
                for first_step, last_step, groups in groups_over_training(affinities, steps, search)
            ],
        },
    }
    write_json(folder / GROUPING, result)
    figures = {
        "Affinity matrix": affinity_heat_map(affinity, tasks, partition.groups),
        "Affinity graph": affinity_graph_figure(affinity_graph(affinity, tasks, partition.groups)),
        "Co-assignment frequency over bootstrap resamples": co_assignment_map(
            stability.co_assignment, tasks, partition.groups
        ),
        "Affinity during training": affinity_over_training(affinities, steps, tasks, partition.groups),
        "Partitions with the highest scores": ranked_partitions_figure(ranked),
    }
    images = {}
    for (title, figure), name in zip(figures.items(), (*FIGURES, *STABILITY_FIGURES), strict=True):
        figure.savefig(folder / name, dpi=150)
        images[title] = ((folder / name).read_bytes(), round(figure.get_figwidth() * PIXELS_PER_INCH))
    summary = describe_search(result)
    page = grouping_page(result, summary[0].upper() + summary[1:], images)
    write_file(folder / PAGE, page)


def _read_snapshots(
    tasks: Sequence[str], files: Mapping[Path, Sequence[str]]
) -> tuple[dict[str, list[int]], list[int], np.ndarray]:
    """Return layout, steps (S,), and gradients (S, T, P) of the tasks, in their order.

    Raises:
        UserError: a file is damaged, or its layout or steps differ from the first file's.
    """
    gradients_by_task: dict[str, np.ndarray] = {}
    layouts, steps = [], []
    for file, file_tasks in files.items():
        layouts.append(read_layout(file))
        steps.append(read_steps(file))
        gradients_by_task |= zip(file_tasks, read_gradients(file, file_tasks).swapaxes(0, 1))
        if (layouts[-1], steps[-1]) != (layouts[0], steps[0]):
            raise UserError(
                f"{file} has other steps or layers than {next(iter(files))}; remove its folder and run again"
            )
    return layouts[0], steps[0], np.stack([gradients_by_task[task] for task in tasks], axis=1)
