"""The exception that users see, and the escaping of text that it quotes."""

from __future__ import annotations

import re

_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and direction marks, and surrogates, as Python decodes file names that are not UTF-8."""


def escape_controls(text: str, keep: str = "") -> str:
    """Escape (`\\n`, `\\x1b`) the characters that could control a terminal or forge a line, except those in `keep`."""
    return _CONTROL_CHARACTERS.sub(
        lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(), text
    )


class UserError(ValueError):
    """An error that the user can fix: a wrong path, value, file or server.

    The message says what is wrong, with the value, and what to do; jobs print it without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(escape_controls(message, keep="\n\t"))  # it may quote untrusted names and files

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and notebooks show: the message alone, as it says all that the user needs."""
        return [f"UserError: {self}"]
