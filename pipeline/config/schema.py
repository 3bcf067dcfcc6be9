"""Everything a run can be told, as one frozen tree, validated.

The docstring under a field is its help text, on the command line and in docs/configuration.md. An unknown field or an
impossible value is refused by name, with the valid ones, before anything starts.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.fields import Section
from pipeline.config.methods import (
    BitFitConfig,
    ClipAdapterConfig,
    ClipLoraConfig,
    CoopConfig,
    FullConfig,
    HiProConfig,
    JointPromptsConfig,
    LammConfig,
    LinearProbeConfig,
    MapleConfig,
    Method,
    MlpPromptsConfig,
    MvlptConfig,
    PromptSrcConfig,
    SoftCptConfig,
    VptConfig,
)
from pipeline.config.sections import (
    ClipConfig,
    ClusterConfig,
    DataConfig,
    GlobalPromptConfig,
    GroupingConfig,
    MmapConfig,
    TrackingConfig,
    TrainingConfig,
)
from pipeline.errors import UserError


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)] = "mmap"
    """Name of the run in reports and MLflow."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 1
    """Seed of the few-shot sampling, the prompts' start, batches and augmentation."""
    storage: str = "mmap-runs"
    """Where everything made goes: a folder, on a cluster one that all machines share, or a bucket (s3://bucket/folder;
    credentials and AWS_ENDPOINT_URL come from the environment). A relative folder lies in the working directory, or in
    the home directory for a submitted Ray job, whose working directory is a passing copy."""
    cache: str = "~/.cache/mmap-clip"
    """Folder on every machine for copies of what lies in a bucket; may be emptied when no run is at work."""
    data: DataConfig = DataConfig()
    """Images and few-shot splits (stage 1)."""
    clip: ClipConfig = ClipConfig()
    """The frozen CLIP."""
    mmap: MmapConfig = MmapConfig()
    """Shape of the multi-modal alignment prompts."""
    compare: tuple[Method, ...] = ()
    """Other methods to train and evaluate beside MmAP, each task for itself, or with `_mt` one for all tasks; and
    MmAP's own ablations (docs/methods.md)."""
    coop: CoopConfig = CoopConfig()
    """CoOp: text context."""
    vpt: VptConfig = VptConfig()
    """VPT: prompts of the image tower."""
    maple: MapleConfig = MapleConfig()
    """MaPLe: text prompts mapped into the image tower."""
    clip_adapter: ClipAdapterConfig = ClipAdapterConfig()
    """CLIP-Adapter: a bottleneck on image features."""
    joint_prompts: JointPromptsConfig = JointPromptsConfig()
    """Prompts of both towers with nothing in common (ablation)."""
    mlp_prompts: MlpPromptsConfig = MlpPromptsConfig()
    """Prompts of both towers made by linear layers (ablation)."""
    clip_lora: ClipLoraConfig = ClipLoraConfig()
    """CLIP-LoRA: low-rank updates of the attention matrices of both towers."""
    linear_probe: LinearProbeConfig = LinearProbeConfig()
    """Linear probe: a weight vector for each class."""
    lamm: LammConfig = LammConfig()
    """LAMM: trained class names."""
    promptsrc: PromptSrcConfig = PromptSrcConfig()
    """PromptSRC: prompts of both towers, held to the frozen CLIP."""
    mvlpt: MvlptConfig = MvlptConfig()
    """MVLPT: mixed prompts of both towers, trained on all tasks, then on each."""
    softcpt: SoftCptConfig = SoftCptConfig()
    """SoftCPT: contexts made from the tasks' names."""
    hipro: HiProConfig = HiProConfig()
    """HiPro: a tree of contexts."""
    bitfit: BitFitConfig = BitFitConfig()
    """BitFit: the biases of both towers."""
    full: FullConfig = FullConfig()
    """Full fine-tuning."""
    training: TrainingConfig = TrainingConfig()
    """How prompts are trained (stages 2 and 4)."""
    global_prompt: GlobalPromptConfig = GlobalPromptConfig()
    """The prompt shared by all tasks and its gradient snapshots (stage 2)."""
    grouping: GroupingConfig = GroupingConfig()
    """How tasks are partitioned (stage 3)."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""


_DEFAULTS = Config()


def parse_config(values: dict[str, Any]) -> Config:
    """Config from nested plain values; every fault is named in one UserError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        section = section_at(path[:-1])
        valid = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], valid, n=1)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
        return f"unknown config field {name}{hint} Valid here: {', '.join(valid)}"
    message: str = fault["msg"].removeprefix("Value error, ")
    if name and not message.startswith(path[0] + "."):
        value = repr(fault["input"])
        return f"{name}={value if len(value) <= 200 else value[:200] + '...'}: {message}"
    return message


def section_at(path: Sequence[str]) -> type[Section]:
    section: type[Section] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        section = annotation
    return section


def to_yaml(config: Config) -> str:
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def fields(defaults: Section = _DEFAULTS, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """All leaf fields as (dotted name, field, default), in order."""
    for name, field in type(defaults).model_fields.items():
        default = getattr(defaults, name)
        if isinstance(default, Section):
            yield from fields(default, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, default


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """Values of a field that has only these."""
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
