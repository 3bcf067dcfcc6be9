"""Reported results of the paper's tables (paper_results.yaml), for comparison with measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_AVERAGE = "Average"
PAPER_METHODS: tuple[str, ...] = tuple(_FILE["methods"])
TRAINED_PARAMETERS: dict[str, float] = _FILE["trained_parameters"]
"""Variant → millions."""


class Printed(NamedTuple):
    """Accuracy in %. `deviation`: over 3 seeds, None for zero-shot; an average's is about the mean of its tasks'."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class PaperResults:
    """Results of one data set; the outer key of every mapping is the number of shots.

    The paper counts CLIP-Adapter among its multi-task methods, with one adapter a task: our `clip_adapter`.
    """

    data_set: str
    table: str
    accuracy: dict[int, dict[str, dict[str, Printed]]]
    """Shots → variant → task → printed."""
    average: dict[int, dict[str, Printed]]
    """Shots → variant → printed, which may differ from the mean of the tasks: `inconsistent_averages`."""
    framework: dict[int, dict[str, float]]
    """Table 3: shots → variant → average accuracy in %; empty for MiniDomainNet."""

    def task_mean(self, shots: int, method: str) -> float:
        tasks = self.accuracy[shots][method].values()
        return sum(printed.mean for printed in tasks) / len(tasks)

    def inconsistent_averages(self, shots: int) -> dict[str, tuple[float, float]]:
        """Return variant → (printed average, mean of its printed tasks) where rounding cannot explain the difference.

        Rounding changes each of the two by less than 0.05.
        """
        pairs = {
            method: (printed.mean, self.task_mean(shots, method))
            for method, printed in self.average.get(shots, {}).items()
        }
        return {method: pair for method, pair in pairs.items() if abs(pair[0] - pair[1]) > 0.1 - 1e-9}


def paper_results_for(tasks: Sequence[str]) -> PaperResults | None:
    """Return the paper's results for a data set with these tasks, under these names; None for any other data set.

    Recognized by the tasks' names alone, ignoring order, case, spaces and underscores: DomainNet with the tasks of
    MiniDomainNet is taken for MiniDomainNet.
    """
    names = {_normalize(task): task for task in tasks}
    for results in (OFFICE_HOME, MINI_DOMAINNET):
        printed_names = next(iter(next(iter(results.accuracy.values())).values()))
        if len(names) == len(tasks) and set(names) == {_normalize(task) for task in printed_names}:
            accuracy = {
                shots: {
                    method: {names[_normalize(task)]: printed for task, printed in by_task.items()}
                    for method, by_task in methods.items()
                }
                for shots, methods in results.accuracy.items()
            }
            return replace(results, accuracy=accuracy)
    return None


def _normalize(task: str) -> str:
    normalized = task.lower().replace(" ", "").replace("_", "")
    return "real" if normalized == "realworld" else normalized


def _read(data_set: Mapping[str, Any]) -> PaperResults:
    accuracy: dict[int, dict[str, dict[str, Printed]]] = {
        shots: {
            method: {row: _printed(cells[column]) for row, cells in rows.items()}
            for column, method in enumerate(_FILE["columns"])
        }
        for shots, rows in data_set["accuracy"].items()
    }
    average = {
        shots: {method: rows.pop(_AVERAGE) for method, rows in methods.items()} for shots, methods in accuracy.items()
    }
    return PaperResults(data_set["name"], data_set["table"], accuracy, average, data_set["framework"])


def _printed(cell: float | str) -> Printed:
    mean, _, deviation = str(cell).partition("±")
    return Printed(float(mean), float(deviation) if deviation else None)


OFFICE_HOME, MINI_DOMAINNET = map(_read, _FILE["data_sets"])
