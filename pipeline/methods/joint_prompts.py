"""Text and image prompts, new in every layer, trained together with nothing in common (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation
from pipeline.seeds import normal


class JointPrompts(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        length = config.joint_prompts.prompt_length
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
