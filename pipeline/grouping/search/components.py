"""Decomposition: the connected components of the graph of non-negative affinities are searched separately."""

from __future__ import annotations

import networkx as nx
import numpy as np

from pipeline.grouping.search.problem import Problem


def connected_components(problem: Problem) -> list[list[int]]:
    """Return lists of nodes, sorted by first node, whose optimal partitions together are optimal; a single list if the
    constraints do not allow separate searches.

    Two nodes share an edge if they may share a group and their affinity is not below -`margin`. Proof that no group of
    an optimal partition spans two components: let its pairs inside components sum to S_1, S_2, ... and its pairs across
    to X. Nodes that may not share a group never do, so every pair across has an affinity below -`margin`.

    - Where a pair has the same weight in all groups (`sum`): cut along the components, the group's score
      S_1 + S_2 + ... + X grows by -X > 0.
    - Where a group of n tasks scores w(n) times its pairs' sum, with w falling in n (`mean`, `density`): keep the parts
      with S_i ≥ 0 as groups and break the others into their nodes. The kept parts score at least w(n) S_i each, and a
      single node at least 0, so together they exceed w(n) (S_1 + S_2 + ... + X) by at least -w(n) X.

    This gain must exceed what the tie rule takes for the new groups, fewer than n of them: the group has at least
    n_1 n_2 ≥ n - 1 pairs of tasks across, so a `margin` of 4 T ties for each pair of tasks (T of all tasks) is enough
    where w(n) ≥ 1 / n.

    The cut respects `max_size` and `cannot_link`, since its parts are subsets made of whole nodes. It may violate
    `num_groups` or `min_size`: with these the result is a single list. So it is under falling weights if a node of
    several tasks scores below 0 by itself (breaking a part into nodes may then cost), and under weights that rise.

    Of equal optimal partitions the union of the components' first ones is the first: where two unions differ first, the
    two groups have the same first member, and differ within one component.
    """
    single_list = [list(range(problem.num_nodes))]
    if problem.num_groups is not None or problem.min_size > problem.sizes.min():
        return single_list
    weights = problem.pair_weights[1:]
    constant, falling = (np.diff(weights) == 0).all(), (np.diff(weights) <= 0).all()
    if (weights * np.arange(1, len(weights) + 1) < 1 - 1e-12).any() or not falling:
        return single_list
    if not constant and (np.diag(problem.affinity) < 0).any():
        return single_list
    pairs = np.outer(problem.sizes, problem.sizes)
    margin = 4 * problem.sizes.sum() * problem.tie * pairs
    graph = nx.from_numpy_array((problem.affinity >= -margin) & ~problem.cannot_link)
    return sorted(sorted(part) for part in nx.connected_components(graph))
