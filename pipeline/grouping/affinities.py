"""How two tasks' gradients are compared: each affinity is one class here, known to all by its name.

The config takes its names and help from here, and imports no numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np

AFFINITIES: dict[str, Affinity] = {}
"""Name → affinity."""


class Affinity(ABC):
    name: ClassVar[str]
    summary: ClassVar[str]
    """What it is of two tasks, for the config's help."""
    one_group_advice: ClassVar[str]
    """What splits tasks that all are in one group, beside constraints and another objective."""
    per_layer_helps: ClassVar[bool] = False
    """Whether that is affinities of each layer's own gradients."""
    dominance_advice: ClassVar[str | None] = None
    """What a task with far longer gradients than the others does to the grouping, and the remedy; None: nothing."""

    def __init_subclass__(cls) -> None:
        AFFINITIES[cls.name] = cls()

    @abstractmethod
    def scaled(self, gradients: np.ndarray) -> np.ndarray:
        """The tasks' gradients (T, P), float64, as vectors whose inner products are the affinities."""


class Dot(Affinity):
    """Inner products (Eq. 8 of the MmAP paper)."""

    name = "dot"
    summary = "the dot product of their gradients (Eq. 8)"
    one_group_advice = "affinity 'cosine' helps if a few snapshots with large gradients decide the signs"
    dominance_advice = "its dot products dominate the grouping. Affinity 'cosine' gives every task the same weight"

    def scaled(self, gradients: np.ndarray) -> np.ndarray:
        return gradients


class Cosine(Affinity):
    """Inner products of gradients of unit length, so that a task with large gradients (a high loss, many classes)
    counts no more than the others. A gradient of zeros has no direction, and stays zero."""

    name = "cosine"
    summary = "their cosine"
    one_group_advice = "per_layer=true helps if one layer's large gradients decide the cosines"
    per_layer_helps = True

    def scaled(self, gradients: np.ndarray) -> np.ndarray:
        import numpy as np

        # The largest value goes first: squares of very small or very large gradients leave float64's range.
        largest = np.abs(gradients).max(axis=1, keepdims=True)
        gradients = gradients / np.where(largest == 0, 1.0, largest)
        length = np.linalg.norm(gradients, axis=1, keepdims=True)
        unit: np.ndarray = gradients / np.where(length == 0, 1.0, length)
        return unit


def get_affinity(name: str) -> Affinity:
    """The affinity of that name.

    Raises:
        UserError: there is none.
    """
    if name not in AFFINITIES:
        raise UserError(f"affinity kind {name!r} is unknown; choose from {', '.join(AFFINITIES)}")
    return AFFINITIES[name]
