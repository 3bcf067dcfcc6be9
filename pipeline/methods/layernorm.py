"""LN-tuning (Qi et al., 2022; with few images Basu et al., AAAI 2024): weights and biases of all LayerNorms of both
towers train, and nothing else.

None of their rates is for CLIP: AdamW at 0.001, as for BitFit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import Method, MethodConfig, OwnTraining, Words, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("layernorm")
class LayerNorms(Method):
    title = "LN-tuning"
    trains_weights = True

    class Options(MethodConfig):
        """LN-tuning: the LayerNorms of both towers."""

        training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)

    def __init__(self, config: Config, towers: ClipTowers, words: Words):
        super().__init__()
        self.towers = towers.copy_that_trains(lambda name: "ln_" in name)  # ln_pre, ln_1, ln_2, ln_post, ln_final

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)
