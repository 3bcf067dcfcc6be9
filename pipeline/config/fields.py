"""What config sections are made of: types of values, and what each field affects.

Keys of runs and artifacts are made from the fields that affect them (`values_affecting`), so every field says what it
affects, by itself or with its section, and one that says nothing does not import:

    shots: Annotated[PositiveInt, affects("splits")] = 6
    class GroupingConfig(Section, affects=("grouping",)): ...
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from pipeline.errors import escape_controls

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0)]


def _one_class_field(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("must contain {} exactly once, where the class name goes")
    return template


Template = Annotated[str, AfterValidator(_one_class_field)]


Effect = Literal[
    "data",
    "clip",
    "splits",
    "test_features",
    "training_features",
    "training",
    "evaluation",
    "method",
    "global_prompt",
    "grouping",
    "report",
    "search",
]
"""What a field can affect directly; what rests on that follows by itself.

- `data`, `clip`: which images and which CLIP are found. Keys hold what was found, not the field.
- `splits`: the few-shot splits.
- `test_features`, `training_features`: image features of the frozen CLIP, and of which images and crops.
- `training`: every training, of the global prompt, of groups and of added tasks.
- `evaluation`: predictions on the test set.
- `method`: trainings and evaluations of the method in whose section the field is.
- `global_prompt`, `grouping`: these stages beside what affects all trainings.
- `report`: nothing but what a run reports.
- `search`: the trials of jobs/tune.py.
"""
RESULT_EFFECTS: tuple[Effect, ...] = tuple(of for of in typing.get_args(Effect) if of not in ("data", "clip"))
"""All that fields affect by their values."""


@dataclass(frozen=True)
class Affects:
    """What a field affects, among its annotations."""

    effects: frozenset[Effect]

    def __post_init__(self) -> None:
        if unknown := self.effects - set(typing.get_args(Effect)):
            raise TypeError(f"{min(unknown)!r} is nothing that a field affects; valid: {typing.get_args(Effect)}")


def affects(*effects: Effect) -> Affects:
    """Annotates a field with what it affects directly; `affects()`: no result, such as a name or a place."""
    return Affects(frozenset(effects))


class Section(BaseModel):
    """`class DataConfig(Section, affects=("data",))`: what its fields affect that say nothing themselves."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    _affects: ClassVar[Affects | None] = None

    def __init_subclass__(cls, affects: Collection[Effect] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)

    @classmethod
    def __pydantic_init_subclass__(cls, affects: Collection[Effect] | None = None, **options: Any) -> None:
        """Raises: TypeError: a field that does not say what it affects."""
        super().__pydantic_init_subclass__(**options)
        if affects is not None:
            cls._affects = Affects(frozenset(affects))
        for name, field in cls.model_fields.items():
            if is_section(field) or any(isinstance(of, Affects) for of in field.metadata):
                continue
            if cls._affects is None:
                raise TypeError(
                    f"{cls.__name__}.{name} does not say what it affects, and results would be reused that it changes: "
                    f'annotate it, as `{name}: Annotated[..., affects("training")]`, or affects() if it changes no '
                    "result, or its section (pipeline/config/fields.py)"
                )
            field.metadata.append(cls._affects)

    def __hash__(self) -> int:
        return hash(content_hash(self))  # a mapping among the fields has none of its own

    @field_validator("*")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != escape_controls(value):
            raise ValueError("holds control characters, or is not UTF-8")
        return value


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def field_effects(field: FieldInfo) -> frozenset[Effect]:
    """What a field that is no section affects directly."""
    return next(of.effects for of in reversed(field.metadata) if isinstance(of, Affects))


def values_affecting(section: Section, *effects: Effect) -> dict[str, Any]:
    """The fields that affect any of `effects`, as JSON, nested as the section is: what keys are made from."""
    return section.model_dump(mode="json", include=_affected_fields(type(section), effects))


@cache  # a run asks hundreds of times, for the keys of all its artifacts
def _affected_fields(section: type[Section], effects: tuple[Effect, ...]) -> dict[str, Any]:
    """Field → True, or the same of a section's fields; no section of which nothing affects `effects`."""
    affected = dict[str, Any]()
    for name, field in section.model_fields.items():
        if is_section(field):
            if fields := _affected_fields(cast(type[Section], field.annotation), effects):
                affected[name] = fields
        elif not field_effects(field).isdisjoint(effects):
            affected[name] = True
    return affected


def content_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-like value or config section; equal values hash equally."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
