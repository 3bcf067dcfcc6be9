"""A good partition of many units, without proof: the exact search of few units, again and again.

A round takes some groups of the partition, frees some of their units, and keeps the rest of each group as one: of these
few parts dynamic programming finds the best partition. Moves, swaps, merges and splits of groups, and several of them
at once, are all among what a round may do. To get out of local optima, the affinities get noise that fades (simulated
annealing). The random numbers are fixed.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.search.assignment import feasible_labels
from pipeline.grouping.search.problem import NodeGroups, Problem
from pipeline.grouping.search.subsets import best_by_subsets

MOST_PARTS = 11
"""In a round, which then takes some milliseconds."""
MOST_GROUPS = 4
"""In a round, unless more have so few units that all can be free."""
ROUNDS = 12
"""Of a descent, for each unit."""
NUM_ANNEALINGS = 5
NOISE = 0.9
"""Deviation at an annealing's start, of the mean absolute affinity; in its last fifth there is none."""
SECONDS_TO_START = 20.0


def heuristic_partition(problem: Problem, seconds: float) -> NodeGroups:
    """Groups of units that meet the constraints.

    Raises:
        UserError: not even one partition that meets the constraints was found.
    """
    return _descended(problem, _start(problem), 0.0, np.random.default_rng(0), time.monotonic() + seconds)


def improve_partition(problem: Problem, groups: NodeGroups, seconds: float) -> NodeGroups:
    """The best that annealing finds from a partition; itself if that is no better."""
    deadline, rng = time.monotonic() + seconds, np.random.default_rng(0)
    noise = NOISE * np.abs(problem.affinity[np.triu_indices(problem.num_nodes, 1)]).mean()
    for _ in range(NUM_ANNEALINGS):
        groups = _descended(problem, groups, noise, rng, deadline)
    return groups


def _descended(
    problem: Problem, groups: NodeGroups, noise: float, rng: np.random.Generator, deadline: float
) -> NodeGroups:
    best, best_value = groups, _value(problem, groups)
    for heat in np.linspace(noise, -noise / 4, ROUNDS * problem.num_nodes):
        if time.monotonic() > deadline:
            break
        groups = _round(problem, groups, max(heat, 0.0), rng)
        if (value := _value(problem, groups)) > best_value:
            best, best_value = groups, value
    return best


def _value(problem: Problem, groups: NodeGroups) -> float:
    return problem.score(groups) - problem.tie * len(groups)


def _start(problem: Problem) -> NodeGroups:
    if problem.num_groups is None and problem.min_size <= problem.sizes.min():
        return [(unit,) for unit in range(problem.num_nodes)]
    labels = feasible_labels(problem, SECONDS_TO_START)
    if labels is None:
        raise UserError("no partition that meets the constraints of `grouping` was found in time; loosen them")
    return [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]


def _round(problem: Problem, groups: NodeGroups, noise: float, rng: np.random.Generator) -> NodeGroups:
    """The best of what some of the groups can become, where affinities have noise of that deviation."""
    order = rng.permutation(len(groups))
    num_small = np.count_nonzero(np.cumsum([len(groups[group]) for group in order]) <= MOST_PARTS)
    chosen, others = np.split(order, [max(num_small, rng.integers(2, MOST_GROUPS + 1))])
    nodes = rng.permutation([unit for group in chosen for unit in groups[group]])
    free = set(nodes[: len(nodes) if len(nodes) <= MOST_PARTS else MOST_PARTS - len(chosen)].tolist())
    rests = (tuple(unit for unit in groups[group] if unit not in free) for group in chosen)
    parts = sorted([*((unit,) for unit in free), *filter(None, rests)])
    shifts = np.triu(rng.normal(size=problem.affinity.shape), 1) * noise
    few = replace(problem, affinity=problem.affinity + shifts + shifts.T).contract_must_links(parts)
    if problem.num_groups is not None:
        few = replace(few, num_groups=len(chosen))
    found = [tuple(unit for part in group for unit in parts[part]) for group in best_by_subsets(few)]
    return [*found, *(groups[group] for group in others)]
