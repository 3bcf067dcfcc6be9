"""Comparison of scores and accuracies: the scores of all partitions against their accuracies after training.

A partition's accuracy follows from the trainings of its groups, so 2^T - 1 trainings give that of every partition (203
for six tasks, from 63 trainings).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean

import numpy as np

from pipeline.grouping.affinities import SIMILARITIES
from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.objectives import OBJECTIVES, get_objective
from pipeline.grouping.partition import best_partition
from pipeline.grouping.search.problem import Groups

CRITERIA = tuple(
    (kind, name) for kind in SIMILARITIES for name, objective in OBJECTIVES.items() if objective.included_in_study
)
"""Pairs of gradient similarity and objective that score partitions."""


@dataclass(frozen=True)
class CriterionOutcome:
    """Quality of one criterion's scores. Accuracies are means over tasks, 0 to 1."""

    affinity: str
    objective: str
    scores: tuple[float, ...]
    """Scores of all partitions, in the study's order."""
    rank_correlation: float
    """Spearman's, between scores and accuracies over all partitions."""
    same_num_groups_correlation: float
    """The same among partitions with equally many groups: mean over the numbers of groups with several partitions."""
    late_correlation: float
    """The same as rank_correlation, without the first fifth of the snapshots."""
    chosen: Groups
    accuracy: float
    """Accuracy of the partition with the highest score."""
    fraction_better: float
    """Fraction of all partitions with a higher accuracy."""


@dataclass(frozen=True)
class GroupingStudy:
    partitions: tuple[Groups, ...]
    accuracies: tuple[float, ...]
    """Accuracy of each partition, mean over tasks."""
    criteria: tuple[CriterionOutcome, ...]

    @property
    def single_group(self) -> float:
        return self._accuracy_with(1)

    @property
    def all_singletons(self) -> float:
        return self._accuracy_with(max(map(len, self.partitions)))

    @property
    def random(self) -> float:
        """Expected accuracy of a partition drawn uniformly."""
        return fmean(self.accuracies)

    def _accuracy_with(self, num_groups: int) -> float:
        pairs = zip(self.partitions, self.accuracies)
        return next(accuracy for groups, accuracy in pairs if len(groups) == num_groups)


def set_partitions(num_tasks: int) -> Iterator[Groups]:
    """Enumerate all partitions of tasks 0 … T - 1 by restricted growth: each task joins a group or starts one."""

    def extend(groups: Groups, task: int) -> Iterator[Groups]:
        if task == num_tasks:
            yield groups
            return
        for index, group in enumerate(groups):
            yield from extend((*groups[:index], (*group, task), *groups[index + 1 :]), task + 1)
        yield from extend((*groups, (task,)), task + 1)

    return extend((), 0)


def partition_score(affinity: np.ndarray, groups: Groups, objective: str) -> float:
    """Return the score as `best_partition` defines it."""
    weight, total = get_objective(objective).pair_weight, 0.0
    for group in groups:
        inside = affinity[np.ix_(group, group)]
        total += weight(len(group)) * (inside.sum() - np.trace(inside)) / 2
    return total


def study_grouping(
    gradients: np.ndarray, accuracies_by_group: Mapping[tuple[int, ...], Sequence[float]]
) -> GroupingStudy:
    """Compare the scores of all partitions with their accuracies, for every criterion.

    Args:
        gradients: (S, T, P), snapshots from `read_gradients`.
        accuracies_by_group: for every non-empty, sorted set of tasks their test accuracies after a joint training.
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
        fraction_better = fmean(candidate > accuracy for candidate in accuracies)
        late_affinity = affinity_matrix(gradients[len(gradients) // 5 :], kind)
        late_scores = [partition_score(late_affinity, groups, objective) for groups in partitions]
        pairs_by_num_groups: dict[int, list[tuple[float, float]]] = {}
        for groups, *pair in zip(partitions, scores, accuracies):
            pairs_by_num_groups.setdefault(len(groups), []).append(tuple(pair))
        same_num_groups = [_correlation(*zip(*pairs)) for pairs in pairs_by_num_groups.values() if len(pairs) > 2]
        criteria.append(
            CriterionOutcome(
                kind,
                objective,
                tuple(scores),
                _correlation(scores, accuracies),
                fmean(same_num_groups) if same_num_groups else nan,
                _correlation(late_scores, accuracies),
                chosen,
                accuracy,
                fraction_better,
            )
        )
    return GroupingStudy(partitions, tuple(accuracies), tuple(criteria))


def _correlation(scores: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN if all scores or all accuracies are equal."""
    if len(set(scores)) == 1 or len(set(accuracies)) == 1:
        return nan

    from scipy.stats import spearmanr  # only the study needs it, every grouping imports this module

    return float(spearmanr(scores, accuracies).statistic)
