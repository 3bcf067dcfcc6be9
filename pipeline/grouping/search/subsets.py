"""Dynamic programming over subsets: the optimum over all partitions in 3^(N-1) / 2 steps, not a Bell number of them.

Design choices:
- A set's best value is that of the group with its first node plus the best of the remainder. For all sets with the same
  first node that is one (max, +) subset convolution, done in whole arrays: no set depends on another of them.
- A fixed number of groups K needs a table for each number up to K. Once j groups are split off, at least j first nodes
  are gone: each table is a node smaller than the one before, and all of them together cost 1.5 times a single one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pipeline.grouping.search.problem import NodeGroups, Problem

LOW_BITS = 5
"""Sets that differ only in the last nodes are handled side by side: 3^5 = 243 pairs (group, remainder)."""


def solve_subset_dp(problem: Problem) -> NodeGroups:
    """Return the optimal groups of nodes."""
    values = problem.subset_scores()
    last_bit = problem.num_nodes - 1
    if problem.num_groups is None:
        table = np.zeros(1)
        for bit in range(last_bit):
            table = np.concatenate([table, _max_plus(values[1 << bit : 2 << bit], table)])
        tables = [table]
    else:
        num_bits = problem.num_nodes - problem.num_groups
        tables = [np.full(1 << num_bits, -np.inf)]
        tables[0][0] = 0
        for bits in range(num_bits + 1, last_bit + 1):
            blocks = [_max_plus(values[1 << bit : 2 << bit], tables[-1][: 1 << bit]) for bit in range(bits)]
            tables.append(np.concatenate([[-np.inf], *blocks]))
    return _first_optimum(problem, values, tables)


def _first_optimum(problem: Problem, values: np.ndarray, tables: list[np.ndarray]) -> NodeGroups:
    """Return the optimal partition that is first in tuple order.

    Args:
        tables: the best value of every set; with a fixed number of groups one table for each number from 0 on.
    """
    remaining, total, threshold = (1 << problem.num_nodes) - 1, 0.0, None
    tables = list(tables)
    groups = []
    while remaining:
        first_node = 1 << (remaining.bit_length() - 1)
        free = remaining ^ first_node
        peers = _submasks(free)
        table = tables.pop() if problem.num_groups is not None else tables[0]
        reached = total + values[first_node | peers] + table[free ^ peers]
        if threshold is None:
            threshold = reached.max() - problem.tie / 2
        # Sums are associated differently here than in the tables: rounding must not leave no group.
        optimal = first_node | peers[reached >= min(threshold, reached.max())]
        group = int(optimal[0] if len(optimal) == 1 else optimal[np.argmin(problem.tuple_order(optimal))])
        groups.append(problem.mask_nodes(group))
        total += values[group]
        remaining ^= group
    return groups


def _submasks(mask: int) -> np.ndarray:
    masks = np.zeros(1, dtype=np.int64)
    while mask:
        bit = mask & -mask
        masks = np.concatenate([masks, masks | bit])
        mask ^= bit
    return masks


def _max_plus(group_values: np.ndarray, remainder_values: np.ndarray) -> np.ndarray:
    """(2^n,): for every set R the maximum over Q ⊆ R of group_values[Q] + remainder_values[R - Q]."""
    num_bits = len(group_values).bit_length() - 1
    low = min(LOW_BITS, num_bits)
    high = num_bits - low
    group_low, remainder_low, starts = _disjoint_pairs(low)
    group_values = group_values.reshape(1 << high, 1 << low)[:, group_low]  # (2^high, 3^low)
    remainder_values = remainder_values.reshape(1 << high, 1 << low)[:, remainder_low].reshape((2,) * high + (-1,))
    best = np.full_like(remainder_values, -np.inf)
    for group_high in np.flatnonzero((group_values > -np.inf).any(axis=1)):
        inside = [bool(group_high >> bit & 1) for bit in reversed(range(high))]
        disjoint = remainder_values[tuple(0 if bit else slice(None) for bit in inside)]  # sets disjoint from the group
        unions = best[(*(1 if bit else slice(None) for bit in inside), slice(None))]
        np.maximum(unions, disjoint + group_values[group_high], out=unions)
    return np.maximum.reduceat(best.reshape(1 << high, -1), starts, axis=1).ravel()


@lru_cache
def _disjoint_pairs(num_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all pairs (Q, D) of disjoint sets, sorted by their union, and where each union starts."""
    group = remainder = np.zeros(1, dtype=np.int64)
    for bit in range(num_bits):
        group = np.concatenate([group, group | 1 << bit, group])
        remainder = np.concatenate([remainder, remainder, remainder | 1 << bit])
    order = np.argsort(group | remainder, kind="stable")
    group, remainder = group[order], remainder[order]
    return group, remainder, np.searchsorted(group | remainder, np.arange(1 << num_bits))
