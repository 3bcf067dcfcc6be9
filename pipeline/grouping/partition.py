"""The partition of the tasks into disjoint groups that maximises the affinity inside groups.

What this module chose:
- Exact: the best of all partitions. Both objectives add over groups, so dynamic programming over subsets of
  tasks finds what enumeration would, in O(3^T) instead of a Bell number of steps.
- The number of groups is a dimension of the dynamic program, which serves both `num_groups` and the tie rule.
- Ties never depend on the order of float additions: partitions whose scores lie within
  TIE_TOLERANCE * sum over i < j of |affinity| of the best are equal. Among equals the one with the fewest
  groups wins (one prompt less to train), then the smallest `groups` in the order of Python tuples.
- The diagonal of the affinity matrix (a task with itself) plays no part in either objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import comb
from typing import Literal, get_args

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.affinity import AffinityKind

Objective = Literal["sum", "mean"]

MAX_TASKS = 18
"""The search takes about 1 s at 16 tasks and 5 s at 18; every further task nearly triples it."""

TIE_TOLERANCE = 1e-12
"""Scores closer than this, relative to the sum of absolute affinities, are equal."""

DOMINANT_NORM_RATIO = 3.0
"""A task is warned about when its gradients are this many times as long as the others' median."""


@dataclass(frozen=True)
class Partition:
    """Disjoint groups that cover all tasks, and how they were chosen."""

    groups: tuple[tuple[int, ...], ...]
    """Task indices; each group sorted, groups sorted by their first member."""
    score: float
    """The objective's value, summed over groups."""
    num_candidates: int
    """How many partitions satisfy the constraints: the number the search ranged over."""


def best_partition(
    affinity: np.ndarray,
    *,
    objective: Objective = "sum",
    num_groups: int | None = None,
    min_size: int = 1,
    max_size: int | None = None,
) -> Partition:
    """The best of all partitions of T tasks into disjoint groups, exactly; ties as the module header says.

    Objectives (a task alone scores 0 under both):
        sum: the affinities of all pairs inside a group, each pair once (the MmAP paper).
        mean: for every task its mean affinity to the other members of its group, summed over tasks
            (as TAG scores a group; Fifty et al. 2021).

    Args:
        affinity: (T, T), symmetric and finite, with T at most MAX_TASKS; only off-diagonal entries matter.
        objective: "sum" or "mean".
        num_groups: the exact number of groups; None lets the objective decide.
        min_size: the fewest tasks a group may have.
        max_size: the most tasks a group may have; None for no limit.

    Raises:
        UserError: the matrix is not square, symmetric and finite, or has more than MAX_TASKS tasks; the
            objective is unknown; no partition satisfies the constraints (the message says what would).
    """
    affinity = _checked_affinity(affinity)
    num_tasks = len(affinity)
    if objective not in get_args(Objective):
        raise UserError(f"objective {objective!r} is unknown; choose from {', '.join(get_args(Objective))}")
    check_constraints(num_tasks, num_groups, min_size, max_size)
    max_size = num_tasks if max_size is None else min(max_size, num_tasks)

    counts = _count_partitions(num_tasks, min_size, max_size)
    allowed_nums = [k for k in range(1, num_tasks + 1) if counts[k] and num_groups in (None, k)]
    scores = _group_scores(affinity, objective, min_size, max_size)
    best = _best_scores(scores, num_tasks, max(allowed_nums))

    everything = 2**num_tasks - 1
    tolerance = TIE_TOLERANCE * np.abs(np.triu(affinity, 1)).sum()
    threshold = best[everything, allowed_nums].max() - tolerance
    fewest = next(k for k in allowed_nums if best[everything, k] >= threshold)
    groups = _first_partition_reaching(threshold, scores, best, everything, fewest)
    return Partition(
        groups=groups,
        score=float(sum(scores[sum(1 << task for task in group)] for group in groups)),
        num_candidates=sum(counts[k] for k in allowed_nums),
    )


def warnings_about(
    affinity: np.ndarray,
    partition: Partition,
    task_names: Sequence[str],
    *,
    objective: Objective,
    kind: AffinityKind,
) -> list[str]:
    """What a user should know before trusting a partition, in plain sentences; empty when nothing stands out.

    Covers a search that collapsed into one group or into single tasks although it had a choice, affinities
    that are all zero, tasks without any gradient, and, for dot products, a task whose gradient norm
    dominates.

    Args:
        affinity: (T, T), the matrix the partition was found for.
        partition: what `best_partition` returned.
        task_names: T names.
        objective: the objective the partition maximises.
        kind: the affinity; with the objective it decides what is worth trying instead.

    Raises:
        UserError: the matrix is not square, symmetric and finite; the number of names is not T.
    """
    affinity = _checked_affinity(affinity)
    num_tasks = len(affinity)
    if len(task_names) != num_tasks:
        raise UserError(f"{len(task_names)} task names for an affinity matrix of {num_tasks} tasks")
    warnings = []
    pairs = affinity[np.triu_indices(num_tasks, 1)]
    had_choice = partition.num_candidates > 1
    if had_choice and not pairs.any():
        warnings.append("All affinities between tasks are zero: the grouping says nothing about the tasks.")
    elif had_choice and len(partition.groups) == 1:
        if (pairs > 0).all():
            reason = "every pairwise affinity is positive" + (
                ", so under objective 'sum' no split can score higher" if objective == "sum" else ""
            )
        else:
            reason = "the positive affinities outweigh the negative ones in every split"
        advice = "objective 'mean', " if objective == "sum" else ""
        advice += "a fixed number of groups (num_groups=2) or a max_size"
        if kind == "dot":
            advice += "; affinity 'cosine' helps if a few snapshots with large gradients decide the signs"
        warnings.append(f"All {num_tasks} tasks are in one group: {reason}. To split it, try {advice}.")
    elif had_choice and len(partition.groups) == num_tasks:
        reason = "no pairwise affinity is positive" if (pairs <= 0).all() else "no group scores higher"
        warnings.append(
            f"Every task is alone: {reason}, so no two tasks share a prompt. To group the least conflicting "
            "tasks all the same, set num_groups or min_size=2."
        )

    norms = np.sqrt(np.clip(np.diag(affinity), 0, None))
    still = [repr(name) for name, norm in zip(task_names, norms, strict=True) if norm == 0]
    if still:
        warnings.append(
            f"Gradients that are zero in every snapshot: {', '.join(still)}. Their affinities are 0 and say "
            "nothing; does the loss reach the shared prompt?"
        )
    largest = int(np.argmax(norms))
    others = np.delete(norms, largest)
    others = others[others > 0]
    if kind == "dot" and others.size and norms[largest] >= DOMINANT_NORM_RATIO * np.median(others):
        warnings.append(
            f"Task {task_names[largest]!r} has by far the largest gradients (root mean square norm "
            f"{norms[largest]:.3g}, median of the others {np.median(others):.3g}), so its dot products "
            "dominate the grouping. Affinity 'cosine' gives every task the same weight."
        )
    return warnings


def _checked_affinity(affinity: np.ndarray) -> np.ndarray:
    """The matrix as float64, made exactly symmetric; UserError if that is more than rounding."""
    affinity = np.asarray(affinity, dtype=np.float64)
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or affinity.size == 0:
        raise UserError(f"affinity has shape {affinity.shape}, expected a square (tasks, tasks) matrix")
    if not np.isfinite(affinity).all():
        i, j = np.argwhere(~np.isfinite(affinity))[0]
        raise UserError(f"affinity[{i}, {j}] is {affinity[i, j]}; all affinities must be finite")
    difference = np.abs(affinity - affinity.T)
    if difference.max() > 1e-9 * np.abs(affinity).max():
        i, j = np.unravel_index(np.argmax(difference), difference.shape)
        raise UserError(
            f"affinity is not symmetric: [{i}, {j}] is {affinity[i, j]:.6g} but [{j}, {i}] is "
            f"{affinity[j, i]:.6g}; average it with its transpose first"
        )
    return (affinity + affinity.T) / 2


def check_constraints(num_tasks: int, num_groups: int | None, min_size: int, max_size: int | None) -> None:
    """UserError unless the search can be made and some partition satisfies the constraints; says what is possible."""
    if num_tasks > MAX_TASKS:
        raise UserError(
            f"{num_tasks} tasks are too many for the exact search, whose limit is MAX_TASKS={MAX_TASKS}; "
            "group fewer tasks at a time"
        )
    for name, value in (("num_groups", num_groups), ("min_size", min_size)):
        if value is not None and not 1 <= value <= num_tasks:
            raise UserError(f"{name}={value} is impossible for {num_tasks} tasks; choose 1 to {num_tasks}")
    if max_size is not None and max_size < 1:
        raise UserError(f"max_size={max_size} is impossible: a group has at least 1 task")
    if max_size is not None and min_size > max_size:
        raise UserError(f"min_size={min_size} is larger than max_size={max_size}")

    def possible_nums(smallest: int, largest: int | None) -> range:
        # k groups of between `smallest` and `largest` tasks hold between k * smallest and k * largest tasks.
        fewest = 1 if largest is None else -(-num_tasks // largest)
        return range(fewest, num_tasks // smallest + 1)

    nums = possible_nums(min_size, max_size)
    if not nums:
        smaller = next(m for m in range(min_size, 0, -1) if possible_nums(m, max_size))
        larger = next(m for m in range(max_size, num_tasks + 1) if possible_nums(min_size, m))
        raise UserError(
            f"{num_tasks} tasks cannot be split into groups of min_size={min_size} to max_size={max_size} "
            f"tasks; min_size={smaller} or max_size={larger} would do"
        )
    if num_groups is not None and num_groups not in nums:
        sizes = f"min_size={min_size}" + ("" if max_size is None else f" and max_size={max_size}")
        possible = f"{nums[0]} to {nums[-1]}" if len(nums) > 1 else f"only {nums[0]}"
        raise UserError(
            f"num_groups={num_groups} is impossible for {num_tasks} tasks with {sizes}; possible: {possible}"
        )


def _count_partitions(num_tasks: int, min_size: int, max_size: int) -> list[int]:
    """How many partitions into k groups of allowed sizes exist, for k = 0..num_tasks (Stirling numbers)."""
    counts = [[1] + [0] * num_tasks]  # counts[n][k]
    for n in range(1, num_tasks + 1):
        row = [0] * (num_tasks + 1)
        for size in range(min_size, min(max_size, n) + 1):  # of the group that holds the first of n tasks
            for k in range(1, n + 1):
                row[k] += comb(n - 1, size - 1) * counts[n - size][k - 1]
        counts.append(row)
    return counts[num_tasks]


def _group_scores(affinity: np.ndarray, objective: Objective, min_size: int, max_size: int) -> np.ndarray:
    """(2^T,) score of every subset as a group, -inf where its size is barred; bit t stands for task t."""
    num_tasks = len(affinity)
    sizes = np.zeros(2**num_tasks, dtype=np.int64)
    pair_sums = np.zeros(2**num_tasks)
    for task in range(num_tasks):
        below = 2**task  # the subsets of tasks 0..task-1; adding `task` gives the next `below` subsets
        to_task = np.zeros(below)  # each such subset's summed affinity to `task`
        for other in range(task):
            to_task[2**other : 2 ** (other + 1)] = to_task[: 2**other] + affinity[task, other]
        pair_sums[below : 2 * below] = pair_sums[:below] + to_task
        sizes[below : 2 * below] = sizes[:below] + 1
    if objective == "mean":  # each pair counts for both of its tasks, over the number of other members
        pair_sums *= 2 / np.maximum(sizes - 1, 1)
    return np.where((sizes >= min_size) & (sizes <= max_size), pair_sums, -np.inf)


def _best_scores(scores: np.ndarray, num_tasks: int, max_groups: int) -> np.ndarray:
    """(2^T, max_groups + 1): the best score of each subset of tasks split into exactly k groups, or -inf.

    Filled in for the subsets a search needs: all tasks, and those without task 0, since the group of the
    first task is always split off first.
    """
    best = np.full((2**num_tasks, max_groups + 1), -np.inf)
    best[0, 0] = 0
    everything = 2**num_tasks - 1
    for subset in chain(range(2, everything, 2), [everything]):
        groups = _groups_with_first(subset, scores)
        if groups.size:
            # A subset of n tasks makes at most n groups: the columns beyond stay -inf.
            nums = min(subset.bit_count(), max_groups)
            split = best[subset ^ groups, :nums]
            split += scores[groups, None]
            best[subset, 1 : nums + 1] = split.max(axis=0)
    return best


def _groups_with_first(subset: int, scores: np.ndarray) -> np.ndarray:
    """All groups of allowed size inside a subset that hold its first task."""
    first = subset & -subset
    groups = np.array([first])
    rest = subset ^ first
    while rest:
        task = rest & -rest
        groups = np.concatenate([groups, groups | task])
        rest ^= task
    return groups[scores[groups] > -np.inf]


def _first_partition_reaching(
    threshold: float, scores: np.ndarray, best: np.ndarray, subset: int, num_groups: int
) -> tuple[tuple[int, ...], ...]:
    """The first partition, in tuple order, of a subset into num_groups whose score reaches the threshold."""
    partition = []
    score = 0.0
    for remaining in range(num_groups - 1, -1, -1):
        groups = _groups_with_first(subset, scores)
        reached = score + scores[groups] + best[subset ^ groups, remaining]
        # Sums are associated differently here than in `best`: rounding must not leave the loop with no group.
        good = groups[reached >= min(threshold, reached.max())]
        group = min(_members(int(g)) for g in good)
        partition.append(group)
        taken = sum(1 << task for task in group)
        score += scores[taken]
        subset ^= taken
    return tuple(partition)


def _members(subset: int) -> tuple[int, ...]:
    return tuple(task for task in range(subset.bit_length()) if subset >> task & 1)
