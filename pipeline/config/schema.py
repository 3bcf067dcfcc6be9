"""Everything a run can be told, as one frozen tree, validated.

The docstring under a field is its help text, on the command line and in docs/configuration.md. An unknown field or an
impossible value is refused by name, with the valid ones, before anything starts.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from pipeline.config.fields import Section, affects
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
from pipeline.config.suggestions import did_you_mean
from pipeline.errors import UserError

# By name, as plug-ins: the methods are built on this package, and bring it their sections and names.
_methods: Any = import_module("pipeline.methods.registry")
_S = TypeVar("_S", bound=Section)


def _comparable(name: str) -> str:
    valid = [variant for variant in _methods.VARIANTS if variant not in ("zero_shot", *_methods.DEFAULT_VARIANTS)]
    if name not in valid:
        raise ValueError(f"no method that can be compared{did_you_mean(name, valid)} Valid: {', '.join(valid)}")
    return name


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80), affects()] = "mmap"
    """Name of the run in reports and MLflow."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), affects("splits", "training_features", "training")] = 1
    """Seed of the few-shot sampling, the prompts' start, batches and augmentation."""
    storage: Annotated[str, affects()] = "mmap-runs"
    """Where everything made goes: a folder, on a cluster one that all machines share, or a bucket (s3://bucket/folder;
    credentials and AWS_ENDPOINT_URL come from the environment). A relative folder lies in the working directory, or in
    the home directory for a submitted Ray job, whose working directory is a passing copy."""
    cache: Annotated[str, affects()] = "~/.cache/mmap-clip"
    """Folder on every machine for copies of what lies in a bucket; may be emptied when no run is at work."""
    data: DataConfig = DataConfig()
    """Images and few-shot splits (stage 1)."""
    clip: ClipConfig = ClipConfig()
    """The frozen CLIP."""
    mmap: MmapConfig = MmapConfig()
    """Shape of the multi-modal alignment prompts."""
    baselines: Annotated[tuple[Annotated[str, AfterValidator(_comparable)], ...], affects("report")] = ()
    """Other methods to train and evaluate beside MmAP, each task for itself, or with `_mt` one for all tasks; and
    MmAP's own ablations (docs/methods.md)."""
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

    def section(self, options: type[_S]) -> _S:
        """The section of this type: `config.section(Coop.Options)`."""
        return next(value for _, value in self if type(value) is options)


VARIANTS: tuple[str, ...] = tuple(_methods.VARIANTS)
METHOD_SECTIONS: dict[str, Any] = {
    name: (method.Options, method.Options())
    for name, method in _methods.METHODS.items()
    if method.section not in (None, *Config.model_fields)
}
if not TYPE_CHECKING:  # for which `section` knows the types of the methods' sections
    Config = create_model("Config", __base__=Config, __module__=__name__, **METHOD_SECTIONS)

_DEFAULTS = Config()
Model = TypeVar("Model", bound=BaseModel)


def parse_config(values: dict[str, Any]) -> Config:
    """Config from nested plain values; every fault is named in one UserError."""
    return validate(Config, values)


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """Raises: UserError: every fault, by field and value."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_format_error(fault) for fault in error.errors())) from None


def _format_error(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        valid = section_at(path[:-1]).model_fields
        hint = did_you_mean(name, (".".join([*path[:-1], of]) for of in valid))
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


def section_description(path: str) -> str:
    """As its parent has it, or its own."""
    *parents, name = path.split(".")
    field = section_at(parents).model_fields[name]
    return " ".join((field.description or field.annotation.__doc__ or "").split())


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
