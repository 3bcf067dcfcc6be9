"""Dynamic programming over subsets: the optimum of all partitions in 3^(U-1) / 2 steps, not a Bell number of them.

What this module chose:
- A set's best value is that of the group with its first unit plus the best of what remains. For all sets with the same
  first unit that is one (max, +) subset convolution, which is done in whole arrays: no set depends on another of them.
- A given number of groups K makes a table for each number up to K. When j groups are split off, at least j first units
  are gone: the tables shrink by a unit each, and together cost 1.5 times the one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pipeline.grouping.search.problem import NodeGroups, Problem

LOW_BITS = 5
"""Sets that differ in the last units only are handled side by side: 3^5 = 243 pairs (group, rest)."""


def best_by_subsets(problem: Problem) -> NodeGroups:
    """Groups of units."""
    values = problem.subset_scores()
    last = problem.num_nodes - 1
    if problem.num_groups is None:
        table = np.zeros(1)
        for bit in range(last):
            table = np.concatenate([table, _max_plus(values[1 << bit : 2 << bit], table)])
        tables = [table]
    else:
        num_bits = problem.num_nodes - problem.num_groups
        tables = [np.full(1 << num_bits, -np.inf)]
        tables[0][0] = 0
        for bits in range(num_bits + 1, last + 1):
            with_first = [_max_plus(values[1 << bit : 2 << bit], tables[-1][: 1 << bit]) for bit in range(bits)]
            tables.append(np.concatenate([[-np.inf], *with_first]))
    return _first_reaching_best(problem, values, tables)


def _first_reaching_best(problem: Problem, values: np.ndarray, tables: list[np.ndarray]) -> NodeGroups:
    """The first in tuple order of the partitions with the best value.

    Args:
        tables: the best value of every set; of a given number of groups, from 0 on, if there are several.
    """
    remaining, taken, threshold = (1 << problem.num_nodes) - 1, 0.0, None
    tables = list(tables)
    groups = []
    while remaining:
        first = 1 << (remaining.bit_length() - 1)
        rest = remaining ^ first
        others = _submasks(rest)
        table = tables.pop() if problem.num_groups is not None else tables[0]
        reached = taken + values[first | others] + table[rest ^ others]
        if threshold is None:
            threshold = reached.max() - problem.tie / 2
        # Sums are associated differently here than in the tables: rounding must not leave no group.
        good = first | others[reached >= min(threshold, reached.max())]
        group = int(good[0] if len(good) == 1 else good[np.argmin(problem.order_of_masks(good))])
        groups.append(problem.members(group))
        taken += values[group]
        remaining ^= group
    return groups


def _submasks(mask: int) -> np.ndarray:
    masks = np.zeros(1, dtype=np.int64)
    while mask:
        bit = mask & -mask
        masks = np.concatenate([masks, masks | bit])
        mask ^= bit
    return masks


def _max_plus(of_group: np.ndarray, of_rest: np.ndarray) -> np.ndarray:
    """(2^n,): for every set R the maximum over Q ⊆ R of of_group[Q] + of_rest[R - Q]."""
    num_bits = len(of_group).bit_length() - 1
    low = min(LOW_BITS, num_bits)
    high = num_bits - low
    group_low, rest_low, starts = _disjoint_pairs(low)
    of_group = of_group.reshape(1 << high, 1 << low)[:, group_low]  # (2^high, 3^low)
    of_rest = of_rest.reshape(1 << high, 1 << low)[:, rest_low].reshape((2,) * high + (-1,))
    best = np.full_like(of_rest, -np.inf)
    for group_high in np.flatnonzero((of_group > -np.inf).any(axis=1)):
        inside = [bool(group_high >> bit & 1) for bit in reversed(range(high))]
        rests = of_rest[tuple(0 if bit else slice(None) for bit in inside)]  # all sets disjoint from the group
        unions = best[(*(1 if bit else slice(None) for bit in inside), slice(None))]
        np.maximum(unions, rests + of_group[group_high], out=unions)
    return np.maximum.reduceat(best.reshape(1 << high, -1), starts, axis=1).ravel()


@lru_cache
def _disjoint_pairs(num_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All (Q, D) with Q and D disjoint, sorted by their union, and where each union starts."""
    group = rest = np.zeros(1, dtype=np.int64)
    for bit in range(num_bits):
        group = np.concatenate([group, group | 1 << bit, group])
        rest = np.concatenate([rest, rest, rest | 1 << bit])
    order = np.argsort(group | rest, kind="stable")
    group, rest = group[order], rest[order]
    return group, rest, np.searchsorted(group | rest, np.arange(1 << num_bits))
