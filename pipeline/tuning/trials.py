"""What is known of a search's trials: a JSON file each, from which an interrupted search goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.files import make_folder, read_json, write_json
from pipeline.runtime.storage import Storage
from pipeline.tuning.points import Point

State = Literal["running", "whole", "stopped", "failed"]
"""Not ended; trained to its last epoch; ended early by the rule; ended by a fault."""


@dataclass(frozen=True)
class Epoch:
    """What a trial measured after an epoch, from 1. `accuracy`: task → share of its validation images that are
    classified correctly, 0 to 1; `average`: their plain mean."""

    epoch: int
    average: float
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """One point that was tried. `number`: from 0, in the order of their starts."""

    number: int
    point: Point
    state: State = "running"
    epochs: tuple[Epoch, ...] = ()
    trained_parameters: int = 0
    fault: str = ""

    @property
    def validation_accuracy(self) -> float:
        """After its last epoch, 0 to 1; 0 for one that failed."""
        return self.epochs[-1].average if self.epochs and self.state != "failed" else 0.0


@dataclass(frozen=True)
class TrialRecords:
    """The trials of a search in its folder."""

    storage: Storage
    folder: Path

    def write(self, trial: Trial) -> None:
        """Raises: UserError: the disk is full."""
        path = make_folder(self.folder) / f"{trial.number}.json"
        write_json(path, asdict(trial))
        self.storage.send(path)

    def read(self) -> list[Trial]:
        """By number."""
        found = [_trial(read_json(path)) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda trial: trial.number)


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


def _trial(values: dict[str, Any]) -> Trial:
    return Trial(**{**values, "epochs": tuple(Epoch(**of) for of in values["epochs"])})
