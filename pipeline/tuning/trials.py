"""Results of the trials of a search, and the choice of the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.tuning.points import TrialParams

State = Literal["running", "completed", "pruned", "failed"]
"""Pruned: ended early by the rule; failed: ended by an error."""


@dataclass(frozen=True)
class Trial:
    """One trial. `number`: from 0, in the order of their starts."""

    number: int
    params: TrialParams
    state: State = "running"
    epochs: int = 0
    """Measured epochs; the results below are those after the last of them."""
    validation_accuracy: float = 0.0
    """Plain mean over tasks, 0 to 1; 0 for a trial that failed."""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Task → validation accuracy, 0 to 1."""
    trained_parameters: int = 0
    error: str = ""


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Return the first of the ranked trials that completed all epochs, as the pipeline will."""
    return next(iter(ranked([trial for trial in trials if trial.state == "completed"])), None)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return completed trials first, then pruned, running and failed ones; within each state by descending validation
    accuracy, then fewest parameters, then number."""
    order: dict[State, int] = {"completed": 0, "pruned": 1, "running": 2, "failed": 3}
    # Rounded, since means of the same hits may differ by the order of summation.
    return sorted(
        trials,
        key=lambda t: (order[t.state], -round(t.validation_accuracy, 9), t.trained_parameters, t.number),
    )
