"""Tasks as a weighted graph.

Design choices:
- The graph is complete and keeps negative affinities: figures, exports (GraphML, GEXF) and networkx's algorithms each
  drop what they cannot use.
- All attributes are plain Python numbers, because the export formats support no others.
"""

from collections.abc import Sequence

import networkx as nx
import numpy as np


def affinity_graph(affinity: np.ndarray, task_names: Sequence[str], groups: Sequence[Sequence[int]]) -> nx.Graph:
    """Return the complete graph over tasks; nodes are task names in task order.

    Node attributes: `group` (index into groups), `self_affinity` (the matrix's diagonal).
    Edge attributes: `weight` (the pair's affinity, which may be negative), `within_group` (bool).

    Args:
        affinity: (T, T), symmetric.
        task_names: T distinct names.
        groups: disjoint groups of task indices that cover all tasks, as in `Partition.groups`.

    Raises:
        ValueError: names are repeated or their number is not T; groups do not contain every task exactly once.
    """
    num_tasks = len(affinity)
    if len(task_names) != num_tasks:
        raise ValueError(f"{len(task_names)} task names for an affinity matrix of {num_tasks} tasks")
    if len(set(task_names)) != num_tasks:
        repeated = sorted({name for name in task_names if list(task_names).count(name) > 1})
        raise ValueError(f"task names must differ; repeated: {', '.join(repeated)}")
    if sorted(task for group in groups for task in group) != list(range(num_tasks)):
        raise ValueError(f"groups {groups} do not contain each of the tasks 0 to {num_tasks - 1} exactly once")
    task_to_group = {task: index for index, group in enumerate(groups) for task in group}
    graph = nx.Graph()
    for task, name in enumerate(task_names):
        graph.add_node(name, group=task_to_group[task], self_affinity=float(affinity[task, task]))
    for i in range(num_tasks):
        for j in range(i + 1, num_tasks):
            graph.add_edge(
                task_names[i],
                task_names[j],
                weight=float(affinity[i, j]),
                within_group=task_to_group[i] == task_to_group[j],
            )
    return graph
