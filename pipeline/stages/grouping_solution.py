"""Computation of stage 4; a separate module because it imports scipy and matplotlib, which trainings do not need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import GroupingConfig
from pipeline.files import write_file, write_json
from pipeline.grouping.advice import grouping_warnings
from pipeline.grouping.affinities import Gradient, get_affinity
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import Partition, best_partition
from pipeline.grouping.search.constraints import task_indices
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.stability import (
    bootstrap,
    early_share,
    groups_over_training,
    num_early_snapshots,
    ranked_partitions,
    satisfies,
)
from pipeline.report.grouping_figures import affinity_graph_figure, affinity_heat_map, co_assignment_map
from pipeline.report.grouping_page import grouping_page
from pipeline.report.grouping_stability_figures import affinity_over_training, ranked_partitions_figure
from pipeline.stages.finished_run import GROUPING
from pipeline.stages.grouping import FIGURES, GRADIENT_FIGURES, PAGE, STABILITY_FIGURES, describe_search
from pipeline.stages.grouping_sources import GroupingSources
from pipeline.stages.measures import MEASURES

MAX_RESAMPLED_PARTITIONS_SHOWN = 10
"""The most frequent ones."""
PIXELS_PER_INCH = 110
"""Of a figure on the page."""
RESAMPLE_TIME_LIMIT_S = 2.0
"""Per search on a bootstrap resample."""


def write_grouping(tasks: Sequence[str], sources: GroupingSources, options: GroupingConfig, folder: Path) -> None:
    """Write grouping.json, the figures and the page."""
    measures = {name: MEASURES[name](tasks, sources, options) for name in sources.affinities(tasks)}
    partitions = {name: _search(measure.affinity, tasks, options) for name, measure in measures.items()}
    measure, partition = measures[options.affinity], partitions[options.affinity]
    affinity, is_gradient = measure.affinity, options.affinity == Gradient.name
    warnings = grouping_warnings(
        affinity,
        partition,
        tasks,
        objective=options.objective,
        kind=options.affinity,
        similarity=options.gradient_similarity,
        per_layer=options.per_layer,
    )

    def search(matrix: np.ndarray) -> Groups:
        return _search(matrix, tasks, options, RESAMPLE_TIME_LIMIT_S).groups

    def to_names(groups: Groups) -> list[list[str]]:
        return [[tasks[i] for i in group] for group in groups]

    links = {name: task_indices(tasks, name, options.constraints[name]) for name in ("must_link", "cannot_link")}
    stability = bootstrap(measure.resample, search)
    ranked = ranked_partitions(
        affinity, partition.groups, options.objective, tasks, partial(satisfies, **{**options.constraints, **links})
    )
    result: dict[str, Any] = {
        "tasks": tasks,
        "groups": to_names(partition.groups),
        "score": partition.score,
        "upper_bound": partition.upper_bound,
        "is_optimal": partition.is_optimal,
        "method": partition.method,
        "num_candidates": partition.num_candidates,
        "objective": options.objective,
        "affinity_kind": options.affinity,
        "gradient_similarity": options.gradient_similarity if is_gradient else None,
        "per_layer": options.per_layer,
        "scaling_matrices": options.scaling_matrices,
        "constraints": options.constraints,
        "affinity": affinity.tolist(),
        "gains": None if measure.gains is None else measure.gains.tolist(),
        "candidates": [
            {
                "affinity": name,
                "similarity": options.gradient_similarity if name == Gradient.name else None,
                "objective": options.objective,
                "groups": to_names(partitions[name].groups),
                "score": partitions[name].score,
                "is_taken": name == options.affinity,
            }
            for name in sorted(partitions, key=lambda name: name != options.affinity)
        ],
        "warnings": warnings,
        "stability": {
            "resampled_from": get_affinity(options.affinity).resampled,
            "num_resampled": measure.num_resampled,
            "num_resamples": stability.num_resamples,
            "co_assignment": stability.co_assignment.tolist(),
            "resampled": [
                {"groups": to_names(groups), "frequency": frequency}
                for groups, frequency in list(stability.frequencies.items())[:MAX_RESAMPLED_PARTITIONS_SHOWN]
            ],
            "ranked": [{"groups": to_names(item.groups), "score": float(item.score)} for item in ranked],
        },
    }
    figures = {
        "Affinity matrix": affinity_heat_map(affinity, tasks, partition.groups),
        "Affinity graph": affinity_graph_figure(affinity_graph(affinity, tasks, partition.groups)),
        "Co-assignment frequency over bootstrap resamples": co_assignment_map(
            stability.co_assignment, tasks, partition.groups
        ),
        "Partitions with the highest scores": ranked_partitions_figure(ranked),
    }
    if measure.by_snapshot is not None:
        by_snapshot, steps = measure.by_snapshot, measure.steps
        num_early = num_early_snapshots(len(steps))
        result["training"] = {
            "early": {
                "num_snapshots": num_early,
                "last_step": steps[num_early - 1],
                "share": early_share(by_snapshot),
            },
            "phases": [
                {"first_step": first_step, "last_step": last_step, "groups": to_names(groups)}
                for first_step, last_step, groups in groups_over_training(by_snapshot, steps, search)
            ],
        }
        figures["Affinity during training"] = affinity_over_training(by_snapshot, steps, tasks, partition.groups)
    write_json(folder / GROUPING, result)
    images = {}
    for (title, figure), name in zip(figures.items(), (*FIGURES, *STABILITY_FIGURES, *GRADIENT_FIGURES)):
        figure.savefig(folder / name, dpi=150)
        images[title] = ((folder / name).read_bytes(), round(figure.get_figwidth() * PIXELS_PER_INCH))
    summary = describe_search(result)
    page = grouping_page(result, summary[0].upper() + summary[1:], images)
    write_file(folder / PAGE, page)


def _search(
    affinity: np.ndarray, tasks: Sequence[str], options: GroupingConfig, time_limit_s: float | None = None
) -> Partition:
    return best_partition(
        affinity,
        objective=options.objective,
        **options.constraints,
        tasks=tasks,
        time_limit_s=min(options.time_limit_s, time_limit_s or options.time_limit_s),
    )
