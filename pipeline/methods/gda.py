"""GDA (Wang et al., ICLR 2024): Gaussian discriminant analysis of image features, added to CLIP's logits.

Classes are Gaussians with one covariance, estimated from few images by a ridge. Classes with equal names have one
Gaussian, also across tasks.
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

ALPHAS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Grid of alpha, the authors'."""
MAX_FOLDS = 5
ONE_SHOT_ALPHA = 0.001
"""Alpha without cross-validation, as the authors' most frequent one for a single image per class."""


@method("gda")
class Gda(FittedMethod):
    title = "GDA"

    class Options(FitConfig):
        """GDA: Gaussian discriminant analysis of image features."""

        alpha: NonNegative | None = None
        """Weight of the Gaussian classifier's logits; null: cross-validated on the training images."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__(config, towers, class_names)
        self.alpha = config.section(Gda.Options).alpha
        self._towers = (towers,)  # in a tuple, so that it is not a submodule
        zeros = self.zeros(self.num_classes, towers.embed_dim)
        self.weights = nn.Parameter(zeros, requires_grad=False)  # (K, E), times alpha
        self.biases = nn.Parameter(zeros[:, 0].clone(), requires_grad=False)  # (K,), times alpha

    def fit(
        self, features: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], text_features: Sequence[torch.Tensor]
    ) -> None:
        x = [F.normalize(task_features, dim=-1) for task_features in features]
        classes = self.class_indices(labels)
        weights, biases = self._discriminants(torch.cat(x), torch.cat(classes))
        alpha = self.alpha if self.alpha is not None else self._cross_validated_alpha(x, classes, labels, text_features)
        self.weights.data, self.biases.data = (alpha * weights).to(self.weights), (alpha * biases).to(self.biases)

    def logits(self, classes: list[int], x: torch.Tensor, z: torch.Tensor, clip_logits: torch.Tensor) -> torch.Tensor:
        """Return the sum of CLIP's and the Gaussian classifier's logits."""
        return clip_logits + x @ self.weights[classes].to(x.dtype).T + self.biases[classes].to(x.dtype)

    def _discriminants(self, x: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights (K, E) and biases (K,) of equally frequent classes from features (N, V, E) of images and
        their classes (N,)."""
        samples, sample_classes = x.flatten(0, 1), classes.repeat_interleave(x.shape[1])
        one_hot = F.one_hot(sample_classes, self.num_classes).to(x.dtype)
        # A class without images has the mean 0.
        means = one_hot.T @ samples / one_hot.sum(0).clamp(min=1)[:, None]
        centered = samples - means[sample_classes]
        scatter = centered.T @ centered  # (N V - 1) times the covariance
        width = x.shape[-1]
        ridge = scatter.trace() / max(len(samples) - 1, 1) * torch.eye(width, device=x.device, dtype=x.dtype)
        precision = width * torch.linalg.pinv(scatter + ridge, hermitian=True)
        weights = means @ precision
        return weights, -(weights * means).sum(1) / 2

    def _cross_validated_alpha(
        self,
        x: Sequence[torch.Tensor],
        classes: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        text_features: Sequence[torch.Tensor],
    ) -> float:
        """Return the alpha of ALPHAS with the highest accuracy on held-out training images, of equal ones the smallest.

        A fold holds out every MAX_FOLDS-th image of each class and task, or with fewer images one of each class.
        """
        (towers,) = self._towers
        ranks = [_ranks(task_labels) for task_labels in labels]
        num_folds = min(MAX_FOLDS, *(int(task_labels.bincount().min()) for task_labels in labels))
        if num_folds < 2:
            return ONE_SHOT_ALPHA
        hits = dict.fromkeys(ALPHAS, 0)
        for fold in range(num_folds):
            held_out = [rank % num_folds == fold for rank in ranks]
            fitted = [~rows for rows in held_out]
            fold_x, fold_classes = (torch.cat([part[rows] for part, rows in zip(p, fitted)]) for p in (x, classes))
            weights, biases = self._discriminants(fold_x, fold_classes)
            for task, rows in enumerate(held_out):
                task_classes = self.classes[task]
                images, targets = x[task][rows].flatten(0, 1), labels[task][rows].repeat_interleave(self.views)
                clip_logits = towers.logits(images, text_features[task])
                gaussian_logits = images @ weights[task_classes].T + biases[task_classes]
                for alpha in ALPHAS:
                    predicted = (clip_logits + alpha * gaussian_logits).argmax(1)
                    hits[alpha] += int((predicted == targets).sum())
        return max(hits, key=lambda alpha: hits[alpha])


def _ranks(labels: torch.Tensor) -> torch.Tensor:
    """Return each image's position (n,) among those of its class."""
    one_hot = F.one_hot(labels)
    return (one_hot.cumsum(0) * one_hot).sum(1) - 1
