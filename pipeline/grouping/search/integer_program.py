"""A bound on the score of many units, and often the proof that a partition is the best: by an integer program, HiGHS.

What this module chose:
- w_kuv = 1 if units u and v share a group whose number of tasks is in size class k, z_ku = 1 if unit u is in such a
  group. Sizes of one class give pairs the same weight, so that the score is linear: under `sum` one class is enough.
- In a group of class k, for units of n tasks: smallest_k z_ku ≤ Σ_v n_v w_kuv + n_u z_ku ≤ largest_k z_ku. Where a
  number of groups is given, tasks in groups of s tasks count 1 / s each, and f_u = 1 if unit u is its group's first.
- What makes groups of pairs, w_kuv ≤ z_ku and w_kuv + w_kvw - w_kuw ≤ z_kv (triangles), is added where violated; so are
  2-partition inequalities w_k(u : W) - w_k(W) ≤ z_ku, at most one pair more across than inside, which tighten the
  relaxation where affinities have no clear structure (Grötschel and Wakabayashi, 1989).
- The relaxation (fractions allowed) is solved round by round. Each round's least cost bounds every partition's score.
  On gradients' affinities it ends in whole numbers nearly always: that is then the best partition. Elsewhere variables
  that a better partition than the known one cannot change are fixed, and HiGHS branches on the rest.
- HiGHS compares with absolute tolerances of about 1e-6, so costs are scaled, and ties are not broken by any rule.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array

from pipeline.grouping.search.problem import NodeGroups, Problem

LARGEST_COST = 100.0
"""Costs are scaled so that the largest is this."""
PROOF_TOLERANCE = 1e-4
"""In those units: a bound this near to a partition's cost counts as reached."""
MOST_CUTS_A_ROUND = 1500
ROUNDS_TO_GAIN = 15
"""Cutting stops when so many rounds have closed less than a hundredth of the gap."""
WHOLE = 1e-6

Cut = tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray, float]
"""Columns, their factors, and what their sum may be at most."""
FoundCut = tuple[float, Cut]
"""With how much a solution is above that."""


class IntegerProgram:
    """Variables from 0 to 1 whose cost is minus `scale` times the score."""

    def __init__(self, problem: Problem):
        self.problem = problem
        num_nodes, sizes = problem.num_nodes, problem.sizes
        one, other = np.triu_indices(num_nodes, 1)
        self.classes = _size_classes(problem)
        smallest, largest, weights = np.array(self.classes).T[:, :, None]
        # Columns: w by class and pair, then z by class and unit, then f.
        shape = (len(self.classes), num_nodes, num_nodes)
        self.pair_column = np.zeros(shape, dtype=np.int64)
        self.pair_column[:, one, other] = np.arange(len(self.classes) * len(one)).reshape(len(self.classes), -1)
        self.pair_column += self.pair_column.transpose(0, 2, 1)
        self.unit_column = len(self.classes) * len(one) + np.arange(len(self.classes) * num_nodes).reshape(shape[:2])
        between, inside = problem.affinity[one, other], np.diag(problem.affinity)
        score = np.append(weights * between, weights * inside)
        may_share = (largest >= sizes[one] + sizes[other]) & ~problem.cannot_link[one, other]
        highest = np.append(may_share, largest >= sizes).astype(np.float64)
        firsts = np.zeros(num_nodes if problem.num_groups is not None else 0)
        self.first_column = len(score) + np.arange(len(firsts))
        self.scale = LARGEST_COST / (np.abs(score).max(initial=0) or 1.0)
        self.cost = np.append(-score * self.scale, firsts)
        self.lowest = np.zeros(len(self.cost))
        self.highest = np.append(highest, firsts + 1)
        self.cuts: list[Cut] = []
        self.always = self._constraints()

    def solve(self, known: NodeGroups, seconds: float) -> tuple[NodeGroups, float]:
        """The best groups of units found, and a bound on every partition's score: their own where that is proven.

        Args:
            known: groups of units that meet the constraints.
        """
        deadline = time.monotonic() + seconds
        self.best, self.least_cost = known, -self.problem.score(known) * self.scale
        bound = self._cut(deadline)
        while bound < self.least_cost - PROOF_TOLERANCE and time.monotonic() < deadline:
            found = self._branch(deadline)
            if found.status == 2:  # all that is better than the known partition was ruled out by reduced costs
                bound = self.least_cost
            elif found.mip_dual_bound is not None:
                bound = max(bound, found.mip_dual_bound)
            if found.x is None or not self._cut_off(found.x):
                break
        if bound >= self.least_cost - PROOF_TOLERANCE:
            return self.best, self.problem.score(self.best)
        # If every pair that gains were in the group where it counts most, and no pair that costs in any.
        most = np.clip(np.triu(self.problem.affinity), 0, None).sum() * self.problem.weights[2:].max()
        return self.best, float(min(-bound / self.scale, most))

    def _cut(self, deadline: float) -> float:
        """Adds violated constraints until there are none, or they help no more; returns the bound."""
        bounds = [-np.inf]
        while bounds[-1] < self.least_cost - PROOF_TOLERANCE and time.monotonic() < deadline:
            found = self._relaxed(deadline)
            if found.x is None or found.status:
                break
            bounds.append(max(bounds[-1], found.fun))
            # A variable whose change costs more than the known partition has above the bound keeps its value.
            gap = self.least_cost - found.fun + PROOF_TOLERANCE
            self.highest[(found.lower.marginals > gap) & (self.lowest == 0)] = 0
            self.lowest[(found.upper.marginals < -gap) & (self.highest == 1)] = 1
            self.cuts = [cut for cut in self.cuts if cut[2] - np.dot(found.x[cut[0]], cut[1]) < 1e-6]
            if not self._cut_off(found.x):
                break
            gap = self.least_cost - bounds[-1]
            if len(bounds) > 2 * ROUNDS_TO_GAIN and bounds[-1] - bounds[-1 - ROUNDS_TO_GAIN] < 0.01 * gap:
                break
        return bounds[-1]

    def _cut_off(self, solution: np.ndarray) -> bool:
        """Adds what the solution violates; False if there is nothing to add. A partition is kept if it is better."""
        violated = sorted(self._violated(solution), key=lambda cut: -cut[0])[:MOST_CUTS_A_ROUND]
        if not violated and (np.abs(solution - np.round(solution)) < WHOLE).all():
            shared = solution[self.pair_column].max(axis=0) > 0.5
            np.fill_diagonal(shared, True)
            groups = [tuple(np.flatnonzero(row).tolist()) for row in np.unique(shared, axis=0)]
            if (cost := -self.problem.score(groups) * self.scale) < self.least_cost:
                self.best, self.least_cost = groups, cost
            return False
        if len(violated) < 50:
            violated += sorted(self._two_partitions(solution), key=lambda cut: -cut[0])[: MOST_CUTS_A_ROUND // 3]
        self.cuts += [cut for _, cut in violated]
        return bool(violated)

    def _violated(self, solution: np.ndarray) -> list[FoundCut]:
        """What makes pairs groups: [] for whole numbers only if they are a partition."""
        found: list[FoundCut] = []
        for pair, unit in zip(self.pair_column, self.unit_column):
            shared, has = solution[pair], solution[unit]
            np.fill_diagonal(shared, 0)
            excess = shared - has[:, None]
            found += [(excess[u, v], ([pair[u, v], unit[u]], [1, -1], 0)) for u, v in np.argwhere(excess > WHOLE)]
            for v in range(len(has)):
                excess = shared[v][:, None] + shared[v] - shared - has[v]
                excess[v] = excess[:, v] = 0
                u, w = np.nonzero(np.triu(excess, 1) > WHOLE)
                columns = np.stack([pair[u, v], pair[v, w], pair[u, w], np.broadcast_to(unit[v], len(u))], axis=1)
                found += [(over, (of, [1, 1, -1, -1], 0)) for over, of in zip(excess[u, w].tolist(), columns)]
        return found

    def _two_partitions(self, solution: np.ndarray) -> list[FoundCut]:
        """Of each class and unit, from each possible first member of W, which then grows greedily."""
        found = {}
        for at, (pair, unit) in enumerate(zip(self.pair_column, self.unit_column)):
            shared, has = solution[pair], solution[unit]
            np.fill_diagonal(shared, 0)
            fractional = (shared > WHOLE) & (shared < has[:, None] - WHOLE)
            for u, first in np.argwhere(fractional).tolist():
                members, excess = [first], shared[u, first] - has[u]
                gains = np.where(fractional[u], shared[u] - shared[first], -1.0)
                gains[first] = -1
                while gains[best := int(np.argmax(gains))] > 1e-9:
                    members.append(best)
                    excess += gains[best]
                    gains = gains - shared[best]
                    gains[best] = -1
                if excess > 1e-3:
                    found[at, u, *sorted(members)] = excess
        cuts: list[FoundCut] = []
        for (at, u, *members), excess in found.items():
            one, other = (np.array(members)[of] for of in np.triu_indices(len(members), 1))
            pair = self.pair_column[at]
            columns = [*pair[u, members], *pair[one, other], self.unit_column[at, u]]
            cuts.append((excess, (columns, [1.0] * len(members) + [-1.0] * (len(one) + 1), 0)))
        return cuts

    def _relaxed(self, deadline: float) -> OptimizeResult:
        matrix, most = self._rows()
        bounds = np.stack([self.lowest, self.highest], axis=1)
        seconds = max(deadline - time.monotonic(), 0.1)
        return linprog(self.cost, A_ub=matrix, b_ub=most, bounds=bounds, options={"time_limit": seconds})

    def _branch(self, deadline: float) -> OptimizeResult:
        matrix, most = self._rows()
        return milp(
            self.cost,
            integrality=np.ones(len(self.cost)),
            bounds=Bounds(self.lowest, self.highest),
            constraints=LinearConstraint(matrix, -np.inf, most),
            options={"time_limit": max(deadline - time.monotonic(), 0.1), "mip_rel_gap": 0},
        )

    def _rows(self) -> tuple[csr_array, np.ndarray]:
        rows = self.always + self.cuts
        columns = np.concatenate([np.asarray(of, dtype=np.int64) for of, _, _ in rows])
        factors = np.concatenate([np.asarray(of, dtype=np.float64) for _, of, _ in rows])
        starts = np.cumsum([0, *(len(of) for of, _, _ in rows)])
        matrix = csr_array((factors, columns, starts), shape=(len(rows), len(self.cost)))
        return matrix, np.array([most for _, _, most in rows], dtype=np.float64)

    def _constraints(self) -> list[Cut]:
        """What is never left out."""
        sizes, cuts = self.problem.sizes, []
        for unit in range(self.problem.num_nodes):
            others = np.delete(np.arange(self.problem.num_nodes), unit)
            has = self.unit_column[:, unit]
            cuts += [(has, sign * np.ones(len(has)), sign) for sign in (1, -1)]
            for at, (smallest, largest, _) in enumerate(self.classes):
                columns = np.append(self.pair_column[at, unit, others], has[at])
                cuts.append((columns, np.append(sizes[others], sizes[unit] - largest), 0))
                cuts.append((columns, np.append(-sizes[others], smallest - sizes[unit]), 0))
        return cuts + self._number_constraints()

    def _number_constraints(self) -> list[Cut]:
        problem, cuts = self.problem, []
        if (number := problem.num_groups) is None:
            return []
        for at, sign in ((1, 1), (0, -1)):  # the largest and smallest size of each class
            shares = problem.sizes / np.array(self.classes)[:, at, None]
            cuts.append((self.unit_column.ravel(), sign * shares.ravel(), sign * number))
        for unit, first in enumerate(self.first_column):
            earlier = self.pair_column[:, unit, :unit].T  # (units, classes)
            cuts.append((np.append(earlier, first), np.full(earlier.size + 1, -1.0), -1))
            cuts += [(np.append(pair, first), np.ones(len(pair) + 1), 1) for pair in earlier]
        ones = np.ones(len(self.first_column))
        return [*cuts, (self.first_column, ones, number), (self.first_column, -ones, -number)]


def _size_classes(problem: Problem) -> list[tuple[int, int, float]]:
    """(fewest tasks, most tasks, weight of a pair), of groups that may be needed for the best score."""
    largest = problem.max_size
    if problem.num_groups is not None:
        largest = min(largest, int(problem.sizes.sum()) - (problem.num_groups - 1) * problem.min_size)
    elif problem.num_nodes == problem.sizes.sum():
        largest = min(largest, problem.objective.largest_needed_size(problem.min_size) or largest)
    weights = problem.weights
    same = [list(of) for _, of in groupby(range(problem.min_size, largest + 1), key=lambda size: weights[size])]
    return [(of[0], of[-1], weights[of[0]]) for of in same]
