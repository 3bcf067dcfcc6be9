"""Text and YAML files of the user's, and the configs that come with this package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MAX_YAML_BYTES = 1 << 18
MAX_TEXT_BYTES = 256 << 20
_ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = next(
    (
        folder / "configs"
        for folder in (_ROOT, *(place / "share" / "mmap-clip" for place in (_ROOT, Path(sys.prefix))))
        if (folder / "configs" / "demo.yaml").is_file()
    ),
    _ROOT / "configs",
)
"""In a clone, or where a wheel puts it."""
DEMO_CONFIG = CONFIGS / "demo.yaml"


def read_text(path: Path, name: str, errors: str = "strict", limit: int = MAX_TEXT_BYTES) -> str:
    """A text file of the user's; `name` is what faults call it.

    Raises:
        UserError: no file, larger than `limit` bytes, not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{name} is no file")
    try:
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{name} has {size:,} bytes, more than {limit:,}: it is no such text file")
        data = path.read_bytes()
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} is not UTF-8 text: line {line}: {error.reason}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None


class _PlainYaml(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
    """Plain values only. Neither tags that make Python objects, nor a name given twice, of which YAML takes the last,
    nor aliases, by which a few lines make billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{alias.anchor}: write the value out", problem_mark=alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{name.value[:80]} is given twice", problem_mark=name.start_mark)
            seen.add((name.tag, str(name.value)))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:
                raise ValueError
            return value
        except (ValueError, LookupError, AttributeError):  # PyYAML's own on `!!int x`, 2024-13-45, 5000 digits
            kind, value = node.tag.rpartition(":")[2], str(node.value)[:40]
            raise yaml.MarkedYAMLError(problem=f"{value!r} is no {kind}", problem_mark=node.start_mark) from None


def parse_yaml(text: str, name: str) -> Any:
    """Raises: yaml.YAMLError"""
    try:
        loader = _PlainYaml(text)
        loader.name = name
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Nested values of a YAML file.

    Raises:
        UserError: no file, more than MAX_YAML_BYTES, not UTF-8, not plain YAML (by its line), no fields and values.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        values = parse_yaml(read_text(path, f"config file {path}", limit=MAX_YAML_BYTES), str(path))
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not plain YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"config file {path} must hold fields and values, not {type(values).__name__}")
    return values or {}


def resolve_config_path(path: Path) -> Path:
    """The path itself, or, where there is no such file and it begins with `configs`, the one that comes with this
    package."""
    shipped = CONFIGS.parent / path
    is_shipped = path.parts[:1] == (CONFIGS.name,) and not path.exists() and shipped.exists()
    return shipped if is_shipped else path
