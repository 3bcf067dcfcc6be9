"""Temperature scaling (Guo et al. 2017): logits are divided by what makes held-out labels most likely."""

from __future__ import annotations

import math

import torch

from pipeline.errors import UserError

BOUNDS = (1e-3, 1e3)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, task: str) -> float:
    """The temperature of the least mean negative log-likelihood of labels (N,) under logits (N, C) / temperature.

    Raises:
        UserError: there is none: every image's own class is the most probable (the colder, the better), or its logit
            is on average no higher than the others' (the hotter, the better).
    """
    logits = logits.double()
    own = logits.gather(1, labels[:, None])
    why = None
    if (own >= logits).all():
        why = "all of them are classified correctly"
    elif (own[:, 0] - logits.mean(dim=1)).mean() <= 0:
        why = "their classes are no more probable than others"
    if why:
        raise UserError(
            f"no temperature can be fitted to {len(labels)} images of task {task!r}: {why}; give more images that were "
            "not trained on"
        )

    from scipy.optimize import minimize_scalar  # every prediction imports this module, and few calibrate

    # Convex in 1 / temperature, so with one minimum in its logarithm too.
    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, labels, math.exp(log_temperature))

    bounds = tuple(map(math.log, BOUNDS))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """Mean over the images, in nats."""
    return torch.nn.functional.cross_entropy(logits / temperature, labels).item()
