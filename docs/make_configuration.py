"""Writes docs/configuration.md from the code: `python docs/make_configuration.py`."""

import json
from pathlib import Path

from pipeline.config import Config, Section, choices, fields

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Every config field

Made from `pipeline/config/` and `pipeline/methods/` by `docs/make_configuration.py`. A field is given in a YAML file
(`--config FILE ...`, later ones over earlier ones) or on the command line (`--section.field VALUE`, over the files;
lists are written `[a, b]`). Defaults are the paper's settings; what the paper leaves open is taken from MaPLe and Dassl
([methods.md](methods.md#what-the-paper-leaves-open))."""


def reference() -> str:
    """The page: a table for each section, in the order of the config."""
    sections: dict[str, list[str]] = {}
    for name, field, default in fields():
        section, _, short = name.rpartition(".")
        text = _one_line(field.description or "")
        if valid := choices(field):
            text += f" One of {', '.join(f'`{value}`' for value in valid)}."
        sections.setdefault(section, []).append(f"| `{short}` | `{json.dumps(default, default=str)}` | {text} |")
    parts = [HEAD]
    for section, rows in sections.items():
        parts.append(f"\n## {section or 'The run'}\n")
        if section:
            parts.append(f"{_one_line(_description(section))}\n")
        parts += ["| Field | Default | What it does |", "|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _description(path: str) -> str:
    """Of a section, as its parent has it, or its own."""
    *parents, name = path.split(".")
    section: type[Section] = Config
    for part in parents:
        section = type(getattr(section(), part))
    field = section.model_fields[name]
    return field.description or field.annotation.__doc__ or ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
