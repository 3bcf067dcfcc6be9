"""MVLPT with unified prompts (Shen et al., WACV 2024): CoOp's context and deep prompts of the image tower, mixed by one
small transformer block; trained on all tasks first, then on each alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.coop import Coop
from pipeline.seeds import derive_seed, normal


class Mvlpt(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        length, width = config.mvlpt.prompt_length, config.mvlpt.mixer_width
        text_width, vision_width, depth = towers.text_width, towers.vision_width, towers.vision_depth
        start = partial(normal, std=0.02, seed=config.seed)
        self.context = nn.Parameter(start(length, text_width, purpose="mvlpt text"))
        self.vision_prompts = nn.Parameter(start(depth, length, vision_width, purpose="mvlpt vision"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "mvlpt mixer"))
            self.text_in, self.vision_in = nn.Linear(text_width, width), nn.Linear(vision_width, width)
            self.mixer = nn.TransformerEncoderLayer(
                width,
                nhead=1,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.text_out, self.vision_out = nn.Linear(width, text_width), nn.Linear(width, vision_width)

    def forward(self) -> Adaptation:
        depth, length, _ = self.vision_prompts.shape
        prompts = torch.cat([self.text_in(self.context), self.vision_in(self.vision_prompts.flatten(0, 1))])
        mixed = self.mixer(prompts[None])[0]  # ((1 + K) b, width), as one sequence
        text, vision = self.text_out(mixed[:length]), self.vision_out(mixed[length:]).unflatten(0, (depth, length))
        text, vision = (of.expand(len(self.tasks), -1, -1, -1) for of in (text[None], vision))
        return Adaptation(text, vision, text_carried=True)

    template = staticmethod(Coop.template)
