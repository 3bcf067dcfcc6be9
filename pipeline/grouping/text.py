"""Groups of tasks, and numbers of snapshots, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_GROUPS_LENGTH = 80
"""Characters of groups in a sentence; longer ones are only counted."""


def format_groups(groups: Iterable[Iterable[Any]], task_names: Sequence[str] | None = None) -> str:
    """Return `a + b | c`; tasks are names, or indices into `task_names`."""
    return " | ".join(" + ".join(task_names[task] if task_names else task for task in group) for group in groups)


def describe_groups(groups: Sequence[Sequence[str]]) -> str:
    """Return the groups for a sentence."""
    if len(groups) == 1:
        return "all tasks in one group"
    if all(len(group) == 1 for group in groups):
        return "each task alone"
    text = format_groups(groups)
    return text if len(text) <= MAX_GROUPS_LENGTH else f"{len(groups)} groups"


def describe_candidates(candidates: Sequence[Mapping[str, Any]]) -> str:
    """Describe grouping.json's `candidates`: the groups that were taken, the first, and those of other affinities."""
    titles: dict[frozenset[frozenset[str]], list[str]] = {}
    for candidate in candidates[1:]:
        titles.setdefault(_partition(candidate), []).append(affinity_title(candidate))
    groups = {_partition(candidate): describe_groups(candidate["groups"]) for candidate in reversed(candidates)}
    taken = candidates[0]
    text = f"Groups by {affinity_title(taken)}: {groups[_partition(taken)]}."
    choices = [
        f"{' and '.join(names)} would choose {'the same' if partition == _partition(taken) else groups[partition]}"
        for partition, names in titles.items()
    ]
    sentence = "; ".join(choices)
    return f"{text} {sentence[0].upper()}{sentence[1:]}." if choices else text


def _partition(candidate: Mapping[str, Any]) -> frozenset[frozenset[str]]:
    return frozenset(map(frozenset, candidate["groups"]))


def affinity_title(candidate: Mapping[str, Any]) -> str:
    similarity = candidate["similarity"]
    return f"{candidate['affinity']} ({similarity.replace('_', ' ')})" if similarity else str(candidate["affinity"])


def first_snapshots(number: int, num_snapshots: int) -> str:
    """Return `the first of 4 snapshots`, `the first 10 of 100 snapshots`."""
    return f"the first {f'{number} ' if number > 1 else ''}of {num_snapshots} snapshots"
