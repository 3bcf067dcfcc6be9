"""The options of the methods beside MmAP; the defaults are their authors'."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import NonNegative, PositiveInt, Section, Share

Method = Literal[
    "coop",
    "vpt",
    "maple",
    "clip_adapter",
    "joint_prompts",
    "mlp_prompts",
    "linear_probe",
    "lamm",
    "promptsrc",
    "bitfit",
    "full",
    "clip_lora",
    "coop_mt",
    "vpt_mt",
    "maple_mt",
    "clip_adapter_mt",
    "joint_prompts_mt",
    "mlp_prompts_mt",
    "linear_probe_mt",
    "lamm_mt",
    "promptsrc_mt",
    "bitfit_mt",
    "full_mt",
    "clip_lora_mt",
    "mvlpt",
    "mvlpt_mt",
    "softcpt",
    "hipro",
    "mmap_task_only",
    "mmap_group_only",
    "mmap_random_groups",
]
METHODS = ("zero_shot", *typing.get_args(Method), "all_in_one", "grouped")
"""The names of registry.VERSIONS, in its order, without the torch that it imports."""


class OwnTraining(Section):
    """Where a method's training differs from the section `training`; null: it does not."""

    epochs: PositiveInt | None = None
    """Instead of training.epochs."""
    batch_size: PositiveInt | None = None
    """Instead of training.batch_size."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """Instead of training.optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Instead of training.learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Instead of training.weight_decay."""


class MethodConfig(Section):
    """Options of one method beside MmAP; the defaults are its authors'."""

    training: OwnTraining = OwnTraining()
    """Where its training differs from `training`: as its authors train it. configs/paper_protocol.yaml trains all
    methods alike."""

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        """Giving one value of a method's training leaves its others as they are."""
        if isinstance(values, dict) and isinstance(values.get("training"), dict):
            defaults = cls.model_fields["training"].default.model_dump()
            values = {**values, "training": {**defaults, **values["training"]}}
        return values


class CoopConfig(MethodConfig):
    context_length: PositiveInt = 16
    """Context vectors, which take the place of the template's words before the class name."""
    training: OwnTraining = OwnTraining(epochs=200, batch_size=32, learning_rate=0.002)


class VptConfig(MethodConfig):
    prompt_length: PositiveInt = 8
    """Prompt vectors in each layer of the image tower."""
    training: OwnTraining = OwnTraining(epochs=5, batch_size=4, learning_rate=0.0025)


class MapleConfig(MethodConfig):
    prompt_length: PositiveInt = 2
    """Text prompt vectors in a layer; those of the first layer start as the template's first words."""
    depth: PositiveInt = 9
    """Layers, from the first, that get new prompts."""
    training: OwnTraining = OwnTraining(epochs=5, batch_size=4, learning_rate=0.0035)


class ClipAdapterConfig(MethodConfig):
    reduction: PositiveInt = 4
    """How much narrower the bottleneck is than the image feature."""
    ratio: Share = 0.2
    """Share of the bottleneck's output in the adapted feature."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class JointPromptsConfig(MethodConfig):
    prompt_length: PositiveInt = 8
    """Prompt vectors in each layer of each tower."""


class MlpPromptsConfig(MethodConfig):
    prompt_length: PositiveInt = 4
    """Prompt vectors in each layer."""
    source_width: PositiveInt = 256
    """Width of the source prompt that the linear layers map to both towers."""


class ClipLoraConfig(MethodConfig):
    rank: PositiveInt = 2
    """Rank of the update of each query, key and value matrix."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """The update is scaled by alpha over the rank's root."""
    training: OwnTraining = OwnTraining(
        epochs=250, batch_size=32, optimizer="adamw", learning_rate=2e-4, weight_decay=0.01
    )


class LinearProbeConfig(MethodConfig):
    training: OwnTraining = OwnTraining(epochs=20, batch_size=32, optimizer="adamw", learning_rate=1e-3)


class LammConfig(MethodConfig):
    embedding_weight: NonNegative = 1.0
    """Weight of the squared distance of the trained embeddings from their start."""
    text_weight: NonNegative = 1.0
    """Weight of the cosine distance from the frozen text features."""
    logits_weight: NonNegative = 0.05
    """Weight of the divergence from the frozen CLIP's logits."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class PromptSrcConfig(MethodConfig):
    prompt_length: PositiveInt = 4
    """Prompt vectors in a layer of each tower; the first text layer's start as the template's first words."""
    depth: PositiveInt = 9
    """Layers, from the first, that get new prompts."""
    image_weight: NonNegative = 10.0
    """Weight of the mean absolute distance from the frozen image features."""
    text_weight: NonNegative = 25.0
    """Weight of the mean absolute distance from the frozen text features."""
    logits_weight: NonNegative = 1.0
    """Weight of the divergence from the frozen CLIP's logits."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=4, learning_rate=0.0025)


class MvlptConfig(MethodConfig):
    prompt_length: PositiveInt = 4
    """Context vectors, and prompt vectors in each layer of the image tower."""
    mixer_width: PositiveInt = 128
    """Width of the transformer block that mixes the prompts."""
    training: OwnTraining = OwnTraining(epochs=200, batch_size=32, learning_rate=0.002)


class SoftCptConfig(MethodConfig):
    context_length: PositiveInt = 16
    """Context vectors that are made for each task."""
    meta_length: PositiveInt = 4
    """Trained vectors before the task's name."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class HiProConfig(MethodConfig):
    context_length: PositiveInt = 16
    """Context vectors of each node of the tree of tasks."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class BitFitConfig(MethodConfig):
    training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)


class FullConfig(MethodConfig):
    training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-5, weight_decay=0.1)
