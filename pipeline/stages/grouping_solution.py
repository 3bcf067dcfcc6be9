"""What stage 3 computes: gradient snapshots → affinities → the best partition and how sure it is, as JSON, pictures and
a page. Apart from the stage, for it imports scipy and matplotlib, which the trainings do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import GroupingConfig
from pipeline.errors import UserError
from pipeline.files import write_file, write_json
from pipeline.grouping.advice import grouping_warnings
from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.gradient_blocks import gradient_blocks, read_layout
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import best_partition
from pipeline.grouping.search.constraints import task_indices
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.stability import (
    bootstrap,
    groups_over_training,
    ranked_partitions,
    satisfies,
    snapshot_affinities,
)
from pipeline.report.grouping_figures import affinity_graph_figure, affinity_heat_map, co_assignment_map
from pipeline.report.grouping_page import grouping_page
from pipeline.report.grouping_stability_figures import affinity_over_training, ranked_partitions_figure
from pipeline.stages.grouping import FIGURES, PAGE, STABILITY_FIGURES, describe_search
from pipeline.training.snapshots import read_gradients, read_steps

MAX_RESAMPLED_PARTITIONS_SHOWN = 10
"""Partitions of the resamples, the most frequent."""
RESAMPLE_TIME_LIMIT_S = 2.0
"""At most, for a search that only tells how sure the groups are."""


def write_grouping(
    tasks: Sequence[str], files: Mapping[Path, Sequence[str]], options: GroupingConfig, folder: Path
) -> None:
    """`files`: snapshots → the tasks whose gradients are taken from it."""
    layout, steps, gradients = _snapshots(tasks, files)
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
        affinity, partition, tasks, objective=options.objective, kind=options.affinity, per_layer=options.per_layer
    )
    affinities = snapshot_affinities(gradients, options.affinity, blocks)

    def search(matrix: np.ndarray) -> Groups:
        seconds = min(options.time_limit_s, RESAMPLE_TIME_LIMIT_S)
        return best_partition(
            matrix, objective=options.objective, **options.constraints, tasks=tasks, time_limit_s=seconds
        ).groups

    def named(groups: Groups) -> list[list[str]]:
        return [[tasks[i] for i in group] for group in groups]

    numbers = {name: task_indices(tasks, name, options.constraints[name]) for name in ("must_link", "cannot_link")}
    sure = bootstrap(affinities, search)
    ranked = ranked_partitions(
        affinity, partition.groups, options.objective, tasks, partial(satisfies, **{**options.constraints, **numbers})
    )
    result = {
        "tasks": tasks,
        "groups": named(partition.groups),
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
            "num_resamples": sure.num_resamples,
            "co_assignment": sure.co_assignment.tolist(),
            "resampled": [
                {"groups": named(groups), "share": share}
                for groups, share in list(sure.frequencies.items())[:MAX_RESAMPLED_PARTITIONS_SHOWN]
            ],
            "ranked": [{"groups": named(of.groups), "score": float(of.score)} for of in ranked],
            "over_training": [
                {"first_step": first, "last_step": last, "groups": named(groups)}
                for first, last, groups in groups_over_training(affinities, steps, search)
            ],
        },
    }
    write_json(folder / "grouping.json", result)
    figures = {
        "Affinities": affinity_heat_map(affinity, tasks, partition.groups),
        "Graph": affinity_graph_figure(affinity_graph(affinity, tasks, partition.groups)),
        "How sure each pair is": co_assignment_map(sure.co_assignment, tasks, partition.groups),
        "Over the training": affinity_over_training(affinities, steps, tasks, partition.groups),
        "What comes close": ranked_partitions_figure(ranked),
    }
    for figure, name in zip(figures.values(), (*FIGURES, *STABILITY_FIGURES), strict=True):
        figure.savefig(folder / name, dpi=150)
    search_in_words = describe_search(result)
    page = grouping_page(result, search_in_words[0].upper() + search_in_words[1:], figures)
    write_file(folder / PAGE, page)


def _snapshots(
    tasks: Sequence[str], files: Mapping[Path, Sequence[str]]
) -> tuple[dict[str, list[int]], list[int], np.ndarray]:
    """Layout, steps (S,), and gradients (S, T, P) of the tasks, in their order.

    Raises:
        UserError: a file that is damaged, or whose snapshots are others than the first one's.
    """
    of_task: dict[str, np.ndarray] = {}
    layouts, steps = [], []
    for file, of_file in files.items():
        layouts.append(read_layout(file))
        steps.append(read_steps(file))
        of_task |= zip(of_file, read_gradients(file, of_file).swapaxes(0, 1))
        if (layouts[-1], steps[-1]) != (layouts[0], steps[0]):
            raise UserError(f"{file} holds other snapshots than {next(iter(files))}: remove its folder and run again")
    return layouts[0], steps[0], np.stack([of_task[task] for task in tasks], axis=1)
