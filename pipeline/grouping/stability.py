"""How sure a grouping is: what other snapshots of the same training would have said, which other partitions come close,
and whether the groups change while the prompt trains.

Snapshots of neighboring steps are alike, so the bootstrap draws blocks of neighbors, not single snapshots: single
ones would make any grouping look sure.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.study import partition_score, set_partitions
from pipeline.grouping.text import format_groups

NUM_RESAMPLES = 200
BOOTSTRAP_TIME_LIMIT_S = 20.0
"""The bootstrap of a slow search ends with fewer resamples."""
MAX_TASKS_RANKED_ALL = 8
"""Up to this many tasks (4,140 partitions) all partitions are ranked; above, those next to the best."""
Search = Callable[[np.ndarray], Groups]
"""Affinities (T, T) → the best groups."""


@dataclass(frozen=True)
class Bootstrap:
    co_assignment: np.ndarray
    """(T, T): share of the resamples in which two tasks are in one group; 1 on the diagonal."""
    frequencies: dict[Groups, float]
    """Share of the resamples that give a partition, the most frequent first."""
    num_resamples: int


@dataclass(frozen=True)
class RankedPartition:
    groups: Groups
    score: float
    title: str
    """Its groups in words, or how it differs from the best."""


def snapshot_affinities(gradients: np.ndarray, kind: str, blocks: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """(S, T, T) of gradients (S, T, P): each snapshot's own affinities, whose mean is `affinity_matrix`."""
    return np.stack([affinity_matrix(snapshot[None], kind, blocks=blocks) for snapshot in gradients])


def bootstrap(
    affinities: np.ndarray, search: Search, *, seed: int = 0, time_limit_s: float = BOOTSTRAP_TIME_LIMIT_S
) -> Bootstrap:
    """Searches the best groups again for means over resampled blocks of about √S neighboring snapshots.

    Args:
        affinities: (S, T, T), by snapshot, in the order of the steps.
        search: as the grouping itself was found.
    """
    num_snapshots, num_tasks, _ = affinities.shape
    length = max(1, round(math.sqrt(num_snapshots)))
    rng = np.random.default_rng(seed)
    co_assignment = np.zeros((num_tasks, num_tasks))
    counts: Counter[Groups] = Counter()
    began = time.monotonic()
    for _ in range(NUM_RESAMPLES):
        starts = rng.integers(0, num_snapshots, math.ceil(num_snapshots / length))
        drawn = (starts[:, None] + np.arange(length)).ravel()[:num_snapshots] % num_snapshots  # around the end
        groups = search(affinities[drawn].mean(axis=0))
        counts[groups] += 1
        for group in groups:
            co_assignment[np.ix_(group, group)] += 1
        if time.monotonic() - began > time_limit_s:
            break
    total = counts.total()
    return Bootstrap(co_assignment / total, {groups: count / total for groups, count in counts.most_common()}, total)


def ranked_partitions(
    affinity: np.ndarray,
    best: Groups,
    objective: str,
    task_names: Sequence[str],
    allowed: Callable[[Groups], bool] = lambda groups: True,
    count: int = 10,
) -> list[RankedPartition]:
    """The `count` best-scored partitions among those `allowed`, `best` first: of all up to MAX_TASKS_RANKED_ALL tasks,
    above of those that differ from `best` by one task moved, two groups joined, or one task left alone."""
    num_tasks = len(affinity)
    if num_tasks <= MAX_TASKS_RANKED_ALL:
        titles = {groups: format_groups(groups, task_names) for groups in set_partitions(num_tasks)}
    else:
        titles = {best: "as found", **_neighbors(best, task_names)}
    scores = {groups: partition_score(affinity, groups, objective) for groups in titles if allowed(groups)}
    others = sorted(scores.keys() - {best}, key=lambda groups: (-scores[groups], len(groups), groups))
    return [RankedPartition(groups, scores[groups], titles[groups]) for groups in (best, *others[: count - 1])]


def satisfies(
    groups: Groups,
    num_groups: int | None,
    min_size: int,
    max_size: int | None,
    must_link: Sequence[Sequence[int]],
    cannot_link: Sequence[Sequence[int]],
) -> bool:
    """Whether a partition keeps the constraints of `best_partition`, given by task numbers."""
    group_of = {task: number for number, group in enumerate(groups) for task in group}
    return (
        num_groups in (None, len(groups))
        and all(min_size <= len(group) <= (max_size or len(group_of)) for group in groups)
        and all(len({group_of[task] for task in tasks}) == 1 for tasks in must_link)
        and all(len({group_of[task] for task in tasks}) == len(tasks) for tasks in cannot_link)
    )


def groups_over_training(
    affinities: np.ndarray, steps: Sequence[int], search: Search, num_windows: int = 5
) -> list[tuple[int, int, Groups]]:
    """(first step, last step, groups) of each of about `num_windows` equal parts of the training alone."""
    bounds = np.linspace(0, len(affinities), min(num_windows, len(affinities)) + 1).astype(int)
    return [
        (steps[start], steps[stop - 1], search(affinities[start:stop].mean(axis=0)))
        for start, stop in zip(bounds, bounds[1:])
    ]


def _neighbors(groups: Groups, task_names: Sequence[str]) -> dict[Groups, str]:
    """Partitions one step away → the step."""
    near: dict[Groups, str] = {}
    for at, group in enumerate(groups):
        for task in group:
            kept = [*groups[:at], *groups[at + 1 :], *([tuple(other for other in group if other != task)])]
            kept = [other for other in kept if other]
            near[_sorted([*kept, (task,)])] = f"{task_names[task]} alone"
            for to, other in enumerate(groups):
                if to != at:
                    moved = [of for of in kept if of != other]
                    near[_sorted([*moved, tuple(sorted((*other, task)))])] = f"{task_names[task]} in group {to + 1}"
        for to in range(at + 1, len(groups)):
            rest = [of for number, of in enumerate(groups) if number not in (at, to)]
            near[_sorted([*rest, tuple(sorted(group + groups[to]))])] = f"groups {at + 1} and {to + 1} as one"
    near.pop(groups, None)
    return near


def _sorted(groups: Sequence[tuple[int, ...]]) -> Groups:
    return tuple(sorted(groups))
