"""What a partition is worth: each objective is one class here, known to all by its name.

A group scores the summed affinities of its pairs times a weight that depends on its number of tasks: that is what the
searches rest on. The config takes its names and help from here, and imports no numpy.
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
    """What it maximizes, for the config's help."""
    remark: ClassVar[str] = ""
    """Beside its name where it is advised."""
    included_in_study: ClassVar[bool] = True
    """Whether the grouping study holds its scores against accuracies."""

    def __init_subclass__(cls) -> None:
        OBJECTIVES[cls.name] = cls()

    @abstractmethod
    def pair_weight(self, size: int) -> float:
        """The factor of each pair's affinity in a group of `size` tasks, above 0."""

    def largest_needed_size(self, min_size: int) -> int | None:
        """Tasks in a group above which some split into groups of at least `min_size` scores no less; None: no limit."""
        return None

    @property
    def rewards_splitting(self) -> float:
        """How much more a pair counts in a group of two than in a group of three; 1 where the size plays no part."""
        return self.pair_weight(2) / self.pair_weight(3)

    def finer(self) -> list[Objective]:
        """The objectives that make smaller groups, the one of the smallest first."""
        others = (other for other in OBJECTIVES.values() if other.rewards_splitting > self.rewards_splitting)
        return sorted(others, key=lambda other: -other.rewards_splitting)


class Sum(Objective):
    """The affinities of all pairs inside a group, each pair once (the MmAP paper)."""

    name = "sum"
    summary = "the pairwise affinities inside groups (the paper)"

    def pair_weight(self, size: int) -> float:
        return 1.0


class Mean(Objective):
    """For every task its mean affinity to the other members of its group, summed over tasks (as TAG scores a group;
    Fifty et al. 2021).

    Groups of four or more single tasks are never needed. A group's score is its number of tasks times the mean of its
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
    """The affinities of all pairs inside a group over the group's number of tasks (Principled-Task-Grouping's sum over
    groups of (1/|G|) sum S)."""

    name = "density"
    summary = "the affinities in a group over its number of tasks, in between"
    included_in_study = False

    def pair_weight(self, size: int) -> float:
        return 1 / size


def get_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        UserError: there is none.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective {name!r} is unknown; choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
