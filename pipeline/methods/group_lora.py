"""LoRA of a task group, as MmAP's prompts: W + (α / √r) (B A + B' A') with factors B A shared by the group and B' A' of
each task, for query, key and value of every layer of both towers.

The summed task losses update the group's factors by all tasks (Eq. 11) and each task's by that task alone (Eq. 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.lazy_torch import Module, nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.clip_lora import ClipLora, LowRank, project_low_rank
from pipeline.methods.method import ClassNames, Method, Variant, method
from pipeline.seeds import derive_seed

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("group_lora")
class GroupLora(Method):
    title = "shared + task LoRA"
    mixes_tasks = False
    Options = ClipLora.Options
    section = "clip_lora"
    variants = {
        "lora_all_in_one": Variant("shared + task LoRA, all in one group", "group_lora", "multi-task"),
        "lora_grouped": Variant("shared + task LoRA, grouped", "group_lora", "found groups"),
    }

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        options = config.section(ClipLora.Options)
        widths = [block.width for block in (*towers.vision_blocks, *towers.text_blocks)]

        def updates(*purpose: str) -> list[LowRank]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(config.seed, "group_lora", *purpose))
                return [LowRank(width, options.rank, options.alpha) for width in widths]

        stacks = [LowRankStack(layer) for layer in zip(*(updates("task", task) for task in class_names))]
        self.group, self.task = nn.ModuleList(updates("group")), nn.ModuleList(stacks)
        self._views: list[list[torch.Tensor]] = [[] for _ in widths]
        """For each layer, the tasks' views of the group's factors, which hold their gradients after a backward pass."""
        self._task_towers = []  # a list, so that they are no submodules
        for index in range(len(class_names)):
            task_towers = towers.trainable_copy()
            task_towers.activation_memory_gib /= len(class_names)  # a step keeps the activations of all tasks
            blocks = (*task_towers.vision_blocks, *task_towers.text_blocks)
            for block, views, task in zip(blocks, self._views, stacks):
                block.set_projection_update(GroupAndTask(views, task, index))
            self._task_towers.append(task_towers)

    def forward(self) -> Adaptation:
        num_tasks, trains = len(self._task_towers), torch.is_grad_enabled()
        for group, views in zip(self.group, self._views):
            factors = [factor if trains else factor.detach() for factor in group.parameters()]
            views[:] = [factor.expand(num_tasks, *factor.shape) for factor in factors]
            for view in views if trains else ():
                view.retain_grad()
        return Adaptation(task_towers=self._task_towers)

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.group.parameters())

    def task_gradients(self) -> torch.Tensor:
        gradients = [view.grad for views in self._views for view in views]
        return torch.cat([gradient.flatten(1) for gradient in gradients if gradient is not None], dim=1)


class LowRankStack(Module):
    """Low-rank updates of a layer for T tasks. One tensor for all tasks has a gradient in every data-parallel worker,
    also in one without an image or text of some task."""

    def __init__(self, updates: Sequence[LowRank]):
        super().__init__()
        self.scaling = updates[0].scaling
        self.down = nn.Parameter(torch.stack([update.down.weight.detach() for update in updates]))  # (T, 3r, D)
        self.up = nn.Parameter(torch.stack([update.up.detach() for update in updates]))  # (T, 3, D, r)

    def forward(self, h: torch.Tensor, parts: slice, index: int) -> torch.Tensor:
        """h (N, L, D) of a task → (N, L, D · parts), as `LowRank`."""
        return project_low_rank(h, parts, self.down[index], self.up[index], self.scaling)


class GroupAndTask(Module):
    """Sum of a layer's updates of the group and of one of its tasks."""

    def __init__(self, group: Sequence[torch.Tensor], task: LowRankStack, index: int):
        """`group`: the tasks' views of the group's factors B (T, 3, D, r) and A (T, 3r, D), set by `GroupLora`."""
        super().__init__()
        self.group, self.task, self.index = group, task, index

    def forward(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        """h (N, L, D) → (N, L, D · parts), where parts 0, 1, 2 are query, key and value."""
        group_up, group_down = (view[self.index] for view in self.group)
        task_update: torch.Tensor = self.task(h, parts, self.index)
        return project_low_rank(h, parts, group_down, group_up, self.task.scaling) + task_update
