"""What every way to search is given, and how partitions compare.

What this module chose:
- Tasks that must be together are one unit: all ways partition units, and never see that constraint.
- A set of units is a bit mask in which the first unit has the highest bit: a group is split off by the highest bit.
- Ties never depend on the order of float additions. A partition's value is its score less `tie` for each group, and
  values within tie / 2 are equal; `tie` is 1e-12 of the summed absolute affinities, far above rounding. So of equal
  scores the fewest groups win (one prompt less to train), then the smallest `groups` in the order of Python tuples.
- A matrix's diagonal (a task with itself) plays no part.

Dimensions: T tasks, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.grouping.objectives import Objective

Groups = tuple[tuple[int, ...], ...]
"""Each group sorted, groups sorted by their first member."""
NodeGroups = list[tuple[int, ...]]
"""Likewise of units, in any order."""

TIE_TOLERANCE = 1e-12
"""Relative to the sum of absolute affinities: what a further group must gain."""


@dataclass(frozen=True)
class Problem:
    """Affinities between units, an objective, and the constraints that are left."""

    affinity: np.ndarray
    """(U, U), symmetric: the summed affinities between the tasks of two units; on the diagonal of the pairs inside."""
    nodes: Groups
    """The units' tasks."""
    cannot_link: np.ndarray
    """(U, U), symmetric, bool: units that may not share a group."""
    objective: Objective
    num_groups: int | None
    min_size: int
    max_size: int
    """Sizes count tasks."""
    tie: float

    @staticmethod
    def of(
        affinity: np.ndarray,
        objective: Objective,
        num_groups: int | None = None,
        min_size: int = 1,
        max_size: int | None = None,
        must_link: Sequence[Sequence[int]] = (),
        cannot_link: Sequence[Sequence[int]] = (),
    ) -> Problem:
        """Of affinities (T, T) and constraints as of `best_partition`, which can be met (`check_constraints`)."""
        num_tasks = len(affinity)
        barred = np.zeros((num_tasks, num_tasks), dtype=bool)
        for tasks in cannot_link:
            barred[np.ix_(tasks, tasks)] = True
        np.fill_diagonal(barred, False)
        affinity = affinity - np.diag(np.diag(affinity))
        return Problem(
            affinity=affinity,
            nodes=tuple((task,) for task in range(num_tasks)),
            cannot_link=barred,
            objective=objective,
            num_groups=num_groups,
            min_size=min_size,
            max_size=num_tasks if max_size is None else min(max_size, num_tasks),
            tie=TIE_TOLERANCE * float(np.abs(np.triu(affinity, 1)).sum()) or 1.0,
        ).contract_must_links(_joined(num_tasks, must_link))

    def contract_must_links(self, parts: Sequence[Sequence[int]]) -> Problem:
        """The same with each of the given sets of units as one, and without the units that are in none; ties stay those
        of the whole."""
        member = np.zeros((len(parts), self.num_nodes))
        for part, members in enumerate(parts):
            member[part, members] = 1
        inside = np.diag(self.affinity)
        between = member @ (self.affinity - np.diag(inside)) @ member.T
        between = (between + between.T) / 2
        # Each pair inside a part was counted from both sides.
        between[np.diag_indices(len(parts))] = np.diag(between) / 2 + member @ inside
        cannot_link = member @ self.cannot_link @ member.T > 0
        np.fill_diagonal(cannot_link, False)
        nodes = tuple(tuple(sorted(task for unit in part for task in self.nodes[unit])) for part in parts)
        return replace(self, affinity=between, cannot_link=cannot_link, nodes=nodes)

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(U,) tasks of each unit."""
        return np.array([len(tasks) for tasks in self.nodes])

    @cached_property
    def weights(self) -> np.ndarray:
        """(tasks + 1,): a group's score is the sum of its pairs' affinities times the weight of its number of tasks."""
        return np.array([0.0, *(self.objective.pair_weight(size) for size in range(1, self.sizes.sum() + 1))])

    def score(self, unit_groups: Sequence[Sequence[int]]) -> float:
        """Of groups of units."""
        total, sizes = 0.0, self.sizes
        for group in unit_groups:
            inside = self.affinity[np.ix_(group, group)]
            pairs = (inside.sum() + np.trace(inside)) / 2
            total += float(pairs * self.objective.pair_weight(int(sizes[list(group)].sum())))
        return total

    def task_groups(self, unit_groups: Sequence[Sequence[int]]) -> Groups:
        groups = (tuple(sorted(task for unit in group for task in self.nodes[unit])) for group in unit_groups)
        return tuple(sorted(groups))

    def subset_scores(self) -> np.ndarray:
        """(2^U,) value of every set of units as a group, -inf where it is not allowed; 0 for the empty set."""
        sizes = _sums_of_subsets(self.sizes)
        values = _pair_sums_of_subsets(self.affinity) * self.weights[sizes] - self.tie
        allowed = (sizes >= self.min_size) & (sizes <= self.max_size)
        if self.cannot_link.any():
            allowed &= _pair_sums_of_subsets(self.cannot_link.astype(np.float64)) == 0
        values = np.where(allowed, values, -np.inf)
        values[0] = 0
        return values

    def members(self, mask: int) -> tuple[int, ...]:
        """Units of a bit mask."""
        return tuple(unit for unit in range(self.num_nodes) if mask >> (self.num_nodes - 1 - unit) & 1)

    def order_of_masks(self, masks: np.ndarray) -> np.ndarray:
        """Numbers that sort sets of units as Python sorts their tuples of tasks."""
        tasks = sorted(task for unit in self.nodes for task in unit)
        unit_of = {task: unit for unit, of_unit in enumerate(self.nodes) for task in of_unit}
        # The place of a tuple among all: 1 for each member, and for each task left out below the last member all
        # tuples that go on with it.
        order = np.zeros(len(masks), dtype=np.int64 if len(tasks) < 62 else object)
        started = np.zeros(len(masks), dtype=bool)
        for later, task in enumerate(reversed(tasks)):
            inside = (masks >> (self.num_nodes - 1 - unit_of[task]) & 1).astype(bool)
            started |= inside
            order = order + np.where(inside, 1, np.where(started, 2**later, 0))
        return order


def _joined(num_tasks: int, must_link: Sequence[Sequence[int]]) -> Groups:
    """Tasks as units: lists that share a task are one."""
    unit_of = list(range(num_tasks))
    for tasks in must_link:
        joined = {unit_of[task] for task in tasks}
        unit_of = [min(joined) if unit in joined else unit for unit in unit_of]
    return tuple(tuple(task for task in range(num_tasks) if unit_of[task] == unit) for unit in sorted(set(unit_of)))


def _sums_of_subsets(numbers: np.ndarray) -> np.ndarray:
    """(2^U,) sums over the units of every bit mask."""
    sums = np.zeros(1, dtype=numbers.dtype)
    for number in numbers[::-1]:  # the last unit has the lowest bit
        sums = np.concatenate([sums, sums + number])
    return sums


def _pair_sums_of_subsets(matrix: np.ndarray) -> np.ndarray:
    """(2^U,) sums over the pairs i ≤ j of the units of every bit mask."""
    matrix = matrix[::-1, ::-1]
    sums, of_rows = np.zeros(1), np.zeros((len(matrix), 1))  # of_rows: of each later unit's row, over the units so far
    for unit in range(len(matrix)):
        sums = np.concatenate([sums, sums + (of_rows[0] + matrix[unit, unit])])
        of_rows = of_rows[1:]
        of_rows = np.concatenate([of_rows, of_rows + matrix[unit + 1 :, unit, None]], axis=1)
    return sums
