"""The documentation and the files for contributors against the code: messages, links, paths, the page of config fields,
the commands of CI and pre-commit. Code blocks: test_docs_code.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
import yaml
from pipelines import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs"))
from make_configuration import PAGE, reference  # noqa: E402

DOCS = sorted((REPOSITORY / "docs").rglob("*.md"))
DECISIONS = [page for page in DOCS if page.parent.name == "decisions"]
FOR_CONTRIBUTORS = [REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "SECURITY.md"]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *FOR_CONTRIBUTORS, *DOCS]
WORKFLOW = REPOSITORY / ".github" / "workflows" / "ci.yml"
PLACEHOLDER = "\0"


def string_literals() -> list[str]:
    """Return all string literals, with PLACEHOLDER for the expressions of f-strings."""
    literals = []
    for file in sorted((REPOSITORY / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                literals.append("".join(v.value if isinstance(v, ast.Constant) else PLACEHOLDER for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    return literals


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    texts = string_literals()
    messages = re.findall(r"^#### `(.+)`$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        # A placeholder may contain words of the message.
        pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
        assert any(re.search(".*".join(pieces), text, re.DOTALL) for text in texts), message


def test_the_page_of_config_fields_is_that_of_the_code():
    assert PAGE.read_text() == reference(), "run: python docs/make_configuration.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_targets_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        path = "".join(target).partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", [*FOR_CONTRIBUTORS, *DECISIONS], ids=lambda page: page.name)
def test_paths_that_contributors_are_pointed_to_exist(page):
    for path in re.findall(r"`((?:\.ci|\.github|configs|docs|jobs|pipeline|tests)/[^\s`]*)`", page.read_text()):
        assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


def test_every_decision_is_in_the_index():
    index = REPOSITORY / "docs" / "decisions" / "index.md"
    indexed = re.findall(r"\]\((\w+\.md)\)", index.read_text())
    assert sorted(indexed) == [page.name for page in DECISIONS if page != index]


def make_commands(text: str) -> list[str]:
    return sorted(set(re.findall(r"^make (.+?)(?: \|\|.*)?$", text, re.MULTILINE)))


def test_the_workflow_makes_what_the_script_of_ci_makes():
    steps = [step for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values() for step in job["steps"]]
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert make_commands("\n".join(step.get("run", "") for step in steps)) == make_commands(script)
    assert len(make_commands(script)) >= 4


def test_the_workflow_may_only_read_and_pins_its_actions():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1")), step


def test_pre_commit_lints_and_types_as_make_does_and_takes_the_largest_file():
    repositories = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for repository in repositories for hook in repository["hooks"]}
    assert {"make lint", "make types"} <= {hook.get("entry") for hook in hooks.values()}
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    for repository in repositories:  # hooks with their own linter use the pinned version
        for tool in ("ruff", "mypy"):
            assert tool not in repository["repo"] or repository["rev"] == f"v{pinned[tool]}"
    (limit,) = hooks["check-added-large-files"]["args"]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name] or [*REPOSITORY.glob("pipeline/demo/*")]
    assert int(limit.removeprefix("--maxkb=")) * 1024 >= max(file.stat().st_size for file in files if file.is_file())
