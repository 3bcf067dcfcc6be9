"""Prompts of both towers that two linear layers make from a source prompt, in every layer (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation
from pipeline.seeds import derive_seed, normal


class MlpPrompts(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        depth = min(towers.text_depth, towers.vision_depth)
        length, width = config.mlp_prompts.prompt_length, config.mlp_prompts.source_width
        self.source = nn.Parameter(normal(depth, length, width, std=0.02, seed=config.seed, purpose="mlp source"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "mlp layers"))
            self.text_layers, self.vision_layers = (
                nn.ModuleList(nn.Linear(width, tower_width) for _ in range(depth))
                for tower_width in (towers.text_width, towers.vision_width)
            )

    def forward(self) -> Adaptation:
        text, vision = (
            torch.stack([layer(source) for layer, source in zip(layers, self.source)]).expand(
                len(self.tasks), -1, -1, -1
            )
            for layers in (self.text_layers, self.vision_layers)
        )
        return Adaptation(text, vision)
