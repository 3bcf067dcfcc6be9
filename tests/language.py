"""Measure how far names and docstrings are from plain, standard English: `python tests/language.py [FOLDER ...]`."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FUNCTION_WORDS = frozenset(
    """above after again all alone and any apart are as asked at be before begun behind below both but by came come done
    each either else every few first for found from given gone here how if in into is it its just kept known last left
    less like likewise look looks made many meant more most much neither next no none nor not now of on one ones or
    other others out own place rest said same seen sent shown since so some such than that the their them then there
    they this those thus to together told too until up upon wanted was way ways what when where whether which while who
    whole whom whose why will with without yet""".split()
)
PREPOSITION = re.compile(r"_?(?!in_proj_)(?:of|in|at|for|from|to|with)_\w+")  # in_proj_weight: torch's own
FRAGMENT = re.compile(
    r"(?:Of|What|Likewise|How|Where|Which|That|As|For|In|On|At|With|By|When|If|Also|From|To|Only|Those|Whose|And|Its|"
    r"Their|Why|Who|Not|Before|After|Beside|Between|Until|Than|Without|Within|Through|Such|Same)\b"
)


@dataclass
class Measure:
    num_bindings: int = 0
    function_words: Counter[str] = field(default_factory=Counter)
    prepositions: Counter[str] = field(default_factory=Counter)
    num_docstrings: int = 0
    fragments: list[str] = field(default_factory=list)

    @property
    def per_thousand(self) -> float:
        """Variables and arguments per thousand whose name is a function word."""
        return 1000 * self.function_words.total() / max(1, self.num_bindings)


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Names of arguments, and of variables each time they are assigned to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def measure(folders: Sequence[Path]) -> Measure:
    result = Measure()
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        tree = ast.parse(file.read_text())
        names = [name for name in bound_names(tree) if name not in ("self", "cls") and not name.startswith("__")]
        result.num_bindings += len(names)
        result.function_words.update(name for name in names if name.strip("_") in FUNCTION_WORDS)
        result.prepositions.update(name for name in names if PREPOSITION.fullmatch(name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if docstring := ast.get_docstring(node):
                    result.num_docstrings += 1
                    if FRAGMENT.match(docstring):
                        line = getattr(node, "lineno", 1)
                        result.fragments.append(f"{file}:{line}: {docstring.splitlines()[0]}")
    return result


if __name__ == "__main__":
    measured = measure([Path(folder) for folder in sys.argv[1:] or ("pipeline", "jobs")])
    print(f"{measured.num_bindings} bindings, {measured.per_thousand:.1f} of 1,000 are function words:", end=" ")
    print(*(f"{name} {count}" for name, count in measured.function_words.most_common()), sep=", ")
    print(f"{measured.prepositions.total()} bindings begin with a preposition:", end=" ")
    print(*(f"{name} {count}" for name, count in measured.prepositions.most_common()), sep=", ")
    print(f"{len(measured.fragments)} of {measured.num_docstrings} docstrings begin as a fragment:")
    print(*measured.fragments, sep="\n")
