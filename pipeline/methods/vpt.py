"""VPT-deep (Jia et al., ECCV 2022), as in MaPLe's repository: prompts of the image tower, new in every layer; text
features are CLIP's.

The first layer's prompts are tokens of the input, which `ln_pre` norms with the patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import nn
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method
from pipeline.seeds import normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("vpt")
class Vpt(Method):
    title = "VPT"

    class Options(MethodConfig):
        """VPT: prompts of the image tower."""

        prompt_length: PositiveInt = 8
        """Prompt vectors per layer of the image tower."""
        training: TrainingOverrides = TrainingOverrides(epochs=5, batch_size=4, learning_rate=0.0025)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        shape = (towers.vision_depth, config.section(Vpt.Options).prompt_length, towers.vision_width)
        self.prompts = nn.Parameter(normal(*shape, std=0.02, seed=config.seed, purpose="vpt"))  # (K, b, d_v)

    def forward(self) -> Adaptation:
        prompts = self.prompts.expand(len(self.tasks), -1, -1, -1)
        return Adaptation(vision_prompts=prompts, vision_prompts_propagate=True)
