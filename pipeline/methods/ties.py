"""TIES-Merging (Yadav et al., NeurIPS 2023): trims each task vector to its largest values, elects a sign for each
parameter, and averages the values of that sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.config.fields import Section
from pipeline.lazy_torch import torch
from pipeline.methods.merging import MergedLora, MergedWeights, TaskVector
from pipeline.methods.method import Variant, method

if TYPE_CHECKING:
    from pipeline.config import Config


class TiesConfig(Section, affects=("method",)):
    """TIES-Merging: trims the tasks' updates, elects signs, and averages what agrees."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of each task's update that is kept: the values of the largest magnitude."""
    scaling: Annotated[float, Field(gt=0)] = 1.0
    """The merged update is scaled by this; 1 is what the authors take without validation images."""


def trim_elect_merge(config: Config, vectors: Sequence[TaskVector]) -> TaskVector:
    """Return the task vectors merged by TIES (the paper's Algorithm 1). Where the values of both signs weigh the same,
    the result is 0."""
    options = config.section(TiesConfig)
    thresholds = [_smallest_kept(vector, options.density) for vector in vectors]
    merged = {}
    for name in vectors[0]:
        trimmed = torch.stack([vector[name] * (vector[name].abs() >= t) for vector, t in zip(vectors, thresholds)])
        agrees = (trimmed != 0) & (trimmed.sign() == trimmed.sum(0).sign())
        merged[name] = options.scaling * (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return merged


def _smallest_kept(vector: TaskVector, density: float) -> torch.Tensor:
    """Return the magnitude of the smallest value to keep of a whole task vector."""
    magnitudes = torch.cat([value.abs().flatten() for value in vector.values()])
    num_kept = max(1, int(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) + 1 - num_kept).values


@method("ties")
class Ties(MergedWeights):
    title = "TIES"
    Options = TiesConfig
    variants = {"ties": Variant("TIES", "ties", "multi-task", init_from="full_finetune")}
    combine = staticmethod(trim_elect_merge)


@method("ties_lora")
class LoraTies(MergedLora):
    title = "TIES of LoRA"
    Options = TiesConfig
    section = "ties"
    variants = {"ties_lora": Variant("TIES, LoRA", "ties_lora", "multi-task", init_from="clip_lora")}
    combine = staticmethod(trim_elect_merge)
