"""Text and image prompts, replaced in every layer, trained jointly without shared parameters (the paper's Figure 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import nn
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, method
from pipeline.seeds import normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("joint_prompts")
class JointPrompts(Method):
    title = "joint prompts"

    class Options(MethodConfig):
        """Independent prompts of both towers (ablation)."""

        prompt_length: PositiveInt = 8
        """Prompt vectors in each layer of each tower."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        length = config.section(JointPrompts.Options).prompt_length
        text, vision = (
            normal(depth, length, width, std=0.02, seed=config.seed, purpose=f"joint {tower}")
            for tower, depth, width in (
                ("text", towers.text_depth, towers.text_width),
                ("vision", towers.vision_depth, towers.vision_width),
            )
        )
        self.text_prompts = nn.Parameter(text)  # (K, b, d_l)
        self.vision_prompts = nn.Parameter(vision)  # (K, b, d_v)

    def forward(self) -> Adaptation:
        text, vision = (p.expand(len(self.tasks), -1, -1, -1) for p in (self.text_prompts, self.vision_prompts))
        return Adaptation(text, vision)
