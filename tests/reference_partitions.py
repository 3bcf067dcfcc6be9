"""Reference implementations of partitions, scores and constraints by plain loops, for comparison in tests.

`REFERENCE_SCORES` and `REFERENCE_AFFINITIES` define every registered objective and similarity of gradients: tests
iterate over the registries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations

import numpy as np

from pipeline.grouping.affinities import SIMILARITIES
from pipeline.grouping.objectives import OBJECTIVES as REGISTERED
from pipeline.grouping.search.problem import Groups

OBJECTIVES = tuple(REGISTERED)
SIMILARITY_NAMES = tuple(SIMILARITIES)


@cache
def all_partitions(num_tasks: int) -> tuple[Groups, ...]:
    """Enumerate every partition once, by restricted growth strings."""

    def extend(labels: list[int]) -> Iterator[list[int]]:
        if len(labels) == num_tasks:
            yield labels
            return
        for label in range(max(labels, default=-1) + 2):
            yield from extend([*labels, label])

    return tuple(
        tuple(tuple(task for task in range(num_tasks) if labels[task] == group) for group in range(max(labels) + 1))
        for labels in extend([])
    )


def _sum(affinity: np.ndarray, group: tuple[int, ...]) -> float:
    return sum(affinity[i, j] for i in group for j in group if i < j)


def _mean(affinity: np.ndarray, group: tuple[int, ...]) -> float:
    affinities_by_task = {i: [affinity[i, j] for j in group if j != i] for i in group}
    return sum(sum(values) / len(values) for values in affinities_by_task.values() if values)


def _density(affinity: np.ndarray, group: tuple[int, ...]) -> float:
    return _sum(affinity, group) / len(group)


REFERENCE_SCORES: dict[str, Callable[[np.ndarray, tuple[int, ...]], float]] = {
    "sum": _sum,
    "mean": _mean,
    "density": _density,
}
"""Objective → score of a group."""


Vector = Sequence[float]


def _dot(a: Vector, b: Vector, rms: Vector) -> float:
    return float(sum(x * y for x, y in zip(a, b)))


def _cosine(a: Vector, b: Vector, rms: Vector) -> float:
    return _dot(a, b, rms) / math.sqrt(_dot(a, a, rms) * _dot(b, b, rms))


def _adam_cosine(a: Vector, b: Vector, rms: Vector) -> float:
    return _cosine([x / scale for x, scale in zip(a, rms)], [y / scale for y, scale in zip(b, rms)], rms)


REFERENCE_AFFINITIES: dict[str, Callable[[Vector, Vector, Vector], float]] = {
    "dot": _dot,
    "cosine": _cosine,
    "adam_cosine": _adam_cosine,
}
"""Similarity → its value for two tasks' gradients, neither of which is zero; the third vector is `reference_rms`."""


def reference_rms(gradients: np.ndarray) -> list[float]:
    """Return each parameter's root mean square over all snapshots and tasks of gradients (S, T, P)."""
    return [
        math.sqrt(sum(g[p] ** 2 for snapshot in gradients for g in snapshot) / (len(gradients) * len(gradients[0])))
        for p in range(gradients.shape[2])
    ]


def reference_score(affinity: np.ndarray, groups: Groups, objective: str) -> float:
    return sum((REFERENCE_SCORES[objective](affinity, group) for group in groups), 0.0)


def all_scores(affinity: np.ndarray, objective: str) -> Iterator[tuple[float, Groups]]:
    """Yield `reference_score` of every partition; each group's score is computed once."""
    tasks = range(len(affinity))
    group_scores = {
        group: REFERENCE_SCORES[objective](affinity, group)
        for size in range(1, len(affinity) + 1)
        for group in combinations(tasks, size)
    }
    for groups in all_partitions(len(affinity)):
        yield sum(map(group_scores.__getitem__, groups), 0.0), groups


def meets_constraints(groups: Groups, num_groups=None, min_size=1, max_size=None, must_link=(), cannot_link=()) -> bool:
    task_to_group = {task: group for group in groups for task in group}
    return (
        num_groups in (None, len(groups))
        and all(min_size <= len(group) <= (max_size or len(task_to_group)) for group in groups)
        and all(len({task_to_group[task] for task in tasks}) == 1 for tasks in must_link)
        and all(len({task_to_group[task] for task in tasks}) == len(tasks) for tasks in cannot_link)
    )


def best_by_enumeration(affinity: np.ndarray, objective: str, **constraints) -> tuple[Groups, float, int] | None:
    """Return the best groups, their score, and the number of feasible partitions; None if there is none."""
    num_tasks = len(affinity)
    allowed = [scored for scored in all_scores(affinity, objective) if meets_constraints(scored[1], **constraints)]
    if not allowed:
        return None
    scale = sum(abs(affinity[i, j]) for i in range(num_tasks) for j in range(i))
    best = max(score for score, _ in allowed)
    ties = [(score, groups) for score, groups in allowed if score >= best - 1e-12 * scale]
    score, groups = min(ties, key=lambda pair: (len(pair[1]), pair[1]))
    return groups, score, len(allowed)
