"""Computation of stage 4; a separate module because it imports matplotlib and networkx, which trainings do not need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.config import GroupingConfig
from pipeline.files import write_file, write_json
from pipeline.grouping.advice import grouping_warnings
from pipeline.grouping.affinities import Gradient, get_affinity
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import Partition, best_partition
from pipeline.grouping.search.constraints import task_indices
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.stability import (
    Bootstrap,
    RankedPartition,
    Search,
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
from pipeline.stages.measures import MEASURES, Measure

MAX_RESAMPLED_PARTITIONS_SHOWN = 10
"""The most frequent ones."""
PIXELS_PER_INCH = 110
"""Of a figure on the page."""
RESAMPLE_TIME_LIMIT_S = 2.0
"""Per search on a bootstrap resample."""


@dataclass(frozen=True)
class Solution:
    """The best partition by each measured affinity, and how stable that by the config's affinity is."""

    tasks: Sequence[str]
    options: GroupingConfig
    measure: Measure
    """Of the config's affinity."""
    partitions: dict[str, Partition]
    """By affinity."""
    search: Search
    """Within a short time, for resamples."""
    stability: Bootstrap
    ranked: Sequence[RankedPartition]
    """Those with the highest scores."""

    @property
    def partition(self) -> Partition:
        """The one that is taken."""
        return self.partitions[self.options.affinity]

    def names(self, groups: Groups) -> list[list[str]]:
        """Return the names of each group's tasks."""
        return [[self.tasks[i] for i in group] for group in groups]


def write_grouping(tasks: Sequence[str], sources: GroupingSources, options: GroupingConfig, folder: Path) -> None:
    """Write grouping.json, the figures and the page."""
    solution = _solve(tasks, sources, options)
    result = _to_json(solution)
    write_json(folder / GROUPING, result)
    images = {}
    for (title, figure), name in zip(_figures(solution).items(), (*FIGURES, *STABILITY_FIGURES, *GRADIENT_FIGURES)):
        figure.savefig(folder / name, dpi=150)
        images[title] = ((folder / name).read_bytes(), round(figure.get_figwidth() * PIXELS_PER_INCH))
    summary = describe_search(result)
    page = grouping_page(result, summary[0].upper() + summary[1:], images)
    write_file(folder / PAGE, page)


def _solve(tasks: Sequence[str], sources: GroupingSources, options: GroupingConfig) -> Solution:
    measures = {name: MEASURES[name](tasks, sources, options) for name in sources.affinities(tasks)}
    partitions = {name: _search(measure.affinity, tasks, options) for name, measure in measures.items()}
    measure, partition = measures[options.affinity], partitions[options.affinity]

    def search(affinity: np.ndarray) -> Groups:
        return _search(affinity, tasks, options, RESAMPLE_TIME_LIMIT_S).groups

    links = {name: task_indices(tasks, name, options.constraints[name]) for name in ("must_link", "cannot_link")}
    is_allowed = partial(satisfies, **{**options.constraints, **links})
    stability = bootstrap(measure.resample, search)
    ranked = ranked_partitions(measure.affinity, partition.groups, options.objective, tasks, is_allowed)
    return Solution(tasks, options, measure, partitions, search, stability, ranked)


def _to_json(solution: Solution) -> dict[str, Any]:
    options, measure, partition = solution.options, solution.measure, solution.partition
    stability, names = solution.stability, solution.names
    similarities = {Gradient.name: options.gradient_similarity}
    result: dict[str, Any] = {
        "tasks": solution.tasks,
        "groups": names(partition.groups),
        "score": partition.score,
        "upper_bound": partition.upper_bound,
        "is_optimal": partition.is_optimal,
        "method": partition.method,
        "num_candidates": partition.num_candidates,
        "objective": options.objective,
        "affinity_kind": options.affinity,
        "gradient_similarity": similarities.get(options.affinity),
        "per_layer": options.per_layer,
        "scaling_matrices": options.scaling_matrices,
        "constraints": options.constraints,
        "affinity": measure.affinity.tolist(),
        "gains": None if measure.gains is None else measure.gains.tolist(),
        "candidates": [
            {
                "affinity": name,
                "similarity": similarities.get(name),
                "objective": options.objective,
                "groups": names(candidate.groups),
                "score": candidate.score,
                "is_taken": name == options.affinity,
            }
            for name, candidate in sorted(solution.partitions.items(), key=lambda item: item[0] != options.affinity)
        ],
        "warnings": grouping_warnings(
            measure.affinity,
            partition,
            solution.tasks,
            objective=options.objective,
            kind=options.affinity,
            similarity=options.gradient_similarity,
            per_layer=options.per_layer,
        ),
        "stability": {
            "resampled_from": get_affinity(options.affinity).resampled,
            "num_resampled": measure.num_resampled,
            "num_resamples": stability.num_resamples,
            "co_assignment": stability.co_assignment.tolist(),
            "resampled": [
                {"groups": names(groups), "frequency": frequency}
                for groups, frequency in list(stability.frequencies.items())[:MAX_RESAMPLED_PARTITIONS_SHOWN]
            ],
            "ranked": [{"groups": names(item.groups), "score": float(item.score)} for item in solution.ranked],
        },
    }
    if measure.by_snapshot is not None:
        num_early = num_early_snapshots(len(measure.steps))
        result["training"] = {
            "early": {
                "num_snapshots": num_early,
                "last_step": measure.steps[num_early - 1],
                "share": early_share(measure.by_snapshot),
            },
            "phases": [
                {"first_step": first_step, "last_step": last_step, "groups": names(groups)}
                for first_step, last_step, groups in groups_over_training(
                    measure.by_snapshot, measure.steps, solution.search
                )
            ],
        }
    return result


def _figures(solution: Solution) -> dict[str, Figure]:
    """Draw the figures, by title, in the order of their files."""
    tasks, affinity, groups = solution.tasks, solution.measure.affinity, solution.partition.groups
    figures = {
        "Affinity matrix": affinity_heat_map(affinity, tasks, groups),
        "Affinity graph": affinity_graph_figure(affinity_graph(affinity, tasks, groups)),
        "Co-assignment frequency over bootstrap resamples": co_assignment_map(
            solution.stability.co_assignment, tasks, groups
        ),
        "Partitions with the highest scores": ranked_partitions_figure(solution.ranked),
    }
    if solution.measure.by_snapshot is not None:
        figures["Affinity during training"] = affinity_over_training(
            solution.measure.by_snapshot, solution.measure.steps, tasks, groups
        )
    return figures


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
