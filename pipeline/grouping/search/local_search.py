"""A good partition without proof: the start and the fallback of the integer programs.

Moves of one unit, swaps of two, and merges of two groups, the best first, until none helps; then some units are moved
at random and it goes on from there. The random numbers are fixed.
"""

from __future__ import annotations

import time

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.search.assignment import feasible_labels
from pipeline.grouping.search.problem import Problem

SECONDS_TO_START = 20.0
MOST_ROUNDS_WITHOUT_GAIN = 60


def good_partition(problem: Problem, seconds: float) -> list[tuple[int, ...]]:
    """Groups of units that meet the constraints.

    Raises:
        UserError: not even one partition that meets the constraints was found.
    """
    deadline = time.monotonic() + seconds
    rng = np.random.default_rng(0)
    best = _improved(problem, _start(problem), deadline)
    best_value, without_gain = _value(problem, best), 0
    while without_gain < MOST_ROUNDS_WITHOUT_GAIN and time.monotonic() < deadline:
        labels = _improved(problem, _shaken(problem, best, rng), deadline)
        value = _value(problem, labels)
        if value > best_value + problem.tie / 2:
            best, best_value, without_gain = labels, value, 0
        else:
            without_gain += 1
    return [tuple(np.flatnonzero(best == label).tolist()) for label in np.unique(best)]


def _start(problem: Problem) -> np.ndarray:
    """(U,) group numbers."""
    if problem.num_groups is None and problem.min_size <= problem.sizes.min():
        return np.arange(problem.num_units)
    labels = feasible_labels(problem, SECONDS_TO_START, np.random.default_rng(0))
    if labels is None:
        raise UserError("no partition that meets the constraints of `grouping` was found in time; loosen them")
    return labels


def _value(problem: Problem, labels: np.ndarray) -> float:
    pairs, sizes, _, _ = _sums(problem, labels)
    return float((pairs * problem.weight(sizes) - problem.tie * (sizes > 0)).sum())


def _sums(problem: Problem, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of G = U groups, some empty: pair sums (G,), sizes (G,), each unit's affinity to the others of each group (U, G),
    and how many others of each group it may not be with (U, G)."""
    inside = np.eye(problem.num_units)[labels]  # (U, G)
    own = np.diag(problem.affinity)
    links = (problem.affinity - np.diag(own)) @ inside
    pairs = ((links * inside).sum(axis=0)) / 2 + own @ inside
    return pairs, problem.sizes @ inside, links, problem.apart @ inside


def _improved(problem: Problem, labels: np.ndarray, deadline: float) -> np.ndarray:
    labels = np.unique(labels, return_inverse=True)[1]
    while time.monotonic() < deadline:
        changes = [_best_move(problem, labels), _best_swap(problem, labels), _best_merge(problem, labels)]
        gain, changed = max(changes, key=lambda change: change[0])
        if gain <= problem.tie / 2:
            break
        labels = changed
    return labels


def _move_gains(problem: Problem, labels: np.ndarray) -> np.ndarray:
    """(U, G) gain of moving each unit to each group, -inf where not allowed."""
    pairs, sizes, links, conflicts = _sums(problem, labels)
    units = np.arange(problem.num_units)
    own, weight, of_unit = np.diag(problem.affinity), problem.weight, problem.sizes
    used = sizes > 0
    left = sizes[labels] - of_unit  # (U,)
    leaving = weight(left) * (pairs[labels] - links[units, labels] - own) - weight(sizes[labels]) * pairs[labels]
    leaving = leaving + problem.tie * (left == 0)
    joined = sizes[None, :] + of_unit[:, None]  # (U, G)
    joining = weight(joined) * (pairs[None, :] + links + own[:, None]) - (weight(sizes) * pairs)[None, :]
    joining = joining - problem.tie * ~used[None, :]
    allowed = (joined >= problem.min_size) & (joined <= problem.max_size) & (conflicts == 0)
    may_vanish = problem.num_groups is None
    allowed &= ((left >= problem.min_size) | ((left == 0) & may_vanish))[:, None]
    allowed[units, labels] = False
    if not may_vanish:
        allowed[:, ~used] = False
    return np.where(allowed, leaving[:, None] + joining, -np.inf)


def _best_move(problem: Problem, labels: np.ndarray) -> tuple[float, np.ndarray]:
    gains = _move_gains(problem, labels)
    unit, group = np.unravel_index(np.argmax(gains), gains.shape)
    changed = labels.copy()
    changed[unit] = group
    return float(gains[unit, group]), changed


def _best_merge(problem: Problem, labels: np.ndarray) -> tuple[float, np.ndarray]:
    if problem.num_groups is not None:
        return -np.inf, labels
    pairs, sizes, links, conflicts = _sums(problem, labels)
    inside = np.eye(problem.num_units)[labels]
    joined = sizes[:, None] + sizes[None, :]  # (G, G)
    alone = problem.weight(sizes) * pairs
    together = problem.weight(joined) * (pairs[:, None] + pairs[None, :] + inside.T @ links)
    allowed = (sizes > 0)[:, None] & (sizes > 0)[None, :] & (joined <= problem.max_size) & (inside.T @ conflicts == 0)
    np.fill_diagonal(allowed, False)
    gains = np.where(allowed, together - alone[:, None] - alone[None, :] + problem.tie, -np.inf)
    one, other = np.unravel_index(np.argmax(gains), gains.shape)
    return float(gains[one, other]), np.where(labels == one, other, labels)


def _best_swap(problem: Problem, labels: np.ndarray) -> tuple[float, np.ndarray]:
    pairs, sizes, links, conflicts = _sums(problem, labels)
    units = np.arange(problem.num_units)
    own, weight, of_unit, apart = np.diag(problem.affinity), problem.weight, problem.sizes, problem.apart
    before = (weight(sizes) * pairs)[labels]  # (U,)
    without = pairs[labels] - links[units, labels] - own
    # [u, v]: u's group with v instead of u
    new_pairs = without[:, None] + links[units[None, :], labels[:, None]]
    new_pairs = new_pairs - problem.affinity + np.diag(own) + own[None, :]
    new_sizes = sizes[labels][:, None] - of_unit[:, None] + of_unit[None, :]
    half = weight(new_sizes) * new_pairs - before[:, None]
    bad = conflicts[units[None, :], labels[:, None]] - apart > 0
    bad |= (new_sizes < problem.min_size) | (new_sizes > problem.max_size)
    gains = np.where(bad | bad.T | (labels[:, None] == labels[None, :]), -np.inf, half + half.T)
    one, two = np.unravel_index(np.argmax(gains), gains.shape)
    changed = labels.copy()
    changed[[one, two]] = labels[[two, one]]
    return float(gains[one, two]), changed


def _shaken(problem: Problem, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some units moved at random to where they may be."""
    labels = np.unique(labels, return_inverse=True)[1]
    for _ in range(rng.integers(2, 2 + max(2, problem.num_units // 2))):
        moves = np.argwhere(_move_gains(problem, labels) > -np.inf)
        if not len(moves):
            break
        unit, group = moves[rng.integers(len(moves))]
        labels[unit] = group
    return labels
