"""Whether constraints can be met, and how many partitions meet them."""

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

MOST_UNITS_COUNTED_ONE_BY_ONE = 10
SECONDS_TO_FIND_ONE = 10.0


def check_constraints(
    tasks: Sequence[Hashable],
    *,
    num_groups: int | None = None,
    min_size: int = 1,
    max_size: int | None = None,
    must_link: Sequence[Sequence[Hashable]] = (),
    cannot_link: Sequence[Sequence[Hashable]] = (),
) -> None:
    """UserError unless some partition of the tasks meets the constraints of `best_partition`; says what is possible."""
    _check_sizes(len(tasks), num_groups, min_size, max_size)
    must_link, cannot_link = (
        task_numbers(tasks, "must_link", must_link),
        task_numbers(tasks, "cannot_link", cannot_link),
    )
    if not (must_link or cannot_link):
        return

    from pipeline.grouping.search.assignment import (  # scipy, which every run would import
        InfeasibleError,
        feasible_labels,
    )

    problem = Problem.of(
        np.zeros((len(tasks), len(tasks))), Sum(), num_groups, min_size, max_size, must_link, cannot_link
    )
    for unit in problem.nodes:
        for of_list in cannot_link:
            both = [tasks[task] for task in unit if task in of_list]
            if len(both) > 1:
                raise UserError(f"{both[0]!r} and {both[1]!r} must be together (`must_link`) and apart (`cannot_link`)")
        if len(unit) > problem.max_size:
            names = ", ".join(repr(tasks[task]) for task in unit)
            raise UserError(
                f"max_size={max_size}, but the {len(unit)} tasks {names} must be together; "
                f"choose max_size={len(unit)} or more, or take tasks out of `must_link`"
            )
    try:
        feasible_labels(problem, SECONDS_TO_FIND_ONE)
    except InfeasibleError:
        every = {"num_groups": num_groups, "max_size": max_size, "must_link": must_link, "cannot_link": cannot_link}
        given: dict[str, Any] = {name: value for name, value in every.items() if value not in (None, ())}
        if min_size > 1:
            given["min_size"] = min_size
        removable = [name for name in given if _possible_without(name, len(tasks), given)]
        remedy = f"without {' or without '.join(removable)} there are some" if removable else "drop two of them"
        raise UserError(f"no partition of the {len(tasks)} tasks meets {', '.join(given)} at once; {remedy}") from None


def task_numbers(
    tasks: Sequence[Hashable], name: str, lists: Sequence[Sequence[Hashable]]
) -> tuple[tuple[int, ...], ...]:
    """Lists of tasks by their number; `name` is the constraint's.

    Raises:
        UserError: an unknown task, a task twice in a list, or a list of fewer than two tasks.
    """
    number = {task: at for at, task in enumerate(tasks)}
    for of_list in lists:
        shown = f"{name}: [{', '.join(map(str, of_list))}]"
        if unknown := [task for task in of_list if task not in number]:
            raise UserError(f"{shown}: {unknown[0]!r} is not a task; tasks: {', '.join(map(str, tasks))}")
        if len(set(of_list)) < len(of_list):
            raise UserError(f"{shown} names a task twice")
        if len(of_list) < 2:
            raise UserError(f"{shown} must name at least two tasks")
    return tuple(tuple(sorted(number[task] for task in of_list)) for of_list in lists)


def count_partitions(problem: Problem) -> int | None:
    """How many partitions meet the constraints; None where pairs apart make that slow to count."""
    sizes = Counter(problem.sizes.tolist())
    if not problem.cannot_link.any():
        kinds = sorted(sizes)
        left = tuple(sizes[kind] for kind in kinds)
        counts = _counts_by_number(left, tuple(kinds), problem.min_size, problem.max_size)
        return sum(count for k, count in counts.items() if problem.num_groups in (None, k))
    if problem.num_nodes > MOST_UNITS_COUNTED_ONE_BY_ONE:
        return None
    allowed = np.isfinite(problem.subset_scores())
    of_set = [Counter({0: 1})]  # of every set of units: number of groups → number of its partitions
    for mask in range(1, len(allowed)):
        rest = mask ^ (1 << (mask.bit_length() - 1))
        of_set.append(Counter())
        others = rest
        while others >= 0:  # all subsets of the rest
            if allowed[mask ^ others]:
                for k, count in of_set[others].items():
                    of_set[mask][k + 1] += count
            others = (others - 1) & rest if others else -1
    return sum(count for k, count in of_set[-1].items() if problem.num_groups in (None, k))


@lru_cache(maxsize=4096)
def _counts_by_number(left: tuple[int, ...], kinds: tuple[int, ...], min_size: int, max_size: int) -> dict[int, int]:
    """Number of groups → number of partitions of left[i] units of kinds[i] tasks each."""
    if not any(left):
        return {0: 1}
    counts: Counter[int] = Counter()
    first = next(at for at, number in enumerate(left) if number)
    rest = tuple(number - (at == first) for at, number in enumerate(left))
    for joining in np.ndindex(*(number + 1 for number in rest)):  # the first unit's group: how many more of each kind
        size = kinds[first] + sum(number * kind for number, kind in zip(joining, kinds))
        if min_size <= size <= max_size:
            ways = prod(comb(number, chosen) for number, chosen in zip(rest, joining))
            remaining = tuple(number - chosen for number, chosen in zip(rest, joining))
            for k, count in _counts_by_number(remaining, kinds, min_size, max_size).items():
                counts[k + 1] += ways * count
    return dict(counts)


def _possible_without(name: str, num_tasks: int, given: dict[str, Any]) -> bool:
    from pipeline.grouping.search.assignment import InfeasibleError, feasible_labels

    others = {other: value for other, value in given.items() if other != name}
    try:
        _check_sizes(num_tasks, others.get("num_groups"), others.get("min_size", 1), others.get("max_size"))
        problem = Problem.of(np.zeros((num_tasks, num_tasks)), Sum(), **others)
        return feasible_labels(problem, SECONDS_TO_FIND_ONE) is not None
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
        fewest = 1 if largest is None else -(-num_tasks // largest)
        return range(fewest, num_tasks // smallest + 1)

    nums = possible_nums(min_size, max_size)
    if not nums:
        assert max_size is not None  # else one group of all tasks would do
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
