"""HiPro (Liu et al., CVPR 2023), reconstructed from its abstract: a tree of CoOp contexts over the tasks.

Leaves belong to one task, inner nodes to the tasks below them. Tasks whose gradients agree most are merged first. A
class's feature is the mean, over the nodes from leaf to root, of its unit-length features with each node's context.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens
from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.coop import Coop
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, Variant, method
from pipeline.seeds import normal

if TYPE_CHECKING:
    import numpy as np

    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("hipro")
class HiPro(Method):
    """HiPro; until `build_tree` is called, all affinities are equal."""

    title = "HiPro"
    modifies_image_encoder = False
    uses_affinities = True
    variants = {"hipro": Variant("HiPro", "hipro", "multi-task")}

    class Options(MethodConfig):
        """HiPro: a tree of contexts."""

        context_length: PositiveInt = 16
        """Context vectors of each node of the tree of tasks."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=32, learning_rate=0.002)

    below: torch.Tensor
    """(N, T) bool: the tasks at or below each node."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        self._towers = (towers,)  # in a tuple, so that it is not a submodule
        num_tasks = len(self.tasks)
        shape = (2 * num_tasks - 1, config.section(HiPro.Options).context_length, towers.text_width)
        self.contexts = nn.Parameter(normal(*shape, std=0.02, seed=config.seed, purpose="hipro"))  # (N, M, d_l)
        self.register_buffer("below", torch.from_numpy(task_tree(torch.zeros(num_tasks, num_tasks).numpy())))

    def build_tree(self, affinity: np.ndarray) -> None:
        """Build the tree from the tasks' affinities (T, T)."""
        self.below.copy_(torch.from_numpy(task_tree(affinity)))

    def forward(self) -> Adaptation:
        return Adaptation(text_features=self._path_features)

    def _path_features(self, tokens: ClassTokens) -> torch.Tensor:
        (towers,) = self._towers
        nodes_by_task = [column.nonzero()[:, 0].tolist() for column in self.below.T]
        rows = torch.arange(len(tokens.suffix), device=tokens.suffix.device).split(tokens.rows_per_task)
        repeated = torch.cat([task_rows for task_rows, nodes in zip(rows, nodes_by_task) for _ in nodes])
        pairs = [(task, node) for task, nodes in enumerate(nodes_by_task) for node in nodes]
        pair_tokens = replace(
            tokens,
            prefix=torch.stack([tokens.prefix[task] for task, _ in pairs]),
            suffix=tokens.suffix[repeated],
            eot=tokens.eot[repeated],
            rows_per_task=tuple(len(rows[task]) for task, _ in pairs),
            name_start=tuple(tokens.name_start[task] for task, _ in pairs),
        )
        contexts = torch.stack([self.contexts[node] for _, node in pairs])[:, None]
        z = F.normalize(towers.encode_text(pair_tokens, contexts, propagate=True), dim=-1)
        counts = [len(nodes) * len(task_rows) for nodes, task_rows in zip(nodes_by_task, rows)]
        return torch.cat(
            [part.unflatten(0, (len(nodes), -1)).mean(0) for part, nodes in zip(z.split(counts), nodes_by_task)]
        )

    template = staticmethod(Coop.template)

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(HiPro.Options).context_length


def task_tree(affinity: np.ndarray) -> np.ndarray:
    """Return the average-linkage tree of the tasks by affinity (T, T): the tasks at or below each node (2T - 1, T), the
    leaves in the order of the tasks, then the merges, the root last."""
    import numpy as np  # here, to keep `--help` fast

    num_tasks = len(affinity)
    nodes = list(np.eye(num_tasks, dtype=bool))
    if num_tasks > 1:
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        distance = affinity.max() - (affinity + affinity.T) / 2
        np.fill_diagonal(distance, 0)
        for i, j, *_ in linkage(squareform(distance, checks=False), "average"):
            nodes.append(nodes[int(i)] | nodes[int(j)])
    return np.stack(nodes)
