"""The config of a run: one frozen, validated tree of sections.

The docstring of a field is its help text, on the command line and in docs/configuration.md. Unknown fields and invalid
values are rejected by name, with the valid ones, before a run starts.
"""

from __future__ import annotations

import os
import re
import typing
import unicodedata
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from pipeline.config.fields import Section, affects, check_texts
from pipeline.config.messages import validation_messages
from pipeline.config.sections import (
    BUILTIN_DIGITS,
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
from pipeline.config.values import resolve_scalars
from pipeline.errors import UserError

# Imported by name, as plug-ins: the methods depend on this package, and provide their sections and names.
_methods: Any = import_module("pipeline.methods.registry")
_S = TypeVar("_S", bound=Section)


def _is_baseline(variant: str) -> bool:
    return variant not in ("zero_shot", *_methods.DEFAULT_VARIANTS)


def _check_baseline(name: str) -> str:
    valid = list(filter(_is_baseline, _methods.VARIANTS))
    if name not in valid:
        raise ValueError(f"not a baseline{did_you_mean(name, valid)} Valid: {', '.join(valid)}")
    return name


MAX_NAME = 80


def _check_name(name: str) -> str:
    check_texts(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > MAX_NAME:
        raise ValueError(
            f"must be at most {MAX_NAME} letters, digits, `.`, `_` and `-`, the first a letter or digit"
            + (f": {suggestion}" if (suggestion := _to_name(name)) else "")
        )
    return name


def _last_folder(root: str) -> str:
    """Return the name of a folder, or of a table without its suffix."""
    path = root.partition("?")[0].rstrip("/") if "://" in root else os.path.abspath(os.path.expanduser(root))
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet") else name


def _to_name(text: str) -> str:
    """Return the closest valid name, empty if no character of the text is valid."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_text).strip("._-")[:MAX_NAME]


class Config(Section):
    name: Annotated[str, AfterValidator(_check_name), affects()] = "mmap"
    """Name of the run in reports and MLflow; unless given, that of the last folder of data.root."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), affects("splits", "training_features", "training")] = 1
    """Random seed of few-shot sampling, prompt initialization, batch order and augmentation."""
    storage: Annotated[str, affects()] = "mmap-runs"
    """Root of all outputs: a folder (on a cluster, one shared by all machines) or a bucket (s3://bucket/folder, with
    credentials and AWS_ENDPOINT_URL from the environment). A relative path starts at the working directory; in a
    submitted Ray job, whose working directory is a temporary copy, at the home directory."""
    cache: Annotated[str, affects()] = "~/.cache/mmap-clip"
    """Folder on every machine for local copies of objects in a bucket; may be deleted when no run is active."""
    data: DataConfig = DataConfig()
    """Images and few-shot splits (stage 1)."""
    clip: ClipConfig = ClipConfig()
    """Frozen CLIP model."""
    mmap: MmapConfig = MmapConfig()
    """Multi-modal alignment prompts (MmAP)."""
    baselines: Annotated[
        tuple[Annotated[str, AfterValidator(_check_baseline)], ...],
        Field(examples=[name for name in _methods.VARIANTS if _is_baseline(name)]),
        affects("report"),
    ] = ()
    """Methods to compare with MmAP: single-task, or multi-task with the suffix `_mt`; also ablations of MmAP
    (docs/methods.md)."""
    training: TrainingConfig = TrainingConfig()
    """Training of prompts (stages 2, 3 and 5)."""
    global_prompt: GlobalPromptConfig = GlobalPromptConfig()
    """Global prompt, shared by all tasks, and its gradient snapshots (stage 2)."""
    grouping: GroupingConfig = GroupingConfig()
    """Partition of the tasks into groups (stage 4)."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray cluster and resources."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow tracking and model registry."""

    @model_validator(mode="before")
    @classmethod
    def _name_of_data(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" not in values:
            data = values.get("data")
            root = data.get("root") if isinstance(data, dict) else getattr(data, "root", None)
            if isinstance(root, str) and root != BUILTIN_DIGITS and (name := _to_name(_last_folder(root))):
                return {**values, "name": name}
        return values

    def section(self, options: type[_S]) -> _S:
        """Return the section of this type: `config.section(Coop.Options)`."""
        return next(value for _, value in self if type(value) is options)


VARIANTS: tuple[str, ...] = tuple(_methods.VARIANTS)
METHOD_SECTIONS: dict[str, Any] = {
    method.section: (method.Options, method.Options())
    for method in _methods.METHODS.values()
    if method.section not in (None, *Config.model_fields)
}
if not TYPE_CHECKING:  # mypy gets the types of the methods' sections from `section`
    Config = create_model("Config", __base__=Config, __module__=__name__, **METHOD_SECTIONS)

_DEFAULTS = Config()
Model = TypeVar("Model", bound=BaseModel)


def parse_config(values: dict[str, Any]) -> Config:
    """Build a config from nested plain values; one UserError reports all invalid fields."""
    return validate(Config, values)


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """Validate values; one UserError reports all invalid fields, with their values."""
    try:
        return model.model_validate(resolve_scalars(model, values))
    except ValidationError as error:
        raise UserError("\n".join(validation_messages(model, error))) from None


def section_at(path: Sequence[str]) -> type[Section]:
    section: type[Section] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        section = annotation
    return section


def section_description(path: str) -> str:
    """Return the description in the parent section, or else the docstring of the section itself."""
    *parents, name = path.split(".")
    field = section_at(parents).model_fields[name]
    return " ".join((field.description or field.annotation.__doc__ or "").split())


def to_yaml(config: Config) -> str:
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def fields(defaults: Section = _DEFAULTS, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield all leaf fields as (dotted name, field, default), in order."""
    for name, field in type(defaults).model_fields.items():
        default = getattr(defaults, name)
        if isinstance(default, Section):
            yield from fields(default, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, default


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """Return the valid values of a Literal field, else ()."""
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
