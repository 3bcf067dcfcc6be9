"""Does a better score mean better tasks? Scores of all partitions against the accuracies that they reach when trained.

A partition's accuracy follows from its groups' trainings, so 2^T - 1 trainings tell that of every partition (203 for
six tasks, from 63 trainings).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean

import numpy as np

from pipeline.grouping.affinities import AFFINITIES
from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.objectives import OBJECTIVES, get_objective
from pipeline.grouping.partition import best_partition
from pipeline.grouping.search.problem import Groups

CRITERIA = tuple(
    (kind, name) for kind in AFFINITIES for name, objective in OBJECTIVES.items() if objective.included_in_study
)
"""Affinity and objective of each way to score partitions."""


@dataclass(frozen=True)
class CriterionOutcome:
    """What one way to score partitions is worth. Accuracies are means over tasks, 0 to 1."""

    affinity: str
    objective: str
    scores: tuple[float, ...]
    """Of all partitions, in the study's order."""
    rank_correlation: float
    """Spearman's, of scores and accuracies over all partitions."""
    same_num_groups_correlation: float
    """Likewise among the partitions with equally many groups: the mean over the numbers that leave a choice."""
    late_correlation: float
    """As rank_correlation, with the snapshots after the first fifth alone."""
    chosen: Groups
    accuracy: float
    """Of the partition with the best score."""
    fraction_better: float
    """Share of all partitions that reach a higher accuracy."""


@dataclass(frozen=True)
class GroupingStudy:
    partitions: tuple[Groups, ...]
    accuracies: tuple[float, ...]
    """Of the partitions, means over tasks."""
    criteria: tuple[CriterionOutcome, ...]

    @property
    def single_group(self) -> float:
        return self._accuracy_with(1)

    @property
    def all_singletons(self) -> float:
        return self._accuracy_with(max(map(len, self.partitions)))

    @property
    def random(self) -> float:
        """Expected of a partition drawn among all."""
        return fmean(self.accuracies)

    def _accuracy_with(self, num_groups: int) -> float:
        return next(of for groups, of in zip(self.partitions, self.accuracies) if len(groups) == num_groups)


def set_partitions(num_tasks: int) -> Iterator[Groups]:
    """All ways to part tasks 0 … T - 1 into groups, by restricted growth: task by task, into a group or a new one."""

    def extended(groups: Groups, task: int) -> Iterator[Groups]:
        if task == num_tasks:
            yield groups
            return
        for at, group in enumerate(groups):
            yield from extended((*groups[:at], (*group, task), *groups[at + 1 :]), task + 1)
        yield from extended((*groups, (task,)), task + 1)

    return extended((), 0)


def partition_score(affinity: np.ndarray, groups: Groups, objective: str) -> float:
    """As `best_partition` defines it."""
    weight, total = get_objective(objective).pair_weight, 0.0
    for group in groups:
        inside = affinity[np.ix_(group, group)]
        total += weight(len(group)) * (inside.sum() - np.trace(inside)) / 2
    return total


def study_grouping(
    gradients: np.ndarray, accuracies_by_group: Mapping[tuple[int, ...], Sequence[float]]
) -> GroupingStudy:
    """
    Args:
        gradients: (S, T, P), snapshots as of `read_gradients`.
        accuracy_of_group: for every non-empty, sorted set of tasks its tasks' test accuracies after training them
            together.
    """
    num_tasks = gradients.shape[1]
    partitions = tuple(set_partitions(num_tasks))
    accuracies = [sum(sum(accuracies_by_group[group]) for group in groups) / num_tasks for groups in partitions]
    criteria = []
    for kind, objective in CRITERIA:
        affinity = affinity_matrix(gradients, kind)
        scores = [partition_score(affinity, groups, objective) for groups in partitions]
        chosen = best_partition(affinity, objective=objective).groups
        accuracy = accuracies[partitions.index(chosen)]
        better = fmean(other > accuracy for other in accuracies)
        late = affinity_matrix(gradients[len(gradients) // 5 :], kind)
        late_scores = [partition_score(late, groups, objective) for groups in partitions]
        of_number: dict[int, list[tuple[float, float]]] = {}
        for groups, *pair in zip(partitions, scores, accuracies):
            of_number.setdefault(len(groups), []).append(tuple(pair))
        same_number = [_correlation(*zip(*pairs)) for pairs in of_number.values() if len(pairs) > 2]
        criteria.append(
            CriterionOutcome(
                kind,
                objective,
                tuple(scores),
                _correlation(scores, accuracies),
                fmean(same_number) if same_number else nan,
                _correlation(late_scores, accuracies),
                chosen,
                accuracy,
                better,
            )
        )
    return GroupingStudy(partitions, tuple(accuracies), tuple(criteria))


def _correlation(scores: Sequence[float], accuracies: Sequence[float]) -> float:
    """Nan where all of either are equal."""
    if len(set(scores)) == 1 or len(set(accuracies)) == 1:
        return nan

    from scipy.stats import spearmanr  # only the study needs it, every grouping imports this module

    return float(spearmanr(scores, accuracies).statistic)
