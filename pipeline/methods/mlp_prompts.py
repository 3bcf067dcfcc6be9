"""Prompts of both towers, mapped by two linear layers from a source prompt per layer (the paper's Figure 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, method
from pipeline.seeds import derive_seed, normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("mlp_prompts")
class MlpPrompts(Method):
    title = "MLP prompts"

    class Options(MethodConfig):
        """Prompts of both towers made by linear layers (ablation)."""

        prompt_length: PositiveInt = 4
        """Prompt vectors per layer."""
        source_width: PositiveInt = 256
        """Width of the source prompt that the linear layers map to both towers."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        depth = min(towers.text_depth, towers.vision_depth)
        options = config.section(MlpPrompts.Options)
        length, width = options.prompt_length, options.source_width
        self.source = nn.Parameter(normal(depth, length, width, std=0.02, seed=config.seed, purpose="mlp source"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "mlp layers"))
            self.text_layers, self.vision_layers = (
                nn.ModuleList(nn.Linear(width, tower_width) for _ in range(depth))
                for tower_width in (towers.text_width, towers.vision_width)
            )

    def forward(self) -> Adaptation:
        text, vision = (
            torch.stack([layer(source) for layer, source in zip(layers, self.source)]).expand(
                len(self.tasks), -1, -1, -1
            )
            for layers in (self.text_layers, self.vision_layers)
        )
        return Adaptation(text, vision)
