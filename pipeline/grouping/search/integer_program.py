"""An integer program (HiGHS) for many nodes: an upper bound on the score, and often proof that a partition is optimal.

Design choices:
- w_kuv = 1 if nodes u and v share a group whose number of tasks is in size class k; z_ku = 1 if node u is in such a
  group. All sizes of a class give a pair the same weight, so the score is linear: `sum` needs a single class.
- In a group of class k, with nodes of n tasks: smallest_k z_ku ≤ Σ_v n_v w_kuv + n_u z_ku ≤ largest_k z_ku. With a
  fixed number of groups, tasks in groups of s tasks count 1 / s each, and f_u = 1 if node u is the first of its group.
- The constraints that turn pairs into groups, w_kuv ≤ z_ku and w_kuv + w_kvw - w_kuw ≤ z_kv (triangles), are added
  where violated. So are 2-partition inequalities w_k(u : W) - w_k(W) ≤ z_ku, which tighten the relaxation where
  affinities have no clear structure (Grötschel and Wakabayashi, 1989).
- Cutting planes: the LP relaxation is solved in rounds; the lowest cost of each bounds the score of every partition.
  On affinities of gradients it nearly always ends integral, hence optimal. Otherwise variables that no partition better
  than the incumbent can change are fixed (reduced costs), and HiGHS branches on the remaining ones.
- HiGHS has absolute tolerances of about 1e-6, so costs are scaled, and no rule breaks ties.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array

from pipeline.grouping.search.problem import NodeGroups, Problem

MAX_COST = 100.0
"""Costs are scaled so that the largest is this."""
OPTIMALITY_TOLERANCE = 1e-4
"""In scaled costs: a lower bound this close to the incumbent's cost proves it optimal."""
MAX_CUTS_PER_ROUND = 1500
STALLED_ROUNDS = 15
"""Cutting stops when this many rounds have closed less than a hundredth of the gap."""
INTEGRALITY_TOLERANCE = 1e-6

Cut = tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray, float]
"""Columns, their coefficients, and the upper limit of the sum."""
ViolatedCut = tuple[float, Cut]
"""By how much a solution violates the cut, and the cut."""


class IntegerProgram:
    """Variables from 0 to 1 whose cost is minus `scale` times the score."""

    def __init__(self, problem: Problem):
        self.problem = problem
        num_nodes, sizes = problem.num_nodes, problem.sizes
        rows, columns = np.triu_indices(num_nodes, 1)
        self.classes = _size_classes(problem)
        smallest, largest, weights = np.array(self.classes).T[:, :, None]
        # Columns: w by class and pair, then z by class and node, then f.
        shape = (len(self.classes), num_nodes, num_nodes)
        self.pair_columns = np.zeros(shape, dtype=np.int64)
        self.pair_columns[:, rows, columns] = np.arange(len(self.classes) * len(rows)).reshape(len(self.classes), -1)
        self.pair_columns += self.pair_columns.transpose(0, 2, 1)
        self.node_columns = len(self.classes) * len(rows) + np.arange(len(self.classes) * num_nodes).reshape(shape[:2])
        between, inside = problem.affinity[rows, columns], np.diag(problem.affinity)
        score = np.append(weights * between, weights * inside)
        may_share = (largest >= sizes[rows] + sizes[columns]) & ~problem.cannot_link[rows, columns]
        upper_bounds = np.append(may_share, largest >= sizes).astype(np.float64)
        firsts = np.zeros(num_nodes if problem.num_groups is not None else 0)
        self.first_columns = len(score) + np.arange(len(firsts))
        self.scale = MAX_COST / (np.abs(score).max(initial=0) or 1.0)
        self.cost = np.append(-score * self.scale, firsts)
        self.lower_bounds = np.zeros(len(self.cost))
        self.upper_bounds = np.append(upper_bounds, firsts + 1)
        self.cuts: list[Cut] = []
        self.base_constraints = self._base_constraints()

    def solve(self, incumbent: NodeGroups, seconds: float) -> tuple[NodeGroups, float]:
        """Return the best groups of nodes found, and an upper bound on the score, equal to theirs if proven optimal.

        Args:
            incumbent: groups of nodes that meet the constraints.
        """
        deadline = time.monotonic() + seconds
        self.incumbent, self.incumbent_cost = incumbent, -self.problem.score(incumbent) * self.scale
        lower_bound = self._solve_with_cuts(deadline)
        while lower_bound < self.incumbent_cost - OPTIMALITY_TOLERANCE and time.monotonic() < deadline:
            result = self._branch_and_bound(deadline)
            if result.status == 2:  # infeasible: reduced costs ruled out everything better than the incumbent
                lower_bound = self.incumbent_cost
            elif result.mip_dual_bound is not None:
                lower_bound = max(lower_bound, result.mip_dual_bound)
            if result.x is None or not self._add_cuts(result.x):
                break
        if lower_bound >= self.incumbent_cost - OPTIMALITY_TOLERANCE:
            return self.incumbent, self.problem.score(self.incumbent)
        # The trivial bound: all positive pairs in the group where they count most, no negative pair in any.
        trivial_bound = np.clip(np.triu(self.problem.affinity), 0, None).sum() * self.problem.pair_weights[2:].max()
        return self.incumbent, float(min(-lower_bound / self.scale, trivial_bound))

    def _solve_with_cuts(self, deadline: float) -> float:
        """Add violated cuts until there are none or they stall; return the lower bound on the cost."""
        bounds = [-np.inf]
        while bounds[-1] < self.incumbent_cost - OPTIMALITY_TOLERANCE and time.monotonic() < deadline:
            relaxation = self._solve_relaxation(deadline)
            if relaxation.x is None or relaxation.status:
                break
            bounds.append(max(bounds[-1], relaxation.fun))
            # Reduced-cost fixing: a variable whose change costs more than the gap keeps its value.
            gap = self.incumbent_cost - relaxation.fun + OPTIMALITY_TOLERANCE
            self.upper_bounds[(relaxation.lower.marginals > gap) & (self.lower_bounds == 0)] = 0
            self.lower_bounds[(relaxation.upper.marginals < -gap) & (self.upper_bounds == 1)] = 1
            self.cuts = [cut for cut in self.cuts if cut[2] - np.dot(relaxation.x[cut[0]], cut[1]) < 1e-6]
            if not self._add_cuts(relaxation.x):
                break
            gap = self.incumbent_cost - bounds[-1]
            if len(bounds) > 2 * STALLED_ROUNDS and bounds[-1] - bounds[-1 - STALLED_ROUNDS] < 0.01 * gap:
                break
        return bounds[-1]

    def _add_cuts(self, solution: np.ndarray) -> bool:
        """Add the cuts that a solution violates; False if none. A partition that beats the incumbent replaces it."""
        violated = sorted(self.separate(solution), key=lambda cut: -cut[0])[:MAX_CUTS_PER_ROUND]
        if not violated and (np.abs(solution - np.round(solution)) < INTEGRALITY_TOLERANCE).all():
            shared = solution[self.pair_columns].max(axis=0) > 0.5
            np.fill_diagonal(shared, True)
            groups = [tuple(np.flatnonzero(row).tolist()) for row in np.unique(shared, axis=0)]
            if (cost := -self.problem.score(groups) * self.scale) < self.incumbent_cost:
                self.incumbent, self.incumbent_cost = groups, cost
            return False
        if len(violated) < 50:
            tightening = sorted(self.separate_tightening_cuts(solution), key=lambda cut: -cut[0])
            violated += tightening[: MAX_CUTS_PER_ROUND // 3]
        self.cuts += [cut for _, cut in violated]
        return bool(violated)

    def separate(self, solution: np.ndarray) -> list[ViolatedCut]:
        """Violated constraints that turn pairs into groups; an integral solution without any is a partition."""
        violated: list[ViolatedCut] = []
        for pair, node in zip(self.pair_columns, self.node_columns):
            shared, z = solution[pair], solution[node]
            np.fill_diagonal(shared, 0)
            excess = shared - z[:, None]
            pairs = np.argwhere(excess > INTEGRALITY_TOLERANCE)
            violated += [(excess[u, v], ([pair[u, v], node[u]], [1, -1], 0)) for u, v in pairs]
            for v in range(len(z)):
                excess = shared[v][:, None] + shared[v] - shared - z[v]
                excess[v] = excess[:, v] = 0
                u, w = np.nonzero(np.triu(excess, 1) > INTEGRALITY_TOLERANCE)
                columns = np.stack([pair[u, v], pair[v, w], pair[u, w], np.broadcast_to(node[v], len(u))], axis=1)
                violated += [(over, (row, [1, 1, -1, -1], 0)) for over, row in zip(excess[u, w].tolist(), columns)]
        return violated

    def separate_tightening_cuts(self, solution: np.ndarray) -> list[ViolatedCut]:
        """Violated 2-partition inequalities: for each class and node, W grows greedily from each possible member."""
        violations = {}
        for size_class, (pair, node) in enumerate(zip(self.pair_columns, self.node_columns)):
            shared, z = solution[pair], solution[node]
            np.fill_diagonal(shared, 0)
            fractional = (shared > INTEGRALITY_TOLERANCE) & (shared < z[:, None] - INTEGRALITY_TOLERANCE)
            for u, seed_node in np.argwhere(fractional).tolist():
                members, excess = [seed_node], shared[u, seed_node] - z[u]
                gains = np.where(fractional[u], shared[u] - shared[seed_node], -1.0)
                gains[seed_node] = -1
                while gains[best := int(np.argmax(gains))] > 1e-9:
                    members.append(best)
                    excess += gains[best]
                    gains = gains - shared[best]
                    gains[best] = -1
                if excess > 1e-3:
                    violations[size_class, u, *sorted(members)] = excess
        cuts: list[ViolatedCut] = []
        for (size_class, u, *members), excess in violations.items():
            v, w = (np.array(members)[index] for index in np.triu_indices(len(members), 1))
            pair = self.pair_columns[size_class]
            columns = [*pair[u, members], *pair[v, w], self.node_columns[size_class, u]]
            cuts.append((excess, (columns, [1.0] * len(members) + [-1.0] * (len(v) + 1), 0)))
        return cuts

    def _solve_relaxation(self, deadline: float) -> OptimizeResult:
        matrix, limits = self._constraint_rows()
        bounds = np.stack([self.lower_bounds, self.upper_bounds], axis=1)
        seconds = max(deadline - time.monotonic(), 0.1)
        return linprog(self.cost, A_ub=matrix, b_ub=limits, bounds=bounds, options={"time_limit": seconds})

    def _branch_and_bound(self, deadline: float) -> OptimizeResult:
        matrix, limits = self._constraint_rows()
        return milp(
            self.cost,
            integrality=np.ones(len(self.cost)),
            bounds=Bounds(self.lower_bounds, self.upper_bounds),
            constraints=LinearConstraint(matrix, -np.inf, limits),
            options={"time_limit": max(deadline - time.monotonic(), 0.1), "mip_rel_gap": 0},
        )

    def _constraint_rows(self) -> tuple[csr_array, np.ndarray]:
        rows = self.base_constraints + self.cuts
        columns = np.concatenate([np.asarray(indices, dtype=np.int64) for indices, _, _ in rows])
        coefficients = np.concatenate([np.asarray(values, dtype=np.float64) for _, values, _ in rows])
        starts = np.cumsum([0, *(len(indices) for indices, _, _ in rows)])
        matrix = csr_array((coefficients, columns, starts), shape=(len(rows), len(self.cost)))
        return matrix, np.array([limit for _, _, limit in rows], dtype=np.float64)

    def _base_constraints(self) -> list[Cut]:
        """The constraints of every relaxation: one class per node, and the sizes of groups."""
        sizes, constraints = self.problem.sizes, []
        for node in range(self.problem.num_nodes):
            peers = np.delete(np.arange(self.problem.num_nodes), node)
            class_columns = self.node_columns[:, node]
            constraints += [(class_columns, sign * np.ones(len(class_columns)), sign) for sign in (1, -1)]
            for size_class, (smallest, largest, _) in enumerate(self.classes):
                columns = np.append(self.pair_columns[size_class, node, peers], class_columns[size_class])
                constraints.append((columns, np.append(sizes[peers], sizes[node] - largest), 0))
                constraints.append((columns, np.append(-sizes[peers], smallest - sizes[node]), 0))
        return constraints + self._num_groups_constraints()

    def _num_groups_constraints(self) -> list[Cut]:
        problem, constraints = self.problem, []
        if (num_groups := problem.num_groups) is None:
            return []
        for size_index, sign in ((1, 1), (0, -1)):  # the largest and smallest size of each class
            shares = problem.sizes / np.array(self.classes)[:, size_index, None]
            constraints.append((self.node_columns.ravel(), sign * shares.ravel(), sign * num_groups))
        for node, first_column in enumerate(self.first_columns):
            earlier = self.pair_columns[:, node, :node].T  # (nodes, classes)
            constraints.append((np.append(earlier, first_column), np.full(earlier.size + 1, -1.0), -1))
            constraints += [(np.append(pair, first_column), np.ones(len(pair) + 1), 1) for pair in earlier]
        num_firsts = np.ones(len(self.first_columns))
        return [*constraints, *((self.first_columns, sign * num_firsts, sign * num_groups) for sign in (1, -1))]


def _size_classes(problem: Problem) -> list[tuple[int, int, float]]:
    """(min tasks, max tasks, pair weight) of the group sizes that an optimum may need."""
    largest = problem.max_size
    if problem.num_groups is not None:
        largest = min(largest, int(problem.sizes.sum()) - (problem.num_groups - 1) * problem.min_size)
    elif problem.num_nodes == problem.sizes.sum():
        largest = min(largest, problem.objective.largest_needed_size(problem.min_size) or largest)
    weights = problem.pair_weights
    sizes_by_weight = groupby(range(problem.min_size, largest + 1), key=lambda size: weights[size])
    classes = [list(sizes) for _, sizes in sizes_by_weight]
    return [(sizes[0], sizes[-1], weights[sizes[0]]) for sizes in classes]
