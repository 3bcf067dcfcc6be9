"""BitFit (Zaken et al., ACL 2022): all biases of both towers train, those of LayerNorms too, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import Method, MethodConfig, OwnTraining, Words, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("bitfit")
class BitFit(Method):
    title = "BitFit"
    trains_weights = True

    class Options(MethodConfig):
        """BitFit: the biases of both towers."""

        training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)

    def __init__(self, config: Config, towers: ClipTowers, words: Words):
        super().__init__()
        self.towers = towers.copy_that_trains(lambda name: name.endswith("bias"))  # in_proj_bias too

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)
