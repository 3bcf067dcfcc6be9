"""Units that no good group joins are searched apart: connected components of the graph of non-negative affinities."""

from __future__ import annotations

import networkx as nx
import numpy as np

from pipeline.grouping.search.problem import Problem


def components(problem: Problem) -> list[list[int]]:
    """Lists of units, sorted by first unit, such that every best partition is one of each list's best partitions; a
    single list where the constraints do not allow to search apart.

    Two units share an edge if they may share a group and their affinity is not clearly negative. Why no group of a
    best partition spans two components: let its pairs inside components sum to S_1, S_2, ... and its pairs across to X.
    Units that may not share a group are in none together, so every pair across has an affinity below -`clearly`.

    - Where a pair counts alike in all groups (`sum`): cut along the components, the group's score S_1 + S_2 + ... + X
      grows by -X > 0.
    - Where a group of n tasks scores w(n) times its pairs' sum, with w falling in n (`mean`, `density`): keep the parts
      with S_i ≥ 0 as groups and break the others into their units. The kept ones score at least w(n) S_i each, and a
      unit alone at least 0, so that together they beat w(n) (S_1 + S_2 + ... + X) by at least -w(n) X.

    This gain must be more than the tie rule takes for the new groups, fewer than n of them: the group has at least
    n_1 n_2 ≥ n - 1 pairs of tasks across, so `clearly` = 4 T ties for each pair of tasks (T of all tasks) is enough
    where w(n) ≥ 1 / n.

    The cut keeps `max_size`, units and pairs apart, since its parts are subsets made of whole units. It may break a
    given number of groups or a smallest size, so there the answer is a single list. So it is under falling weights
    where a unit of several tasks that must be together scores below 0 alone: breaking a part into units may then
    cost; and under weights that rise somewhere.

    Of equal best partitions the union of the components' first ones is the first: where two unions differ first, the
    two groups have the same first member, and differ within one component.
    """
    everything = [list(range(problem.num_nodes))]
    if problem.num_groups is not None or problem.min_size > problem.sizes.min():
        return everything
    weights = problem.weights[1:]
    constant, falling = (np.diff(weights) == 0).all(), (np.diff(weights) <= 0).all()
    if (weights * np.arange(1, len(weights) + 1) < 1 - 1e-12).any() or not falling:
        return everything
    if not constant and (np.diag(problem.affinity) < 0).any():
        return everything
    pairs = np.outer(problem.sizes, problem.sizes)
    clearly = 4 * problem.sizes.sum() * problem.tie * pairs
    graph = nx.from_numpy_array((problem.affinity >= -clearly) & ~problem.cannot_link)
    return sorted(sorted(part) for part in nx.connected_components(graph))
