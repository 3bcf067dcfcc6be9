"""Stability of a grouping: bootstrap, next best partitions, groups by phase of the training.

Gradient affinities are resampled over snapshots, transfer and features over the training images of each task
(`Resample`). Snapshots of neighboring steps are correlated, so theirs is a block bootstrap: resampling single snapshots
would make any grouping look stable.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.grouping.search.problem import Groups
from pipeline.grouping.study import partition_score, set_partitions
from pipeline.grouping.text import format_groups

NUM_RESAMPLES = 200
BOOTSTRAP_TIME_LIMIT_S = 20.0
"""The bootstrap of a slow search ends with fewer resamples."""
MAX_TASKS_RANKED_ALL = 8
"""Up to this many tasks (4,140 partitions) all partitions are ranked; above, the neighbors of the best one."""
Search = Callable[[np.ndarray], Groups]
"""Affinities (T, T) → the best groups."""
Resample = Callable[[np.random.Generator], np.ndarray]
"""Draws the affinities (T, T) of a bootstrap resample."""


@dataclass(frozen=True)
class Bootstrap:
    co_assignment: np.ndarray
    """(T, T): fraction of the resamples in which two tasks are in one group; 1 on the diagonal."""
    frequencies: dict[Groups, float]
    """Partition → fraction of the resamples that give it, the most frequent first."""
    num_resamples: int


@dataclass(frozen=True)
class RankedPartition:
    groups: Groups
    score: float
    title: str
    """Its groups as text, or how it differs from the best partition."""


def resample_snapshots(affinities: np.ndarray) -> Resample:
    """Return the resampling of blocks of about √S neighboring snapshots; affinities (S, T, T) in the order of the
    steps."""
    num_snapshots = len(affinities)
    length = max(1, round(math.sqrt(num_snapshots)))

    def draw(rng: np.random.Generator) -> np.ndarray:
        starts = rng.integers(0, num_snapshots, math.ceil(num_snapshots / length))
        indices = (starts[:, None] + np.arange(length)).ravel()[:num_snapshots] % num_snapshots  # wraps around the end
        mean: np.ndarray = affinities[indices].mean(axis=0)
        return mean

    return draw


def bootstrap(
    resample: Resample, search: Search, *, seed: int = 0, time_limit_s: float = BOOTSTRAP_TIME_LIMIT_S
) -> Bootstrap:
    """Repeat the search that found the grouping on resampled affinities."""
    rng = np.random.default_rng(seed)
    co_assignment: np.ndarray | float = 0.0
    counts: Counter[Groups] = Counter()
    started = time.monotonic()
    for _ in range(NUM_RESAMPLES):
        affinity = resample(rng)
        groups = search(affinity)
        counts[groups] += 1
        is_together = np.zeros_like(affinity)
        for group in groups:
            is_together[np.ix_(group, group)] = 1
        co_assignment = co_assignment + is_together
        if time.monotonic() - started > time_limit_s:
            break
    total = counts.total()
    frequencies = {groups: count / total for groups, count in counts.most_common()}
    return Bootstrap(np.asarray(co_assignment) / total, frequencies, total)


def ranked_partitions(
    affinity: np.ndarray,
    best: Groups,
    objective: str,
    task_names: Sequence[str],
    is_allowed: Callable[[Groups], bool] = lambda groups: True,
    count: int = 10,
) -> list[RankedPartition]:
    """Return the `count` allowed partitions with the highest scores, `best` first.

    Candidates are all partitions of up to MAX_TASKS_RANKED_ALL tasks, above that those that differ from `best` by one
    task moved, two groups merged, or one task split off.
    """
    num_tasks = len(affinity)
    if num_tasks <= MAX_TASKS_RANKED_ALL:
        titles = {groups: format_groups(groups, task_names) for groups in set_partitions(num_tasks)}
    else:
        titles = {best: "best partition", **_neighbors(best, task_names)}
    scores = {groups: partition_score(affinity, groups, objective) for groups in titles if is_allowed(groups)}
    runners_up = sorted(scores.keys() - {best}, key=lambda groups: (-scores[groups], len(groups), groups))
    return [RankedPartition(groups, scores[groups], titles[groups]) for groups in (best, *runners_up[: count - 1])]


def satisfies(
    groups: Groups,
    num_groups: int | None,
    min_size: int,
    max_size: int | None,
    must_link: Sequence[Sequence[int]],
    cannot_link: Sequence[Sequence[int]],
) -> bool:
    """Return whether a partition meets the constraints of `best_partition`, given by task indices."""
    task_to_group = {task: number for number, group in enumerate(groups) for task in group}
    return (
        num_groups in (None, len(groups))
        and all(min_size <= len(group) <= (max_size or len(task_to_group)) for group in groups)
        and all(len({task_to_group[task] for task in tasks}) == 1 for tasks in must_link)
        and all(len({task_to_group[task] for task in tasks}) == len(tasks) for tasks in cannot_link)
    )


def groups_over_training(
    affinities: np.ndarray, steps: Sequence[int], search: Search, num_windows: int = 5
) -> list[tuple[int, int, Groups]]:
    """Return (first step, last step, groups) of each of about `num_windows` equal parts of the training by itself."""
    bounds = np.linspace(0, len(affinities), min(num_windows, len(affinities)) + 1).astype(int)
    return [
        (steps[start], steps[stop - 1], search(affinities[start:stop].mean(axis=0)))
        for start, stop in zip(bounds, bounds[1:])
    ]


def num_early_snapshots(num_snapshots: int) -> int:
    """Return a tenth of the snapshots, at least one."""
    return max(1, num_snapshots // 10)


def early_share(affinities: np.ndarray) -> float:
    """Return the fraction of the affinities (S, T, T) that is from the early snapshots, 0 to 1.

    Absolute values are added over all pairs of tasks, so that none cancel.
    """
    totals = np.abs(affinities[:, *np.triu_indices(affinities.shape[1], 1)]).sum(axis=1)
    return float(totals[: num_early_snapshots(len(totals))].sum() / (totals.sum() or 1.0))


def _neighbors(groups: Groups, task_names: Sequence[str]) -> dict[Groups, str]:
    """Return partition → description of the single change that leads to it."""
    neighbors: dict[Groups, str] = {}
    for source, group in enumerate(groups):
        for task in group:
            reduced = [*groups[:source], *groups[source + 1 :], tuple(member for member in group if member != task)]
            reduced = [members for members in reduced if members]
            neighbors[_sorted([*reduced, (task,)])] = f"{task_names[task]} by itself"
            for target, members in enumerate(groups):
                if target != source:
                    unchanged = [peers for peers in reduced if peers != members]
                    moved = _sorted([*unchanged, tuple(sorted((*members, task)))])
                    neighbors[moved] = f"{task_names[task]} in group {target + 1}"
        for target in range(source + 1, len(groups)):
            unchanged = [members for number, members in enumerate(groups) if number not in (source, target)]
            merged = _sorted([*unchanged, tuple(sorted(group + groups[target]))])
            neighbors[merged] = f"groups {source + 1} and {target + 1} merged"
    neighbors.pop(groups, None)
    return neighbors


def _sorted(groups: Sequence[tuple[int, ...]]) -> Groups:
    return tuple(sorted(groups))
