"""MmAP, the multi-modal alignment prompt (Xin et al., AAAI 2024): Eqs. 6-7, and its uses in Eqs. 8-12.

Both towers' prompts are Kronecker products of a source prompt per layer with two small scaling matrices:
P_l = M_l ⊗ P_s, P_v = M_v ⊗ P_s. Modules hold a stack of MmAPs, so that one product serves several tasks.

Dimensions: N MmAPs in the stack, T tasks, K layers, m × n source prompt, b prompts, d_l and d_v the towers' widths.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pipeline.config.sections import MmapConfig, source_columns
from pipeline.errors import UserError
from pipeline.lazy_torch import Module, nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import Method, Variant, method
from pipeline.seeds import derive_seed

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@dataclass(frozen=True)
class MmapShape:
    """Sizes of one MmAP. `sources`: number of source prompts, one per layer or 1 shared by all."""

    depth: int
    sources: int
    b: int
    m: int
    n: int
    text_width: int
    vision_width: int

    @staticmethod
    def of(config: MmapConfig, towers: ClipTowers) -> MmapShape:
        """Return the shape for these towers. Raises: UserError: depth or source_columns do not fit them."""
        text_width, vision_width = towers.text_width, towers.vision_width
        n = source_columns(config, text_width, vision_width)
        deepest = min(towers.text_depth, towers.vision_depth)
        depth = config.depth or deepest
        if depth > deepest:
            raise UserError(
                f"mmap.depth={depth}: the text tower has {towers.text_depth} layers and the vision tower "
                f"{towers.vision_depth}; valid: 1 to {deepest}"
            )
        sources = 1 if config.shared_source else depth
        return MmapShape(depth, sources, config.prompt_length, config.source_rows, n, text_width, vision_width)

    @property
    def num_parameters(self) -> int:
        """Trained parameters of one MmAP."""
        scaling = (self.b // self.m) * (self.text_width // self.n + self.vision_width // self.n)
        return self.sources * self.m * self.n + self.depth * scaling


class MmapStack(Module):
    """Stack of N MmAPs, each initialized by its own one of the N `seeds`."""

    def __init__(self, shape: MmapShape, seeds: Sequence[int], init_std: float = 0.02):
        super().__init__()
        self.shape = shape
        sources = [
            torch.randn(shape.sources, shape.m, shape.n, generator=torch.Generator().manual_seed(seed)) * init_std
            for seed in seeds
        ]
        repeats = shape.b // shape.m
        self.source = nn.Parameter(torch.stack(sources))  # (N, K or 1, m, n)
        # Ones keep the source's standard deviation; the sources already differ between layers and tasks.
        self.text_scaling = nn.Parameter(torch.ones(len(seeds), shape.depth, repeats, shape.text_width // shape.n))
        self.vision_scaling = nn.Parameter(torch.ones(len(seeds), shape.depth, repeats, shape.vision_width // shape.n))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return text prompts (N, K, b, d_l) and vision prompts (N, K, b, d_v)."""
        return kronecker(self.text_scaling, self.source), kronecker(self.vision_scaling, self.source)

    def parameter_gradients(self, text_gradients: torch.Tensor, vision_gradients: torch.Tensor) -> torch.Tensor:
        """Map gradients of the prompts of one MmAP, (T, K, b, d_l) and (T, K, b, d_v), to those of its parameters
        (T, parameters)."""
        copies = [p.detach().expand(len(text_gradients), *p.shape[1:]).requires_grad_() for p in self.parameters()]
        source, text_scaling, vision_scaling = copies
        prompts = kronecker(text_scaling, source), kronecker(vision_scaling, source)
        gradients = torch.autograd.grad(prompts, copies, (text_gradients, vision_gradients))
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


@method("mmap_shared")
class SharedMmap(Method):
    """The global prompt: one MmAP for all T tasks, of which each task uses its own copy.

    After one backward pass through the sum of the tasks' losses, each copy holds its task's gradient (Eq. 8), and
    autograd has summed them for the update.
    """

    title = "MmAP"
    mixes_tasks = False
    Options = MmapConfig
    section = "mmap"
    variants = {
        "mmap_task_only": Variant("MmAP, task only", "mmap_shared", "single-task"),
        "mmap_group_only": Variant("MmAP, group only", "mmap_shared", "found groups"),
    }

    def __init__(self, shape: MmapShape, tasks: Collection[str], seed: int, init_std: float = 0.02):
        super().__init__()
        self.tasks = tuple(tasks)
        self.mmap = MmapStack(shape, [derive_seed(seed, "global")], init_std)
        self._copies: list[torch.Tensor] = []

    @classmethod
    def build(cls, config: Config, towers: ClipTowers, class_names: Collection[str]) -> Self:
        return cls(MmapShape.of(config.mmap, towers), class_names, config.seed, config.mmap.init_std)

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: depth or source_columns do not fit the towers."""
        MmapShape.of(config.mmap, towers)

    def forward(self) -> Adaptation:
        self._copies = [p.expand(len(self.tasks), *p.shape[1:]) for p in self.mmap.parameters()]
        if torch.is_grad_enabled():
            for copy in self._copies:
                copy.retain_grad()
        source, text_scaling, vision_scaling = self._copies
        return Adaptation(kronecker(text_scaling, source), kronecker(vision_scaling, source))

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.mmap.parameters())

    def task_gradients(self) -> torch.Tensor:
        """Return each task's gradient of the last backward pass (T, parameters), in the order of `gradient_layout`."""
        gradients = []
        for copy in self._copies:
            assert copy.grad is not None
            gradients.append(copy.grad.flatten(1))
        return torch.cat(gradients, dim=1)

    def gradient_layout(self) -> dict[str, list[int]]:
        """Return name → shape of the parameters in a gradient vector, in order; axis 0 is the layer."""
        return {name: list(p.shape[1:]) for name, p in self.mmap.named_parameters()}


@method("mmap")
class GroupMmap(Method):
    """The prompts of a task group (Eqs. 9-12): one MmAP shared by the group and one for each of its T tasks.

    Every layer sees [group prompts, task prompts]. The summed task losses update the group's MmAP by all tasks (Eq. 11)
    and each task's by that task alone (Eq. 12). Each task has its own view of the group's prompts, which holds its
    gradient after a backward pass.
    """

    title = "MmAP"
    mixes_tasks = False
    Options = MmapConfig
    variants = {
        "mmap_random_groups": Variant("MmAP, random groups", "mmap", "random groups"),
        "each_alone": Variant("MmAP, each task alone", "mmap", "single-task"),
        "all_in_one": Variant("MmAP, all in one group", "mmap", "multi-task"),
        "grouped": Variant("MmAP, grouped", "mmap", "found groups"),
    }

    def __init__(self, shape: MmapShape, tasks: Collection[str], seed: int, init_std: float = 0.02):
        super().__init__()
        self.tasks = tuple(tasks)
        self.group = MmapStack(shape, [derive_seed(seed, "group")], init_std)
        self.task = MmapStack(shape, [derive_seed(seed, "task", name) for name in tasks], init_std)
        self._views: list[torch.Tensor] = []

    @classmethod
    def build(cls, config: Config, towers: ClipTowers, class_names: Collection[str]) -> Self:
        return cls(MmapShape.of(config.mmap, towers), class_names, config.seed, config.mmap.init_std)

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: depth or source_columns do not fit the towers."""
        MmapShape.of(config.mmap, towers)

    def load_frozen_group_prompt(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the group prompt from a trained group's state dict and freeze it, so that only the tasks' prompts
        train."""
        self.group.load_state_dict(
            {name.removeprefix("group."): value for name, value in state.items() if name.startswith("group.")}
        )
        self.group.requires_grad_(False)

    def forward(self) -> Adaptation:
        """Return 2b prompts in every layer of both towers."""
        self._views = [prompts.expand(len(self.tasks), -1, -1, -1) for prompts in self.group()]
        for view in self._views:
            if view.requires_grad:
                view.retain_grad()
        text, vision = (torch.cat(pair, dim=2) for pair in zip(self._views, self.task()))
        return Adaptation(text, vision)

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.group.parameters())

    def task_gradients(self) -> torch.Tensor:
        text, vision = (view.grad for view in self._views)
        assert text is not None and vision is not None
        return self.group.parameter_gradients(text, vision)


def kronecker(scaling: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Batched torch.kron: (..., p, q) ⊗ (..., m, n) → (..., p·m, q·n)."""
    product = torch.einsum("...pq,...mn->...pmqn", scaling, source)
    return product.flatten(-2).flatten(-3, -2)
