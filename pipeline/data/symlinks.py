"""Which paths under a data root lead out of it: a folder of somebody else's must not show other files of yours."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from pipeline.data.names import escape_for_terminal, truncated_list
from pipeline.errors import UserError


class SymlinkChecker:
    """Which of the paths under a root lead out of it by a link, unless they may."""

    def __init__(self, root: Path, allow_external: bool):
        self.allow_external = allow_external
        self._root = root
        self._real = os.path.realpath(root)
        self._out: dict[str, str] = {}

    def escapes_root(self, path: str | Path, real: str | None = None) -> bool:
        """Whether it does, to be refused then; `real`: its real path, if that is known."""
        real = real or os.path.realpath(path)
        if self.allow_external or os.path.commonpath((self._real, real)) == self._real:
            return False
        self._out[str(path)] = real
        return True

    def refuse(self, root: Path, tasks: Collection[str] | None = None) -> None:
        """Raises: UserError: links that lead out, in the folders of `tasks` below `root`, and at `root` itself."""
        ways = [
            f"{escape_for_terminal(os.path.relpath(path, self._root))} → {escape_for_terminal(real)}"
            for path, real in sorted(self._out.items())
            if tasks is None or Path(path) == root or Path(path).relative_to(root).parts[0] in tasks
        ]
        if ways:
            raise UserError(
                f"links lead out of data.root={self._root}: {truncated_list(ways)}; replace them by what they lead to, "
                "or allow them all with --data.follow_external_symlinks true"
            )
