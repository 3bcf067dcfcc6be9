"""Reading of text and YAML files, and the configs that ship with this package."""

from __future__ import annotations

import codecs
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
        for folder in (_ROOT, *(prefix / "share" / "mmap-clip" for prefix in (_ROOT, Path(sys.prefix))))
        if (folder / "configs" / "demo.yaml").is_file()
    ),
    _ROOT / "configs",
)
"""In a clone, or where a wheel installs it."""
DEMO_CONFIG = CONFIGS / "demo.yaml"


_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with that of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path, name: str, errors: str = "strict", limit: int = MAX_TEXT_BYTES) -> str:
    """Read a text file that a user wrote: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is not part of the
    text. Lines end with \\n in the text, with \\n, \\r\\n or \\r in the file.

    Args:
        name: how error messages call the file.
        errors: how to decode what is not UTF-8.

    Raises:
        UserError: not a file, larger than `limit` bytes, or not text of these encodings.
    """
    if not path.is_file():
        raise UserError(f"{name} is not a file")
    try:
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{name} is too large ({size:,} bytes, limit {limit:,})")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    encoding = next((codec for mark, codec in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and (position := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, position) + 1
        raise UserError(f"{name} is not a text file: line {line} has a NUL byte; save it as text in UTF-8")
    try:
        return data.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.upper().removesuffix("-SIG")
        raise UserError(f"{name} is not {expected}: line {line}: {error.reason}; save it as UTF-8") from None


class _PlainYaml(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
    """Loader of plain values: rejects tags that create Python objects, duplicate keys, and aliases, which let a few
    lines expand to billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{alias.anchor}: write the value out", problem_mark=alias.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[tuple[str, str]] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name.value[:80]}", problem_mark=name.start_mark)
            keys.add((name.tag, str(name.value)))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:
                raise ValueError
            return value
        except (ValueError, LookupError, AttributeError):  # raised by PyYAML for `!!int x`, 2024-13-45, 5000 digits
            tag, value = node.tag.rpartition(":")[2], str(node.value)[:40]
            raise yaml.MarkedYAMLError(problem=f"invalid {tag} {value!r}", problem_mark=node.start_mark) from None


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML of plain values; yaml.YAMLError if it is invalid."""
    try:
        loader = _PlainYaml(text)
        loader.name = name
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested fields.

    Raises:
        UserError: no such file, larger than MAX_YAML_BYTES, not UTF-8, not plain YAML, or not a mapping.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        values = parse_yaml(read_text(path, f"config file {path}", limit=MAX_YAML_BYTES), str(path))
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not plain YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"config file {path} must be a mapping of fields to values, not {type(values).__name__}")
    return values or {}


def resolve_config_path(path: Path) -> Path:
    """Return the path, or that of the shipped config if the file does not exist and the path begins with `configs`."""
    shipped = CONFIGS.parent / path
    is_shipped = path.parts[:1] == (CONFIGS.name,) and not path.exists() and shipped.exists()
    return shipped if is_shipped else path
