"""Full fine-tuning: all weights of both towers train, and the temperature of the logits.

It wants a far smaller rate than prompts do: training.learning_rate of 1e-5 or so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation


class FullFineTuning(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        self.towers = towers.copy_that_trains(lambda name: True)

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)
