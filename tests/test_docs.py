"""The documentation against the code: messages, links, the page of config fields. Code blocks: test_docs_code.py."""

from __future__ import annotations

import ast
import re
import sys

import pytest
from pipelines import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs"))
from make_configuration import PAGE, reference  # noqa: E402

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *DOCS]
HOLE = "\0"


def texts_of_the_code() -> list[str]:
    """All text literals; what an f-string fills in is a HOLE."""
    found = []
    for file in sorted((REPOSITORY / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    texts = texts_of_the_code()
    messages = re.findall(r"^#### `(.+)`$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        # What the code fills in may be words of the message too.
        pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
        assert any(re.search(".*".join(pieces), text, re.DOTALL) for text in texts), message


def test_the_page_of_config_fields_is_that_of_the_code():
    assert PAGE.read_text() == reference(), "run: python docs/make_configuration.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        place = "".join(target).partition("#")[0]
        if place and "://" not in place:
            assert (page.parent / place).exists(), f"{page.name}: {place}"
