"""VPT-deep (Jia et al., ECCV 2022): prompts of the image tower, new in every layer; texts are CLIP's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation
from pipeline.seeds import normal


class Vpt(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        shape = (towers.vision_depth, config.vpt.prompt_length, towers.vision_width)
        self.prompts = nn.Parameter(normal(*shape, std=0.02, seed=config.seed, purpose="vpt"))  # (K, b, d_v)

    def forward(self) -> Adaptation:
        return Adaptation(vision_prompts=self.prompts.expand(len(self.tasks), -1, -1, -1))
