"""Stored artifacts that affinities are computed from, and the affinities that they determine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

from pipeline.grouping.affinities import Features, Gradient, Transfer
from pipeline.runtime.storage import Artifact

PROMPTS_OF, TASKS = "prompts_of", "tasks"
"""Inputs of an artifact with losses: the task of the prompts (None: zero-shot CLIP), and those of the images."""


@dataclass(frozen=True)
class SingleTasks:
    """Tasks that were trained alone, and the losses of their training images under each other's prompts."""

    adapters: Mapping[str, Artifact] = field(default_factory=dict)
    """Task → its training."""
    losses: tuple[Artifact, ...] = ()
    splits: tuple[Artifact, ...] = ()
    """Splits with the training images; each task is in one of them."""

    def __add__(self, added: Self) -> SingleTasks:
        return SingleTasks(
            {**self.adapters, **added.adapters}, (*self.losses, *added.losses), (*self.splits, *added.splits)
        )


@dataclass(frozen=True)
class GroupingSources:
    """Artifacts from which a grouping is computed."""

    snapshots: Mapping[tuple[str, ...], Artifact] = field(default_factory=dict)
    """Tasks → their gradients on the global prompt, at the same steps."""
    losses: tuple[Artifact, ...] = ()

    @staticmethod
    def of(global_prompt: Artifact | None, single_tasks: SingleTasks | None) -> GroupingSources:
        """Return the sources of a run."""
        snapshots = {tuple(global_prompt.inputs[TASKS]): global_prompt} if global_prompt else {}
        return GroupingSources(snapshots, single_tasks.losses if single_tasks else ())

    def affinities(self, tasks: Sequence[str]) -> Iterator[str]:
        """Yield the names of the affinities that the sources determine for these tasks."""
        measured = {(artifact.inputs[PROMPTS_OF], task) for artifact in self.losses for task in artifact.inputs[TASKS]}
        has_zero_shot = measured.issuperset((None, task) for task in tasks)
        if has_zero_shot and measured.issuperset(product(tasks, tasks)):
            yield Transfer.name
        if {task for names in self.snapshots for task in names}.issuperset(tasks):
            yield Gradient.name
        if has_zero_shot:
            yield Features.name

    @property
    def key_inputs(self) -> dict[str, Any]:
        """The inputs of a grouping's key."""
        return {
            "snapshots": [artifact.key for artifact in self.snapshots.values()],
            "losses": [artifact.key for artifact in self.losses],
        }
