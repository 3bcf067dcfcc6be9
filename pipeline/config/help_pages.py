"""Help pages of the jobs. --help has the common config fields, one line each; --help-all has all."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.schema import METHOD_SECTIONS, VARIANTS, choices, section_description
from pipeline.config.values import value_types

Page = Literal["help", "methods", "all", "json"]
ConfigField = tuple[str, FieldInfo, Any]
"""Dotted name, field, default."""
COMMON_FIELDS = (
    *("data.root", "data.tasks", "data.shots", "clip.model", "clip.pretrained", "clip.template", "baselines"),
    *("training.epochs", "training.learning_rate", "training.batch_size", "seed", "name", "storage"),
)
MIN_WIDTH, MAX_WIDTH = 80, 120
TEXT_COLUMN = 45


def help_page(
    program: str,
    description: str,
    options: type[BaseModel],
    config_fields: Sequence[ConfigField],
    base_help: str,
    base_changes: Mapping[str, Any],
    page: Page,
) -> str:
    """Format a page of help.

    Args:
        options: the job's own options.
        base_help: the values that apply where --config gives none; empty: the job has no --config, and few fields.
        base_changes: fields of which a run without images of one's own has another default.
        page: `help`: the job, its options and the common config fields; `methods`: the fields of the baselines;
            `all`: everything, with the full help of every field, as docs/configuration.md has it.
    """
    method_fields = [field for field in config_fields if is_method_field(field[0])]
    run_fields = [field for field in config_fields if field not in method_fields]
    if page == "methods":
        head = f"Methods (docs/methods.md): {', '.join(VARIANTS)}. Their config fields, with defaults:"
        return "\n".join([*_wrap(head), *_format_sections(method_fields, full=False), ""])
    lines = [_usage(program, options, base_help), "", *description.strip().splitlines(), ""]
    for name, field in option_fields(options).items():
        lines += _format_entry(_option_name(options, name), field, field.get_default(), full=True)
    if not base_help:
        for name, field, default in config_fields:
            lines += _format_entry(f"--{name}", field, default, full=True)
        return "\n".join([*lines, ""])
    if options.model_fields:
        lines.append("")
    listed = run_fields if page == "all" else [field for field in run_fields if field[0] in COMMON_FIELDS]
    lines.append(
        f"{'All' if page == 'all' else 'Common'} config fields, with defaults. Options override files, later files "
        "earlier ones:"
    )
    lines += _wrap_entry("--config FILE ...", f"YAML files of fields (default: {base_help})")
    if page == "all":
        lines += _format_sections([*run_fields, *method_fields], full=True)
    else:
        listed.sort(key=lambda field: COMMON_FIELDS.index(field[0]))
        for name, field, default in listed:
            lines += _format_entry(f"--{name}", field, default, full=False)
    names = {name for name, *_ in listed}
    if changes := [f"{name} {_format_value(value)}" for name, value in base_changes.items() if name in names]:
        lines += ["", *_wrap(f"The demo, which runs without --data.root and --config, has {', '.join(changes)}.")]
    if page == "all":
        return "\n".join([*lines, ""])
    footer = (
        f"--help-all shows all {len(config_fields)} config fields in full, --help-methods those of the baseline "
        "methods. A list is `a b` or `a,b`, and `null` no value. `--shots` is enough for `--data.shots`, `--lr` for "
        "`--training.learning_rate`."
    )
    return "\n".join([*lines, "", *_wrap(footer), ""])


def options_json(
    job_fields: Mapping[str, FieldInfo],
    positional: Sequence[str],
    config_fields: Mapping[str, FieldInfo],
    takes_config: bool,
) -> str:
    """Return all options as a JSON list, for the completion of command lines."""
    entries = [{"name": "config", "help": "YAML files of fields", "positional": False, "list": True, "choices": []}]
    options = [] if not takes_config else entries
    for name, field in {**job_fields, **config_fields}.items():
        kinds = value_types(field.annotation)
        values = ["true", "false"] if bool in kinds else [*(choices(field) or field.examples or ())]
        text = re.split(r"[.](?=\s|$)", " ".join((field.description or "").split()))[0]
        is_list = tuple in kinds
        options.append(
            {"name": name, "help": text, "positional": name in positional, "list": is_list, "choices": values}
        )
    return json.dumps(options, indent=1) + "\n"


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


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_on_hyphens=False)


def _wrap_entry(option: str, text: str) -> list[str]:
    prefix = f"  {option}"
    lines = textwrap.wrap(text, _width() - TEXT_COLUMN - 1, break_on_hyphens=False)
    if len(prefix) > TEXT_COLUMN:
        return [prefix, *(" " * (TEXT_COLUMN + 1) + line for line in lines)]
    return [f"{prefix:{TEXT_COLUMN}} {lines[0]}", *(" " * (TEXT_COLUMN + 1) + line for line in lines[1:])]


def _width() -> int:
    return max(MIN_WIDTH, min(shutil.get_terminal_size((MAX_WIDTH, 50)).columns, MAX_WIDTH))
