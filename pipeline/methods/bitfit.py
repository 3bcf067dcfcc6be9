"""BitFit (Zaken et al., ACL 2022): all biases of both towers train, those of LayerNorms too, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation


class BitFit(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        self.towers = towers.copy_that_trains(lambda name: name.endswith("bias"))  # in_proj_bias too

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)
