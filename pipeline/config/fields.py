"""Building blocks of config sections: value types, and declarations of what each field affects.

Keys of runs and artifacts are computed from the fields that affect them (`values_affecting`). So every field, or its
section, declares what it affects; a field without a declaration raises an error at import:

    shots: Annotated[PositiveInt, affects("splits")] = 6
    class GroupingConfig(Section, affects=("grouping",)): ...
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import typing
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from pipeline.errors import escape_controls

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0)]


def _check_placeholder(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("must contain {} exactly once, as the placeholder of the class name")
    return template


Template = Annotated[str, AfterValidator(_check_placeholder)]


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
"""Results that a field can affect directly; whatever depends on those follows automatically.

- `data`, `clip`: which images and which CLIP are loaded. Keys contain their content, not the field.
- `splits`: the few-shot splits.
- `test_features`, `training_features`: image features of the frozen CLIP, and the choice of images and crops.
- `training`: every training: of the global prompt, of groups and of added tasks.
- `evaluation`: predictions on the test set.
- `method`: trainings and evaluations of the method whose section has the field.
- `global_prompt`, `grouping`: only these stages.
- `report`: only the report of a run.
- `search`: the trials of mmap-clip tune.
"""
RESULT_EFFECTS: tuple[Effect, ...] = tuple(name for name in typing.get_args(Effect) if name not in ("data", "clip"))
"""Effects by the value of the field itself."""


@dataclass(frozen=True)
class Affects:
    """Annotation of a field: the effects that it declares."""

    effects: frozenset[Effect]

    def __post_init__(self) -> None:
        if unknown := self.effects - set(typing.get_args(Effect)):
            raise TypeError(f"unknown effect {min(unknown)!r}; valid: {typing.get_args(Effect)}")


def affects(*effects: Effect) -> Affects:
    """Annotate a field with its direct effects; `affects()`: it changes no result, such as a name or a path."""
    return Affects(frozenset(effects))


def check_texts(value: Any) -> None:
    """Check a text, or the texts in a tuple or mapping.

    Raises:
        ValueError: one is empty, or has control characters.
    """
    if isinstance(value, str):
        if not value:
            raise ValueError("is empty: give a value")
        if value != escape_controls(value):
            raise ValueError("contains control characters or is not UTF-8")
    elif isinstance(value, tuple | dict):
        for element in (*value, *(value.values() if isinstance(value, dict) else ())):
            check_texts(element)


class Section(BaseModel):
    """Base of config sections; `class DataConfig(Section, affects=("data",))` sets the effects of its fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # from Python: tasks=[2019, 2020]; YAML and command line give text
    )
    _affects: ClassVar[Affects | None] = None

    def __init_subclass__(cls, affects: Collection[Effect] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)

    @classmethod
    def __pydantic_init_subclass__(cls, affects: Collection[Effect] | None = None, **options: Any) -> None:
        """Check that every field declares its effects; TypeError if one does not."""
        super().__pydantic_init_subclass__(**options)
        if affects is not None:
            cls._affects = Affects(frozenset(affects))
        for name, field in cls.model_fields.items():
            if is_section(field) or any(isinstance(item, Affects) for item in field.metadata):
                continue
            if cls._affects is None:
                raise TypeError(
                    f"{cls.__name__}.{name} does not declare what it affects, so stale results are reused: annotate it "
                    f'(`{name}: Annotated[..., affects("training")]`; affects() if it changes no result) or its '
                    "section (pipeline/config/fields.py)"
                )
            field.metadata.append(cls._affects)

    def __hash__(self) -> int:
        return hash(content_hash(self))  # a field may be a mapping, which is not hashable

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        check_texts(value)
        return value


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def add_descriptions(section: type[Section]) -> None:
    """Give the fields of a section, and of the sections in it, their docstrings as descriptions.

    Pydantic would do so for each class that is imported, a sixth of the time to a job's first line.
    """
    for name, field in section.model_fields.items():
        owner = next(base for base in section.__mro__ if name in inspect.get_annotations(base))
        if field.description is None:
            field.description = _docstrings(owner.__module__).get(owner.__qualname__, {}).get(name)
        if is_section(field):
            add_descriptions(cast(type[Section], field.annotation))


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return class → attribute → docstring of a module's source."""
    docstrings: dict[str, dict[str, str]] = {}

    def visit(parent: ast.Module | ast.ClassDef, prefix: str) -> None:
        for node in parent.body:
            if not isinstance(node, ast.ClassDef):
                continue
            visit(node, f"{prefix}{node.name}.")
            docstrings[prefix + node.name] = {
                attribute.target.id: inspect.cleandoc(text)
                for attribute, expression in pairwise(node.body)
                if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name)
                if isinstance(expression, ast.Expr) and isinstance(expression.value, ast.Constant)
                if isinstance(text := expression.value.value, str)
            }

    visit(ast.parse(inspect.getsource(sys.modules[module])), "")
    return docstrings


def field_effects(field: FieldInfo) -> frozenset[Effect]:
    """Return the direct effects of a field that is not a section."""
    return next(item.effects for item in reversed(field.metadata) if isinstance(item, Affects))


def values_affecting(section: Section, *effects: Effect) -> dict[str, Any]:
    """Return the fields that affect any of `effects`, nested, as JSON: the input of keys."""
    return section.model_dump(mode="json", include=_affected_fields(type(section), effects))


@cache  # called hundreds of times per run, for the keys of all artifacts
def _affected_fields(section: type[Section], effects: tuple[Effect, ...]) -> dict[str, Any]:
    """Map each affecting field to True, and each section with such fields to the same mapping of its fields."""
    affected = dict[str, Any]()
    for name, field in section.model_fields.items():
        if is_section(field):
            if fields := _affected_fields(cast(type[Section], field.annotation), effects):
                affected[name] = fields
        elif not field_effects(field).isdisjoint(effects):
            affected[name] = True
    return affected


def content_hash(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON-like value or config section."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
