"""Tip-Adapter (Zhang et al., ECCV 2022): a cache of the training images' features and labels, added to CLIP's logits.

Classes with equal names share a class of the cache, also across tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.fields import NonNegative
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.method import ClassNames, FitConfig, FittedMethod, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("tip_adapter")
class TipAdapter(FittedMethod):
    title = "Tip-Adapter"

    class Options(FitConfig):
        """Tip-Adapter: a cache of image features."""

        alpha: NonNegative = 1.0
        """Weight of the cache's logits (the paper's on ImageNet)."""
        beta: NonNegative = 5.5
        """Sharpness of the cache's similarities (the paper's on ImageNet)."""

    per_image = ("keys", "values")
    values: torch.Tensor
    """(N, K) bool: one-hot labels among the classes of all tasks."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__(config, towers, class_names)
        options = config.section(type(self).Options)
        self.alpha, self.beta = options.alpha, options.beta
        empty = self.zeros(0, towers.embed_dim)
        self.keys = nn.Parameter(empty, requires_grad=self.takes_steps)  # (N, E)
        self.register_buffer("values", torch.empty(0, self.num_classes, dtype=torch.bool, device=towers.device))

    def fit(
        self, features: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], text_features: Sequence[torch.Tensor]
    ) -> None:
        self.keys.data = F.normalize(torch.cat(list(features)).mean(dim=1), dim=-1).to(self.keys)
        self.values.data = F.one_hot(torch.cat(self.class_indices(labels)), self.num_classes).bool()

    def logits(self, classes: list[int], x: torch.Tensor, z: torch.Tensor, clip_logits: torch.Tensor) -> torch.Tensor:
        """Return the sum of CLIP's and the cache's logits."""
        affinities = torch.exp(self.beta * (x @ self.keys.to(x.dtype).T - 1))  # (B, N)
        return clip_logits + self.alpha * affinities @ self.values[:, classes].to(x.dtype)
