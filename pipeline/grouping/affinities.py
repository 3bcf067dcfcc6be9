"""Affinities of two tasks, and similarities of two gradients: registries with one class for each.

The config takes names and help texts from here, without importing numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np

AFFINITIES: dict[str, Affinity] = {}
"""Name → affinity, the default first."""
SIMILARITIES: dict[str, Similarity] = {}
"""Name → similarity of gradients, the default first."""


class Advice:
    """Help and advice about an affinity, or about a similarity of gradients."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """Definition for two tasks, in the config's help."""
    one_group_advice: ClassVar[str]
    """How to split a single group, beside constraints and another objective."""
    conflict: ClassVar[str] = "no pairwise affinity is positive"
    """Reason for groups of single tasks."""
    per_layer_helps: ClassVar[bool] = False
    """Whether affinities per layer help with that."""
    dominance_advice: ClassVar[str | None] = None
    """Effect of a task with much larger gradients on the grouping, and the remedy; None if there is no effect."""


class Affinity(Advice):
    """A kind of affinity; `pipeline.grouping.affinity`, `transfer` and `features` compute them."""

    resampled: ClassVar[str]
    """What the bootstrap draws from."""

    def __init_subclass__(cls) -> None:
        AFFINITIES[cls.name] = cls()


class Transfer(Affinity):
    """Gain of two tasks from each other's prompts."""

    name = "transfer"
    summary = (
        "what each gains from prompts that were trained on the other alone: zero-shot loss minus loss on its training "
        "images, averaged over both directions"
    )
    conflict = "no two tasks gain from each other's prompts (no pairwise affinity is positive)"
    one_group_advice = "with --grouping.affinity features not all affinities can be positive"
    resampled = "training images"


class Gradient(Affinity):
    """Similarity of the tasks' gradients on the global prompt; its advice is that of the similarity."""

    name = "gradient"
    summary = "the similarity of their gradients on the global prompt"
    one_group_advice = ""
    resampled = "snapshots"


class Features(Affinity):
    """Cosine of the tasks' mean image features."""

    name = "features"
    summary = "the cosine of their mean frozen image features, after subtraction of the mean over tasks"
    one_group_advice = "--grouping.affinity transfer measures what tasks gain from each other, not how similar they are"
    resampled = "training images"


class Similarity(Advice, ABC):
    """Inner product of two tasks' gradients, after a normalization."""

    divides_by_rms: ClassVar[bool] = False
    """Whether each parameter's gradients are first divided by their root mean square over snapshots and tasks."""

    def __init_subclass__(cls) -> None:
        SIMILARITIES[cls.name] = cls()

    @abstractmethod
    def normalize(self, gradients: np.ndarray) -> np.ndarray:
        """Return the tasks' gradients (T, P), float64, as vectors whose inner products are the affinities."""


class Dot(Similarity):
    """Inner products (Eq. 8 of the MmAP paper)."""

    name = "dot"
    summary = "dot product (the paper's Eq. 8)"
    one_group_advice = (
        "--grouping.gradient_similarity cosine helps if a few snapshots with large gradients determine the signs"
    )
    dominance_advice = (
        "its dot products dominate the grouping. --grouping.gradient_similarity cosine gives every task the same weight"
    )

    def normalize(self, gradients: np.ndarray) -> np.ndarray:
        return gradients


class Cosine(Similarity):
    """Inner products of gradients of unit length, so that a task with large gradients (a high loss, many classes)
    has the same weight as other tasks. A zero gradient has no direction, and stays zero."""

    name = "cosine"
    summary = "cosine"
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


class AdamCosine(Cosine):
    """Cosine of gradients as Adam scales them: each parameter's divided by their root mean square.

    Adam divides by the root of a moving average of squares, which for β₂ → 1 is their plain mean over all steps. Here
    it is the mean over snapshots and tasks. The square of the tasks' sum, which Adam would see, is near zero exactly
    where tasks conflict, and dividing by it would let these parameters decide the cosine.
    """

    name = "adam_cosine"
    summary = "cosine after dividing each parameter's gradients by their root mean square, as Adam does"
    one_group_advice = "--grouping.affinity transfer has a natural zero: pairs that lose by each other are negative"
    per_layer_helps = False
    divides_by_rms = True


def get_affinity(name: str) -> Affinity:
    """Return the affinity of a name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in AFFINITIES:
        raise UserError(f"affinity {name!r} is unknown; choose from {', '.join(AFFINITIES)}")
    return AFFINITIES[name]


def get_similarity(name: str) -> Similarity:
    """Return the similarity of gradients of a name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in SIMILARITIES:
        raise UserError(f"gradient similarity {name!r} is unknown; choose from {', '.join(SIMILARITIES)}")
    return SIMILARITIES[name]


def get_advice(affinity: str, similarity: str | None) -> Advice:
    """Return the advice for a grouping by this affinity; `similarity` counts for gradients only.

    Raises:
        UserError: a name is unknown.
    """
    kind = get_affinity(affinity)
    return get_similarity(similarity or "") if kind.name == Gradient.name else kind
