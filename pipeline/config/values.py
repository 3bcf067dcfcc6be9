"""Values as they are written, on the command line and in YAML files, for fields of a given type.

Text stays text: nothing here makes a number, a date or a truth value of it. Validation converts what a field takes as a
number or flag (`1e-3`, `1_000`, `yes`), so that all of these forms mean the same everywhere.
"""

from __future__ import annotations

import json
import shlex
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.files import Scalar, parse_yaml
from pipeline.errors import UserError

NULLS = ("", "~", "null", "Null", "NULL")
"""Forms of null in YAML."""


def value_types(annotation: Any) -> set[Any]:
    """Return the types of the values, without those of the elements of a tuple or dict."""
    kinds = set[Any]()
    for alternative in _alternatives(annotation):
        origin, arguments = typing.get_origin(alternative), typing.get_args(alternative)
        kinds |= set(map(type, arguments)) if origin is typing.Literal else {origin or alternative}
    return kinds


def is_nullable(annotation: Any) -> bool:
    return types.NoneType in value_types(annotation)


def resolve_scalars(annotation: Any, value: Any) -> Any:
    """Return a value, such as the tree of a YAML file, with the scalars that stand for something else replaced.

    A null without quotes is None where the field takes None, and an empty section where only the name is there. Where
    the field takes a list, a text is a list of one. All other text stays.
    """
    alternatives = _alternatives(annotation)
    models = [kind for kind in alternatives if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if isinstance(value, Scalar) and value.plain and value in NULLS:
        return None if types.NoneType in alternatives else {} if models and not value else value
    if isinstance(value, Scalar) and set(value_types(annotation)) - {types.NoneType} == {tuple}:
        value = [value]
    if isinstance(value, dict):
        for model in models:
            fields = model.model_fields
            return {
                name: resolve_scalars(fields[name].annotation, entry) if name in fields else entry
                for name, entry in value.items()
            }
    for kind in alternatives:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is dict and isinstance(value, dict):
            return {name: resolve_scalars(arguments[1], entry) for name, entry in value.items()}
        if origin is tuple and isinstance(value, list):
            return [resolve_scalars(_element_type(arguments, index), element) for index, element in enumerate(value)]
    return value


def command_line_value(option: str, field: FieldInfo, texts: Sequence[str], splits_lists: bool = True) -> Any:
    """Return the value of an option from its arguments.

    `null` is None where the field takes None. A list is `a b`, `a,b` or `[a, b]`, a mapping `{a: b}`; brackets and
    braces are read as YAML. All else is the text itself.

    Args:
        splits_lists: False: each text is an element of a list, with its commas and brackets.

    Raises:
        UserError: an empty text; brackets or braces that are not YAML.
    """
    if "" in texts:
        raise UserError(f"{option} is empty: give a value")
    kinds = value_types(field.annotation)
    if list(texts) == ["null"] and types.NoneType in kinds:
        return None
    if tuple in kinds and not splits_lists:
        return list(texts)
    if tuple in kinds:
        return _list_value(option, field.annotation, texts)
    (text,) = texts
    if dict in kinds and text.startswith("{") and text.endswith("}"):
        mapping = _parse_flow(option, text) if str not in kinds else _parse_flow_or_none(text)
        if isinstance(mapping, dict) and "" not in mapping.values():
            return mapping
    return text


def list_arguments(values: Sequence[str]) -> str:
    """Return a list of texts as the shell arguments of an option."""
    if any(
        "," in value or value != value.strip() or value.startswith(("[", "-")) or value == "null" for value in values
    ):
        return shlex.quote(json.dumps(list(values), ensure_ascii=False))
    return shlex.join(values)


def _list_value(option: str, annotation: Any, texts: Sequence[str]) -> Any:
    arguments = next(typing.get_args(kind) for kind in _alternatives(annotation) if typing.get_origin(kind) is tuple)
    holds_lists = tuple in value_types(arguments[0])
    joined = " ".join(texts)
    if joined.startswith("[") and joined.endswith("]"):  # the shell splits `[a, b]` without quotes
        if not holds_lists:
            return _parse_flow(option, joined)
        if isinstance(lists := _parse_flow_or_none(joined), list):
            return lists if all(isinstance(element, list) for element in lists) else [lists]
    if holds_lists:
        return [_parse_flow(option, text) if text.startswith("[") else _split(text) for text in texts]
    if not (elements := [element for text in texts for element in _split(text)]):
        raise UserError(f"{option} {joined}: no value between the commas")
    return elements


def _split(text: str) -> list[str]:
    return [element for part in text.split(",") if (element := part.strip())]


def _parse_flow(option: str, text: str) -> Any:
    try:
        return parse_yaml(text, option)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(
            f"{option} {text[:200]}: not valid YAML in brackets ({problem}); put each text that has special characters "
            f'in quotes: {text[0]}"..."{text[-1]}'
        ) from None


def _parse_flow_or_none(text: str) -> Any:
    try:
        return parse_yaml(text, "")
    except yaml.YAMLError:
        return None


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself, without annotations."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return _alternatives(arguments[0]) if origin is typing.Annotated else [annotation]


def _element_type(arguments: tuple[Any, ...], index: int) -> Any:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return arguments[index] if index < len(arguments) else Any
