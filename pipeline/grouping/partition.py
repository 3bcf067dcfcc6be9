"""The partition of the tasks into disjoint groups that maximizes the affinity inside groups.

What this module chose:
- The user chooses no way to search. Tasks that no good group joins are searched apart; up to 20 units (tasks that must
  be together are one) dynamic programming over subsets is exact; beyond, a local search finds a good partition and an
  integer program a bound, and most often the proof that it is the best.
- Only the integer program can end without a proof, at the time limit. The result says so and has the bound.
- Ties are broken by a rule, but not beyond 20 units: the fewest groups, then the smallest `groups` in the order of
  Python tuples (`pipeline.grouping.search.problem`).
- The diagonal of the affinity matrix (a task with itself) plays no part in any objective.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.objectives import find_objective
from pipeline.grouping.search.components import components
from pipeline.grouping.search.constraints import check_constraints, count_partitions, task_numbers
from pipeline.grouping.search.problem import Groups, NodeGroups, Problem
from pipeline.grouping.search.subsets import best_by_subsets

MOST_SEARCHED_WHOLE = 12
"""Units up to which dynamic programming takes milliseconds: there is nothing to gain from components."""
MOST_BY_SUBSETS = 20
"""Units up to which dynamic programming takes seconds; each further one triples that."""
TIME_LIMIT_S = 60.0
SHARE_OF_LOCAL_SEARCH, SHARE_OF_FIRST_TRY = 0.1, 0.2
"""Of the time limit: before the integer program and once more in its course; and of its first try."""


@dataclass(frozen=True)
class Partition:
    """Disjoint groups that cover all tasks, and how they were found."""

    groups: Groups
    """Task indices; each group sorted, groups sorted by their first member."""
    score: float
    """The objective's value, summed over groups."""
    num_candidates: int | None
    """How many partitions satisfy the constraints: the number the search ranged over. None where `cannot_link` makes it
    slow to count."""
    method: str
    """The way it was found."""
    bound: float
    """No partition scores more; equal to `score` if this one is proven best."""

    @property
    def is_optimal(self) -> bool:
        return self.bound == self.score


def best_partition(
    affinity: np.ndarray,
    *,
    objective: str = "sum",
    num_groups: int | None = None,
    min_size: int = 1,
    max_size: int | None = None,
    must_link: Sequence[Sequence[Hashable]] = (),
    cannot_link: Sequence[Sequence[Hashable]] = (),
    tasks: Sequence[Hashable] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> Partition:
    """The best of all partitions of T tasks into disjoint groups; ties as the module header says.

    Args:
        affinity: (T, T), symmetric and finite; only off-diagonal entries matter.
        objective: a name of `pipeline.grouping.objectives`; a task alone scores 0 under each.
        num_groups: the exact number of groups; None lets the objective decide.
        min_size: the fewest tasks a group may have.
        max_size: the most tasks a group may have; None for no limit.
        together: lists of tasks that must be in one group.
        apart: lists of tasks no two of which may be in one group.
        tasks: T names that `must_link` and `cannot_link` use; without them they use indices.
        time_limit_s: seconds after which the integer program ends with the best partition found.

    Raises:
        UserError: the matrix is not square, symmetric and finite; the objective is unknown; no partition satisfies
            the constraints (the message says what would).
    """
    affinity = checked_affinity(affinity)
    tasks = range(len(affinity)) if tasks is None else tasks
    check_constraints(
        tasks, num_groups=num_groups, min_size=min_size, max_size=max_size, must_link=must_link, cannot_link=cannot_link
    )
    problem = Problem.of(
        affinity,
        find_objective(objective),
        num_groups=num_groups,
        min_size=min_size,
        max_size=max_size,
        must_link=task_numbers(tasks, "must_link", must_link),
        cannot_link=task_numbers(tasks, "cannot_link", cannot_link),
    )
    groups, bound, method = _search(problem, time_limit_s)
    score = problem.score(groups)
    return Partition(problem.task_groups(groups), score, count_partitions(problem), method, float(max(bound, score)))


def _search(problem: Problem, time_limit_s: float) -> tuple[NodeGroups, float, str]:
    """The best groups of units, the bound on the score, and the way's name."""
    deadline = time.monotonic() + time_limit_s
    parts = components(problem) if problem.num_nodes > MOST_SEARCHED_WHOLE else []
    if len(parts) <= 1:
        return _search_connected(problem, deadline)
    groups: NodeGroups = []
    missing = 0.0
    methods: dict[str, None] = {}  # as a set that keeps their order
    for part in parts:
        alone = problem.contract_must_links([[unit] for unit in part])
        of_part, bound, method = _search_connected(alone, deadline)
        groups += [tuple(part[unit] for unit in group) for group in of_part]
        missing += max(bound - alone.score(of_part), 0.0)  # exactly 0 where proven
        if len(part) > 1:
            methods[method] = None
    by = f", by {' and '.join(methods)}" if methods else ""
    return groups, problem.score(groups) + missing, f"{len(parts)} connected components{by}"


def _search_connected(problem: Problem, deadline: float) -> tuple[NodeGroups, float, str]:
    if problem.num_nodes <= MOST_BY_SUBSETS:
        groups = best_by_subsets(problem)
        return groups, problem.score(groups), "dynamic programming over subsets"

    from pipeline.grouping.search.integer_program import IntegerProgram  # scipy's solvers
    from pipeline.grouping.search.local_search import heuristic_partition, improve_partition

    seconds = max(deadline - time.monotonic(), 0.0)
    program = IntegerProgram(problem)
    groups, bound = program.solve(
        heuristic_partition(problem, SHARE_OF_LOCAL_SEARCH * seconds), SHARE_OF_FIRST_TRY * seconds
    )
    if bound > problem.score(groups):
        groups = improve_partition(problem, groups, SHARE_OF_LOCAL_SEARCH * seconds)
        groups, bound = program.solve(groups, max(deadline - time.monotonic(), 0.1))
    return groups, bound, "integer program"


def checked_affinity(affinity: np.ndarray) -> np.ndarray:
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
    symmetric: np.ndarray = (affinity + affinity.T) / 2
    return symmetric
