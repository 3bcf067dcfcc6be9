"""The search file: the searched config fields, the search algorithm and the validation images.

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

from collections.abc import Collection, Mapping, Sequence
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
from pipeline.config.messages import show_value, validation_messages, value_message
from pipeline.config.values import resolve_scalars
from pipeline.errors import UserError
from pipeline.grouping.affinities import Gradient
from pipeline.methods.registry import METHODS, VARIANTS

METHOD = "method"
"""The one field outside the config: the variant in registry.VARIANTS that a trial trains."""
AGGREGATION = "training.aggregation"
GRADIENT_FIELDS = ("gradient_similarity", "per_layer", "scaling_matrices")
"""Fields of `grouping` that gradient affinities depend on."""
RANGE_KINDS = ("choice", "uniform", "loguniform", "integer")
MAX_TRIALS = 10_000
NOT_SEARCHABLE = {
    "name": "it is only a name",
    "seed": "the best seed is chance; use mmap-clip benchmark to compare seeds",
    "storage": "all trials share it",
    "cache": "all trials share it",
    "data": "all trials share the splits",
    "clip": "all trials share the frozen CLIP (clip.template alone may be searched)",
    "baselines": f"search `{METHOD}` instead",
    "cluster": "it does not change results",
    "tracking": "it does not change results",
    "training.checkpoint_every": "it does not change results",
    "grouping.time_limit_s": "it is a limit, not a hyperparameter",
}
"""Field or section that cannot be searched → reason."""


@dataclass(frozen=True)
class Range:
    """Values that a field may take: the `values` of a choice, or the interval between two of them, ends included."""

    kind: Literal["choice", "uniform", "loguniform", "integer"]
    values: tuple[Any, ...]


class SearchOptions(Section, affects=("search",)):
    """A search file without its `fields`."""

    method: str = "grouped"
    """Variant of MmAP or another method (docs/methods.md) that trials train, unless `fields` has `method`."""
    searcher: Literal["random", "grid", "optuna"] = "optuna"
    """How trials are chosen: at random, all points of a grid, or by Optuna's TPE from the results so far."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Number of trials; null for a grid, which runs all its points."""
    early_stopping: Literal["asha", "median", "none"] = "asha"
    """Rule that prunes trials by their validation accuracy after an epoch: those not in the best quarter of the trials
    that reached it (ASHA), or below the median of the other trials' means."""
    grace_period: PositiveInt = 5
    """Epochs before a trial may be pruned."""
    validation_shots: PositiveInt = 2
    """Training images per class and task held out as validation images."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of the sampling of trials; all trainings use the config's seed."""

    @model_validator(mode="after")
    def _check_num_trials(self) -> SearchOptions:
        if self.searcher == "grid" and self.trials is not None:
            raise ValueError("searcher grid runs all points: remove trials, or set searcher: random")
        if self.searcher != "grid" and self.trials is None:
            raise ValueError(f"trials is required for searcher {self.searcher}: set the number of trials")
        return self


@dataclass(frozen=True)
class Search:
    """`space`: dotted config field, or METHOD → range; `applicable_methods`: field → methods that it affects."""

    options: SearchOptions
    space: Mapping[str, Range]
    applicable_methods: Mapping[str, frozenset[str]]

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that trials may train."""
        return self.space[METHOD].values if METHOD in self.space else (self.options.method,)

    def fields_for(self, method: str) -> list[str]:
        """Return the searched fields that affect a method."""
        return [name for name in self.space if name == METHOD or method in self.applicable_methods[name]]

    def trial_params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of `point` (for all fields) that affect its method."""
        return {name: point[name] for name in self.fields_for(point.get(METHOD, self.methods[0]))}

    def to_json(self) -> dict[str, Any]:
        """Return all that determines the search's results, laid out as the file."""
        ranges = {name: {entry.kind: list(entry.values)} for name, entry in self.space.items()}
        return {**values_affecting(self.options, "search"), "fields": ranges}


def read_search(path: Path, base: Config) -> Search:
    """Read a search file whose unsearched fields have the values of `base`.

    Raises:
        UserError: all invalid fields, values and options of the file; if each is valid alone, the first
            contradiction.
    """
    values = load_yaml(path)
    ranges = values.pop("fields", None)
    space, errors = {}, list[str]()
    misplaced = [name for name in values if name in _FIELDS and name not in SearchOptions.model_fields]
    errors += [f"unknown option {name}; config fields belong under `fields`." for name in misplaced]
    values = {name: value for name, value in values.items() if name not in misplaced}
    try:
        options = SearchOptions.model_validate(resolve_scalars(SearchOptions, values))
    except ValidationError as error:
        errors += validation_messages(SearchOptions, error, "option", ("fields",))
    if not isinstance(ranges, dict) or not ranges:
        ranges = {}
        errors.append(f"fields is required: give config fields and their values, such as {_EXAMPLE}")
    if METHOD in ranges and METHOD in values:
        errors.append("method is given twice, at the top level and under fields: remove one")
    for name, specification in ranges.items():
        try:
            space[str(name)] = _parse_range(str(name), specification, values.get("searcher"))
        except UserError as error:
            errors.append(str(error))
    if not errors:
        try:
            # The order in the file does not matter.
            return _checked_search(options, {name: space[name] for name in (METHOD, *_FIELDS) if name in space}, base)
        except UserError as error:
            errors.append(str(error))
    raise UserError("\n".join(f"{path}: {error}" for error in errors))


def trial_config(base: Config, params: Mapping[str, Any], methods: Sequence[str]) -> tuple[Config, str]:
    """Return the base config with a trial's params, and the trial's method; `methods` are those of the Search.

    Raises:
        UserError: the values contradict each other.
    """
    nested = base.model_dump(mode="json")
    for name, value in params.items():
        if name != METHOD:
            *parents, key = name.split(".")
            section = nested
            for parent in parents:
                section = section[parent]
            section[key] = value
    return parse_config(nested), params.get(METHOD, methods[0])


_EXAMPLE = "training.learning_rate: {loguniform: [0.0003, 0.03]}"
_FIELDS = {name: field for name, field, _ in fields()}


def _parse_range(name: str, specification: Any, searcher: Any) -> Range:
    """Raises: UserError: an entry of `fields` is invalid."""
    _check_name(name)
    if not isinstance(specification, dict) or len(specification) != 1:
        raise UserError(f"fields: {name} takes one of {', '.join(RANGE_KINDS)} with its values, such as {_EXAMPLE}")
    ((kind, values),) = specification.items()
    if kind not in RANGE_KINDS:
        hint = did_you_mean(str(kind), RANGE_KINDS)
        raise UserError(f"fields: {name}: unknown range {kind}{hint} Valid: {', '.join(RANGE_KINDS)}")
    if kind != "choice" and (searcher == "grid" or name == METHOD):
        reason = "searcher grid needs a list of values" if searcher == "grid" else "it is not a number"
        raise UserError(f"fields: {name}: {reason}: use choice instead of {kind}")
    if not isinstance(values, list) or not values:
        raise UserError(f"fields: {name}: {kind} takes a list of values")
    values = [_parse_field_value(name, value) for value in values]
    if kind == "integer":
        values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    if kind == "choice":
        if repeated := [value for index, value in enumerate(values) if value in values[:index]]:
            raise UserError(f"fields: {name}: {repeated[0]!r} is given twice")
        return Range(kind, tuple(values))
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"fields: {name}: {kind} takes two numbers, the smaller first; got {values}")
    if kind != "integer":
        interior = sum(numbers) / 2 + 0.001 * (numbers[1] - numbers[0])
        _parse_field_value(name, interior, f"{kind} samples fractions; use integer: ")
    elif not all(isinstance(value, int) for value in values):
        raise UserError(f"fields: {name}: integer takes two integers; got {values}")
    if kind == "loguniform" and values[0] <= 0:
        raise UserError(f"fields: {name}: loguniform needs a lower bound above 0; got {values[0]}")
    return Range(kind, tuple(values))


def _check_name(name: str) -> None:
    if name == METHOD:
        return
    parts = name.split(".")
    prefixes = [".".join(parts[: length + 1]) for length in range(len(parts))]
    if name != "clip.template" and (prefix := next((prefix for prefix in prefixes if prefix in NOT_SEARCHABLE), None)):
        raise UserError(f"fields: {name} cannot be searched: {NOT_SEARCHABLE[prefix]}")
    if name not in _FIELDS:
        hint = did_you_mean(name, [METHOD, *_FIELDS])
        raise UserError(f"fields: {name} is not a config field{hint} Fields are dotted, as on the command line")


def _parse_field_value(name: str, value: Any, prefix: str = "") -> Any:
    """Return a field's value as in JSON, checked alone; combinations are checked when trials are planned."""
    if name == METHOD:
        _check_method(value)
        return str(value)
    field = _FIELDS[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    adapter = TypeAdapter(kind)
    try:
        return adapter.dump_python(adapter.validate_python(resolve_scalars(field.annotation, value)), mode="json")
    except ValidationError as error:
        message = value_message(error.errors()[0])
        raise UserError(f"fields: {prefix}{name}={show_value(value)}: {message}") from None


def _check_method(name: Any) -> None:
    valid = [name for name, variant in VARIANTS.items() if METHODS[variant.method].trainable]
    if name not in valid:
        hint = did_you_mean(str(name), valid)
        raise UserError(f"method {name!r} cannot be searched{hint} Valid: {', '.join(valid)}")


def _checked_search(options: SearchOptions, space: Mapping[str, Range], base: Config) -> Search:
    """Raises: UserError: an unknown method, or a field that affects none of the methods."""
    methods = space[METHOD].values if METHOD in space else (options.method,)
    for method in methods:
        _check_method(method)
    if options.validation_shots >= base.data.shots:
        raise UserError(
            f"validation_shots={options.validation_shots} leaves no training images of data.shots={base.data.shots}: "
            "lower validation_shots or raise data.shots"
        )
    names = [name for name in space if name != METHOD]
    applicable_methods = {
        name: frozenset(method for method in methods if _affects(name, method, base, space)) for name in names
    }
    for name, affected in applicable_methods.items():
        if not affected:
            hint = " (its own section overrides this field)" if name.startswith("training.") else ""
            hint = " (it trains tasks alone, or on batches of all)" if name == AGGREGATION else hint
            raise UserError(f"fields: {name} has no effect on method {', '.join(methods)}{hint}: remove it")
    return Search(options, space, applicable_methods)


def _affects(name: str, method: str, base: Config, space: Collection[str]) -> bool:
    variant = VARIANTS[method]
    section, _, field_name = name.partition(".")
    by_gradients = base.grouping.affinity == Gradient.name or "grouping.affinity" in space
    uses_gradients = variant.uses_gradients or (variant.uses_grouping and by_gradients)
    method_section = METHODS[variant.method].section
    if section == method_section or (section != "training" and "training" in field_effects(_FIELDS[name])):
        return True
    if variant.uses_grouping and section in ("mmap", "grouping", "training"):
        return True
    if uses_gradients and (section in ("mmap", "global_prompt", "training") or field_name in GRADIENT_FIELDS):
        return True
    if section != "training":
        return False
    if not METHODS[variant.method].takes_steps:
        return name != "training.epochs" and "training_features" in field_effects(_FIELDS[name])
    if name == AGGREGATION and (variant.scope == "single-task" or METHODS[variant.method].mixes_tasks):
        return False
    overrides = getattr(getattr(base, method_section or "", None), "training", None)
    return getattr(overrides, field_name, None) is None
