"""The command line of a job: options of its own, --config files, and the fields of the config.

All jobs speak one dialect. An option is spelled as the field that it sets, with underscores, and takes its value as
YAML has it; but text is taken as it is, a list may also be written `a b c`, and a switch alone is true.
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
from pipeline.config.help_pages import Page, help_page
from pipeline.config.schema import Config, fields, parse_config, validated
from pipeline.errors import UserError, did_you_mean


class JobOptions(BaseModel):
    """Options of a job beside fields of the config: a field with a description is one.

    Not with docstrings: pydantic does not find those of a script that was also imported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    positional: ClassVar[str] = ""
    """The field, a list, that is given without its name."""


Options = TypeVar("Options", bound=JobOptions)


@dataclass(frozen=True)
class Given(Generic[Options]):
    """What a command line gives."""

    own: Options
    files: Sequence[Path]
    """Of --config."""
    fields: Mapping[str, Any]
    """Config fields by their dotted names."""

    def config(self, base: Path | None = None) -> Config:
        """The values of `base` and of --config over it (without either: of the demo), and of the command line over
        them.

        Raises:
            UserError: values that cannot be.
        """
        values: dict[str, Any] = {}
        for file in [*([base] if base else []), *self.files] or [DEMO_CONFIG]:
            values = _deep_merge(values, load_yaml(resolve_config_path(file)))
        return parse_config(_deep_merge(values, self.nested()))

    def nested(self) -> dict[str, Any]:
        """`fields` as a YAML file has them."""
        values: dict[str, Any] = {}
        for name, value in self.fields.items():
            for part in reversed(name.split(".")):
                value = {part: value}
            values = _deep_merge(values, value)
        return values


class JobParser(argparse.ArgumentParser, Generic[Options]):
    """Reads a job's command line; its pages of help are made to be read on two screens."""

    def __init__(
        self,
        description: str | None,
        own: type[Options] = JobOptions,  # type: ignore[assignment]  # mypy has no defaults for type variables
        takes: Mapping[str, str] | None = None,
        instead: Mapping[str, str] = {},
        base: str = "configs/demo.yaml, the embedded digits",
    ):
        """
        Args:
            description: the job's docstring.
            own: the job's own options.
            takes: fields of the config that are options → what they mean here; None: all, and --config.
            instead: field that is none → the own option to use.
            base: words for what lies under the values of --config.
        """
        super().__init__(add_help=False, allow_abbrev=False)
        self.own, self.instead, self.base = own, instead, base if takes is None else ""
        self.job_description = description or ""
        self.config_fields = [
            (name, field, default) if takes is None else (name, _described(field, takes[name]), None)
            for name, field, default in fields()
            if name not in instead and (takes is None or name in takes)
        ]
        self.add_argument("-h", "--help", action=_ShowPage, const="help", nargs=0)
        if self.base:
            self.add_argument("--help-methods", action=_ShowPage, const="methods", nargs=0)
            self.add_argument("--help-all", action=_ShowPage, const="all", nargs=0)
            self.add_argument("--config", type=Path, nargs="+", default=[])
        for name, field in own.model_fields.items():
            if name == own.positional:
                self.add_argument(name, nargs="+", metavar=name.upper())
            else:
                self._add_field(name, name, field)
        for name, field, _ in self.config_fields:
            self._add_field(name, f"config.{name}", field)

    def given(self, command_line: Sequence[str] | None = None) -> Given[Options]:
        """
        Raises:
            UserError: an option that is not known, is missing, or has a value that cannot be.
        """
        arguments, unknown = self.parse_known_args(command_line)
        if unknown:
            self._refuse(unknown[0].partition("=")[0])
        texts = vars(arguments)
        own = {
            name: texts[name] if name == self.own.positional else _value(f"--{name}", field, texts[name])
            for name, field in self.own.model_fields.items()
            if name in texts
        }
        given = {
            name: _value(f"--{name}", field, texts[f"config.{name}"])
            for name, field, _ in self.config_fields
            if f"config.{name}" in texts
        }
        return Given(validated(self.own, own), texts.get("config", []), given)

    def format_help(self, page: Page = "help") -> str:
        return help_page(self.prog, self.job_description, self.own, self.config_fields, self.base, page)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. --help tells more")

    def _add_field(self, name: str, destination: str, field: FieldInfo) -> None:
        kinds = _kinds(field.annotation)
        number = {"nargs": "+"} if tuple in kinds else {"nargs": "?", "const": "true"} if bool in kinds else {}
        self.add_argument(
            f"--{name}", dest=destination, default=argparse.SUPPRESS, required=field.is_required(), **number
        )

    def _refuse(self, option: str) -> NoReturn:
        if not option.startswith("-"):
            raise UserError(f"{option} belongs to no option. --help tells more")
        if instead := self.instead.get(option.removeprefix("--")):
            raise UserError(f"{option} is no option of this job: use {instead}")
        raise UserError(f"unknown option {option}{did_you_mean(option, self._option_string_actions)} --help lists them")


class _ShowPage(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, JobParser)
        print(parser.format_help(self.const), end="")
        parser.exit()


def _described(field: FieldInfo, description: str) -> FieldInfo:
    field = copy.copy(field)
    field.description = description
    return field


def _kinds(annotation: Any) -> set[Any]:
    """Types of the values: tuple and dict without what is in them."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return set[Any]().union(*map(_kinds, arguments))
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    if origin is typing.Literal:
        return set(map(type, arguments))
    return {origin or annotation}


def _value(option: str, field: FieldInfo, given: str | list[str]) -> Any:
    if isinstance(given, str):
        return _scalar(option, _kinds(field.annotation), given)
    if len(given) == 1:
        try:
            whole = parse_yaml(given[0], option)
        except yaml.YAMLError:
            return given[0]  # no list, as the field will say
        if isinstance(whole, list | dict) or given[0] == "null":
            return whole
    return [_scalar(option, {str}, text) for text in given]  # of which pydantic makes numbers


def _scalar(option: str, kinds: Collection[Any], text: str) -> Any:
    try:
        value = parse_yaml(text, option)
    except yaml.YAMLError:
        return text
    is_null = text == "null" and types.NoneType in kinds
    return text if str in kinds and not isinstance(value, list | dict) and not is_null else value


def _deep_merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        before = merged.get(name)
        merged[name] = _deep_merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
