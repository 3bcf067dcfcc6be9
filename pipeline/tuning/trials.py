"""What a search's trials measured, and which is the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.tuning.points import Point

State = Literal["running", "whole", "stopped", "failed"]
"""Not ended; trained to its last epoch; ended early by the rule; ended by a fault."""


@dataclass(frozen=True)
class Trial:
    """One point that was tried. `number`: from 0, in the order of their starts."""

    number: int
    point: Point
    state: State = "running"
    epochs: int = 0
    """That were measured; what follows is after the last of them."""
    validation_accuracy: float = 0.0
    """The plain mean over tasks, 0 to 1; 0 for a trial that failed."""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Task → share of its validation images that are classified correctly, 0 to 1."""
    trained_parameters: int = 0
    fault: str = ""


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Of those that trained to their last epoch, as the pipeline will, the first of `ranked`."""
    return next(iter(ranked([trial for trial in trials if trial.state == "whole"])), None)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Whole trials first, then those that were stopped, did not end, or failed; of each, by the highest validation
    accuracy, then the fewest parameters, then the first."""
    order: dict[State, int] = {"whole": 0, "stopped": 1, "running": 2, "failed": 3}
    # Means of the same hits, added in another order, are equal.
    return sorted(
        trials,
        key=lambda of: (order[of.state], -round(of.validation_accuracy, 9), of.trained_parameters, of.number),
    )
