"""MaPLe (Khattak et al., CVPR 2023): text prompts of the first layers, and a linear map of each into the image tower.

The first layer's text prompts replace as many of the template's first tokens and are initialized with their embeddings:
`[v1] [v2] of a {}.`; those of the last prompted layer propagate through the layers after it, in both towers. More
prompts than the template has tokens before the class name replace all of these and start at random.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.fields import PositiveInt
from pipeline.errors import UserError
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method
from pipeline.seeds import derive_seed, normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


def initial_context(config: Config, towers: ClipTowers, tasks: Sequence[str], prompts: torch.Tensor) -> torch.Tensor:
    """Return initial values of the first layer's text prompts: the embeddings of the first tokens of the tasks'
    template, of clip.template if they have several; the random `prompts` (b, d_l) if it has fewer tokens before the
    class name."""
    templates = {config.clip.template_for(task) for task in tasks}
    template = templates.pop() if len(templates) == 1 else config.clip.template
    ids = towers.tokenizer.encode(template.partition("{}")[0].strip())[: len(prompts)]
    if len(ids) < len(prompts):
        return prompts
    words: torch.Tensor = towers.token_embedding(torch.tensor(ids, device=towers.device))
    return words.detach().to(prompts)


@method("maple")
class Maple(Method):
    title = "MaPLe"

    class Options(MethodConfig):
        """MaPLe: text prompts mapped into the image tower."""

        prompt_length: PositiveInt = 2
        """Text prompt vectors per layer. The first layer's replace the template's first tokens and are initialized with
        them, or at random if it has fewer before the class name."""
        depth: PositiveInt = 9
        """Number of first layers with new prompts."""
        training: TrainingOverrides = TrainingOverrides(epochs=5, batch_size=4, learning_rate=0.0035)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        options, width = config.section(Maple.Options), towers.text_width
        prompts = normal(options.depth, options.prompt_length, width, std=0.02, seed=config.seed, purpose="maple")
        prompts[0] = initial_context(config, towers, self.tasks, prompts[0])
        self.text_prompts = nn.Parameter(prompts)  # (K', b, d_l)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "maple projections"))
            first, deeper = (nn.Linear(width, towers.vision_width) for _ in range(2))
        # Those of the deeper layers start equal.
        self.projections = nn.ModuleList([first, *(copy.deepcopy(deeper) for _ in range(options.depth - 1))])

    def forward(self) -> Adaptation:
        vision = torch.stack([project(prompts) for project, prompts in zip(self.projections, self.text_prompts)])
        text, vision = (prompts.expand(len(self.tasks), -1, -1, -1) for prompts in (self.text_prompts, vision))
        return Adaptation(text, vision, text_prompts_propagate=True, vision_prompts_propagate=True)

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: depth exceeds the layers of a tower."""
        depth, deepest = config.section(Maple.Options).depth, min(towers.text_depth, towers.vision_depth)
        if depth > deepest:
            raise UserError(f"maple.depth={depth}: the shallower tower has {deepest} layers; valid: 1 to {deepest}")

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Maple.Options).prompt_length

    num_replaced_tokens = num_prompt_positions
