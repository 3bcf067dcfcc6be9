"""Classes of several tasks that have the same words are one class to methods that train something for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def distinct_words(words: Mapping[str, Sequence[str]]) -> tuple[list[str], list[int]]:
    """The words of all tasks' classes without repetitions, and for each class, task by task, which of them it has."""
    names = list(dict.fromkeys(name for of_task in words.values() for name in of_task))
    number = {name: at for at, name in enumerate(names)}
    return names, [number[name] for of_task in words.values() for name in of_task]
