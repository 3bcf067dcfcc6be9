"""The words of the code: names, docstrings, and the glossary."""

from __future__ import annotations

import re
from functools import cache

import language
import pytest
from pipelines import REPOSITORY

GLOSSARY = REPOSITORY / "docs" / "glossary.md"
ROWS = re.findall(r"^\| (?!Term|-)(.+?) \| (.+?) \| (.+?) \| (.*?)\|$", GLOSSARY.read_text(), re.MULTILINE)
RETIRED = sorted(word for *_, retired in ROWS for word in re.findall(r"`([^`]+)`", retired))
FOLDERS = ("pipeline", "jobs", "benchmarks", "tests", "configs", "docs", "cluster")
TEXTS = {
    str(file.relative_to(REPOSITORY)): file.read_text()
    for file in [*REPOSITORY.glob("*.md"), *(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*"))]
    if file.suffix in (".py", ".md", ".yaml", ".ipynb")
}
# These name what was renamed.
for file in ("CHANGELOG.md", "docs/glossary.md", "pipeline/config/suggestions.py", "tests/test_command_line.py"):
    del TEXTS[file]


@cache
def measure(*folders: str) -> language.Measure:
    return language.measure([REPOSITORY / folder for folder in folders])


@pytest.mark.parametrize("folders", [("pipeline", "jobs"), ("benchmarks", "docs"), ("tests",)], ids=" ".join)
def test_hardly_any_name_is_a_function_word(folders):
    measured = measure(*folders)
    assert measured.num_bindings > 500
    assert measured.per_thousand <= 3, measured.function_words.most_common()


def test_no_name_begins_with_a_preposition():
    assert not measure("pipeline", "jobs").prepositions


def test_docstrings_begin_with_a_phrase_that_stands_alone():
    assert not measure("pipeline", "jobs").fragments


def test_the_glossary_is_short_and_each_term_is_used_where_it_says():
    assert 20 <= len(ROWS) <= 40
    for term, _, links, _ in ROWS:
        for page in re.findall(r"\]\((\w+\.md)\)", links):
            words = re.split("[- ]", term.lower())
            assert re.search(r"[\s_-]".join(words), (GLOSSARY.parent / page).read_text().lower()), (term, page)


@pytest.mark.parametrize("word", RETIRED)
def test_no_retired_word_comes_back(word):
    assert not [name for name, text in TEXTS.items() if word in text]
