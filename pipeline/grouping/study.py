"""Comparison of affinities with what they predict: the scores of all partitions against their test results.

A partition's accuracy and test loss follow from the trainings of its groups, so 2^T - 1 trainings give those of every
partition (203 for six tasks, from 63 trainings).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import nan, sqrt
from statistics import fmean

import numpy as np

from pipeline.grouping.objectives import OBJECTIVES, get_objective
from pipeline.grouping.partition import best_partition
from pipeline.grouping.search.problem import Groups

SIGNS = {"accuracy": 1, "test_loss": -1}
"""Measure of a training → 1 if higher is better, else -1."""
DECIMALS = 12
"""Of results, far beyond what they tell; sums in another order differ beyond that."""
Group = tuple[int, ...]
ResultsByGroup = Mapping[Group, Sequence[float]]
"""Non-empty, sorted set of tasks → result of each after a joint training."""


@dataclass(frozen=True)
class Criterion:
    """An affinity and an objective that score the P partitions."""

    affinity: str
    objective: str
    scores: np.ndarray
    """(P,)"""
    chosen: int
    """Index of the partition that the search finds: the one with the highest score."""


@dataclass(frozen=True)
class GroupingStudy:
    """Results of all P partitions of T tasks for one seed, and the criteria that score them.

    A measure is a key of SIGNS: `accuracy` (0 to 1) or `test_loss` (nats). Gains are positive if a result is better.
    """

    partitions: tuple[Groups, ...]
    values: Mapping[str, np.ndarray]
    """Measure → mean over tasks (P,)."""
    pair_gains: Mapping[str, np.ndarray]
    """Measure → (T, T): gain of the column's task from training with the row's task over training alone; NaN on the
    diagonal."""
    pair_estimates: Mapping[str, np.ndarray]
    """Measure → (P,): estimates of `values` from pairs, the mean over a task's mates of its result with each mate
    alone."""
    criteria: tuple[Criterion, ...]

    @cached_property
    def num_groups(self) -> np.ndarray:
        """(P,)"""
        return np.array([len(groups) for groups in self.partitions])

    @property
    def all_in_one(self) -> int:
        """Index of the partition with a single group."""
        return int(self.num_groups.argmin())

    @property
    def each_alone(self) -> int:
        """Index of the partition into single tasks."""
        return int(self.num_groups.argmax())

    def best(self, measure: str) -> int:
        """Return the index of the partition with the best result."""
        return int((SIGNS[measure] * self.values[measure]).argmax())

    def random(self, measure: str) -> float:
        """Return the expected result of a partition drawn uniformly."""
        return fmean(self.values[measure])

    def random_of_sizes(self, measure: str, index: int) -> float:
        """Return the expected result of a partition drawn uniformly among those with the same sizes of groups."""
        return fmean(self.values[measure][self._sizes == self._sizes[index]])

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The sizes of each partition's groups as text (P,)."""
        return np.array([str(sorted(map(len, groups))) for groups in self.partitions])

    def fraction_better(self, measure: str, index: int) -> float:
        """Return the fraction of all partitions with a better result."""
        quality = SIGNS[measure] * self.values[measure]
        return float((quality > quality[index]).mean())

    def correlations(self, predictor: np.ndarray, measure: str) -> tuple[float, float]:
        """Return Spearman's correlation of a predictor (P,), where higher means better, with the results: over all
        partitions, and among partitions with equally many groups (mean over the numbers of groups with more than two
        partitions). NaN if a constant makes one undefined."""
        quality = SIGNS[measure] * self.values[measure]
        same_number = [
            _correlation(predictor[selected], quality[selected])
            for number in range(1, len(self.partitions[self.each_alone]) + 1)
            if (selected := self.num_groups == number).sum() > 2
        ]
        return _correlation(predictor, quality), fmean(same_number) if same_number else nan


def study_grouping(affinities: Mapping[str, np.ndarray], results: Mapping[str, ResultsByGroup]) -> GroupingStudy:
    """Score all partitions by every affinity and objective, beside their results.

    Args:
        affinities: name → (T, T).
        results: measure → results of all groups of the T tasks.
    """
    num_tasks = max(map(len, results["accuracy"]))
    partitions = tuple(set_partitions(num_tasks))
    position = {groups: index for index, groups in enumerate(partitions)}
    pair_results = {measure: _pair_results(num_tasks, by_group) for measure, by_group in results.items()}
    criteria = []
    for name, affinity in affinities.items():
        for objective in OBJECTIVES:
            scores = {group: _group_score(affinity, group, objective) for group in results["accuracy"]}
            chosen = best_partition(affinity, objective=objective).groups
            partition_scores = [sum(scores[group] for group in groups) for groups in partitions]
            criteria.append(Criterion(name, objective, np.array(partition_scores), position[chosen]))
    return GroupingStudy(
        partitions,
        {measure: _means(partitions, by_group) for measure, by_group in results.items()},
        {
            measure: np.where(np.eye(num_tasks), nan, SIGNS[measure] * (values - values.diagonal()))
            for measure, values in pair_results.items()
        },
        {
            measure: _means(partitions, {group: _mate_means(values, group) for group in results[measure]})
            for measure, values in pair_results.items()
        },
        tuple(criteria),
    )


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
    return sum(_group_score(affinity, group, objective) for group in groups)


def _group_score(affinity: np.ndarray, group: Group, objective: str) -> float:
    inside = affinity[np.ix_(group, group)]
    return get_objective(objective).pair_weight(len(group)) * float(inside.sum() - np.trace(inside)) / 2


def best_on_other_seeds(studies: Sequence[GroupingStudy], measure: str) -> list[int]:
    """Return for each of several seeds the index of the partition with the best mean result over the others, which is
    not chosen by the noise of its own result."""
    values = np.stack([SIGNS[measure] * study.values[measure] for study in studies])
    return [int(np.delete(values, seed, axis=0).mean(axis=0).argmax()) for seed in range(len(studies))]


def ceiling(studies: Sequence[GroupingStudy], measure: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the correlations (as of `GroupingStudy.correlations`) of two seeds' results: the mean over all pairs of
    seeds, each with its standard error by the jackknife over seeds; the error is NaN for two seeds, all for one."""
    num_seeds = len(studies)
    overall, same_number = (np.full((num_seeds, num_seeds), nan) for _ in range(2))
    for i, j in combinations(range(num_seeds), 2):
        predictor = SIGNS[measure] * studies[i].values[measure]
        overall[i, j], same_number[i, j] = studies[j].correlations(predictor, measure)
    return _jackknife(overall), _jackknife(same_number)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error, NaN for a single value; NaN if a value is."""
    return fmean(values), float(np.std(values, ddof=1)) / sqrt(len(values)) if len(values) > 1 else nan


def _jackknife(by_pair: np.ndarray) -> tuple[float, float]:
    """Return the mean over pairs i < j of the values (n, n) of n seeds, and its standard error from the means without
    each seed."""

    def mean_over(seeds: Sequence[int]) -> float:
        values = [by_pair[pair] for pair in combinations(seeds, 2)]
        return float(np.mean(values)) if values else nan

    seeds = range(len(by_pair))
    left_out = np.array([mean_over([other for other in seeds if other != seed]) for seed in seeds])
    variance = (len(seeds) - 1) * left_out.var()
    return mean_over(seeds), sqrt(variance)


def _means(partitions: Sequence[Groups], results: ResultsByGroup) -> np.ndarray:
    """Return each partition's mean result over tasks (P,), rounded so that equal accuracies stay equal."""
    num_tasks = max(map(len, results))
    totals = {group: sum(values) for group, values in results.items()}
    return np.array([sum(totals[group] for group in groups) / num_tasks for groups in partitions]).round(DECIMALS)


def _pair_results(num_tasks: int, results: ResultsByGroup) -> np.ndarray:
    """Return the results (T, T) of the column's task after training with the row's; alone on the diagonal."""
    pairs = np.empty((num_tasks, num_tasks))
    for i in range(num_tasks):
        pairs[i, i] = results[i,][0]
        for j in range(i):
            pairs[i, j], pairs[j, i] = results[j, i]
    return pairs


def _mate_means(pair_results: np.ndarray, group: Group) -> list[float]:
    """Return for each task of a group the mean over its mates of its result with each; alone for a single task."""
    if len(group) == 1:
        return [float(pair_results[group[0], group[0]])]
    return [fmean(pair_results[mate, task] for mate in group if mate != task) for task in group]


def _correlation(predictor: np.ndarray, quality: np.ndarray) -> float:
    """Return Spearman's rank correlation; NaN if all values of one are equal."""
    if np.ptp(predictor) == 0 or np.ptp(quality) == 0:
        return nan

    from scipy.stats import rankdata  # only the study needs it

    return float(np.corrcoef(rankdata([predictor, quality], axis=1))[0, 1])
