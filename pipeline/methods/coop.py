"""CoOp (Zhou et al., IJCV 2022): context vectors in place of the template's words, the same for all classes.

The context stands after the start token, takes positions, and is carried through all layers; images are CLIP's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation
from pipeline.seeds import normal


class Coop(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        shape = (config.coop.context_length, towers.text_width)
        self.context = nn.Parameter(normal(*shape, std=0.02, seed=config.seed, purpose="coop"))  # (M, d_l)

    def forward(self) -> Adaptation:
        return Adaptation(text_prompts=self.context.expand(len(self.tasks), 1, -1, -1), text_carried=True)

    @staticmethod
    def template(of_config: str) -> str:
        """The context stands for all words but the class name."""
        return "{}."
