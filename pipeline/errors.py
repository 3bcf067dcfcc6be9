"""The one exception that users are meant to see, and what it may quote."""

from __future__ import annotations

import re
from collections.abc import Iterable

_DRIVES_TERMINALS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and direction marks, and bytes that are not UTF-8 as Python holds them in file names."""


def escaped(text: str, keep: str = "") -> str:
    """The text with all that could drive a terminal or forge a line as escapes (`\\n`, `\\x1b`), but for `keep`."""
    return _DRIVES_TERMINALS.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )


class UserError(ValueError):
    """Something that the user can put right: a path, a value, a file, a server.

    The message names the thing, its value and the remedy; the jobs print it without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(escaped(message, keep="\n\t"))  # it quotes names and files of others


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """What stands behind an unknown name: `; did you mean <the valid one that is nearest>?`, or a full stop.

    Names may be dotted: then it is the last part that is misspelled, or the section.
    """
    import difflib

    def near(word: str, words: Iterable[str]) -> list[str]:
        return difflib.get_close_matches(word, list(words), n=1)

    names, name = {of.lstrip("-"): of for of in valid}, name.lstrip("-")
    section, _, last = name.rpartition(".")
    siblings = {of.rpartition(".")[2]: of for of in names if of.rpartition(".")[0] == section}
    found = [siblings[of] for of in near(last, siblings)]
    found += sorted((of for of in names if of.endswith(f".{last}")), key=len)
    if not section or not siblings:
        found += near(name, names)
    return f"; did you mean {names[found[0]]}?" if found else "."
