"""A partition that meets the constraints, whatever its score: units assigned to numbered groups by HiGHS."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, kron

from pipeline.grouping.search.problem import Problem


class InfeasibleError(Exception):
    """No partition meets the constraints."""


def feasible_labels(problem: Problem, seconds: float) -> np.ndarray | None:
    """(U,) each unit's group number of some partition; None if none was found in time.

    Raises:
        Impossible: there is none, proven.
    """
    num_nodes, num_tasks = problem.num_nodes, int(problem.sizes.sum())
    num_groups = problem.num_groups or min(num_nodes, num_tasks // problem.min_size)
    if num_groups > num_nodes:
        raise InfeasibleError
    # Variables: unit u is in group g (row by row), then: group g is used.
    of_unit = csr_array(kron(np.eye(num_nodes), np.ones((1, num_groups))))
    of_group = csr_array(kron(problem.sizes[None, :], np.eye(num_groups)))
    used = csr_array(np.eye(num_groups))
    unused = csr_array((num_nodes, num_groups))
    one, other = np.nonzero(np.triu(problem.cannot_link))
    pairs = np.zeros((len(one), num_nodes))
    pairs[np.arange(len(one)), one] = pairs[np.arange(len(one)), other] = 1
    both = csr_array(kron(pairs, np.eye(num_groups)))
    # Groups are alike: unit u needs none beyond number u.
    needed = np.arange(num_groups) <= np.arange(num_nodes)[:, None]
    found = milp(
        np.zeros(num_nodes * num_groups + num_groups),
        integrality=np.ones(num_nodes * num_groups + num_groups),
        bounds=Bounds(
            np.append(np.zeros(num_nodes * num_groups), np.full(num_groups, problem.num_groups is not None)),
            np.append(needed.ravel(), np.ones(num_groups)),
        ),
        constraints=[
            LinearConstraint(hstack([of_unit, unused]), 1, 1),
            LinearConstraint(hstack([of_group, -problem.min_size * used]), 0, np.inf),
            LinearConstraint(hstack([of_group, -problem.max_size * used]), -np.inf, 0),
            LinearConstraint(hstack([both, -csr_array(kron(np.ones((len(one), 1)), used))]), -np.inf, 0),
        ],
        options={"time_limit": seconds},
    )
    if found.status == 2:
        raise InfeasibleError
    return None if found.x is None else found.x[: num_nodes * num_groups].reshape(num_nodes, -1).argmax(axis=1)
