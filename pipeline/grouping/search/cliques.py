"""`sum` as an integer program: clique partitioning (Grötschel and Wakabayashi, 1989).

What this module chose:
- x_uv = 1 if units u and v share a group. Triangle inequalities x_uv + x_vw - x_uw ≤ 1 make that transitive; of their
  3 C(U, 3) only those that a solution violates are added.
- 2-partition inequalities x(u : W) - x(W) ≤ 1 (unit u, set W: at most one pair more across than inside) tighten the
  relaxation where affinities have no clear structure.
- A given number of groups needs a variable more for each unit: 1 if it is its group's first.
"""

from __future__ import annotations

import numpy as np

from pipeline.grouping.search.integer_program import (
    LARGEST_COST,
    MOST_CUTS_A_ROUND,
    WHOLE,
    Cut,
    IntegerProgram,
    UnitGroups,
    violated_triangles,
)
from pipeline.grouping.search.problem import Problem


class CliqueProgram(IntegerProgram):
    def __init__(self, problem: Problem):
        self.problem = problem
        num_units = problem.num_units
        self.pairs = np.triu_indices(num_units, 1)
        self.column = np.zeros((num_units, num_units), dtype=np.int64)
        self.column[self.pairs] = np.arange(len(self.pairs[0]))
        self.column += self.column.T
        between = problem.affinity[self.pairs]
        self.scale = LARGEST_COST / (np.abs(between).max(initial=0) or 1.0)
        num_firsts = 0 if problem.num_groups is None else num_units
        self.cost = np.concatenate([-between * self.scale, np.zeros(num_firsts)])
        self.lowest = np.zeros(len(self.cost))
        self.highest = np.concatenate([np.where(problem.apart[self.pairs], 0.0, 1.0), np.ones(num_firsts)])
        self.always = self._size_constraints() + self._number_constraints()
        self.constant = float(np.trace(problem.affinity))

    def violated(self, solution: np.ndarray) -> list[Cut]:
        triangles = violated_triangles(self._shared(solution))[:MOST_CUTS_A_ROUND]
        column = self.column
        return [([column[u, v], column[v, w], column[u, w]], [1, 1, -1], 1) for _, v, u, w in triangles]

    def tightening(self, solution: np.ndarray) -> list[Cut]:
        """2-partition inequalities of each unit, from each possible first member of W, which then grows greedily."""
        shared = self._shared(solution)
        fractional = (shared > WHOLE) & (shared < 1 - WHOLE)
        found = {}
        for unit in range(len(shared)):
            for first in np.flatnonzero(fractional[unit]):
                members, excess = [int(first)], shared[unit, first] - 1
                gains = np.where(fractional[unit], shared[unit] - shared[first], -1.0)
                gains[first] = -1
                while gains[best := int(np.argmax(gains))] > 1e-9:
                    members.append(best)
                    excess += gains[best]
                    gains = gains - shared[best]
                    gains[best] = -1
                if excess > 1e-3:
                    found[unit, *sorted(members)] = excess
        worst = sorted(found, key=lambda key: -found[key])[: MOST_CUTS_A_ROUND // 3]
        return [self._two_partition(unit, np.array(members)) for unit, *members in worst]

    def groups_of(self, solution: np.ndarray) -> UnitGroups:
        shared = self._shared(solution) > 0.5
        np.fill_diagonal(shared, True)
        return [tuple(np.flatnonzero(row).tolist()) for row in np.unique(shared, axis=0)]

    def _two_partition(self, unit: int, members: np.ndarray) -> Cut:
        one, other = np.triu_indices(len(members), 1)
        across, within = self.column[unit, members], self.column[members[one], members[other]]
        return np.concatenate([across, within]), np.repeat([1.0, -1.0], [len(across), len(within)]), 1

    def _size_constraints(self) -> list[Cut]:
        problem, sizes = self.problem, self.problem.sizes
        cuts: list[Cut] = []
        for unit in range(problem.num_units):
            others = np.delete(np.arange(problem.num_units), unit)
            if problem.max_size < sizes.sum():
                cuts.append((self.column[unit, others], sizes[others], problem.max_size - sizes[unit]))
            if problem.min_size > sizes[unit]:
                cuts.append((self.column[unit, others], -sizes[others], sizes[unit] - problem.min_size))
        return cuts

    def _number_constraints(self) -> list[Cut]:
        problem, cuts = self.problem, []
        if problem.num_groups is None:
            return []
        first = len(self.pairs[0]) + np.arange(problem.num_units)
        for unit in range(problem.num_units):
            earlier = self.column[unit, :unit]
            cuts.append(([*earlier, first[unit]], [-1] * (unit + 1), -1))
            cuts += [([pair, first[unit]], [1, 1], 1) for pair in earlier]
        ones = np.ones(problem.num_units)
        return [*cuts, (first, ones, problem.num_groups), (first, -ones, -problem.num_groups)]

    def _shared(self, solution: np.ndarray) -> np.ndarray:
        """(U, U), symmetric, 0 on the diagonal."""
        shared = np.zeros(self.column.shape)
        shared[self.pairs] = solution[: len(self.pairs[0])]
        return shared + shared.T
