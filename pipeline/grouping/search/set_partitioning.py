"""Any objective as an integer program, where few groups are possible: choose groups that cover each unit once.

Under `mean`, groups of four or more single tasks are never needed. A group's score is its number of tasks times the
mean of its pairs' affinities; averaged over all ways to split it into two parts of given sizes, both at least 2, the
parts' scores add up to the same, so that some split scores no less. With a smallest size m ≥ 2 the same holds from 2 m
tasks on.
"""

from __future__ import annotations

import time
from math import comb

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csc_array, vstack

from pipeline.grouping.search.integer_program import LARGEST_COST, PROOF_TOLERANCE, UnitGroups
from pipeline.grouping.search.problem import Problem

MOST_GROUPS = 110_000
"""All groups of up to four of 40 tasks."""
MOST_PROMISING = 2000
"""Groups of the least reduced costs, among which a better partition is sought first."""


def largest_needed_size(problem: Problem) -> int:
    """Tasks in a group; larger ones are not needed for the best score."""
    singles = problem.num_units == problem.sizes.sum()
    if problem.objective == "mean" and problem.num_groups is None and singles:
        return min(problem.max_size, 2 * max(problem.min_size, 2) - 1)
    return problem.max_size


def few_groups(problem: Problem) -> bool:
    most_units = min(largest_needed_size(problem) // problem.sizes.min(), problem.num_units)
    return sum(comb(problem.num_units, size) for size in range(1, most_units + 1)) <= MOST_GROUPS


def best_by_set_partitioning(problem: Problem, known: UnitGroups, seconds: float) -> tuple[UnitGroups, float]:
    """The best groups of units found, and a bound on every partition's score: their own where that is proven.

    Args:
        known: groups of units that meet the constraints.
    """
    deadline = time.monotonic() + seconds
    groups, scores = _possible_groups(problem)
    scale = LARGEST_COST / (np.abs(scores).max() or 1.0)
    cost = -scores * scale
    lengths = [len(group) for group in groups]
    units = np.array([unit for group in groups for unit in group])
    covers = csc_array((np.ones(len(units)), units, np.cumsum([0, *lengths])), shape=(problem.num_units, len(groups)))
    times = np.ones(problem.num_units)
    if problem.num_groups is not None:
        covers = vstack([covers, csc_array(np.ones((1, len(groups))))], format="csc")
        times = np.append(times, problem.num_groups)

    relaxed = linprog(cost, A_eq=covers, b_eq=times, bounds=(0, None), options={"time_limit": seconds})
    if relaxed.status or time.monotonic() > deadline:
        return known, np.inf
    reduced = relaxed.lower.marginals
    best, lower = known, relaxed.fun

    def choose(among: np.ndarray) -> OptimizeResult:
        nonlocal best
        found = milp(
            cost[among],
            integrality=np.ones(len(among)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(covers[:, among], times, times)],
            options={"time_limit": max(deadline - time.monotonic(), 0.1), "mip_rel_gap": 0},
        )
        if found.x is not None:
            best = max(best, [groups[among[at]] for at in np.flatnonzero(found.x > 0.5)], key=problem.score)
        return found

    # A group whose reduced cost is more than the known partition has above the relaxation is in no better partition.
    # The better the known one, the fewer groups are left: the most promising ones may hold a better one.
    choose(np.argsort(reduced, kind="stable")[:MOST_PROMISING])
    kept = np.flatnonzero(reduced <= PROOF_TOLERANCE - problem.score(best) * scale - relaxed.fun)
    found = choose(kept)
    if found.mip_dual_bound is not None:
        lower = max(lower, found.mip_dual_bound)
    score = problem.score(best)
    return best, score if -lower <= score * scale + PROOF_TOLERANCE else -lower / scale


def _possible_groups(problem: Problem) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """All groups of units that are allowed and may be needed, and their scores."""
    largest, sizes = largest_needed_size(problem), problem.sizes
    groups: list[tuple[int, ...]] = []
    scores = []
    members = np.arange(problem.num_units)[:, None]  # (N, k), ascending in a row
    pairs = np.diag(problem.affinity).copy()
    while len(members):
        num_tasks = sizes[members].sum(axis=1)
        fits = num_tasks <= largest
        members, pairs, num_tasks = members[fits], pairs[fits], num_tasks[fits]
        enough = num_tasks >= problem.min_size
        groups += map(tuple, members[enough].tolist())
        scores.append((pairs * problem.weight(num_tasks))[enough])
        later = problem.num_units - 1 - members[:, -1]
        rows = np.repeat(np.arange(len(members)), later)
        added = members[rows, -1] + 1 + np.arange(len(rows)) - np.repeat(np.cumsum(later) - later, later)
        allowed = ~problem.apart[members[rows], added[:, None]].any(axis=1)
        rows, added = rows[allowed], added[allowed]
        joined = problem.affinity[members[rows], added[:, None]].sum(axis=1) + problem.affinity[added, added]
        members, pairs = np.column_stack([members[rows], added]), pairs[rows] + joined
    return groups, np.concatenate(scores)
