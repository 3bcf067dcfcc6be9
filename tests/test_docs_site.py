"""Every page of the docs as `make docs` renders it: no Markdown is left over, and nothing comes from elsewhere.

Markdown that the parser does not take, such as a fence with two words after it, becomes text; no strict build sees it.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from markdown import Markdown
from mkdocs.config import load_config
from pipelines import REPOSITORY

PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
LEFT_OVER = {
    "a fence": "```",
    "a link": "](",
    "bold": "**",
    "a table": r"| --",
    "a table without blanks": "|--",
    "a row of a table": "\n| ",
    "a heading": "\n#",
    "an attribute": "{:",
}
VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Rendered(HTMLParser):
    """The texts of a page inside and outside of code, and the number of its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.prose, self.blocks, self.tags, self.addresses = "\n", "", dict[str, int](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [tag] * (tag not in VOID)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name == "src" and value]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.blocks += data
        elif "code" not in self.open:
            self.prose += data


@pytest.fixture(scope="module")
def render():
    config = load_config(str(REPOSITORY / "mkdocs.yml"))
    markdown = Markdown(extensions=config.markdown_extensions, extension_configs=config.mdx_configs)
    return lambda text: Rendered(markdown.reset().convert(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY / "docs")))
def test_no_markdown_is_left_in_a_rendered_page(page, render):
    text = page.read_text()
    rendered = render(text)
    assert {name for name, mark in LEFT_OVER.items() if mark in rendered.prose} == set()
    assert "```" not in rendered.blocks
    without_code = FENCED.sub("", text)
    assert sum(rendered.tags.get(f"h{level}", 0) for level in range(1, 7)) == len(HEADING.findall(without_code))
    assert rendered.tags.get("pre", 0) == len(FENCED.findall(text))
    assert [address for address in rendered.addresses if "://" in address] == []


@pytest.mark.parametrize(
    "text",
    [
        "```sh server http://127.0.0.1\nls\n```\n\n## Heading\n\n```sh\nls\n```\n",
        "Text\n- **bold\n",
        "see [a page]( page.md\n",
        "Text.\n\n| a | b |\n| 1 | 2 |\n",
    ],
)
def test_what_a_parser_leaves_is_seen(text, render):
    rendered = render(text)
    assert any(mark in rendered.prose + rendered.blocks for mark in LEFT_OVER.values())


def test_the_site_loads_nothing_from_elsewhere():
    """Diagrams and fonts that a browser would have to fetch are missing without a network."""
    config = load_config(str(REPOSITORY / "mkdocs.yml"))
    assert config.theme["font"] is False
    assert [str(path) for path in (*config.extra_css, *config.extra_javascript) if "://" in str(path)] == []
    assert [page.name for page in PAGES if "```mermaid" in page.read_text()] == []
