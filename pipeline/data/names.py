"""Names of tasks, classes and files that others gave: which can be stored and told as they are, and how the rest is
shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from pipeline.errors import UserError, escape_controls


def escape_for_terminal(path: str) -> str:
    """The path as one line of plain text, of which no two paths have the same: what is not plain is escaped, and
    backslashes are doubled."""
    return escape_controls(path.replace("\\", "\\\\"))


def invalid_name_reason(path: str) -> str | None:
    """Why a name cannot be stored and told as it is, or None."""
    if path == escape_for_terminal(path):
        return None
    if path == path.encode("utf-8", "replace").decode():
        return "holds control characters or a backslash"
    return "is not UTF-8"


@lru_cache(maxsize=4096)
def plain_name(name: str, what: str = "folder name") -> str:
    """A task's or class's name, the same on every file system: some store é as e and an accent.

    Raises:
        UserError: a name that cannot be stored and told as it is; `what` is what it calls it.
    """
    if fault := invalid_name_reason(name) or ("begins or ends with a space" if name != name.strip() else None):
        raise UserError(f"the {what} '{escape_for_terminal(name)}' {fault}; rename it")
    return unicodedata.normalize("NFC", name)


def split_synonyms(words: str) -> list[str]:
    """The names in a class's words, which `|` keeps apart, as in "sofa | couch"; the first is its label."""
    return [name for part in words.split("|") if (name := part.strip())] or [words]


def pluralize(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def truncated_list(names: Iterable[str], limit: int = 10) -> str:
    """The first of them, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
