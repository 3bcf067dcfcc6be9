"""Full fine-tuning: all weights of both towers train, and the temperature of the logits.

It wants a far smaller rate than prompts do: training.learning_rate of 1e-5 or so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import Method, MethodConfig, OwnTraining, Words, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("full")
class FullFineTuning(Method):
    title = "full fine-tuning"
    trains_weights = True

    class Options(MethodConfig):
        """Full fine-tuning."""

        training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-5, weight_decay=0.1)

    def __init__(self, config: Config, towers: ClipTowers, words: Words):
        super().__init__()
        self.towers = towers.copy_that_trains(lambda name: True)

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)
