"""MaPLe (Khattak et al., CVPR 2023): text prompts of the first layers, and a linear map of each into the image tower.

The first layer's text prompts stand in place of the template's first words and start as their embeddings; those of the
last prompted layer are carried on through the layers after it, in both towers.
"""

from __future__ import annotations

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


def initialize_from_template(template: str, towers: ClipTowers, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts (b, d_l), of which the first are replaced by the embeddings of the words before the class name."""
    ids = torch.tensor(towers.tokenizer.encode(template.partition("{}")[0].strip())[: len(prompts)], dtype=torch.int64)
    words = towers.token_embedding(ids.to(towers.device)).detach().to(prompts)
    return torch.cat([words, prompts[len(words) :]])


@method("maple")
class Maple(Method):
    title = "MaPLe"

    class Options(MethodConfig):
        """MaPLe: text prompts mapped into the image tower."""

        prompt_length: PositiveInt = 2
        """Text prompt vectors in a layer; those of the first layer start as the template's first words."""
        depth: PositiveInt = 9
        """Layers, from the first, that get new prompts."""
        training: TrainingOverrides = TrainingOverrides(epochs=5, batch_size=4, learning_rate=0.0035)

    def __init__(self, config: Config, towers: ClipTowers, words: ClassNames):
        super().__init__()
        self.tasks = tuple(words)
        options, width = config.section(Maple.Options), towers.text_width
        prompts = normal(options.depth, options.prompt_length, width, std=0.02, seed=config.seed, purpose="maple")
        prompts[0] = initialize_from_template(config.clip.template, towers, prompts[0])
        self.text_prompts = nn.Parameter(prompts)  # (K', b, d_l)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "maple projections"))
            self.projections = nn.ModuleList(nn.Linear(width, towers.vision_width) for _ in range(options.depth))

    def forward(self) -> Adaptation:
        vision = torch.stack([project(prompts) for project, prompts in zip(self.projections, self.text_prompts)])
        text, vision = (prompts.expand(len(self.tasks), -1, -1, -1) for prompts in (self.text_prompts, vision))
        return Adaptation(text, vision, text_prompts_propagate=True, vision_prompts_propagate=True)

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: more prompted layers than the towers have."""
        depth, deepest = config.section(Maple.Options).depth, min(towers.text_depth, towers.vision_depth)
        if depth > deepest:
            raise UserError(f"maple.depth={depth}: the shallower tower has {deepest} layers")

    @staticmethod
    def template(of_config: str) -> str:
        """The prompts stand for the words before the class name."""
        return "{}" + of_config.partition("{}")[2]

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Maple.Options).prompt_length
