"""Losses and biases of tasks in which an image may have several labels.

Each class is a yes or no of its own: an image has it with the probability sigmoid(l), where the logit l is the cosine
similarity over CLIP's temperature, as in single-label tasks, plus a bias of the task. The loss of an image is the sum
of the classes' binary cross-entropies, the negative log-likelihood of its labels, whose gradient by the logits is
probability minus truth, as that of the softmax cross-entropy; so learning rates keep their meaning.

Without a bias every class of every image is nearly certain, as all of CLIP's similarities are positive: SigLIP (Zhai et
al., 2023, Eq. 1) trains one for that reason. Here it is a constant: that with which the frozen CLIP's mean probability
over the training images and classes of the task is the frequency of their labels, the prior (Lin et al., Focal Loss,
2017, section 3.3, start a detector's bias so). It changes neither rankings nor average precisions, and no method's
number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def label_tensor(labels: Sequence[int] | Sequence[Sequence[int]], num_classes: int) -> torch.Tensor:
    """Return labels of N images as a tensor: int64 (N,) of one label each, float32 (N, C) of 0 and 1 of lists."""
    if not labels or isinstance(labels[0], int):
        return torch.tensor(labels)
    targets = torch.zeros(len(labels), num_classes)
    for row, image_labels in zip(targets, labels):
        row[torch.tensor(image_labels)] = 1
    return targets


def image_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the losses (B,) in nats of logits (B, C): cross-entropies with labels (B,), sums of binary cross-entropies
    with labels (B, C) of 0 and 1."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(dim=1)


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of `image_losses`."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")


def num_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the number of images whose most probable class is their label, or one of their labels."""
    predicted = logits.argmax(1)
    return (predicted == labels if labels.dim() == 1 else labels.gather(1, predicted[:, None])).sum()


def prior_bias(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the bias b with which the mean of sigmoid(logits + b) is that of labels (N, C) of 0 and 1.

    Args:
        logits: of the frozen CLIP, without bias (N, C).
    """
    logits, prior = logits.double().cpu(), labels.double().mean().item()
    if prior == 1:  # every image has every class, so there is nothing to learn
        return 0.0
    log_odds = math.log(prior / (1 - prior))
    low, high = log_odds - logits.max().item(), log_odds - logits.min().item()
    for _ in range(100):  # halvings, beyond the precision of float64
        middle = (low + high) / 2
        low, high = (middle, high) if (logits + middle).sigmoid().mean().item() < prior else (low, middle)
    return (low + high) / 2
