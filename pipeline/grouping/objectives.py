"""Objectives that score a partition: a registry with one class for each.

A group scores the summed affinities of its pairs times a weight that depends on its number of tasks: all searches rely
on that. The config takes names and help texts from here, without importing numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pipeline.errors import UserError

OBJECTIVES: dict[str, Objective] = {}
"""Name → objective."""


class Objective(ABC):
    name: ClassVar[str]
    summary: ClassVar[str]
    """The maximized quantity, in the config's help."""
    remark: ClassVar[str] = ""
    """Appended to its name in advice."""

    def __init_subclass__(cls) -> None:
        OBJECTIVES[cls.name] = cls()

    @abstractmethod
    def pair_weight(self, size: int) -> float:
        """Return the factor of each pair's affinity in a group of `size` tasks, above 0."""

    def largest_needed_size(self, min_size: int) -> int | None:
        """Return the size above which some split into groups of at least `min_size` scores no less; None: no limit."""
        return None

    @property
    def split_reward(self) -> float:
        """Weight of a pair in a group of two relative to a group of three; 1 if the size does not matter."""
        return self.pair_weight(2) / self.pair_weight(3)

    def finer_objectives(self) -> list[Objective]:
        """Return the objectives that make smaller groups, smallest groups first."""
        finer = (objective for objective in OBJECTIVES.values() if objective.split_reward > self.split_reward)
        return sorted(finer, key=lambda objective: -objective.split_reward)


class Sum(Objective):
    """Sum of the affinities inside a group, each pair once (the MmAP paper)."""

    name = "sum"
    summary = "the pairwise affinities inside groups (the paper)"

    def pair_weight(self, size: int) -> float:
        return 1.0


class Mean(Objective):
    """Sum over tasks of the mean affinity to the other members of the group (TAG's score; Fifty et al. 2021).

    Groups of four or more tasks are never needed. A group's score is its number of tasks times the mean of its
    pairs' affinities; averaged over all ways to split it into two parts of given sizes, both at least 2, the parts'
    scores add up to the same, so that some split scores no less. With a smallest size m ≥ 2 the same holds from 2 m
    tasks on.
    """

    name = "mean"
    summary = "each task's mean affinity to its group (TAG), which favors groups of two and three"
    remark = " (groups of two or three)"

    def pair_weight(self, size: int) -> float:
        return 2 / max(size - 1, 1)  # each pair counts for both of its tasks

    def largest_needed_size(self, min_size: int) -> int:
        return 2 * max(min_size, 2) - 1


class Density(Objective):
    """Sum of the affinities inside a group divided by its number of tasks (Principled-Task-Grouping: sum over groups of
    (1/|G|) sum S)."""

    name = "density"
    summary = "the affinities in a group divided by its number of tasks, in between"

    def pair_weight(self, size: int) -> float:
        return 1 / size


def get_objective(name: str) -> Objective:
    """Return the objective of a name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective {name!r} is unknown; choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
