"""Base of methods that merge single tasks' adapters into one of all tasks, without training: a rule for task vectors.

A task vector is what a training adds to CLIP's weights (Ilharco et al., ICLR 2023). That of a low-rank update is the
product of its factors: the rules are for weights, and merged factors would multiply one task's A with another's B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.lazy_torch import F, Module, nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.clip_lora import ClipLora, LowRank
from pipeline.methods.method import ClassNames, Method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config

TaskVector = Mapping[str, "torch.Tensor"]
"""Name of a parameter of the merged method → what a task's training adds to it."""


class MergedMethod(Method):
    """A method whose parameters start as the frozen CLIP's, and get the merged task vectors added."""

    trainable = False
    takes_steps = False
    merges = True
    exports_weights = True

    def merge(self, config: Config, states: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Merge the state dicts of trained adapters, task by task, into a method in its initial state."""
        with torch.no_grad():
            merged = self.combine(config, [self.task_vector(config, state) for state in states])
            for name, parameter in self.named_parameters():
                parameter.add_(merged[name].to(parameter.device))

    def task_vector(self, config: Config, state: Mapping[str, torch.Tensor]) -> TaskVector:
        """Return what the adapter with this state dict adds to each parameter, on the state's device."""
        raise NotImplementedError

    @staticmethod
    def combine(config: Config, vectors: Sequence[TaskVector]) -> TaskVector:
        """Return the merged task vector: the rule of the method."""
        raise NotImplementedError


class MergedLora(MergedMethod):
    """Merged updates of the query, key and value matrices of CLIP-LoRA. They are stored as matrices, since a rule may
    return any; not added to the frozen ones, which bfloat16 would round."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.towers = towers.trainable_copy()
        for block in (*self.towers.vision_blocks, *self.towers.text_blocks):
            block.set_projection_update(FullRank(block.width))

    def task_vector(self, config: Config, state: Mapping[str, torch.Tensor]) -> TaskVector:
        alpha = config.section(ClipLora.Options).alpha
        names = {name: name.removesuffix(".weight") for name, _ in self.named_parameters()}
        return {
            name: LowRank.weight_update(state[f"{update}.down.weight"], state[f"{update}.up"], alpha)
            for name, update in names.items()
        }

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)


class MergedWeights(MergedMethod):
    """Merged weights of full fine-tuning: of both towers, with the temperature."""

    trains_weights = True

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.towers = towers.trainable_copy(lambda module, name: True).requires_grad_(False)

    @classmethod
    def needs_image_layers(cls) -> bool:
        return False

    def task_vector(self, config: Config, state: Mapping[str, torch.Tensor]) -> TaskVector:
        frozen = self.named_parameters()
        return {name: state[name] - parameter.to(state[name].device) for name, parameter in frozen}

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)


class FullRank(Module):
    """Update of a layer's query, key and value matrices, of any rank, zero at first."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, width, width), requires_grad=False)

    def forward(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        """h (N, L, D) → (N, L, D · parts), where parts 0, 1, 2 are query, key and value."""
        return F.linear(h, self.weight[parts].flatten(0, 1))
