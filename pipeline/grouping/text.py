"""Groups of tasks as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def format_groups(groups: Iterable[Iterable[Any]], task_names: Sequence[str] | None = None) -> str:
    """Return `a + b | c`; tasks are names, or indices into `task_names`."""
    return " | ".join(" + ".join(task_names[task] if task_names else task for task in group) for group in groups)
