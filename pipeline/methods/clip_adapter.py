"""CLIP-Adapter (Gao et al., IJCV 2024): a bottleneck of two layers on the image feature, mixed with the feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.adaptation import Adaptation
from pipeline.seeds import derive_seed


class ClipAdapter(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        self.ratio = config.clip_adapter.ratio
        width = towers.embed_dim
        hidden = width // config.clip_adapter.reduction
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "clip_adapter"))
            self.bottleneck = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())

    def forward(self) -> Adaptation:
        return Adaptation(image_features=self._mix)

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.ratio * self.bottleneck(x) + (1 - self.ratio) * x
        return mixed
