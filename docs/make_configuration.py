"""Writes docs/configuration.md from the code: `python docs/make_configuration.py`."""

import json
from pathlib import Path

from pipeline.config import choices, fields, section_description

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Every config field

Made from `pipeline/config/` and `pipeline/methods/` by `docs/make_configuration.py`. A field is given in a YAML file
(`--config FILE ...`, later ones over earlier ones) or on the command line of any job (`--section.field VALUE`, over the
files). There too a value is written as in YAML, but text needs no quotes for YAML's sake, a list is `a b c` or
`"[a, b, c]"`, and a switch alone is true. An unknown field or an impossible value is refused by name. The defaults are
the paper's settings; what the paper leaves open is taken from MaPLe and Dassl
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
            parts.append(f"{_one_line(section_description(section))}\n")
        parts += ["| Field | Default | What it does |", "|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
