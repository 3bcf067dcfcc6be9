"""The plain definition: every partition is made, as a restricted growth string, and scored.

A restricted growth string gives each unit the number of its group: an earlier one, or the next new one. All strings of
a length are made at once from those one shorter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.grouping.search.problem import Problem

PREFIXES_AT_ONCE = 4000
"""Bounds the memory: from each prefix of all but three units come some hundred to thousand partitions."""


def all_partitions(num_units: int) -> Iterator[np.ndarray]:
    """Blocks (N, U) of partitions: bit masks of the groups by first unit (first unit: highest bit), then zeros."""
    bits = [1 << (num_units - 1 - unit) for unit in range(num_units)]
    prefixes = np.array([[bits[0]]], dtype=np.int32)  # (N, most groups so far)
    for bit in bits[1:-3]:
        prefixes = _extended(prefixes, bit)
    for start in range(0, len(prefixes), PREFIXES_AT_ONCE):
        block = prefixes[start : start + PREFIXES_AT_ONCE]
        for bit in bits[max(1, num_units - 3) :]:
            block = _extended(block, bit)
        yield block


def best_by_enumeration(problem: Problem) -> list[tuple[int, ...]]:
    """Groups of units."""
    values = problem.mask_values()
    best, equals = -np.inf, np.empty((0, problem.num_units), dtype=np.int32)
    for block in all_partitions(problem.num_units):
        if problem.num_groups is not None:
            block = block[np.count_nonzero(block, axis=1) == problem.num_groups]
        of_block = values[block].sum(axis=1)
        best = max(best, of_block.max(initial=-np.inf))
        equals = np.concatenate([equals, block[of_block >= best - problem.tie / 2]])
    equals = equals[values[equals].sum(axis=1) >= best - problem.tie / 2]
    for column in range(problem.num_units):
        if len(equals) == 1:
            break
        order = problem.order_of_masks(equals[:, column])
        equals = equals[order == order.min()]
    return [problem.members(int(mask)) for mask in equals[0] if mask]


def _extended(partitions: np.ndarray, bit: int) -> np.ndarray:
    """All ways to add one unit: to each group, or as a new one."""
    num_partitions, most = partitions.shape
    places = np.count_nonzero(partitions, axis=1) + 1
    rows = np.repeat(np.arange(num_partitions), places)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(places) - places, places)
    extended = np.zeros((len(rows), most + 1), dtype=partitions.dtype)
    extended[:, :most] = partitions[rows]
    extended[np.arange(len(rows)), columns] |= bit
    return extended
