"""Names of tasks, classes and files from users' data: which are valid, and how others are displayed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from pipeline.errors import UserError, escape_controls

LABEL_SEPARATOR = ";"
"""Between the labels of an image that may have several."""
LABEL_THRESHOLD = 0.5
"""Probability from which on such an image has a label, unless another threshold is asked for."""


def escape_for_terminal(path: str) -> str:
    """Return the path as one line of plain text, unique to it: other characters are escaped, backslashes doubled."""
    return escape_controls(path.replace("\\", "\\\\"))


def invalid_name_reason(path: str) -> str | None:
    """Return why a name cannot be stored and displayed unchanged, or None."""
    if path == escape_for_terminal(path):
        return None
    if path == path.encode("utf-8", "replace").decode():
        return "contains control characters or a backslash"
    return "is not UTF-8"


@lru_cache(maxsize=4096)
def normalize_name(name: str, kind: str = "folder name") -> str:
    """Normalize the name of a task or class to NFC: some file systems store é as e and an accent.

    Raises:
        UserError: the name is invalid; the message calls it `kind`.
    """
    if reason := invalid_name_reason(name) or ("begins or ends with a space" if name != name.strip() else None):
        raise UserError(f"the {kind} '{escape_for_terminal(name)}' {reason}; rename it")
    return unicodedata.normalize("NFC", name)


def split_synonyms(class_name: str) -> list[str]:
    """Split a class name such as "sofa | couch" at `|` into synonyms; predictions use the first."""
    return [name for part in class_name.split("|") if (name := part.strip())] or [class_name]


def pluralize(number: int, word: str) -> str:
    """Return the number and a noun, in the plural unless the number is 1."""
    if number == 1:
        return f"1 {word}"
    ends_in_y = word.endswith("y") and word[-2:-1] not in "aeiou"
    plural = f"{word[:-1]}ies" if ends_in_y else f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"
    return f"{number:,} {plural}"


def truncated_list(names: Iterable[str], limit: int = 10) -> str:
    """Join up to `limit` names, and say how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def shorten(name: str, length: int = 24) -> str:
    """Return a name of at most `length` letters: the middle of a longer one is left out, since names that begin alike
    differ at their end."""
    if len(name) <= length:
        return name
    start = length // 2
    return f"{name[:start]}…{name[len(name) - (length - start - 1) :]}"
