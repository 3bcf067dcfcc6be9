"""CoOp (Zhou et al., IJCV 2022): context vectors that replace the template's words, the same for all classes.

The context follows the start token, takes positions, and propagates through all layers; image features are CLIP's.
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


@method("coop")
class Coop(Method):
    title = "CoOp"
    modifies_image_encoder = False

    class Options(MethodConfig):
        """CoOp: text context."""

        context_length: PositiveInt = 16
        """Context vectors, which replace the template's words before the class name."""
        training: TrainingOverrides = TrainingOverrides(epochs=200, batch_size=32, learning_rate=0.002)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        shape = (config.section(Coop.Options).context_length, towers.text_width)
        self.context = nn.Parameter(normal(*shape, std=0.02, seed=config.seed, purpose="coop"))  # (M, d_l)

    def forward(self) -> Adaptation:
        return Adaptation(text_prompts=self.context.expand(len(self.tasks), 1, -1, -1), text_prompts_propagate=True)

    @staticmethod
    def template(config_template: str, config: Config) -> str:
        """Keep only the class name: the context replaces all other words."""
        return "{}."

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Coop.Options).context_length
