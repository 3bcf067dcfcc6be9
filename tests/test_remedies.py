"""What messages and pages tell users to type exists: options, config fields, jobs and files; and remedies that were
wrong before work when followed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipelines import REPOSITORY

from jobs.__main__ import job_names
from pipeline.config import JobOptions, JobParser
from pipeline.config.schema import fields
from pipeline.data.splits import ScannedImage, sample_splits
from pipeline.errors import UserError

SOURCES = [*sorted((REPOSITORY / "pipeline").rglob("*.py")), *sorted((REPOSITORY / "jobs").glob("*.py"))]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
RENAMED = {"suggestions.py", "glossary.md"}
"""Files with names of earlier versions."""
FIELDS = {name for name, *_ in fields()}
SECTIONS = {name.rpartition(".")[0] for name in FIELDS} - {""}
NOT_FIELDS = {"cluster.connect", "section.field"}
SUFFIXES = "csv|html|json|jsonl|md|parquet|pkl|png|py|safetensors|svg|txt|yaml|yml"
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_]*(?:\.[a-z][a-z_]*)*)(?![\w<*{/-])")
FIELD = re.compile(
    rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS, key=len, reverse=True))})\.(?!(?:{SUFFIXES})\b)[a-z_]+)\b(?![(/])"
)
JOB = re.compile(r"(?:^|[`\s(])(?<!--namespace )mmap-clip ([a-z][a-z_-]*)")
FILE = re.compile(r"(?<![\w/.-])((?:benchmarks|cluster|configs|docs|jobs|tests)/[\w/.-]*\w\.(?:md|py|yaml|txt))")


def job_options() -> set[str]:
    """Return the jobs' own options: annotated names of the class Options and its base, or their aliases."""
    names = {"config", "help", "help-all", "help-methods"}
    files = [*(REPOSITORY / "jobs" / f"{job}.py" for job in job_names()), REPOSITORY / "pipeline/serving/options.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name in ("Options", "ServingOptions"):
                names |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
            if isinstance(node, ast.keyword) and node.arg == "alias":
                names.add(node.value.value)
    return names


OPTIONS = job_options() | {name for name in FIELDS if "." not in name}


def literals(file: Path) -> Iterator[tuple[str, str]]:
    """Yield place and text of the strings of a module (blanks for the expressions of f-strings), or lines of a page."""
    if file.suffix != ".py":
        yield from ((f"{file.name}:{number}", line) for number, line in enumerate(file.read_text().splitlines(), 1))
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
            yield f"{file.name}:{node.lineno}", "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield f"{file.name}:{node.lineno}", node.value


def unknown_names(file: Path) -> list[str]:
    """Return what a file tells users to type and that does not exist."""
    unknown = []
    for place, text in literals(file):
        names = [name for name in FIELD.findall(text) if name not in FIELDS | SECTIONS | NOT_FIELDS]
        names += [f"--{name}" for name in OPTION.findall(text) if "." in name and name not in FIELDS | NOT_FIELDS]
        names += [name for name in JOB.findall(text) if name.replace("-", "_") not in job_names() or "_" in name]
        names += [path for path in FILE.findall(text) if not (REPOSITORY / path).exists()]
        unknown += [f"{place}: {name}" for name in names]
    return unknown


@pytest.mark.parametrize("files", [SOURCES, PAGES, CONFIGS], ids=["code", "docs", "configs"])
def test_names_of_options_fields_jobs_and_files_exist(files):
    assert [name for file in files if file.name not in RENAMED for name in unknown_names(file)] == []


def test_options_without_a_section_that_errors_name_are_those_of_a_job():
    """In the arguments of UserError; other programs have options of their own."""
    unknown = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"):
                continue
            text = re.sub(r"\b(mlflow|ray|git|pip|hf) .*", "", " ".join(ast.unparse(arg) for arg in node.args))
            names = [name for name in OPTION.findall(text) if "." not in name and name not in OPTIONS]
            unknown += [f"{file.name}:{node.lineno}: --{name}" for name in names]
    assert unknown == []


def test_unknown_names_are_seen(tmp_path):
    (file := tmp_path / "page.md").write_text(
        "`--data.rot`, `training.lr`, mmap-clip fullpipeline, mmap-clip full_pipeline, docs/none.md; "
        "but --data.root, clip.precision, grouping.html, `mmap-clip predict`, docs/index.md"
    )
    assert [name.split(": ")[1] for name in unknown_names(file)] == [
        "training.lr", "--data.rot", "fullpipeline", "full_pipeline", "docs/none.md"
    ]  # fmt: skip


def images_of(counts: dict[str, int]) -> list[ScannedImage]:
    return [
        ScannedImage(f"{name}/{number}.png", "ink", name, f"{name}{number}")
        for name, count in counts.items()
        for number in range(count)
    ]


def test_the_number_of_shots_that_a_message_names_works():
    images, classes = images_of({"cup": 9, "mug": 4}), {"ink": ["cup", "mug"]}
    with pytest.raises(UserError, match="ink/mug has 4 image") as raised:
        sample_splits(images, classes, 8, seed=1)
    shots = int(re.search(r"set --data.shots (\d+)", str(raised.value))[1])
    assert shots == 3 and len(sample_splits(images, classes, shots, seed=1).train) == 2 * shots
    with pytest.raises(UserError, match="leave them out: --data.class_names FILE") as raised:
        sample_splits(images_of({"cup": 9, "mug": 1}), classes, 8, seed=1)
    assert "--data.shots 0" not in str(raised.value)


def test_a_field_written_as_other_tools_have_it_is_answered_with_the_option():
    """Messages name fields with their values as `clip.precision=float32`."""
    with pytest.raises(UserError, match="clip.precision: write --clip.precision VALUE"):
        JobParser("", JobOptions).parse(["clip.precision=float32"])


def test_a_crop_scale_is_named_by_its_option_and_the_example_works():
    parse = JobParser("", JobOptions).parse
    with pytest.raises(UserError, match=r"^training.augmentation.crop_scale=\S+ \S+: must be increasing") as raised:
        parse(["--training.augmentation.crop_scale", "1", "0.5"]).config()
    example = str(raised.value).partition("such as ")[2].split()
    assert parse(["--training.augmentation.crop_scale", *example]).config().training.augmentation.crop_scale == (
        0.08,
        1,
    )
