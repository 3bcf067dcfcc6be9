"""The methods by name: what the pipeline, the report and saved files know of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config, TrainingConfig
from pipeline.errors import UserError
from pipeline.methods.bitfit import BitFit
from pipeline.methods.clip_adapter import ClipAdapter
from pipeline.methods.clip_lora import ClipLora
from pipeline.methods.coop import Coop
from pipeline.methods.full_fine_tuning import FullFineTuning
from pipeline.methods.hipro import HiPro
from pipeline.methods.joint_prompts import JointPrompts
from pipeline.methods.lamm import Lamm
from pipeline.methods.linear_probe import LinearProbe
from pipeline.methods.maple import Maple
from pipeline.methods.mlp_prompts import MlpPrompts
from pipeline.methods.mmap import GroupMmap, SharedMmap
from pipeline.methods.mvlpt import Mvlpt
from pipeline.methods.promptsrc import PromptSrc
from pipeline.methods.softcpt import SoftCpt
from pipeline.methods.vpt import Vpt
from pipeline.methods.zero_shot import ZeroShot


@dataclass(frozen=True)
class MethodKind:
    """`build(config, towers, words)` gives a module whose forward pass makes the Adaptation of a group of tasks;
    `words`: task → words of its classes by label."""

    title: str
    section: str | None
    """Of the config: its options, if it has any."""
    build: Callable[[Config, ClipTowers, Mapping[str, Sequence[str]]], nn.Module]
    template: Callable[[str], str] = lambda of_config: of_config
    """What the method makes of the text of a class."""
    num_carried: Callable[[Config], int] = lambda config: 0
    """Text prompts that take positions of the model's context."""
    check: Callable[[Config, ClipTowers], object] = lambda config, towers: None
    """Raises UserError where the options do not fit the towers, of which only the shapes are looked at."""
    trains_weights: bool = False
    """Of the towers, which are loaded in float32 then."""
    changes_images: bool = True
    """Whether the image tower gives other features than the frozen CLIP's; else those are computed once for all such
    methods."""
    consistent: bool = False
    """Whether it is held to the frozen CLIP's features of the training images."""
    trained: bool = True
    """Whether there is anything to train."""
    uses_affinities: bool = False
    """Whether its module's `plant(affinities)` wants to know how much the tasks' gradients agree."""

    def templates(self, config: Config, tasks: Iterable[str]) -> dict[str, str]:
        """Task → text of its classes, as the method takes it."""
        return {task: self.template(config.clip.template_of(task)) for task in tasks}


KINDS = {
    "zero_shot": MethodKind("zero-shot", None, ZeroShot, changes_images=False, trained=False),
    "mmap": MethodKind("MmAP", "mmap", GroupMmap.of),
    "mmap_shared": MethodKind("MmAP", "mmap", SharedMmap.of),
    "coop": MethodKind(
        "CoOp", "coop", Coop, Coop.template, lambda config: config.coop.context_length, changes_images=False
    ),
    "vpt": MethodKind("VPT", "vpt", Vpt),
    "maple": MethodKind(
        "MaPLe", "maple", Maple, Maple.template, lambda config: config.maple.prompt_length, Maple.check
    ),
    "clip_adapter": MethodKind("CLIP-Adapter", "clip_adapter", ClipAdapter, changes_images=False),
    "joint_prompts": MethodKind("joint prompts", "joint_prompts", JointPrompts),
    "mlp_prompts": MethodKind("MLP prompts", "mlp_prompts", MlpPrompts),
    "linear_probe": MethodKind("linear probe", "linear_probe", LinearProbe, changes_images=False),
    "lamm": MethodKind("LAMM", "lamm", Lamm, changes_images=False, consistent=True),
    "promptsrc": MethodKind(
        "PromptSRC",
        "promptsrc",
        PromptSrc,
        PromptSrc.template,
        lambda config: config.promptsrc.prompt_length,
        PromptSrc.check,
        consistent=True,
    ),
    "mvlpt": MethodKind("MVLPT", "mvlpt", Mvlpt, Mvlpt.template, lambda config: config.mvlpt.prompt_length),
    "softcpt": MethodKind(
        "SoftCPT",
        "softcpt",
        SoftCpt,
        SoftCpt.template,
        lambda config: config.softcpt.context_length,
        changes_images=False,
    ),
    "hipro": MethodKind(
        "HiPro",
        "hipro",
        HiPro,
        HiPro.template,
        lambda config: config.hipro.context_length,
        changes_images=False,
        uses_affinities=True,
    ),
    "bitfit": MethodKind("BitFit", "bitfit", BitFit, trains_weights=True),
    "full": MethodKind("full fine-tuning", "full", FullFineTuning, trains_weights=True),
    "clip_lora": MethodKind("CLIP-LoRA", "clip_lora", ClipLora),
}


Groups = Literal["each task", "all tasks", "found groups", "random groups"]


@dataclass(frozen=True)
class Version:
    """A column of the report: a method, trained for these groups of tasks."""

    title: str
    kind: str
    groups: Groups
    starts_from: str | None = None
    """Version whose trained state each training goes on from."""

    @property
    def uses_grouping(self) -> bool:
        """Whether the tasks' affinities or groups have to be known first."""
        return self.groups in ("found groups", "random groups") or KINDS[self.kind].uses_affinities


_MULTI_TASK = ("softcpt", "hipro")
"""Which are nothing for a task alone."""
_BOTH = {
    name: kind
    for name, kind in KINDS.items()
    if name not in ("zero_shot", "mmap", "mmap_shared", "mvlpt", *_MULTI_TASK)
}
VERSIONS = {
    "zero_shot": Version("zero-shot", "zero_shot", "all tasks"),
    **{name: Version(kind.title, name, "each task") for name, kind in _BOTH.items()},
    **{f"{name}_mt": Version(f"{kind.title}-MT", name, "all tasks") for name, kind in _BOTH.items()},
    "mvlpt": Version("MVLPT", "mvlpt", "each task", starts_from="mvlpt_mt"),
    "mvlpt_mt": Version("MVLPT, first stage", "mvlpt", "all tasks"),
    **{name: Version(KINDS[name].title, name, "all tasks") for name in _MULTI_TASK},
    "mmap_task_only": Version("MmAP, task only", "mmap_shared", "each task"),
    "mmap_group_only": Version("MmAP, group only", "mmap_shared", "found groups"),
    "mmap_random_groups": Version("MmAP, random groups", "mmap", "random groups"),
    "all_in_one": Version("MmAP, all in one group", "mmap", "all tasks"),
    "grouped": Version("MmAP, grouped", "mmap", "found groups"),
}
ALWAYS = ("all_in_one", "grouped")
"""What is trained beside the versions of config.compare."""


def kind_of(method: str) -> MethodKind:
    """Raises: UserError: a saved file names a method that this version does not have."""
    if method not in KINDS:
        raise UserError(f"method {method!r} is not known; methods: {', '.join(KINDS)}")
    return KINDS[method]


def options_of(method: str, config: Config) -> dict[str, Any]:
    """The method's section of the config, by its name, without its training."""
    section = kind_of(method).section
    return {} if section is None else {section: getattr(config, section).model_dump(mode="json", exclude={"training"})}


def training_of(method: str, config: Config) -> TrainingConfig:
    """How a method is trained: config.training, with what its own section has instead."""
    own = getattr(getattr(config, kind_of(method).section or "", None), "training", None)
    changes = own.model_dump(exclude_none=True) if own else {}
    return config.training.model_copy(update=changes)
