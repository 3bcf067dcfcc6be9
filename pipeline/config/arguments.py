"""The command line of a run: --config files, and an option for every field of the config."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.files import DEMO_CONFIG, given_or_shipped, load_yaml, parse_yaml
from pipeline.config.schema import Config, choices, fields, parse_config, section_at
from pipeline.errors import UserError


def add_config_arguments(parser: argparse.ArgumentParser, base: str = "configs/demo.yaml, the embedded digits") -> None:
    """`--config FILE` and one `--section.field VALUE` for every field, with its documentation and default; `base` says
    which values these go over."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"YAML files of the run, later ones over earlier ones (without: {base})",
    )
    groups: dict[str, Any] = {}
    for name, field, default in fields():
        section = name.rpartition(".")[0]
        if section not in groups:
            title = f"config: {section}" if section else "config"
            groups[section] = parser.add_argument_group(title, _section_help(section))
        text = " ".join((field.description or "").split()).replace("%", "%%")
        valid = f" One of: {', '.join(map(str, choices(field)))}." if choices(field) else ""
        groups[section].add_argument(
            f"--{name}",
            dest=f"config.{name}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{text}{valid} (default: {json.dumps(default)})",
        )


def _section_help(path: str) -> str | None:
    if not path:
        return "Values on the command line go before those of the file; lists are written [a, b]."
    parent, _, name = path.rpartition(".")
    field = section_at(parent.split(".") if parent else []).model_fields[name]
    return field.description or field.annotation.__doc__


def arguments_of(parser: argparse.ArgumentParser, command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line gives; `parser` has the config arguments.

    Raises:
        UserError: an option that is not known.
    """
    arguments, unknown = parser.parse_known_args(command_line)
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, [f"--{field}" for field, *_ in fields()], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown option {name}{hint} --help lists them all")
    return arguments


def config_from_command_line(
    parser: argparse.ArgumentParser, command_line: Sequence[str] | None = None, base: Path | None = None
) -> Config:
    """The values of --config (without: of the demo), and of the command line over them, validated; `parser` has the
    config arguments. `base`: a file under those of --config, instead of the demo."""
    arguments = arguments_of(parser, command_line)
    values: dict[str, Any] = {}
    files = arguments.config or ([] if base else [DEMO_CONFIG])
    for file in ([base] if base else []) + files:
        values = _over(values, load_yaml(given_or_shipped(file)))
    for key, text in vars(arguments).items():
        if key.startswith("config."):
            *path, name = key.removeprefix("config.").split(".")
            try:
                nested: Any = {name: parse_yaml(text, f"--{'.'.join([*path, name])}")}
            except yaml.YAMLError:
                nested = {name: text}
            for part in reversed(path):
                nested = {part: nested}
            values = _over(values, nested)
    return parse_config(values)


def _over(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        before = merged.get(name)
        merged[name] = _over(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
