"""Messages about invalid values: pydantic's errors in the words of the command line and of YAML."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.files import Scalar
from pipeline.config.suggestions import did_you_mean, find_option
from pipeline.config.values import is_nullable, value_types

MAX_SHOWN_CHARACTERS = 200
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite_number": "must be a finite number",
    "bool": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list: [a, b]",
    "dict_type": "must be a mapping: {a: b}",
    "model": "is a section: give its fields, indented below it",
    "dataclass": "is a section: give its fields, indented below it",
}
"""Type of pydantic's error, or the beginning of several → message."""


def validation_messages(
    model: type[BaseModel], error: ValidationError, noun: str = "config field", more_fields: Sequence[str] = ()
) -> list[str]:
    """Return a message for each invalid field of `model`, with its value, and where a file sets it.

    Args:
        noun: what messages call a field.
        more_fields: fields beside those of `model`.
    """
    by_value = groupby(error.errors(include_url=False), lambda details: _locate(model, details["loc"])[0])
    return [_format(model, list(errors), noun, more_fields) for _, errors in by_value]


def value_message(details: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, without its name."""
    kind, context = details["type"], details.get("ctx") or {}
    if kind == "value_error":
        return str(details["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        return "is missing"
    if kind == "too_short":
        return f"must have at least {context['min_length']} values"
    if kind == "too_long":
        return f"must have {context['max_length']} values"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"must be {context['expected']}{did_you_mean(str(details['input']), valid).rstrip('.')}"
    if message := next((message for prefix, message in _KINDS.items() if kind.startswith(prefix)), None):
        return message
    return re.sub(r"^\w+ should be", "must be", str(details["msg"]))


def show_value(value: Any) -> str:
    """Return a value as Python writes it, but numbers as they were written."""
    text = str(value) if isinstance(value, str) and re.fullmatch(r"[\d.+-][\w.+-]*", value) else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _format(model: type[BaseModel], errors: Sequence[Any], noun: str, more_fields: Sequence[str]) -> str:
    details = errors[0]
    path, annotation = _locate(model, details["loc"])
    name = ".".join(part for part in path if isinstance(part, str))
    source = f" ({value.source})" if isinstance(value := details["input"], Scalar) else ""
    if details["type"] == "extra_forbidden":
        *parents, _ = map(str, path)
        valid = [*_model_at(model, parents).model_fields, *more_fields]
        hint = _nested_hint(model, name, ".".join(parents)) or did_you_mean(
            name, (".".join([*parents, field]) for field in valid)
        )
        return f"unknown {noun} {name}{hint} Valid here: {', '.join(valid)}{source}"
    if details["type"] == "missing":
        is_element = isinstance(path[-1], int)
        return f"{name} must have {len(typing.get_args(annotation))} values" if is_element else f"{name} is missing"
    # Each alternative of a union has an error.
    message = " or ".join(dict.fromkeys(value_message(error).removeprefix("must be ") for error in errors))
    if value_message(details).startswith("must be "):
        message = f"must be {message}"
    if value == "":
        message = "is empty: give a value"
    if message in (_KINDS["int"], _KINDS["float"], _KINDS["bool"]) and is_nullable(annotation):
        message += ", or null"
    if not name or (details["type"] == "value_error" and message.startswith(f"{path[0]}.")):
        return f"{message}{source}"
    if details["loc"][-1] == "[key]":
        return f"{name}: the key {message}{source}"
    return f"{name}={show_value(value)}: {message}{source}"


def _locate(model: type[BaseModel], location: Sequence[int | str]) -> tuple[tuple[int | str, ...], Any]:
    """Return the names of a field, then indices and keys of its value, without pydantic's labels of a union's members
    and of keys; and the annotation of the field."""
    annotation: Any = model
    for index, part in enumerate(location):
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            is_union = len(value_types(annotation) - {types.NoneType}) > 1
            tail = location[index + is_union :]
            return (*location[:index], *(part for part in tail if part != "[key]")), annotation
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        annotation = fields[str(part)].annotation if part in fields else None
    return tuple(location), annotation


def _nested_hint(model: type[BaseModel], name: str, parent: str) -> str:
    """Return how a file has a field that is given outside of its section, with a dotted name or that of an option."""
    section, _, field = (find_option(name, {f"--{leaf}" for leaf in _leaves(model)}) or "").lstrip("-").rpartition(".")
    if not section or section == parent:
        return ""
    nested = f"{field}: ..."
    for part in reversed(section.split(".")):
        nested = f"{part}: {{{nested}}}"
    return f"; a file has it as `{nested}`."


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return model
