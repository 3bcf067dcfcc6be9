"""A feasible partition, whatever its score: HiGHS assigns nodes to numbered groups."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, kron

from pipeline.grouping.search.problem import Problem


class InfeasibleError(Exception):
    """No partition meets the constraints."""


def feasible_labels(problem: Problem, seconds: float) -> np.ndarray | None:
    """Return the group number of each node (N,) in some feasible partition; None if the time limit came first.

    Raises:
        InfeasibleError: proven that no partition meets the constraints.
    """
    num_nodes, num_tasks = problem.num_nodes, int(problem.sizes.sum())
    num_groups = problem.num_groups or min(num_nodes, num_tasks // problem.min_size)
    if num_groups > num_nodes:
        raise InfeasibleError
    # Variables: node n is in group g (row by row), then: group g is used.
    groups_per_node = csr_array(kron(np.eye(num_nodes), np.ones((1, num_groups))))
    tasks_per_group = csr_array(kron(problem.sizes[None, :], np.eye(num_groups)))
    used = csr_array(np.eye(num_groups))
    unused = csr_array((num_nodes, num_groups))
    rows, columns = np.nonzero(np.triu(problem.cannot_link))
    pairs = np.zeros((len(rows), num_nodes))
    pairs[np.arange(len(rows)), rows] = pairs[np.arange(len(rows)), columns] = 1
    pairs_per_group = csr_array(kron(pairs, np.eye(num_groups)))
    # Symmetry breaking: node n never needs a group above number n.
    allowed = np.arange(num_groups) <= np.arange(num_nodes)[:, None]
    solution = milp(
        np.zeros(num_nodes * num_groups + num_groups),
        integrality=np.ones(num_nodes * num_groups + num_groups),
        bounds=Bounds(
            np.append(np.zeros(num_nodes * num_groups), np.full(num_groups, problem.num_groups is not None)),
            np.append(allowed.ravel(), np.ones(num_groups)),
        ),
        constraints=[
            LinearConstraint(hstack([groups_per_node, unused]), 1, 1),
            LinearConstraint(hstack([tasks_per_group, -problem.min_size * used]), 0, np.inf),
            LinearConstraint(hstack([tasks_per_group, -problem.max_size * used]), -np.inf, 0),
            LinearConstraint(hstack([pairs_per_group, -csr_array(kron(np.ones((len(rows), 1)), used))]), -np.inf, 0),
        ],
        options={"time_limit": seconds},
    )
    if solution.status == 2:
        raise InfeasibleError
    return None if solution.x is None else solution.x[: num_nodes * num_groups].reshape(num_nodes, -1).argmax(axis=1)
