"""What a job's --help shows. It fits two screens: a field has a line, the fields of methods a page of their own."""

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
    program: str, description: str, own: type[BaseModel], config_fields: Sequence[ConfigField], base: str, page: Page
) -> str:
    """
    Args:
        own: the job's own options.
        base: words for what lies under the values of --config; empty: the job has none, and few fields.
        page: `help`, the job and its config fields in short, without those of methods beside MmAP; `methods`, these;
            `all`, everything as docs/configuration.md has it.
    """
    of_methods = [field for field in config_fields if is_of_a_method(field[0])]
    others = [field for field in config_fields if field not in of_methods]
    if page == "methods":
        head = f"Methods (docs/methods.md): {', '.join(VARIANTS)}. Their fields of the config, with their defaults:"
        return "\n".join([*textwrap.wrap(head, _width()), *_sections(of_methods, in_full=False), ""])
    lines = [_usage(program, own, base), "", *description.strip().splitlines(), ""]
    for name, field in own.model_fields.items():
        lines += _entry(_own_name(own, name), field, field.get_default(), in_full=True)
    if not base:
        for name, field, default in config_fields:
            lines += _entry(f"--{name}", field, default, in_full=True)
        return "\n".join([*lines, ""])
    if own.model_fields:
        lines.append("")
    lines.append("Fields of the config, with their defaults. Values are written as in YAML, a list also as a b c:")
    files = f"YAML files of fields, later ones over earlier ones, options over all (without: {base})"
    lines += _wrapped("--config FILE ...", files)
    lines += _sections(others, in_full=page == "all")
    if page == "all":
        return "\n".join([*lines, *_sections(of_methods, in_full=True), ""])
    count = len(set(map(_top, of_methods)))
    more = f"--help-methods shows the fields of {count} methods to compare with, --help-all all of every field's help."
    return "\n".join([*lines, "", *textwrap.wrap(more, _width()), ""])


def is_of_a_method(name: str) -> bool:
    """Whether a field of the config belongs to a method beside MmAP."""
    return name.partition(".")[0] in METHOD_SECTIONS


def _usage(program: str, own: type[BaseModel], base: str) -> str:
    required = [_own_name(own, name) for name, field in own.model_fields.items() if field.is_required()]
    parts = [f"{name} VALUE" if name.startswith("-") else name for name in required]
    return " ".join(["usage:", program, *parts, *(["[--config FILE ...]"] if base else []), "[--option VALUE ...]"])


def _own_name(own: type[BaseModel], name: str) -> str:
    return f"{name.upper()} ..." if name == getattr(own, "positional", "") else f"--{name}"


def _sections(config_fields: Sequence[ConfigField], in_full: bool) -> Iterator[str]:
    # The sort is stable, and puts the fields that are in no section first.
    for top, of_section in groupby(sorted(config_fields, key=lambda field: bool(_top(field))), _top):
        if top:
            yield f"{top}: {section_description(top)}"
        for name, field, default in of_section:
            yield from _entry(f"--{name}", field, default, in_full)


def _top(field: ConfigField) -> str:
    return field[0].rpartition(".")[0].partition(".")[0]


def _entry(option: str, field: FieldInfo, default: Any, in_full: bool) -> list[str]:
    text = " ".join((field.description or "").split())
    if field.is_required():
        text = f"Required. {text}"
    elif option.startswith("-"):
        option += f" {_written(default)}"
    if not in_full:
        return [_short(option, text)]
    if valid := choices(field):
        text += f" One of: {', '.join(map(str, valid))}."
    return _wrapped(option, text)


def _written(value: Any) -> str:
    """As it is given on the command line."""
    if isinstance(value, tuple) and value:
        return " ".join(map(_written, value))
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _short(option: str, text: str) -> str:
    """A line: as much of the first sentence as it has room for, if it can be to the end of a clause."""
    left = f"  {option:{TEXT_COLUMN - 2}} "
    room = _width() - len(left)
    sentence = re.split(r"[.](?=\s+[A-Z`]|$)", text)[0]
    if len(sentence) <= room:
        return left + sentence
    ends = [end.start() for end in re.finditer(r"[;,]\s|\s\(", sentence[: room - 3]) if end.start() > room / 3]
    ends = [end for end in ends if not re.search(r"[(\[{][^)\]}]*$", sentence[:end])]
    return left + (f"{sentence[: ends[-1]]} ..." if ends else textwrap.shorten(sentence, room, placeholder=" ..."))


def _wrapped(option: str, text: str) -> list[str]:
    left = f"  {option}"
    lines = textwrap.wrap(text, _width() - TEXT_COLUMN - 1, break_on_hyphens=False)
    if len(left) > TEXT_COLUMN:
        return [left, *(" " * (TEXT_COLUMN + 1) + line for line in lines)]
    return [f"{left:{TEXT_COLUMN}} {lines[0]}", *(" " * (TEXT_COLUMN + 1) + line for line in lines[1:])]


def _width() -> int:
    return max(MIN_WIDTH, min(shutil.get_terminal_size((MAX_WIDTH, 50)).columns, MAX_WIDTH))
