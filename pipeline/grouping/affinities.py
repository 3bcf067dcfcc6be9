"""Affinities between two tasks' gradients: a registry with one class for each.

The config takes names and help texts from here, without importing numpy.
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
    """Definition for two tasks, in the config's help."""
    one_group_advice: ClassVar[str]
    """How to split a single group, beside constraints and another objective."""
    per_layer_helps: ClassVar[bool] = False
    """Whether affinities per layer help with that."""
    dominance_advice: ClassVar[str | None] = None
    """Effect of a task with much larger gradients on the grouping, and the remedy; None if there is no effect."""

    def __init_subclass__(cls) -> None:
        AFFINITIES[cls.name] = cls()

    @abstractmethod
    def normalize(self, gradients: np.ndarray) -> np.ndarray:
        """Return the tasks' gradients (T, P), float64, as vectors whose inner products are the affinities."""


class Dot(Affinity):
    """Inner products (Eq. 8 of the MmAP paper)."""

    name = "dot"
    summary = "the dot product of their gradients (Eq. 8)"
    one_group_advice = "--grouping.affinity cosine helps if a few snapshots with large gradients determine the signs"
    dominance_advice = (
        "its dot products dominate the grouping. --grouping.affinity cosine gives every task the same weight"
    )

    def normalize(self, gradients: np.ndarray) -> np.ndarray:
        return gradients


class Cosine(Affinity):
    """Inner products of gradients of unit length, so that a task with large gradients (a high loss, many classes)
    has the same weight as other tasks. A zero gradient has no direction, and stays zero."""

    name = "cosine"
    summary = "their cosine"
    one_group_advice = "--grouping.per_layer true helps if one layer's large gradients determine the cosines"
    per_layer_helps = True

    def normalize(self, gradients: np.ndarray) -> np.ndarray:
        import numpy as np

        # Divide by the largest value first: squares of very small or very large gradients leave float64's range.
        largest = np.abs(gradients).max(axis=1, keepdims=True)
        gradients = gradients / np.where(largest == 0, 1.0, largest)
        length = np.linalg.norm(gradients, axis=1, keepdims=True)
        unit: np.ndarray = gradients / np.where(length == 0, 1.0, length)
        return unit


def get_affinity(name: str) -> Affinity:
    """Return the affinity of a name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in AFFINITIES:
        raise UserError(f"affinity kind {name!r} is unknown; choose from {', '.join(AFFINITIES)}")
    return AFFINITIES[name]
