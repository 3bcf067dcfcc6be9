"""Temperature scaling (Guo et al. 2017): logits are divided by a temperature fitted to held-out labels."""

from __future__ import annotations

import math

import torch

from pipeline.errors import UserError

BOUNDS = (1e-3, 1e3)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, task: str) -> float:
    """Return the temperature that minimizes the mean NLL of labels (N,) under logits (N, C) / temperature.

    Raises:
        UserError: there is no minimum: every image is classified correctly (the lower, the better), or the logit of the
            correct class is on average not above the mean logit (the higher, the better).
    """
    logits = logits.double()
    label_logits = logits.gather(1, labels[:, None])
    problem = None
    if (label_logits >= logits).all():
        problem = "all of them are classified correctly"
    elif (label_logits[:, 0] - logits.mean(dim=1)).mean() <= 0:
        problem = "their classes are no more probable than other classes"
    if problem:
        raise UserError(
            f"cannot fit the temperature of task {task!r} to {len(labels)} images: {problem}; use more images that are "
            "not in the training set"
        )

    from scipy.optimize import minimize_scalar  # imported late: every prediction imports this module

    # Convex in 1 / temperature, hence unimodal in log(temperature).
    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, labels, math.exp(log_temperature))

    bounds = tuple(map(math.log, BOUNDS))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """Return the mean negative log-likelihood over the images, in nats."""
    return torch.nn.functional.cross_entropy(logits / temperature, labels).item()
