"""Help pages of the jobs. --help fits on two screens: one line per field, and a separate page for fields of methods."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.schema import METHOD_SECTIONS, VARIANTS, choices, section_description

Page = Literal["help", "methods", "all"]
ConfigField = tuple[str, FieldInfo, Any]
"""Dotted name, field, default."""
MIN_WIDTH, MAX_WIDTH = 80, 120
TEXT_COLUMN = 45


def help_page(
    program: str,
    description: str,
    options: type[BaseModel],
    config_fields: Sequence[ConfigField],
    base_help: str,
    page: Page,
) -> str:
    """Format a page of help.

    Args:
        options: the job's own options.
        base_help: the values that apply where --config gives none; empty: the job has no --config, and few fields.
        page: `help`: the job, and its config fields in short, without those of the baselines; `methods`: those;
            `all`: everything, with the full help of every field, as docs/configuration.md has it.
    """
    method_fields = [field for field in config_fields if is_method_field(field[0])]
    run_fields = [field for field in config_fields if field not in method_fields]
    if page == "methods":
        head = f"Methods (docs/methods.md): {', '.join(VARIANTS)}. Their config fields, with defaults:"
        return "\n".join([*textwrap.wrap(head, _width()), *_format_sections(method_fields, full=False), ""])
    lines = [_usage(program, options, base_help), "", *description.strip().splitlines(), ""]
    for name, field in option_fields(options).items():
        lines += _format_entry(_option_name(options, name), field, field.get_default(), full=True)
    if not base_help:
        for name, field, default in config_fields:
            lines += _format_entry(f"--{name}", field, default, full=True)
        return "\n".join([*lines, ""])
    if options.model_fields:
        lines.append("")
    lines.append(
        "Config fields with defaults, written as in YAML; a list also as a b c. Options override files, later files "
        "earlier ones:"
    )
    lines += _wrap_entry("--config FILE ...", f"YAML files of fields (default: {base_help})")
    lines += _format_sections(run_fields, full=page == "all")
    if page == "all":
        return "\n".join([*lines, *_format_sections(method_fields, full=True), ""])
    num_methods = len(set(map(_section, method_fields)))
    footer = (
        f"--help-methods shows the fields of {num_methods} baseline methods, --help-all the full help of every field."
    )
    return "\n".join([*lines, "", *textwrap.wrap(footer, _width()), ""])


def option_fields(options: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a job's own options by name: the field's, or its alias where pydantic has a method of the name."""
    return {field.alias or name: field for name, field in options.model_fields.items()}


def is_method_field(name: str) -> bool:
    """Return whether a config field belongs to the section of a baseline."""
    return name.partition(".")[0] in METHOD_SECTIONS


def _usage(program: str, options: type[BaseModel], base_help: str) -> str:
    required = [_option_name(options, name) for name, field in option_fields(options).items() if field.is_required()]
    parts = [f"{name} VALUE" if name.startswith("-") else name for name in required]
    return " ".join(
        ["usage:", program, *parts, *(["[--config FILE ...]"] if base_help else []), "[--option VALUE ...]"]
    )


def _option_name(options: type[BaseModel], name: str) -> str:
    positional: tuple[str, ...] = getattr(options, "positional", ())
    if name not in positional:
        return f"--{name}"
    return f"{name.upper()} ..." if name == positional[-1] else name.upper()


def _format_sections(config_fields: Sequence[ConfigField], full: bool) -> Iterator[str]:
    # The sort is stable, and puts the fields that are in no section first.
    for section, section_fields in groupby(sorted(config_fields, key=lambda field: bool(_section(field))), _section):
        if section:
            yield f"{section}: {section_description(section)}"
        for name, field, default in section_fields:
            yield from _format_entry(f"--{name}", field, default, full)


def _section(field: ConfigField) -> str:
    return field[0].rpartition(".")[0].partition(".")[0]


def _format_entry(option: str, field: FieldInfo, default: Any, full: bool) -> list[str]:
    text = " ".join((field.description or "").split())
    if field.is_required():
        text = f"Required. {text}"
    elif option.startswith("-"):
        option += f" {_format_value(default)}"
    if not full:
        return [_shorten_entry(option, text)]
    if valid := choices(field):
        text += f" One of: {', '.join(map(str, valid))}."
    return _wrap_entry(option, text)


def _format_value(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, tuple) and value:
        return " ".join(map(_format_value, value))
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _shorten_entry(option: str, text: str) -> str:
    """Return one line: the first sentence, cut at the end of a clause if it is too long."""
    prefix = f"  {option:{TEXT_COLUMN - 2}} "
    width = _width() - len(prefix)
    sentence = re.split(r"[.](?=\s+[A-Z`]|$)", text)[0]
    if len(sentence) <= width:
        return prefix + sentence
    ends = [match.start() for match in re.finditer(r"[;,]\s|\s\(", sentence[: width - 3]) if match.start() > width / 3]
    ends = [end for end in ends if not re.search(r"[(\[{][^)\]}]*$", sentence[:end])]
    return prefix + (f"{sentence[: ends[-1]]} ..." if ends else textwrap.shorten(sentence, width, placeholder=" ..."))


def _wrap_entry(option: str, text: str) -> list[str]:
    prefix = f"  {option}"
    lines = textwrap.wrap(text, _width() - TEXT_COLUMN - 1, break_on_hyphens=False)
    if len(prefix) > TEXT_COLUMN:
        return [prefix, *(" " * (TEXT_COLUMN + 1) + line for line in lines)]
    return [f"{prefix:{TEXT_COLUMN}} {lines[0]}", *(" " * (TEXT_COLUMN + 1) + line for line in lines[1:])]


def _width() -> int:
    return max(MIN_WIDTH, min(shutil.get_terminal_size((MAX_WIDTH, 50)).columns, MAX_WIDTH))
