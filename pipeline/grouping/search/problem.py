"""The grouping problem that every search solves, and how partitions compare.

Design choices:
- Tasks that must share a group are contracted to one node: searches partition nodes and never see `must_link`.
- A set of nodes is a bit mask in which the first node has the highest bit: a group is split off by the highest bit.
- Ties never depend on the order of float additions. A partition's value is its score minus `tie` for each group, and
  values within tie / 2 are equal; `tie` is 1e-12 of the summed absolute affinities, far above rounding. So of equal
  scores the fewest groups win (one prompt less to train), then the smallest `groups` in the order of Python tuples.
- The diagonal of the affinity matrix (a task with itself) is ignored.

Dimensions: T tasks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.grouping.objectives import Objective

Groups = tuple[tuple[int, ...], ...]
"""Groups of tasks: each group sorted, groups sorted by their first member."""
NodeGroups = list[tuple[int, ...]]
"""Groups of nodes, in any order."""

TIE_TOLERANCE = 1e-12
"""Relative to the sum of absolute affinities: what a further group must gain."""


@dataclass(frozen=True)
class Problem:
    """Affinities between nodes, an objective, and the remaining constraints."""

    affinity: np.ndarray
    """(N, N), symmetric: the summed affinities between the tasks of two nodes; on the diagonal of the pairs inside."""
    nodes: Groups
    """The tasks of each node."""
    cannot_link: np.ndarray
    """(N, N), symmetric, bool: nodes that may not share a group."""
    objective: Objective
    num_groups: int | None
    min_size: int
    max_size: int
    """Sizes count tasks."""
    tie: float

    @staticmethod
    def from_affinity(
        affinity: np.ndarray,
        objective: Objective,
        num_groups: int | None = None,
        min_size: int = 1,
        max_size: int | None = None,
        must_link: Sequence[Sequence[int]] = (),
        cannot_link: Sequence[Sequence[int]] = (),
    ) -> Problem:
        """Build a problem from affinities (T, T) and feasible (`check_constraints`) constraints of `best_partition`."""
        num_tasks = len(affinity)
        forbidden = np.zeros((num_tasks, num_tasks), dtype=bool)
        for tasks in cannot_link:
            forbidden[np.ix_(tasks, tasks)] = True
        np.fill_diagonal(forbidden, False)
        affinity = affinity - np.diag(np.diag(affinity))
        return Problem(
            affinity=affinity,
            nodes=tuple((task,) for task in range(num_tasks)),
            cannot_link=forbidden,
            objective=objective,
            num_groups=num_groups,
            min_size=min_size,
            max_size=num_tasks if max_size is None else min(max_size, num_tasks),
            tie=TIE_TOLERANCE * float(np.abs(np.triu(affinity, 1)).sum()) or 1.0,
        ).contract(_merge_must_links(num_tasks, must_link))

    def contract(self, parts: Sequence[Sequence[int]]) -> Problem:
        """Return the problem with each part (a set of nodes) as one node, without nodes in no part; `tie` is kept."""
        membership = np.zeros((len(parts), self.num_nodes))
        for part, members in enumerate(parts):
            membership[part, members] = 1
        inside = np.diag(self.affinity)
        between = membership @ (self.affinity - np.diag(inside)) @ membership.T
        between = (between + between.T) / 2
        # Each pair inside a part was counted from both sides.
        between[np.diag_indices(len(parts))] = np.diag(between) / 2 + membership @ inside
        cannot_link = membership @ self.cannot_link @ membership.T > 0
        np.fill_diagonal(cannot_link, False)
        nodes = tuple(tuple(sorted(task for node in part for task in self.nodes[node])) for part in parts)
        return replace(self, affinity=between, cannot_link=cannot_link, nodes=nodes)

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N,) number of tasks of each node."""
        return np.array([len(tasks) for tasks in self.nodes])

    @cached_property
    def pair_weights(self) -> np.ndarray:
        """(tasks + 1,): a group's score is the sum of its pairs' affinities times the weight of its number of tasks."""
        return np.array([0.0, *(self.objective.pair_weight(size) for size in range(1, self.sizes.sum() + 1))])

    def score(self, node_groups: Sequence[Sequence[int]]) -> float:
        """Return the objective's value for groups of nodes."""
        total, sizes = 0.0, self.sizes
        for group in node_groups:
            inside = self.affinity[np.ix_(group, group)]
            pairs = (inside.sum() + np.trace(inside)) / 2
            total += float(pairs * self.objective.pair_weight(int(sizes[list(group)].sum())))
        return total

    def task_groups(self, node_groups: Sequence[Sequence[int]]) -> Groups:
        groups = (tuple(sorted(task for node in group for task in self.nodes[node])) for group in node_groups)
        return tuple(sorted(groups))

    def subset_scores(self) -> np.ndarray:
        """(2^N,) value of every set of nodes as a group: -inf if it violates a constraint, 0 for the empty set."""
        sizes = _subset_sums(self.sizes)
        values = _subset_pair_sums(self.affinity) * self.pair_weights[sizes] - self.tie
        allowed = (sizes >= self.min_size) & (sizes <= self.max_size)
        if self.cannot_link.any():
            allowed &= _subset_pair_sums(self.cannot_link.astype(np.float64)) == 0
        values = np.where(allowed, values, -np.inf)
        values[0] = 0
        return values

    def mask_nodes(self, mask: int) -> tuple[int, ...]:
        """Nodes of a bit mask."""
        return tuple(node for node in range(self.num_nodes) if mask >> (self.num_nodes - 1 - node) & 1)

    def tuple_order(self, masks: np.ndarray) -> np.ndarray:
        """Sort keys that order sets of nodes as Python orders their tuples of tasks."""
        tasks = sorted(task for node in self.nodes for task in node)
        task_to_node = {task: node for node, members in enumerate(self.nodes) for task in members}
        # A tuple's rank among all tuples: 1 for each member, and for each task left out below the last member the
        # number of tuples that continue with it.
        ranks = np.zeros(len(masks), dtype=np.int64 if len(tasks) < 62 else object)
        started = np.zeros(len(masks), dtype=bool)
        for num_later, task in enumerate(reversed(tasks)):
            inside = (masks >> (self.num_nodes - 1 - task_to_node[task]) & 1).astype(bool)
            started |= inside
            ranks = ranks + np.where(inside, 1, np.where(started, 2**num_later, 0))
        return ranks


def _merge_must_links(num_tasks: int, must_link: Sequence[Sequence[int]]) -> Groups:
    """Return the tasks of each node: lists that share a task form one node."""
    labels = list(range(num_tasks))
    for tasks in must_link:
        linked = {labels[task] for task in tasks}
        labels = [min(linked) if label in linked else label for label in labels]
    return tuple(tuple(task for task in range(num_tasks) if labels[task] == label) for label in sorted(set(labels)))


def _subset_sums(numbers: np.ndarray) -> np.ndarray:
    """(2^N,) sums over the nodes of every bit mask."""
    sums = np.zeros(1, dtype=numbers.dtype)
    for number in numbers[::-1]:  # the last node has the lowest bit
        sums = np.concatenate([sums, sums + number])
    return sums


def _subset_pair_sums(matrix: np.ndarray) -> np.ndarray:
    """(2^N,) sums over the pairs i ≤ j of the nodes of every bit mask."""
    matrix = matrix[::-1, ::-1]
    sums, row_sums = np.zeros(1), np.zeros((len(matrix), 1))  # row_sums: rows of later nodes, over the nodes so far
    for node in range(len(matrix)):
        sums = np.concatenate([sums, sums + (row_sums[0] + matrix[node, node])])
        row_sums = row_sums[1:]
        row_sums = np.concatenate([row_sums, row_sums + matrix[node + 1 :, node, None]], axis=1)
    return sums
