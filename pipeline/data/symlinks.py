"""Symbolic links out of data.root. They are followed unless data.follow_external_symlinks=false: then a data set from
someone else does not expose other files of the user."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from pipeline.data.names import escape_for_terminal, truncated_list
from pipeline.errors import UserError


class SymlinkChecker:
    """Records links under a root that point outside of it, unless that is allowed."""

    def __init__(self, root: Path, allow_external: bool):
        self.allow_external = allow_external
        self._root = root
        self._real = os.path.realpath(root)
        self._escapes: dict[str, str] = {}

    def escapes_root(self, path: str | Path, real: str | None = None) -> bool:
        """Return and record whether `path` is outside of the root; `real`: its resolved path, if known."""
        real = real or os.path.realpath(path)
        if self.allow_external or os.path.commonpath((self._real, real)) == self._real:
            return False
        self._escapes[str(path)] = real
        return True

    def raise_on_escape(self, root: Path, tasks: Collection[str] | None = None) -> None:
        """Raise UserError if links at `root`, or in the folders of `tasks` below it, point outside."""
        links = [
            f"{escape_for_terminal(os.path.relpath(path, self._root))} → {escape_for_terminal(real)}"
            for path, real in sorted(self._escapes.items())
            if tasks is None or Path(path) == root or Path(path).relative_to(root).parts[0] in tasks
        ]
        if links:
            raise UserError(
                f"links point outside of data.root={self._root}, and data.follow_external_symlinks=false: "
                f"{truncated_list(links)}; replace them with their targets, or allow all with "
                "--data.follow_external_symlinks true"
            )
