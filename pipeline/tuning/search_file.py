"""The search file: which config fields are searched, how, and what the trials are measured on.

method: grouped
searcher: optuna
trials: 20
early_stopping: asha
validation_shots: 2
fields:
  training.learning_rate: {loguniform: [0.0003, 0.03]}
  mmap.prompt_length: {choice: [2, 4, 8]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pipeline.config import (
    Config,
    PositiveInt,
    Section,
    did_you_mean,
    field_effects,
    fields,
    load_yaml,
    parse_config,
    values_affecting,
)
from pipeline.errors import UserError
from pipeline.methods.registry import METHODS, VARIANTS

METHOD = "method"
"""Name of the field that is not the config's: the version of registry.VARIANTS that a trial trains."""
KINDS_OF_RANGE = ("choice", "uniform", "loguniform", "integer")
MAX_TRIALS = 10_000
NOT_SEARCHABLE = {
    "name": "it is a name",
    "seed": "the best seed is chance; compare seeds with jobs/benchmark.py",
    "storage": "all trials share it",
    "cache": "all trials share it",
    "data": "all trials share the splits",
    "clip": "all trials share the frozen CLIP (clip.template alone may be searched)",
    "baselines": f"search `{METHOD}` instead",
    "cluster": "it changes no result",
    "tracking": "it changes no result",
    "training.checkpoint_every": "it changes no result",
    "grouping.time_limit_s": "it is a limit, not a choice",
}
"""Fields, or sections, that cannot be searched, and why."""


@dataclass(frozen=True)
class Range:
    """What a field may be: one of the `values` of a choice, or between two of them, both included."""

    kind: Literal["choice", "uniform", "loguniform", "integer"]
    values: tuple[Any, ...]


class SearchOptions(Section, affects=("search",)):
    """A search file but for its `fields`."""

    method: str = "grouped"
    """What a trial trains: a version of MmAP or of another method (docs/methods.md), unless `fields` has `method`."""
    searcher: Literal["random", "grid", "optuna"] = "optuna"
    """How points are chosen: drawn, all of them, or by Optuna's TPE from what was measured before."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """How many points are tried; null for a grid, which tries all."""
    early_stopping: Literal["asha", "median", "none"] = "asha"
    """Whether a trial ends early, by its validation accuracy after an epoch: unless it is in the best quarter of those
    that came so far (ASHA), or when it is below the median of the others' means."""
    grace_period: PositiveInt = 5
    """Epochs before any trial is ended early."""
    validation_shots: PositiveInt = 2
    """Training images of each class and task that are held out to measure trials on."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Of the draws of points. The config's seed is that of all trainings."""

    @model_validator(mode="after")
    def _trials_fit_searcher(self) -> SearchOptions:
        if self.searcher == "grid" and self.trials is not None:
            raise ValueError("searcher grid tries all points: leave out trials, or use searcher: random")
        if self.searcher != "grid" and self.trials is None:
            raise ValueError(f"trials is missing: how many points is searcher {self.searcher} to try?")
        return self


@dataclass(frozen=True)
class Search:
    """`space`: dotted config field, or METHOD → what it may be; `applicable_methods`: field → methods."""

    options: SearchOptions
    space: Mapping[str, Range]
    applicable_methods: Mapping[str, frozenset[str]]

    @property
    def methods(self) -> tuple[str, ...]:
        """All that a trial may train."""
        return self.space[METHOD].values if METHOD in self.space else (self.options.method,)

    def fields_of(self, method: str) -> list[str]:
        """What is searched for a method: points of different methods may have different fields."""
        return [name for name in self.space if name == METHOD or method in self.applicable_methods[name]]

    def point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of `values` for all fields, those that matter to their method."""
        return {name: values[name] for name in self.fields_of(values.get(METHOD, self.methods[0]))}

    def to_json(self) -> dict[str, Any]:
        """All that decides the search's results, in the form of the file."""
        ranges = {name: {of.kind: list(of.values)} for name, of in self.space.items()}
        return {**values_affecting(self.options, "search"), "fields": ranges}


def read_search(path: Path, base: Config) -> Search:
    """A search file for a search around `base`.

    Raises:
        UserError: what cannot be: every field, value and option of the file that is wrong alone, or the first that does
            not fit the others.
    """
    values = load_yaml(path)
    ranges = values.pop("fields", None)
    space, faults = {}, []
    try:
        options = SearchOptions.model_validate(values)
    except ValidationError as error:
        faults = [_explained(fault) for fault in error.errors()]
    if not isinstance(ranges, dict) or not ranges:
        ranges = {}
        faults.append(f"fields is missing: config fields and what each may be, such as {_EXAMPLE}")
    if METHOD in ranges and METHOD in values:
        faults.append("method stands among the fields and beside them: leave one out")
    for name, given in ranges.items():
        try:
            space[str(name)] = _range(str(name), given, values.get("searcher"))
        except UserError as error:
            faults.append(str(error))
    if not faults:
        try:
            # The order in the file decides nothing.
            return _checked(options, {name: space[name] for name in (METHOD, *_FIELDS) if name in space}, base)
        except UserError as error:
            faults.append(str(error))
    raise UserError("\n".join(f"{path}: {fault}" for fault in faults))


def config_at(base: Config, point: Mapping[str, Any], methods: Sequence[str]) -> tuple[Config, str]:
    """The base config with a point's values, and the method that the point is of; `methods` as of Search.

    Raises:
        UserError: values that do not go together.
    """
    nested = base.model_dump(mode="json")
    for name, value in point.items():
        if name != METHOD:
            *path, last = name.split(".")
            section = nested
            for part in path:
                section = section[part]
            section[last] = value
    return parse_config(nested), point.get(METHOD, methods[0])


_EXAMPLE = "training.learning_rate: {loguniform: [0.0003, 0.03]}"
_FIELDS = {name: field for name, field, _ in fields()}


def _range(name: str, given: Any, searcher: Any) -> Range:
    """Raises: UserError: what is wrong with a field of `fields`."""
    _check_name(name)
    if not isinstance(given, dict) or len(given) != 1:
        raise UserError(f"fields: {name} takes one of {', '.join(KINDS_OF_RANGE)} and its values, such as {_EXAMPLE}")
    ((kind, values),) = given.items()
    if kind not in KINDS_OF_RANGE:
        hint = did_you_mean(str(kind), KINDS_OF_RANGE)
        raise UserError(f"fields: {name}: {kind} is not known{hint} Valid: {', '.join(KINDS_OF_RANGE)}")
    if kind != "choice" and (searcher == "grid" or name == METHOD):
        why = "searcher grid tries all values" if searcher == "grid" else "it is no number"
        raise UserError(f"fields: {name}: {why}: use choice, not {kind}")
    if not isinstance(values, list) or not values:
        raise UserError(f"fields: {name}: {kind} takes a list")
    for value in values:
        _check_value(name, value)
    if kind == "choice":
        if repeated := [value for at, value in enumerate(values) if value in values[:at]]:
            raise UserError(f"fields: {name}: {repeated[0]!r} is given twice")
        return Range(kind, tuple(values))
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"fields: {name}: {kind} takes two numbers, the smaller first, not {values}")
    if kind != "integer":
        between = sum(numbers) / 2 + 0.001 * (numbers[1] - numbers[0])
        _check_value(name, between, f"{kind} draws fractions; use integer: ")
    elif not all(isinstance(value, int) for value in values):
        raise UserError(f"fields: {name}: integer takes two whole numbers, not {values}")
    if kind == "loguniform" and values[0] <= 0:
        raise UserError(f"fields: {name}: loguniform begins above 0, not at {values[0]}")
    return Range(kind, tuple(values))


def _check_name(name: str) -> None:
    if name == METHOD:
        return
    parts = name.split(".")
    prefixes = [".".join(parts[: at + 1]) for at in range(len(parts))]
    if name != "clip.template" and (fixed := next((prefix for prefix in prefixes if prefix in NOT_SEARCHABLE), None)):
        raise UserError(f"fields: {name} cannot be searched: {NOT_SEARCHABLE[fixed]}")
    if name not in _FIELDS:
        hint = did_you_mean(name, [METHOD, *_FIELDS])
        raise UserError(f"fields: {name} is no config field{hint} Fields are dotted, as on the command line")


def _check_value(name: str, value: Any, why: str = "") -> None:
    """By itself; what does not go together is found where points are made."""
    if name == METHOD:
        _check_version(value)
        return
    field = _FIELDS[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"fields: {why}{name}={value!r}: {message}") from None


def _check_version(name: Any) -> None:
    valid = [name for name, variant in VARIANTS.items() if METHODS[variant.method].trainable]
    if name not in valid:
        hint = did_you_mean(str(name), valid)
        raise UserError(f"method {name!r} is not one that can be searched{hint} Valid: {', '.join(valid)}")


def _checked(options: SearchOptions, space: Mapping[str, Range], base: Config) -> Search:
    """Raises: UserError: a method that is not known, or a field that matters to none that a trial may train."""
    methods = space[METHOD].values if METHOD in space else (options.method,)
    for method in methods:
        _check_version(method)
    if options.validation_shots >= base.data.shots:
        raise UserError(
            f"validation_shots={options.validation_shots} leaves nothing to train on of data.shots={base.data.shots}: "
            "fewer of those, or more shots"
        )
    names = [name for name in space if name != METHOD]
    applicable_methods = {
        name: frozenset(method for method in methods if _matters(name, method, base)) for name in names
    }
    for name, to_methods in applicable_methods.items():
        if not to_methods:
            own = " (its own section has a value that goes before)" if name.startswith("training.") else ""
            raise UserError(f"fields: {name} does not matter to {', '.join(methods)}{own}: search another")
    return Search(options, space, applicable_methods)


def _matters(name: str, method: str, base: Config) -> bool:
    variant = VARIANTS[method]
    section, _, rest = name.partition(".")
    own = METHODS[variant.method].section
    if section == own or (section != "training" and "training" in field_effects(_FIELDS[name])):
        return True
    if variant.uses_grouping and section in ("mmap", "global_prompt", "grouping", "training"):
        return True
    if section != "training":
        return False
    instead = getattr(getattr(base, own or "", None), "training", None)
    return getattr(instead, rest, None) is None


def _explained(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        valid = [*SearchOptions.model_fields, "fields"]
        hint = "; config fields stand under `fields`." if name in _FIELDS else did_you_mean(name, valid)
        return f"unknown option {name}{hint} Valid here: {', '.join(valid)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{name}={fault['input']!r}: {message}" if name else message
