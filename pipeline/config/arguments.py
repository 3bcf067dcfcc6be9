"""The command line of a job: the job's own options, --config files, and the fields of the config.

All jobs parse options the same way. An option is named after the field that it sets; values.py says how its value is
written, suggestions.py which other names it has. A flag without a value is true.
"""

from __future__ import annotations

import argparse
import copy
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic.fields import FieldInfo

from pipeline.config.fields import add_descriptions, check_texts
from pipeline.config.files import DEMO_CONFIG, load_yaml, resolve_config_path
from pipeline.config.help_pages import Page, help_page, option_fields, options_json
from pipeline.config.schema import Config, fields, parse_config, validate
from pipeline.config.sections import BUILTIN_DIGITS
from pipeline.config.suggestions import did_you_mean, explain_unavailable, find_option
from pipeline.config.values import command_line_value, value_types
from pipeline.errors import UserError

DEMO_HELP = "none; without --data.root, configs/demo.yaml"
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}


class JobOptions(BaseModel):
    """Base of a job's own options, beside the fields of the config: each field with a description is one.

    Docstrings do not work as descriptions here: pydantic does not find those of a script that was also imported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    positional: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that are positional arguments, in this order; only the last can be a list."""
    undivided: ClassVar[tuple[str, ...]] = ()
    """Names of the lists whose values, such as paths, may contain commas: each is an argument of its own."""

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        check_texts(value)
        return value


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
        """Merge `base`, the files of --config and the command line, in this order.

        Without `base` and files, and without images of the user's own in data.root, the base is the demo's config.

        Raises:
            UserError: invalid values.
        """
        values: dict[str, Any] = {}
        files = [*([base] if base else []), *self.config_files]
        if not files and self.fields.get("data.root", BUILTIN_DIGITS) == BUILTIN_DIGITS:
            values = load_yaml(DEMO_CONFIG)
            if "clip.model" in self.fields:
                del values["clip"]["pretrained"]  # the weights of the demo's model
        for file in files:
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
    """Parser of a job's command line."""

    def __init__(
        self,
        description: str | None,
        options: type[Options] = JobOptions,  # type: ignore[assignment]  # mypy has no defaults for type variables
        field_help: Mapping[str, str] | None = None,
        replacements: Mapping[str, str] = {},
        base_help: str = DEMO_HELP,
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
        self.add_argument("--help-json", action=_ShowPage, const="json", nargs=0)
        if self.base_help:
            self.add_argument("--help-methods", action=_ShowPage, const="methods", nargs=0)
            self.add_argument("--help-all", action=_ShowPage, const="all", nargs=0)
            self.add_argument("--config", nargs="+", action="extend", default=[])
        for name, field in option_fields(options).items():
            if name in options.positional:
                is_list = tuple in value_types(field.annotation)
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
        arguments, unknown = self.parse_known_args(
            list(self._normalize(sys.argv[1:] if command_line is None else command_line))
        )
        if unknown:
            self._reject(unknown[0].partition("=")[0])
        texts = vars(arguments)
        option_values = {
            name: self._parse_value(name, field, texts[name])
            for name, field in option_fields(self.options).items()
            if name in texts
        }
        field_values = {
            name: self._parse_value(name, field, texts[f"config.{name}"])
            for name, field, _ in self.config_fields
            if f"config.{name}" in texts
        }
        if "" in (files := texts.get("config", [])):
            raise UserError("--config is empty: give a file")
        return JobArguments(validate(self.options, option_values), [*map(Path, files)], field_values)

    def format_help(self, page: Page = "help") -> str:
        add_descriptions(Config)
        if page == "json":
            job_fields = option_fields(self.options)
            config_fields = {name: field for name, field, _ in self.config_fields}
            return options_json(job_fields, self.options.positional, config_fields, bool(self.base_help))
        demo = dict[str, Any]()
        if self.base_help == DEMO_HELP:
            demo = {name: value for name, _, value in fields(parse_config(load_yaml(DEMO_CONFIG)))}
        changes = {name: demo[name] for name, _, default in self.config_fields if demo.get(name, default) != default}
        description, options = self.job_description, self.options
        return help_page(self.prog, description, options, self.config_fields, self.base_help, changes, page)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"argument (--\S+): expected (?:one|at least one) argument", message):
            raise UserError(f"{match[1]} needs a value; one that begins with - is written {match[1]}=-...")
        raise UserError(f"{message}; see --help")

    def _normalize(self, command_line: Sequence[str]) -> Iterator[str]:
        """Replace options by the full names, and `--option=value` by two arguments, so that more may follow."""
        for index, argument in enumerate(command_line):
            match = re.fullmatch(r"--([A-Za-z][\w.-]*)(?:=(.*))?", argument, re.DOTALL)
            option = find_option(match[1], self._option_string_actions) if match else None
            if match is None or option is None:
                yield argument
            elif match[2] is not None and match[2].startswith("-"):
                yield f"{option}={match[2]}"
            else:
                yield option
                if match[2] is not None:
                    yield match[2]
                elif self.options.positional and self._option_string_actions[option].const == "true":
                    following = command_line[index + 1 : index + 2]
                    if following and following[0].lower() not in _BOOLEANS:
                        yield "true"  # the next argument is positional

    def _parse_value(self, name: str, field: FieldInfo, texts: str | list[str]) -> Any:
        is_positional = name in self.options.positional
        return command_line_value(
            name.upper() if is_positional else f"--{name}",
            field,
            [texts] if isinstance(texts, str) else texts,
            splits_lists=not is_positional and name not in self.options.undivided,
        )

    def _add_field(self, name: str, destination: str, field: FieldInfo) -> None:
        kinds = value_types(field.annotation)
        nargs = {"nargs": "+"} if tuple in kinds else {"nargs": "?", "const": "true"} if bool in kinds else {}
        self.add_argument(
            f"--{name}", dest=destination, default=argparse.SUPPRESS, required=field.is_required(), **nargs
        )

    def _reject(self, option: str) -> NoReturn:
        if not option.startswith("-"):
            if "--data.root" in self._option_string_actions and Path(option).expanduser().exists():
                raise UserError(f"unexpected argument {option}: write --data.root {shlex.quote(option)}")
            if suggestion := find_option(option, self._option_string_actions):  # as Hydra takes it
                raise UserError(f"unexpected argument {option}: write {suggestion} VALUE")
            raise UserError(f"unexpected argument {option}; see --help")
        if replacement := self.replacements.get(option.removeprefix("--")):
            raise UserError(f"{option} is not an option of this job: use {replacement}")
        if reason := explain_unavailable(option, self._option_string_actions):
            raise UserError(f"{option} is not an option: {reason}")
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


def _deep_merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
