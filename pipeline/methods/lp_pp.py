"""LP++ (Huang et al., CVPR 2024): a linear probe with the weights `w_k + α_k z_k`, of a vector and a multiplier of the
text feature per class.

Trained on all images in every iteration, with step sizes from the data. Classes with equal names share both, also
across tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.method import ClassNames, FitConfig, FittedMethod, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config

ALPHA_SCALE = 250
"""Initial multiplier over the mean similarity of the images with their class's text."""
MOMENTUM = 0.9
"""Momentum of the vectors' steps."""


@method("lp_pp")
class LpPp(FittedMethod):
    title = "LP++"

    class Options(FitConfig):
        """LP++: a linear probe that blends text features."""

        views: PositiveInt = 1
        """Augmented views of each training image, each of which counts as an image."""
        iterations: PositiveInt = 300
        """Steps of the vectors."""
        alpha_every: PositiveInt = 10
        """Iterations between steps of the text features' multipliers."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__(config, towers, class_names)
        options = config.section(LpPp.Options)
        self.iterations, self.alpha_every = options.iterations, options.alpha_every
        self.weights = nn.Parameter(self.zeros(self.num_classes, towers.embed_dim))  # (K, E)
        self.alphas = nn.Parameter(self.zeros(self.num_classes))  # (K,)

    def fit(
        self, features: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], text_features: Sequence[torch.Tensor]
    ) -> None:
        x = F.normalize(torch.cat([views.flatten(0, 1) for views in features]), dim=-1)
        rows_per_task = [len(task_labels) * self.views for task_labels in labels]
        classes = torch.cat(self.class_indices(labels)).repeat_interleave(self.views)
        one_hot = F.one_hot(classes, self.num_classes).to(x.dtype)
        # Similarities (N, K) with the classes' texts, and which classes each image's task has.
        similarities, is_candidate = torch.zeros_like(one_hot), torch.zeros_like(one_hot, dtype=torch.bool)
        rows = torch.arange(len(x), device=x.device)[:, None].split(rows_per_task)
        for task_rows, task_classes, z in zip(rows, self.classes, text_features):
            similarities[task_rows, task_classes] = x[task_rows[:, 0]] @ F.normalize(z, dim=-1).T
            is_candidate[task_rows, task_classes] = True

        weights_step = 4 * len(x) / torch.linalg.matrix_norm(x, 2) ** 2
        alphas_step = len(x) / (4 * similarities.square().sum(0).max())
        class_similarities = (one_hot * similarities).sum(0) / one_hot.sum(0).clamp(min=1)
        weights, velocity = one_hot.T @ x, torch.zeros_like(one_hot.T @ x)
        alphas = ALPHA_SCALE * class_similarities.mean().expand(self.num_classes)
        for iteration in range(1, self.iterations + 1):
            logits = (x @ weights.T + alphas * similarities).masked_fill(~is_candidate, -torch.inf)
            errors = (logits.softmax(1) - one_hot) / len(x)
            velocity = MOMENTUM * velocity + errors.T @ x
            weights = weights - weights_step * velocity
            if iteration % self.alpha_every == 0:
                alphas = alphas - alphas_step * (errors * similarities).sum(0)
        self.weights.data, self.alphas.data = weights.to(self.weights), alphas.to(self.alphas)

    def logits(self, classes: list[int], x: torch.Tensor, z: torch.Tensor, clip_logits: torch.Tensor) -> torch.Tensor:
        """Return the linear probe's logits (the paper's Eq. 3)."""
        return x @ (self.weights[classes] + self.alphas[classes, None] * z).to(x.dtype).T
