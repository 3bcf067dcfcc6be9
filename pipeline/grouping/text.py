"""Groups of tasks, and numbers of snapshots, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def format_groups(groups: Iterable[Iterable[Any]], task_names: Sequence[str] | None = None) -> str:
    """Return `a + b | c`; tasks are names, or indices into `task_names`."""
    return " | ".join(" + ".join(task_names[task] if task_names else task for task in group) for group in groups)


def first_snapshots(number: int, num_snapshots: int) -> str:
    """Return `the first of 4 snapshots`, `the first 10 of 100 snapshots`."""
    return f"the first {f'{number} ' if number > 1 else ''}of {num_snapshots} snapshots"
