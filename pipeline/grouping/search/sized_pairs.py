"""`mean` and `density` as an integer program, which knows the size of each pair's group.

What this module chose:
- w_uvs = 1 if units u and v share a group of s tasks, z_us = 1 if unit u is in a group of s tasks: a pair's share of
  the score, its affinity over a function of s, is then linear. Σ_v n_v w_uvs = (s - n_u) z_us for units of n tasks.
- Triangle inequalities for each size, w_uvs + w_vws - w_uws ≤ z_vs, and w_uvs ≤ z_us, are added where violated.
- Tasks in groups of s tasks count 1 / s each: their sum is the number of groups.
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


class SizedPairProgram(IntegerProgram):
    def __init__(self, problem: Problem):
        self.problem = problem
        num_units = problem.num_units
        self.group_sizes = np.arange(problem.min_size, problem.max_size + 1)
        self.pairs = np.triu_indices(num_units, 1)
        num_pairs, num_sizes = len(self.pairs[0]), len(self.group_sizes)
        # Columns: w by size and pair, then z by size and unit.
        self.pair_column = np.zeros((num_sizes, num_units, num_units), dtype=np.int64)
        self.pair_column[:, *self.pairs] = np.arange(num_sizes * num_pairs).reshape(num_sizes, num_pairs)
        self.pair_column += self.pair_column.transpose(0, 2, 1)
        self.size_column = num_sizes * num_pairs + np.arange(num_sizes * num_units).reshape(num_sizes, num_units)

        weights = problem.weight(self.group_sizes)[:, None]
        score = np.concatenate(
            [(weights * problem.affinity[self.pairs]).ravel(), (weights * np.diag(problem.affinity)).ravel()]
        )
        self.scale = LARGEST_COST / (np.abs(score).max(initial=0) or 1.0)
        self.cost = -score * self.scale
        self.lowest = np.zeros(len(self.cost))
        together = problem.sizes[self.pairs[0]] + problem.sizes[self.pairs[1]]
        may_share = (self.group_sizes[:, None] >= together) & ~problem.apart[self.pairs]
        may_have = self.group_sizes[:, None] >= problem.sizes
        self.highest = np.concatenate([may_share.ravel(), may_have.ravel()]).astype(np.float64)
        self.always = self._constraints()

    def violated(self, solution: np.ndarray) -> list[Cut]:
        cuts = []
        for at in range(len(self.group_sizes)):
            has = solution[self.size_column[at]]
            shared = solution[self.pair_column[at]]
            np.fill_diagonal(shared, 0)
            pair, size = self.pair_column[at], self.size_column[at]
            excess = shared - has[:, None]
            cuts += [(excess[u, v], [pair[u, v], size[u]], [1, -1], 0) for u, v in np.argwhere(excess > WHOLE).tolist()]
            cuts += [
                (over, [pair[u, v], pair[v, w], pair[u, w], size[v]], [1, 1, -1, -1], 0)
                for over, v, u, w in violated_triangles(shared, has)[:MOST_CUTS_A_ROUND]
            ]
        cuts.sort(key=lambda cut: -cut[0])
        return [cut[1:] for cut in cuts[:MOST_CUTS_A_ROUND]]

    def groups_of(self, solution: np.ndarray) -> UnitGroups:
        shared = solution[self.pair_column].max(axis=0) > 0.5
        shared &= ~np.eye(len(shared), dtype=bool)
        shared |= np.eye(len(shared), dtype=bool)
        return [tuple(np.flatnonzero(row).tolist()) for row in np.unique(shared, axis=0)]

    def _constraints(self) -> list[Cut]:
        problem, sizes, equal = self.problem, self.problem.sizes, []
        for unit in range(problem.num_units):
            others = np.delete(np.arange(problem.num_units), unit)
            has = self.size_column[:, unit]
            equal.append((has, np.ones(len(has)), 1))
            for at, size in enumerate(self.group_sizes):
                columns = np.append(self.pair_column[at, unit, others], has[at])
                equal.append((columns, np.append(sizes[others], sizes[unit] - size), 0))
        if problem.num_groups is not None:
            shares = sizes[None, :] / self.group_sizes[:, None]
            equal.append((self.size_column.ravel(), shares.ravel(), problem.num_groups))
        return [
            (columns, sign * np.asarray(factors, dtype=np.float64), sign * total)
            for columns, factors, total in equal
            for sign in (1, -1)
        ]
