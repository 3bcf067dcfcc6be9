"""The words of the code: names, docstrings, and the glossary."""

from __future__ import annotations

import re

import pytest
from language import measure
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


@pytest.mark.parametrize("folders", [("pipeline", "jobs"), ("benchmarks", "docs"), ("tests",)], ids=" ".join)
def test_hardly_any_name_is_a_function_word(folders):
    found = measure([REPOSITORY / folder for folder in folders])
    assert found.num_bindings > 500
    assert found.per_thousand <= 3, found.function_words.most_common()


def test_no_name_begins_with_a_preposition():
    assert not measure([REPOSITORY / "pipeline", REPOSITORY / "jobs"]).prepositions


def test_docstrings_begin_with_a_phrase_that_stands_alone():
    assert not measure([REPOSITORY / "pipeline", REPOSITORY / "jobs"]).fragments


def test_the_glossary_is_short_and_each_term_is_used_where_it_says():
    assert 20 <= len(ROWS) <= 40
    for term, _, links, _ in ROWS:
        for page in re.findall(r"\]\((\w+\.md)\)", links):
            text = (GLOSSARY.parent / page).read_text().lower()
            assert re.search(re.escape(term.lower()).replace("\\-", "[- _]").replace("\\ ", r"[\s_-]"), text), (
                term,
                page,
            )


@pytest.mark.parametrize("word", RETIRED)
def test_no_retired_word_comes_back(word):
    assert not [name for name, text in TEXTS.items() if word in text]
