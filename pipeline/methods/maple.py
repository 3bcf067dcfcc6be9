"""MaPLe (Khattak et al., CVPR 2023): text prompts of the first layers, and a linear map of each into the image tower.

The first layer's text prompts replace the template's first words and are initialized with their embeddings; those of
the last prompted layer propagate through the layers after it, in both towers.
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
    """Replace the first of the prompts (b, d_l) by the embeddings of the template's words before the class name."""
    ids = torch.tensor(towers.tokenizer.encode(template.partition("{}")[0].strip())[: len(prompts)], dtype=torch.int64)
    words = towers.token_embedding(ids.to(towers.device)).detach().to(prompts)
    return torch.cat([words, prompts[len(words) :]])


@method("maple")
class Maple(Method):
    title = "MaPLe"

    class Options(MethodConfig):
        """MaPLe: text prompts mapped into the image tower."""

        prompt_length: PositiveInt = 2
        """Text prompt vectors per layer; the first layer's are initialized with the template's first words."""
        depth: PositiveInt = 9
        """Number of first layers with new prompts."""
        training: TrainingOverrides = TrainingOverrides(epochs=5, batch_size=4, learning_rate=0.0035)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
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
        """Raises: UserError: depth exceeds the layers of a tower."""
        depth, deepest = config.section(Maple.Options).depth, min(towers.text_depth, towers.vision_depth)
        if depth > deepest:
            raise UserError(f"maple.depth={depth}: the shallower tower has {deepest} layers; lower it")

    @staticmethod
    def template(config_template: str) -> str:
        """Drop the words before the class name, which the prompts replace."""
        return "{}" + config_template.partition("{}")[2]

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Maple.Options).prompt_length
