"""A heuristic for many nodes: a good partition without proof, by repeated exact search over a few nodes.

A round takes some groups of the partition, frees some of their nodes, and keeps the remainder of each group as a part;
dynamic programming finds the best partition of these few parts. Moves, swaps, merges and splits of groups, and several
of them at once, are all possible results of a round. Simulated annealing leaves local optima: affinities get noise
that fades. The random numbers have a fixed seed.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.search.assignment import feasible_labels
from pipeline.grouping.search.problem import NodeGroups, Problem
from pipeline.grouping.search.subsets import solve_subset_dp

MAX_PARTS = 11
"""Per round, which then takes some milliseconds."""
MAX_GROUPS = 4
"""Per round, unless more groups have so few nodes that all can be free."""
ROUNDS_PER_NODE = 12
NUM_ANNEALINGS = 5
INITIAL_NOISE = 0.9
"""Standard deviation relative to the mean absolute affinity; the last fifth of an annealing has no noise."""
START_TIME_LIMIT_S = 20.0


def heuristic_partition(problem: Problem, seconds: float) -> NodeGroups:
    """Return groups of nodes that meet the constraints, improved by local search.

    Raises:
        UserError: no partition that meets the constraints was found in time.
    """
    start, rng = _initial_partition(problem), np.random.default_rng(0)
    return _search_rounds(problem, start, 0.0, rng, time.monotonic() + seconds)


def improve_partition(problem: Problem, groups: NodeGroups, seconds: float) -> NodeGroups:
    """Return the best partition that annealing finds from `groups`; `groups` if that is no better."""
    deadline, rng = time.monotonic() + seconds, np.random.default_rng(0)
    noise = INITIAL_NOISE * np.abs(problem.affinity[np.triu_indices(problem.num_nodes, 1)]).mean()
    for _ in range(NUM_ANNEALINGS):
        groups = _search_rounds(problem, groups, noise, rng, deadline)
    return groups


def _search_rounds(
    problem: Problem, groups: NodeGroups, noise: float, rng: np.random.Generator, deadline: float
) -> NodeGroups:
    best, best_value = groups, _value(problem, groups)
    for temperature in np.linspace(noise, -noise / 4, ROUNDS_PER_NODE * problem.num_nodes):
        if time.monotonic() > deadline:
            break
        groups = _search_round(problem, groups, max(temperature, 0.0), rng)
        if (value := _value(problem, groups)) > best_value:
            best, best_value = groups, value
    return best


def _value(problem: Problem, groups: NodeGroups) -> float:
    return problem.score(groups) - problem.tie * len(groups)


def _initial_partition(problem: Problem) -> NodeGroups:
    if problem.num_groups is None and problem.min_size <= problem.sizes.min():
        return [(node,) for node in range(problem.num_nodes)]
    labels = feasible_labels(problem, START_TIME_LIMIT_S)
    if labels is None:
        raise UserError(
            f"no partition that meets the constraints in `grouping` was found in {START_TIME_LIMIT_S:g} s; loosen them"
        )
    return [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]


def _search_round(problem: Problem, groups: NodeGroups, noise: float, rng: np.random.Generator) -> NodeGroups:
    """Replace some of the groups by the optimal partition of their parts under affinities with Gaussian noise."""
    order = rng.permutation(len(groups))
    num_small = np.count_nonzero(np.cumsum([len(groups[group]) for group in order]) <= MAX_PARTS)
    chosen, unchanged = np.split(order, [max(num_small, rng.integers(2, MAX_GROUPS + 1))])
    nodes = rng.permutation([node for group in chosen for node in groups[group]])
    free = set(nodes[: len(nodes) if len(nodes) <= MAX_PARTS else MAX_PARTS - len(chosen)].tolist())
    remainders = (tuple(node for node in groups[group] if node not in free) for group in chosen)
    parts = sorted([*((node,) for node in free), *filter(None, remainders)])
    shifts = np.triu(rng.normal(size=problem.affinity.shape), 1) * noise
    subproblem = replace(problem, affinity=problem.affinity + shifts + shifts.T).contract(parts)
    if problem.num_groups is not None:
        subproblem = replace(subproblem, num_groups=len(chosen))
    optimum = [tuple(node for part in group for node in parts[part]) for group in solve_subset_dp(subproblem)]
    return [*optimum, *(groups[group] for group in unchanged)]
