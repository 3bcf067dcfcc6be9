"""The paper's own figures ("MmAP", AAAI 2024): Tables 1, 2 and 3, to stand beside what this library measures.

Test accuracy in %, as printed: mean ± deviation over 3 seeds, CLIP ViT-B/16; 10 % and 20 % of Office-Home are 6 and
12 images a class, 1 % and 2 % of MiniDomainNet are 3 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

PAPER_METHODS = (
    "zero_shot",
    "full",
    "coop",
    "vpt",
    "maple",
    "full_mt",
    "clip_adapter",
    "bitfit_mt",
    "coop_mt",
    "vpt_mt",
    "maple_mt",
    "joint_prompts_mt",
    "mlp_prompts_mt",
    "mmap_task_only",
    "mmap_group_only",
    "mmap_random_groups",
    "all_in_one",
    "grouped",
)
"""Of the paper's tables and its Figure 4."""

# The tables' columns, in the paper's order, as names of versions.
_COLUMNS = "zero_shot full coop vpt maple full_mt clip_adapter bitfit_mt coop_mt vpt_mt maple_mt grouped".split()
_AVERAGE = "Average"

_TABLE_1 = {
    6: """
Art      82.9     84.9±0.9 84.2±0.3 83.7±0.5 84.4±0.5 85.8±0.8 82.3±0.2 79.1±0.1 84.3±0.8 84.0±0.3 84.8±0.6 85.7±0.5
Clipart  68.3     75.4±0.3 72.6±1.1 70.5±0.3 72.8±0.6 76.3±1.0 71.7±0.2 67.8±1.4 73.0±0.1 72.4±0.6 73.3±0.3 76.3±0.6
Product  89.3     91.6±0.3 92.4±0.2 90.9±0.2 92.2±0.1 92.1±1.3 90.8±0.2 86.7±1.5 92.7±0.2 91.7±0.6 92.7±0.4 92.9±0.5
Real     90.1     89.8±0.8 90.5±0.3 89.2±0.6 90.4±0.4 90.2±1.3 89.2±0.2 85.9±0.5 90.7±0.6 90.6±0.1 90.8±0.3 90.9±0.9
Average  82.6     85.4±0.6 84.9±0.5 83.6±0.4 85.0±0.4 86.1±1.1 83.5±0.2 79.9±0.9 85.2±0.4 84.7±0.4 85.4±0.4 86.5±0.6
    """,
    12: """
Art      84.6     87.1±1.2 85.6±0.6 85.4±0.6 85.9±0.4 87.4±0.8 83.2±1.1 81.7±0.6 86.0±0.2 85.9±0.3 86.3±0.4 88.2±0.7
Clipart  68.2     77.9±0.1 74.5±0.6 71.4±0.4 74.2±0.5 78.8±1.0 75.4±0.1 69.6±1.7 73.9±0.6 72.3±0.6 74.2±0.6 77.1±0.6
Product  89.5     91.9±1.3 93.0±0.4 91.5±0.6 92.8±0.6 93.0±1.0 91.7±0.9 87.2±1.4 92.9±0.4 92.1±0.2 92.9±0.2 93.5±0.5
Real     90.7     89.8±0.6 91.8±0.3 90.9±0.1 91.8±0.4 91.9±0.4 90.6±0.2 86.7±1.0 92.0±0.3 91.7±0.3 92.0±0.5 92.4±0.3
Average  83.3     86.7±0.8 86.2±0.5 84.8±0.4 86.2±0.5 87.8±0.8 85.2±0.5 85.5±0.4 86.3±0.4 85.5±0.4 86.4±0.4 87.8±0.5
    """,
}
_TABLE_2 = {
    3: """
Clipart  82.6     82.1±1.5 82.7±0.1 82.3±0.1 82.9±0.2 82.8±0.9 82.6±0.1 78.9±0.4 83.4±0.4 83.0±0.3 83.4±0.4 83.9±0.3
Painting 82.3     81.8±0.7 81.8±0.3 81.7±0.3 82.0±0.2 81.5±0.6 80.4±0.3 74.7±0.4 82.3±0.2 81.9±0.6 82.5±0.4 83.5±0.2
Real     91.2     89.1±0.5 91.9±0.3 91.6±0.2 92.0±0.3 89.1±0.6 90.9±0.2 84.2±0.3 91.3±0.1 90.1±0.2 91.4±0.1 92.2±0.2
Sketch   79.9     77.0±0.7 77.1±0.2 78.5±0.3 78.5±0.4 77.2±1.0 78.3±0.6 72.4±0.5 79.2±0.2 78.6±0.6 79.1±0.2 79.8±0.7
Average  84.0     82.5±0.9 83.4±0.2 83.5±0.2 83.9±0.3 82.7±0.8 83.0±0.3 77.6±0.4 84.0±0.3 83.4±0.4 84.1±0.3 84.9±0.4
    """,
    6: """
Clipart  82.6     82.2±1.3 83.8±0.1 83.5±0.3 83.8±0.4 82.8±0.9 83.1±0.1 81.5±0.2 84.7±0.3 83.8±0.5 84.5±0.3 85.7±0.4
Painting 82.3     82.1±1.4 82.5±0.2 82.4±0.1 82.7±0.2 82.1±0.7 81.5±0.3 76.8±0.2 83.2±0.2 82.2±0.1 83.6±0.4 85.0±0.2
Real     91.2     89.2±0.8 91.9±0.1 91.5±0.1 91.6±0.2 89.3±0.5 90.6±0.2 85.9±0.1 91.7±0.1 90.5±0.1 91.9±0.2 92.3±0.1
Sketch   80.0     77.4±0.5 79.0±0.5 79.6±0.2 79.9±0.3 77.7±1.0 78.7±0.6 74.8±0.2 80.1±0.4 79.0±0.2 80.5±0.3 81.5±0.2
Average  84.0     82.7±1.0 84.3±0.2 84.2±0.2 84.5±0.3 83.0±0.8 83.4±0.3 79.8±0.2 84.9±0.4 83.9±0.3 85.1±0.3 86.1±0.2
    """,
}

# Our copy of the paper lost the check marks: which row is which follows from the differences that its text names.
_TABLE_3 = {
    6: {
        "mmap_task_only": 85.76,
        "mmap_group_only": 86.05,
        "mmap_random_groups": 85.80,
        "grouped": 86.48,
        "all_in_one": 86.09,
    },
    12: {
        "mmap_task_only": 86.97,
        "mmap_group_only": 87.29,
        "mmap_random_groups": 86.92,
        "grouped": 87.77,
        "all_in_one": 87.36,
    },
}

TRAINED_PARAMETERS = {
    "full": 598.48,
    "coop": 0.04,
    "vpt": 0.68,
    "maple": 19.2,
    "full_mt": 149.62,
    "clip_adapter": 0.53,
    "bitfit_mt": 0.17,
    "coop_mt": 0.01,
    "vpt_mt": 0.17,
    "maple_mt": 4.8,
    "grouped": 0.13,
}
"""Version → millions, for all four tasks together; the same in Tables 1 and 2, which print none for zero-shot."""


class Printed(NamedTuple):
    """In %. `deviation`: over 3 seeds, None for zero-shot; an average's is about the mean of its tasks'."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class PaperResults:
    """One data set's results; every mapping begins with the number of shots.

    The paper counts CLIP-Adapter among its multi-task methods, with one adapter a task: our `clip_adapter`.
    """

    data_set: str
    table: str
    accuracy: dict[int, dict[str, dict[str, Printed]]]
    """Shots → version → task → printed."""
    average: dict[int, dict[str, Printed]]
    """Shots → version → printed, which need not be the mean of the tasks: `disagreeing_averages`."""
    framework: dict[int, dict[str, float]]
    """Table 3: shots → version → average accuracy in %; empty for MiniDomainNet."""

    def mean_of_tasks(self, shots: int, method: str) -> float:
        tasks = self.accuracy[shots][method].values()
        return sum(printed.mean for printed in tasks) / len(tasks)

    def disagreeing_averages(self, shots: int) -> dict[str, tuple[float, float]]:
        """Version → (printed average, mean of its printed tasks), where rounding cannot explain the difference.

        Each of the two is off by less than 0.05 from what the paper's authors had.
        """
        pairs = {
            method: (printed.mean, self.mean_of_tasks(shots, method))
            for method, printed in self.average.get(shots, {}).items()
        }
        return {method: pair for method, pair in pairs.items() if abs(pair[0] - pair[1]) > 0.1 - 1e-9}


def paper_results_for(tasks: Sequence[str]) -> PaperResults | None:
    """What the paper has for a data set of these tasks, under the names given here; None for any other data set.

    Known by the tasks' names alone, in any order, whatever their case, spaces and underscores: DomainNet with the
    tasks of MiniDomainNet is taken for MiniDomainNet.
    """
    names = {_plain(task): task for task in tasks}
    for results in (OFFICE_HOME, MINI_DOMAINNET):
        printed_names = next(iter(next(iter(results.accuracy.values())).values()))
        if len(names) == len(tasks) and set(names) == {_plain(task) for task in printed_names}:
            accuracy = {
                shots: {
                    method: {names[_plain(task)]: printed for task, printed in of_tasks.items()}
                    for method, of_tasks in methods.items()
                }
                for shots, methods in results.accuracy.items()
            }
            return replace(results, accuracy=accuracy)
    return None


def _plain(task: str) -> str:
    plain = task.lower().replace(" ", "").replace("_", "")
    return "real" if plain == "realworld" else plain


def _read(data_set: str, table: str, texts: dict[int, str], framework: dict[int, dict[str, float]]) -> PaperResults:
    accuracy: dict[int, dict[str, dict[str, Printed]]] = {}
    for shots, text in texts.items():
        accuracy[shots] = {method: {} for method in _COLUMNS}
        for line in text.strip().splitlines():
            row, *cells = line.split()
            for method, cell in zip(_COLUMNS, cells, strict=True):
                mean, _, deviation = cell.partition("±")
                accuracy[shots][method][row] = Printed(float(mean), float(deviation) if deviation else None)
    average = {
        shots: {method: rows.pop(_AVERAGE) for method, rows in methods.items()} for shots, methods in accuracy.items()
    }
    return PaperResults(data_set, table, accuracy, average, framework)


OFFICE_HOME = _read("Office-Home", "Table 1", _TABLE_1, _TABLE_3)
MINI_DOMAINNET = _read("MiniDomainNet", "Table 2", _TABLE_2, {})
