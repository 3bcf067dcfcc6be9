"""The partition of the tasks into disjoint groups that maximizes the affinity inside groups.

Design choices:
- The search algorithm is not an option. Tasks that no good group joins are searched separately; up to 20 nodes (tasks
  that must share a group are one node) dynamic programming over subsets is exact; beyond, a local search finds a good
  partition, and an integer program an upper bound and most often the proof that it is optimal.
- Only the integer program can end without a proof, at the time limit. The result says so and has the upper bound.
- Up to 20 nodes ties are broken by a rule: the fewest groups, then the smallest `groups` in the order of Python tuples
  (`pipeline.grouping.search.problem`).
- The diagonal of the affinity matrix (a task with itself) is ignored by every objective.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.objectives import get_objective
from pipeline.grouping.search.components import connected_components
from pipeline.grouping.search.constraints import check_constraints, count_partitions, task_indices
from pipeline.grouping.search.problem import Groups, NodeGroups, Problem
from pipeline.grouping.search.subsets import solve_subset_dp

MAX_NODES_WITHOUT_SPLIT = 12
"""Up to here dynamic programming takes milliseconds: splitting into components gains nothing."""
MAX_NODES_SUBSET_DP = 20
"""Up to here dynamic programming takes seconds; each further node triples that."""
TIME_LIMIT_S = 60.0
LOCAL_SEARCH_TIME_FRACTION, FIRST_SOLVE_TIME_FRACTION = 0.1, 0.2
"""Fractions of the time limit: each local search (before the integer program, and between its two runs); its first."""


@dataclass(frozen=True)
class Partition:
    """Disjoint groups that cover all tasks, and how they were found."""

    groups: Groups
    """Task indices; each group sorted, groups sorted by their first member."""
    score: float
    """The objective's value, summed over groups."""
    num_candidates: int | None
    """Number of partitions that satisfy the constraints; None where `cannot_link` makes counting slow."""
    method: str
    """Name of the search algorithm."""
    upper_bound: float
    """No partition scores more; equal to `score` if this one is proven optimal."""

    @property
    def is_optimal(self) -> bool:
        return self.upper_bound == self.score


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
    """Return the best partition of T tasks into disjoint groups; the module docstring has the rule for ties.

    Args:
        affinity: (T, T), symmetric and finite; only off-diagonal entries matter.
        objective: a name in `pipeline.grouping.objectives`; a single task scores 0 under each.
        num_groups: the exact number of groups; None lets the objective decide.
        min_size: minimum number of tasks in a group.
        max_size: maximum number of tasks in a group; None for no limit.
        must_link: lists of tasks that must be in one group.
        cannot_link: lists of tasks no two of which may be in one group.
        tasks: T names that `must_link` and `cannot_link` use; without them they use indices.
        time_limit_s: seconds after which the integer program returns the best partition found.

    Raises:
        UserError: the matrix is not square, symmetric and finite; the objective is unknown; no partition satisfies
            the constraints (the message says what is possible).
    """
    affinity = validate_affinity(affinity)
    tasks = range(len(affinity)) if tasks is None else tasks
    check_constraints(
        tasks, num_groups=num_groups, min_size=min_size, max_size=max_size, must_link=must_link, cannot_link=cannot_link
    )
    problem = Problem.from_affinity(
        affinity,
        get_objective(objective),
        num_groups=num_groups,
        min_size=min_size,
        max_size=max_size,
        must_link=task_indices(tasks, "must_link", must_link),
        cannot_link=task_indices(tasks, "cannot_link", cannot_link),
    )
    groups, upper_bound, method = _search(problem, time_limit_s)
    score, num_candidates = problem.score(groups), count_partitions(problem)
    return Partition(problem.task_groups(groups), score, num_candidates, method, float(max(upper_bound, score)))


def _search(problem: Problem, time_limit_s: float) -> tuple[NodeGroups, float, str]:
    """Return the best groups of nodes, the upper bound on the score, and the name of the algorithm."""
    deadline = time.monotonic() + time_limit_s
    parts = connected_components(problem) if problem.num_nodes > MAX_NODES_WITHOUT_SPLIT else []
    if len(parts) <= 1:
        return _search_connected(problem, deadline)
    groups: NodeGroups = []
    gap = 0.0
    methods: dict[str, None] = {}  # an ordered set
    for part in parts:
        subproblem = problem.contract([[node] for node in part])
        part_groups, upper_bound, method = _search_connected(subproblem, deadline)
        groups += [tuple(part[node] for node in group) for group in part_groups]
        gap += max(upper_bound - subproblem.score(part_groups), 0.0)  # exactly 0 where proven optimal
        if len(part) > 1:
            methods[method] = None
    suffix = f", by {' and '.join(methods)}" if methods else ""
    return groups, problem.score(groups) + gap, f"{len(parts)} connected components{suffix}"


def _search_connected(problem: Problem, deadline: float) -> tuple[NodeGroups, float, str]:
    if problem.num_nodes <= MAX_NODES_SUBSET_DP:
        groups = solve_subset_dp(problem)
        return groups, problem.score(groups), "dynamic programming over subsets"

    from pipeline.grouping.search.integer_program import IntegerProgram  # scipy's solvers
    from pipeline.grouping.search.local_search import heuristic_partition, improve_partition

    seconds = max(deadline - time.monotonic(), 0.0)
    program = IntegerProgram(problem)
    incumbent = heuristic_partition(problem, LOCAL_SEARCH_TIME_FRACTION * seconds)
    groups, upper_bound = program.solve(incumbent, FIRST_SOLVE_TIME_FRACTION * seconds)
    if upper_bound > problem.score(groups):
        groups = improve_partition(problem, groups, LOCAL_SEARCH_TIME_FRACTION * seconds)
        groups, upper_bound = program.solve(groups, max(deadline - time.monotonic(), 0.1))
    return groups, upper_bound, "integer program"


def validate_affinity(affinity: np.ndarray) -> np.ndarray:
    """Return the matrix as float64 and exactly symmetric; UserError if it is asymmetric beyond rounding."""
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
