"""Task arithmetic (Ilharco et al., ICLR 2023): the tasks' vectors are added, scaled by one coefficient."""

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


class TaskArithmeticConfig(Section, affects=("method",)):
    """Task arithmetic: the sum of the tasks' updates, scaled."""

    scaling: Annotated[float, Field(gt=0)] = 0.4
    """The sum of the tasks' updates is scaled by this; 0.4 is what Yadav et al. (NeurIPS 2023) take without validation
    images."""


def add_vectors(config: Config, vectors: Sequence[TaskVector]) -> TaskVector:
    """Return the scaled sum of the task vectors."""
    scaling = config.section(TaskArithmeticConfig).scaling
    return {name: scaling * torch.stack([vector[name] for vector in vectors]).sum(0) for name in vectors[0]}


@method("task_arithmetic")
class TaskArithmetic(MergedWeights):
    title = "task arithmetic"
    Options = TaskArithmeticConfig
    variants = {
        "task_arithmetic": Variant("task arithmetic", "task_arithmetic", "multi-task", init_from="full_finetune")
    }
    combine = staticmethod(add_vectors)


@method("task_arithmetic_lora")
class LoraTaskArithmetic(MergedLora):
    title = "task arithmetic of LoRA"
    Options = TaskArithmeticConfig
    section = "task_arithmetic"
    variants = {
        "task_arithmetic_lora": Variant(
            "task arithmetic, LoRA", "task_arithmetic_lora", "multi-task", init_from="clip_lora"
        )
    }
    combine = staticmethod(add_vectors)
