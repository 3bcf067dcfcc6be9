"""Partitions as whole-numbered variables under linear constraints, most of them added only where violated; by HiGHS.

What this module chose:
- The relaxation (fractions allowed) is solved round by round, with the constraints that its solution violates added.
  Each round's least cost bounds every partition's score. On gradients' affinities the relaxation itself ends in whole
  numbers nearly always: that solution is then the best partition.
- Where it does not, variables that a better partition than the one known cannot change are fixed by their reduced
  costs, and HiGHS branches on the rest, again until nothing is violated.
- HiGHS compares with absolute tolerances of about 1e-6, so costs are scaled, and ties are not broken by any rule.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array

from pipeline.grouping.search.problem import Problem

LARGEST_COST = 100.0
"""Costs are scaled so that the largest is this."""
PROOF_TOLERANCE = 1e-4
"""In those units: a bound this near to a partition's cost counts as reached."""
MOST_CUTS_A_ROUND = 1500
ROUNDS_TO_GAIN = 15
"""Cutting stops when so many rounds have closed less than a hundredth of the gap."""
WHOLE = 1e-6

UnitGroups = list[tuple[int, ...]]
Cut = tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray, float]
"""Columns, their factors, and what their sum may be at most."""


class IntegerProgram(ABC):
    """Variables from 0 to 1 whose cost is `scale` times what the score lacks of `constant`.

    A subclass sets `cost`, `lowest` and `highest` (N,), and `always`, the constraints that are never left out.
    """

    problem: Problem
    scale: float
    cost: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    always: list[Cut]
    constant = 0.0
    """What every partition scores: the pairs inside units, where they need no variable."""

    @abstractmethod
    def violated(self, solution: np.ndarray) -> list[Cut]:
        """What makes a whole-numbered solution a partition, where violated: [] only if it is one."""

    def tightening(self, solution: np.ndarray) -> list[Cut]:
        """Violated constraints that every partition meets without need of them."""
        return []

    @abstractmethod
    def groups_of(self, solution: np.ndarray) -> UnitGroups:
        """Of a solution that is a partition."""

    def solve(self, known: UnitGroups, seconds: float) -> tuple[UnitGroups, float]:
        """The best groups of units found, and a bound on every partition's score: their own where that is proven.

        Args:
            known: groups of units that meet the constraints.
        """
        deadline = time.monotonic() + seconds
        self.cuts: list[Cut] = []
        self.best, self.least_cost = known, self._cost_of(known)
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
        return self.best, self.constant - bound / self.scale

    def _cut(self, deadline: float) -> float:
        """Adds violated constraints until there are none, or they help no more; returns the bound."""
        bounds = [-np.inf]
        while bounds[-1] < self.least_cost - PROOF_TOLERANCE and time.monotonic() < deadline:
            found = self._relaxed(deadline)
            if found.x is None or found.status:
                break
            bounds.append(max(bounds[-1], found.fun))
            self._fix_by_reduced_costs(found)
            self.cuts = [cut for cut in self.cuts if cut[2] - np.dot(found.x[cut[0]], cut[1]) < 1e-6]
            if not self._cut_off(found.x):
                break
            gap = self.least_cost - bounds[-1]
            if len(bounds) > 2 * ROUNDS_TO_GAIN and bounds[-1] - bounds[-1 - ROUNDS_TO_GAIN] < 0.01 * gap:
                break
        return bounds[-1]

    def _cut_off(self, solution: np.ndarray) -> bool:
        """Adds what the solution violates; False if there is nothing to add. A partition is kept if it is better."""
        cuts = self.violated(solution)
        if not cuts and (np.abs(solution - np.round(solution)) < WHOLE).all():
            groups = self.groups_of(np.round(solution))
            if self._cost_of(groups) < self.least_cost:
                self.best, self.least_cost = groups, self._cost_of(groups)
            return False
        cuts += self.tightening(solution) if len(cuts) < 50 else []
        self.cuts += cuts
        return bool(cuts)

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

    def _fix_by_reduced_costs(self, found: OptimizeResult) -> None:
        """A variable whose change costs more than the known partition has above the bound keeps its value."""
        gap = self.least_cost - found.fun + PROOF_TOLERANCE
        self.highest[(found.lower.marginals > gap) & (self.lowest == 0)] = 0
        self.lowest[(found.upper.marginals < -gap) & (self.highest == 1)] = 1

    def _rows(self) -> tuple[csr_array, np.ndarray]:
        rows = self.always + self.cuts
        columns = np.concatenate([np.zeros(0, np.int64), *(np.asarray(of, dtype=np.int64) for of, _, _ in rows)])
        factors = np.concatenate([np.zeros(0), *(np.asarray(of, dtype=np.float64) for _, of, _ in rows)])
        starts = np.cumsum([0, *(len(of) for of, _, _ in rows)])
        matrix = csr_array((factors, columns, starts), shape=(len(rows), len(self.cost)))
        return matrix, np.array([most for _, _, most in rows], dtype=np.float64)

    def _cost_of(self, groups: UnitGroups) -> float:
        return (self.constant - self.problem.score(groups)) * self.scale


def violated_triangles(shared: np.ndarray, allowed: np.ndarray | float = 1.0) -> list[tuple[float, int, int, int]]:
    """(excess, v, u, w) where shared[u, v] + shared[v, w] - shared[u, w] > allowed[v], the largest excess first.

    Args:
        shared: (U, U), symmetric.
        allowed: (U,), or one number.
    """
    found: list[tuple[float, int, int, int]] = []
    for middle, most in enumerate(np.broadcast_to(allowed, len(shared)).tolist()):
        excess = shared[middle][:, None] + shared[middle][None, :] - shared - most
        excess[middle] = excess[:, middle] = 0
        one, other = np.nonzero(np.triu(excess, 1) > WHOLE)
        found += zip(excess[one, other].tolist(), [middle] * len(one), one.tolist(), other.tolist())
    return sorted(found, reverse=True)
