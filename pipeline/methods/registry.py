"""The methods by name: what the pipeline, the report and saved files know of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods.bitfit import BitFit
from pipeline.methods.clip_adapter import ClipAdapter
from pipeline.methods.clip_lora import ClipLora
from pipeline.methods.coop import Coop
from pipeline.methods.full_fine_tuning import FullFineTuning
from pipeline.methods.joint_prompts import JointPrompts
from pipeline.methods.maple import Maple
from pipeline.methods.mlp_prompts import MlpPrompts
from pipeline.methods.mmap import GroupMmap, SharedMmap
from pipeline.methods.vpt import Vpt


@dataclass(frozen=True)
class MethodKind:
    """`build(config, towers, tasks)` gives a module whose forward pass makes the Adaptation of a group of tasks."""

    title: str
    section: str | None
    """Of the config: its options, if it has any."""
    build: Callable[[Config, ClipTowers, Sequence[str]], nn.Module]
    template: Callable[[Config], str] = lambda config: config.clip.template
    num_carried: Callable[[Config], int] = lambda config: 0
    """Text prompts that take positions of the model's context."""
    check: Callable[[Config, ClipTowers], object] = lambda config, towers: None
    """Raises UserError where the options do not fit the towers, of which only the shapes are looked at."""
    trains_weights: bool = False
    """Of the towers, which are loaded in float32 then."""


KINDS = {
    "mmap": MethodKind("MmAP", "mmap", GroupMmap.of),
    "mmap_shared": MethodKind("MmAP", "mmap", SharedMmap.of),
    "coop": MethodKind("CoOp", "coop", Coop, Coop.template, lambda config: config.coop.context_length),
    "vpt": MethodKind("VPT", "vpt", Vpt),
    "maple": MethodKind(
        "MaPLe", "maple", Maple, Maple.template, lambda config: config.maple.prompt_length, Maple.check
    ),
    "clip_adapter": MethodKind("CLIP-Adapter", "clip_adapter", ClipAdapter),
    "joint_prompts": MethodKind("joint prompts", "joint_prompts", JointPrompts),
    "mlp_prompts": MethodKind("MLP prompts", "mlp_prompts", MlpPrompts),
    "bitfit": MethodKind("BitFit", None, BitFit, trains_weights=True),
    "full": MethodKind("full fine-tuning", None, FullFineTuning, trains_weights=True),
    "clip_lora": MethodKind("CLIP-LoRA", "clip_lora", ClipLora),
}


Groups = Literal["each task", "all tasks", "found groups", "random groups"]


@dataclass(frozen=True)
class Version:
    """A column of the report: a method, trained for these groups of tasks."""

    title: str
    kind: str
    groups: Groups


_BASELINES = {name: kind for name, kind in KINDS.items() if name not in ("mmap", "mmap_shared")}
VERSIONS = {
    **{name: Version(kind.title, name, "each task") for name, kind in _BASELINES.items()},
    **{f"{name}_mt": Version(f"{kind.title}-MT", name, "all tasks") for name, kind in _BASELINES.items()},
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
    """The method's section of the config, by its name; nothing for a method without options."""
    section = kind_of(method).section
    return {} if section is None else {section: getattr(config, section).model_dump(mode="json")}
