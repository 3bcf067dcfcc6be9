"""The command line of a job: the job's own options, --config files, and the fields of the config.

All jobs parse options the same way. An option is named after the field that it sets, with underscores, and its value is
written as in YAML; but text needs no quotes, a list may also be written `a b c`, and a flag without a value is true.
"""

from __future__ import annotations

import argparse
import copy
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from pipeline.config.files import DEMO_CONFIG, load_yaml, parse_yaml, resolve_config_path
from pipeline.config.help_pages import Page, help_page, option_fields
from pipeline.config.schema import Config, fields, parse_config, validate
from pipeline.config.suggestions import did_you_mean
from pipeline.errors import UserError


class JobOptions(BaseModel):
    """Base of a job's own options, beside the fields of the config: each field with a description is one.

    Docstrings do not work as descriptions here: pydantic does not find those of a script that was also imported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    positional: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that are positional arguments, in this order; only the last can be a list."""


Options = TypeVar("Options", bound=JobOptions)


@dataclass(frozen=True)
class JobArguments(Generic[Options]):
    """A parsed command line."""

    options: Options
    config_files: Sequence[Path]
    """Values of --config."""
    fields: Mapping[str, Any]
    """Config fields by dotted name."""

    def config(self, base: Path | None = None) -> Config:
        """Merge `base`, the files of --config (the demo's config if there are neither) and the command line, in this
        order.

        Raises:
            UserError: invalid values.
        """
        values: dict[str, Any] = {}
        for file in [*([base] if base else []), *self.config_files] or [DEMO_CONFIG]:
            values = _deep_merge(values, load_yaml(resolve_config_path(file)))
        return parse_config(_deep_merge(values, self.nested_fields()))

    def nested_fields(self) -> dict[str, Any]:
        """Return `fields` nested by section, as in a YAML file."""
        values: dict[str, Any] = {}
        for name, value in self.fields.items():
            for part in reversed(name.split(".")):
                value = {part: value}
            values = _deep_merge(values, value)
        return values


class JobParser(argparse.ArgumentParser, Generic[Options]):
    """Parser of a job's command line; each page of its help fits on two screens."""

    def __init__(
        self,
        description: str | None,
        options: type[Options] = JobOptions,  # type: ignore[assignment]  # mypy has no defaults for type variables
        field_help: Mapping[str, str] | None = None,
        replacements: Mapping[str, str] = {},
        base_help: str = "configs/demo.yaml, the built-in digits",
    ):
        """
        Args:
            description: the job's docstring.
            options: the job's own options.
            field_help: config field that the job accepts → its help; None: all fields, and --config.
            replacements: config field that the job does not accept → the option to use instead.
            base_help: the values that apply where --config gives none.
        """
        super().__init__(add_help=False, allow_abbrev=False)
        self.options, self.replacements = options, replacements
        self.base_help = base_help if field_help is None else ""
        self.job_description = description or ""
        self.config_fields = [
            (name, field, default) if field_help is None else (name, _with_description(field, field_help[name]), None)
            for name, field, default in fields()
            if name not in replacements and (field_help is None or name in field_help)
        ]
        self.add_argument("-h", "--help", action=_ShowPage, const="help", nargs=0)
        if self.base_help:
            self.add_argument("--help-methods", action=_ShowPage, const="methods", nargs=0)
            self.add_argument("--help-all", action=_ShowPage, const="all", nargs=0)
            self.add_argument("--config", type=Path, nargs="+", default=[])
        for name, field in option_fields(options).items():
            if name in options.positional:
                is_list = tuple in _value_types(field.annotation)
                nargs = None if not is_list else "+" if field.is_required() else "*"
                self.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, metavar=name.upper())
            else:
                self._add_field(name, name, field)
        for name, field, _ in self.config_fields:
            self._add_field(name, f"config.{name}", field)

    def parse(self, command_line: Sequence[str] | None = None) -> JobArguments[Options]:
        """Parse the command line, by default that of the process.

        Raises:
            UserError: an unknown or missing option, or an invalid value.
        """
        arguments, unknown = self.parse_known_args(command_line)
        if unknown:
            self._reject(unknown[0].partition("=")[0])
        texts = vars(arguments)
        option_values = {
            name: texts[name] if name in self.options.positional else _parse_value(f"--{name}", field, texts[name])
            for name, field in option_fields(self.options).items()
            if name in texts
        }
        field_values = {
            name: _parse_value(f"--{name}", field, texts[f"config.{name}"])
            for name, field, _ in self.config_fields
            if f"config.{name}" in texts
        }
        return JobArguments(validate(self.options, option_values), texts.get("config", []), field_values)

    def format_help(self, page: Page = "help") -> str:
        return help_page(self.prog, self.job_description, self.options, self.config_fields, self.base_help, page)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def _add_field(self, name: str, destination: str, field: FieldInfo) -> None:
        kinds = _value_types(field.annotation)
        nargs = {"nargs": "+"} if tuple in kinds else {"nargs": "?", "const": "true"} if bool in kinds else {}
        self.add_argument(
            f"--{name}", dest=destination, default=argparse.SUPPRESS, required=field.is_required(), **nargs
        )

    def _reject(self, option: str) -> NoReturn:
        if not option.startswith("-"):
            raise UserError(f"unexpected argument {option}; see --help")
        if replacement := self.replacements.get(option.removeprefix("--")):
            raise UserError(f"{option} is not an option of this job: use {replacement}")
        raise UserError(f"unknown option {option}{did_you_mean(option, self._option_string_actions)} See --help")


class _ShowPage(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, JobParser)
        print(parser.format_help(self.const), end="")
        parser.exit()


def _with_description(field: FieldInfo, description: str) -> FieldInfo:
    field = copy.copy(field)
    field.description = description
    return field


def _value_types(annotation: Any) -> set[Any]:
    """Return the types of the values, without those of the elements of a tuple or dict."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return set[Any]().union(*map(_value_types, arguments))
    if origin is typing.Annotated:
        return _value_types(arguments[0])
    if origin is typing.Literal:
        return set(map(type, arguments))
    return {origin or annotation}


def _parse_value(option: str, field: FieldInfo, texts: str | list[str]) -> Any:
    if isinstance(texts, str):
        return _parse_scalar(option, _value_types(field.annotation), texts)
    if len(texts) == 1:
        try:
            value = parse_yaml(texts[0], option)
        except yaml.YAMLError:
            return texts[0]  # pydantic reports that it is not a list
        if isinstance(value, list | dict) or texts[0] == "null":
            return value
    return [_parse_scalar(option, {str}, text) for text in texts]  # pydantic converts them to numbers


def _parse_scalar(option: str, value_types: Collection[Any], text: str) -> Any:
    try:
        value = parse_yaml(text, option)
    except yaml.YAMLError:
        return text
    is_null = text == "null" and types.NoneType in value_types
    return text if str in value_types and not isinstance(value, list | dict) and not is_null else value


def _deep_merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
