"""Reading of text and YAML files, and the configs that ship with this package."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import yaml

from pipeline.errors import UserError

MAX_YAML_BYTES = 1 << 18
MAX_YAML_BRACKETS = 100
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


class TextFile(Protocol):
    """A file to read: a pathlib.Path, or a path in a bucket."""

    def is_file(self) -> bool: ...

    def stat(self) -> Any: ...

    def read_bytes(self) -> bytes: ...

    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


def read_text(path: TextFile, name: str, errors: str = "strict", limit: int = MAX_TEXT_BYTES) -> str:
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
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None
    encoding = _encoding(data)
    if encoding.startswith("utf-8") and (position := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, position) + 1
        raise UserError(f"{name} is not a text file: line {line} has a NUL byte; save it as text in UTF-8")
    try:
        return _with_newlines(data.decode(encoding, errors))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.upper().removesuffix("-SIG")
        raise UserError(f"{name} is not {expected}: line {line}: {error.reason}; save it as UTF-8") from None


class Scalar(str):
    """A scalar of a YAML file as it is written there, of whatever kind: its field decides what it means.

    So text stays text, where YAML 1.1 makes a number of `007`, a date of `2024-11-28` and a truth value of `no`.
    """

    plain: bool
    """Whether it is written without quotes: then it may mean null."""
    source: str
    """File and line."""


def read_text_start(path: TextFile, num_bytes: int) -> str:
    """Read the first bytes of a file as `read_text` does; bytes of another encoding become surrogates or are left out.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        data = stream.read(num_bytes)
    encoding = _encoding(data)
    return _with_newlines(data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "ignore"))


def _encoding(data: bytes) -> str:
    """Return the encoding that a byte order mark declares, or UTF-8."""
    return next((codec for mark, codec in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _PlainYaml(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
    """Loader of plain values: rejects tags, which create Python objects, duplicate keys, and aliases, which let a few
    lines expand to billions of values."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # The scanner looks at every open bracket again at each token: it takes seconds for thousands of them.
        if self.flow_level >= MAX_YAML_BRACKETS:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: write the value out, or put text in quotes",
                problem_mark=event.start_mark,
            )
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")[:80]
            raise yaml.MarkedYAMLError(
                problem=f"tag {tag}: leave it out, or put text in quotes", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def tree(self, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode):
            scalar = Scalar(node.value)
            scalar.plain, scalar.source = node.style is None, f"{self.name}:{node.start_mark.line + 1}"
            return scalar
        if isinstance(node, yaml.SequenceNode):
            return [self.tree(element) for element in node.value]
        mapping = dict[str, Any]()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in mapping:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value[:80]}", problem_mark=key.start_mark)
            mapping[str(key.value)] = self.tree(value)
        return mapping


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML into mappings, lists and Scalars; yaml.YAMLError if it is invalid."""
    try:
        loader = _PlainYaml(text)
        loader.name = name
        node = loader.get_single_node()
        return None if node is None else loader.tree(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested fields, whose values are Scalars, lists and mappings.

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
        kind = "a list" if isinstance(values, list) else "text"
        raise UserError(f"config file {path} must be a mapping of fields to values (`seed: 3`), not {kind}")
    return values or {}


def resolve_config_path(path: Path) -> Path:
    """Return the path, or that of the shipped config if the file does not exist and the path begins with `configs`."""
    path = path.expanduser()
    shipped = CONFIGS.parent / path
    is_shipped = path.parts[:1] == (CONFIGS.name,) and not path.exists() and shipped.exists()
    return shipped if is_shipped else path
