"""Feasibility of constraints, and the number of partitions that meet them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import comb, prod
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.objectives import Sum
from pipeline.grouping.search.problem import Problem

MAX_NODES_COUNTED_BY_SUBSET = 10
FEASIBILITY_TIME_LIMIT_S = 10.0


def check_constraints(
    tasks: Sequence[Hashable],
    *,
    num_groups: int | None = None,
    min_size: int = 1,
    max_size: int | None = None,
    must_link: Sequence[Sequence[Hashable]] = (),
    cannot_link: Sequence[Sequence[Hashable]] = (),
) -> None:
    """Raise a UserError that says what is possible if no partition meets the constraints of `best_partition`."""
    _check_sizes(len(tasks), num_groups, min_size, max_size)
    must_link = task_indices(tasks, "must_link", must_link)
    cannot_link = task_indices(tasks, "cannot_link", cannot_link)
    if not (must_link or cannot_link):
        return

    from pipeline.grouping.search.assignment import InfeasibleError, feasible_labels  # scipy: slow to import

    problem = Problem.from_affinity(
        np.zeros((len(tasks), len(tasks))), Sum(), num_groups, min_size, max_size, must_link, cannot_link
    )
    for node in problem.nodes:
        for forbidden in cannot_link:
            conflict = [tasks[task] for task in node if task in forbidden]
            if len(conflict) > 1:
                raise UserError(
                    f"must_link puts {conflict[0]!r} and {conflict[1]!r} in one group, cannot_link forbids it"
                )
        if len(node) > problem.max_size:
            names = ", ".join(repr(tasks[task]) for task in node)
            raise UserError(
                f"max_size={max_size}, but must_link puts the {len(node)} tasks {names} in one group; "
                f"choose max_size={len(node)} or more, or remove tasks from must_link"
            )
    try:
        feasible_labels(problem, FEASIBILITY_TIME_LIMIT_S)
    except InfeasibleError:
        options = {"num_groups": num_groups, "max_size": max_size, "must_link": must_link, "cannot_link": cannot_link}
        active: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, ())}
        if min_size > 1:
            active["min_size"] = min_size
        removable = [name for name in active if _is_feasible_without(name, len(tasks), active)]
        remedy = f"remove {' or '.join(removable)}" if removable else "remove two of them"
        raise UserError(
            f"no partition of the {len(tasks)} tasks meets {', '.join(active)} at the same time; {remedy}"
        ) from None


def task_indices(
    tasks: Sequence[Hashable], name: str, lists: Sequence[Sequence[Hashable]]
) -> tuple[tuple[int, ...], ...]:
    """Return lists of tasks as lists of task indices; `name` is the constraint's.

    Raises:
        UserError: an unknown task, a task twice in a list, or a list of fewer than two tasks.
    """
    task_to_index = {task: index for index, task in enumerate(tasks)}
    for listed in lists:
        label = f"{name}: [{', '.join(map(str, listed))}]"
        if unknown := [task for task in listed if task not in task_to_index]:
            raise UserError(f"{label}: {unknown[0]!r} is not a task; tasks: {', '.join(map(str, tasks))}")
        if len(set(listed)) < len(listed):
            raise UserError(f"{label} names a task twice")
        if len(listed) < 2:
            raise UserError(f"{label} must name at least two tasks")
    return tuple(tuple(sorted(task_to_index[task] for task in listed)) for listed in lists)


def count_partitions(problem: Problem) -> int | None:
    """Return the number of partitions that meet the constraints; None where `cannot_link` makes counting slow."""
    num_nodes_by_size = Counter(problem.sizes.tolist())
    if not problem.cannot_link.any():
        sizes = sorted(num_nodes_by_size)
        num_nodes = tuple(num_nodes_by_size[size] for size in sizes)
        counts = _partition_counts(num_nodes, tuple(sizes), problem.min_size, problem.max_size)
        return sum(count for k, count in counts.items() if problem.num_groups in (None, k))
    if problem.num_nodes > MAX_NODES_COUNTED_BY_SUBSET:
        return None
    allowed = np.isfinite(problem.subset_scores())
    subset_counts = [Counter({0: 1})]  # for every set of nodes: number of groups → number of partitions
    for mask in range(1, len(allowed)):
        free = mask ^ (1 << (mask.bit_length() - 1))
        subset_counts.append(Counter())
        remainder = free
        while remainder >= 0:  # all subsets of the free nodes
            if allowed[mask ^ remainder]:
                for k, count in subset_counts[remainder].items():
                    subset_counts[mask][k + 1] += count
            remainder = (remainder - 1) & free if remainder else -1
    return sum(count for k, count in subset_counts[-1].items() if problem.num_groups in (None, k))


@lru_cache(maxsize=4096)
def _partition_counts(
    num_nodes: tuple[int, ...], sizes: tuple[int, ...], min_size: int, max_size: int
) -> dict[int, int]:
    """Return number of groups → number of partitions of num_nodes[i] nodes of sizes[i] tasks each."""
    if not any(num_nodes):
        return {0: 1}
    counts: Counter[int] = Counter()
    first_kind = next(kind for kind, number in enumerate(num_nodes) if number)
    free = tuple(number - (kind == first_kind) for kind, number in enumerate(num_nodes))
    for joining in np.ndindex(*(number + 1 for number in free)):  # how many more of each size join the first node
        group_size = sizes[first_kind] + sum(number * size for number, size in zip(joining, sizes))
        if min_size <= group_size <= max_size:
            num_choices = prod(comb(number, chosen) for number, chosen in zip(free, joining))
            remaining = tuple(number - chosen for number, chosen in zip(free, joining))
            for k, count in _partition_counts(remaining, sizes, min_size, max_size).items():
                counts[k + 1] += num_choices * count
    return dict(counts)


def _is_feasible_without(name: str, num_tasks: int, constraints: dict[str, Any]) -> bool:
    from pipeline.grouping.search.assignment import InfeasibleError, feasible_labels

    remaining = {key: value for key, value in constraints.items() if key != name}
    try:
        _check_sizes(num_tasks, remaining.get("num_groups"), remaining.get("min_size", 1), remaining.get("max_size"))
        problem = Problem.from_affinity(np.zeros((num_tasks, num_tasks)), Sum(), **remaining)
        return feasible_labels(problem, FEASIBILITY_TIME_LIMIT_S) is not None
    except (UserError, InfeasibleError):
        return False


def _check_sizes(num_tasks: int, num_groups: int | None, min_size: int, max_size: int | None) -> None:
    for name, value in (("num_groups", num_groups), ("min_size", min_size)):
        if value is not None and not 1 <= value <= num_tasks:
            raise UserError(f"{name}={value} is impossible for {num_tasks} tasks; choose 1 to {num_tasks}")
    if max_size is not None and max_size < 1:
        raise UserError(f"max_size={max_size} is impossible: a group has at least 1 task")
    if max_size is not None and min_size > max_size:
        raise UserError(f"min_size={min_size} is larger than max_size={max_size}")

    def possible_nums(smallest: int, largest: int | None) -> range:
        # k groups of between `smallest` and `largest` tasks hold between k * smallest and k * largest tasks.
        min_groups = 1 if largest is None else -(-num_tasks // largest)
        return range(min_groups, num_tasks // smallest + 1)

    nums = possible_nums(min_size, max_size)
    if not nums:
        assert max_size is not None  # else one group of all tasks is possible
        smaller = next(m for m in range(min_size, 0, -1) if possible_nums(m, max_size))
        larger = next(m for m in range(max_size, num_tasks + 1) if possible_nums(min_size, m))
        raise UserError(
            f"{num_tasks} tasks cannot be split into groups of min_size={min_size} to max_size={max_size} "
            f"tasks; choose min_size={smaller} or max_size={larger}"
        )
    if num_groups is not None and num_groups not in nums:
        sizes = f"min_size={min_size}" + ("" if max_size is None else f" and max_size={max_size}")
        possible = f"{nums[0]} to {nums[-1]}" if len(nums) > 1 else f"only {nums[0]}"
        raise UserError(
            f"num_groups={num_groups} is impossible for {num_tasks} tasks with {sizes}; possible: {possible}"
        )
