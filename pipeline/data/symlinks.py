"""Symbolic links out of data.root. They are followed unless data.follow_external_symlinks=false: then a data set from
someone else does not expose other files of the user."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from pipeline.buckets import AnyPath
from pipeline.data.names import escape_for_terminal, truncated_list
from pipeline.data.walk import resolve
from pipeline.errors import UserError


class SymlinkChecker:
    """Records links under a root that point outside of it, unless that is allowed."""

    def __init__(self, root: AnyPath, allow_external: bool):
        self.allow_external = allow_external
        self._root = root
        self._real = resolve(root)
        self._escapes: dict[str, str] = {}

    def escapes_root(self, path: str | AnyPath, real: str | None = None) -> bool:
        """Return and record whether `path` is outside of the root; `real`: its resolved path, if known."""
        if self.allow_external or not isinstance(self._root, Path):
            return False
        real = real or resolve(path)
        if os.path.commonpath((self._real, real)) == self._real:
            return False
        self._escapes[str(path)] = real
        return True

    def raise_on_escape(self, root: AnyPath, tasks: Collection[str] | None = None) -> None:
        """Raise UserError if links at `root`, or in the folders of `tasks` below it, point outside."""
        links = [
            f"{escape_for_terminal(os.path.relpath(path, str(self._root)))} → {escape_for_terminal(real)}"
            for path, real in sorted(self._escapes.items())
            if tasks is None or Path(path) == root or Path(path).relative_to(str(root)).parts[0] in tasks
        ]
        if links:
            raise UserError(
                f"links point outside of data.root={self._root}, and data.follow_external_symlinks=false: "
                f"{truncated_list(links)}; replace them with their targets, or allow all with "
                "--data.follow_external_symlinks true"
            )
