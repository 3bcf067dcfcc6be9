"""What all jobs have in common: one dialect of options, pages of help that can be read, and how they end."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from pipelines import REPOSITORY
from pydantic import Field

from jobs.__main__ import job_names
from pipeline.command_line import report_user_errors
from pipeline.config import Config, JobOptions, JobParser, fields
from pipeline.config.help_pages import is_of_a_method
from pipeline.errors import UserError, did_you_mean

INSTEAD = {
    "add_task": {"storage", "data.tasks"},
    "benchmark": {"seed", "data.shots", "baselines"},
    "grouping_study": {"seed"},
}
WITH_FEW_FIELDS = {"predict", "register_model", "serve"}
OF_RUNS = sorted({*job_names()} - WITH_FEW_FIELDS)


@pytest.fixture
def answer(monkeypatch, capsys):
    """`answer(job, *arguments)`: exit status, standard output and error of a job that ends at its command line."""

    def run(job: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "120")
        script = str(REPOSITORY / "jobs" / f"{job}.py")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def fields_shown(page: str) -> list[str]:
    """The fields of the config that have an entry."""
    names = {name for name, *_ in fields()}
    return [option for option in re.findall(r"^  --(\S+)", page, re.MULTILINE) if option in names]


@pytest.mark.parametrize("job", job_names())
def test_help_fits_two_screens(job, answer):
    status, page, _ = answer(job, "--help")
    assert status == 0 and page.startswith(f"usage: {job}.py ")
    assert len(page.splitlines()) <= 100
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("job", OF_RUNS)
def test_every_field_is_on_one_page_of_help(job, answer):
    short, methods = (fields_shown(answer(job, page)[1]) for page in ("--help", "--help-methods"))
    assert sorted(short + methods) == sorted({name for name, *_ in fields()} - INSTEAD.get(job, set()))
    assert not any(map(is_of_a_method, short)) and all(map(is_of_a_method, methods))


def test_help_all_has_the_whole_help_of_every_field(answer):
    page = " ".join(answer("full_pipeline", "--help-all")[1].split())
    for name, field, _ in fields():
        assert f"--{name} " in page and " ".join(field.description.split()) in page


@pytest.mark.parametrize(("columns", "width"), [("20", 80), ("80", 80), ("300", 120)])
def test_entries_are_as_wide_as_the_terminal(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    page = JobParser("").format_help()
    assert width - 5 < max(len(line) for line in page.splitlines() if line.startswith("  --")) <= width


@pytest.mark.parametrize("job", job_names())
def test_an_option_that_a_job_does_not_have_is_named_on_the_standard_error(job, answer):
    required = re.findall(r"(--\w+|INPUTS) (?:VALUE|\.\.\.)", answer(job, "--help")[1].splitlines()[0].split(" [")[0])
    given = [text for option in required for text in ([option, "x"] if option.startswith("--") else ["x"])]
    status, output, error = answer(job, *given, "--clip.pretraned", "x")
    assert (status, output) == (2, "")
    assert error.startswith("error: unknown option --clip.pretraned; did you mean --clip.pretrained? ")


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("serve", ["--models", "a=b", "--max-images", "3"], "unknown option --max-images; did you mean --max_images?"),
        ("full_pipeline", ["--epochs", "3"], "unknown option --epochs; did you mean --training.epochs?"),
        ("full_pipeline", ["--nonsense=3"], "unknown option --nonsense. --help lists them"),
        ("full_pipeline", ["nonsense"], "nonsense belongs to no option"),
        ("full_pipeline", ["--seed"], "--seed: expected one argument"),
        ("predict", ["x"], "required: --adapter"),
        ("predict", ["--adapter", "x"], "required: INPUTS"),
        (
            "predict",
            ["x", "--adapter", "x", "--threshold", "2"],
            "threshold=2: Input should be less than",
        ),
        ("predict", ["x", "--adapter", "x", "--cluster.address", "auto"], "--cluster.address means nothing for CSV"),
        ("benchmark", ["--shots", "1", "x"], "shots.1='x': Input should be a valid integer"),
        ("benchmark", ["--seed", "3"], "--seed is no option of this job: use --seeds"),
    ],
)
def test_faults_of_a_command_line_are_named(job, arguments, message, answer):
    status, _, error = answer(job, *arguments)
    assert status == 2 and message in " ".join(error.split())


class Options(JobOptions):
    tasks: tuple[str, ...] = Field(("a",), description="Names.")
    number: int | None = Field(3, description="A number.")
    again: bool = Field(False, description="Whether it is done again.")


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["--tasks", "b", "c d"], {"tasks": ("b", "c d")}),
        (["--tasks", "[b, c d]"], {"tasks": ("b", "c d")}),
        (["--tasks", "1", "null"], {"tasks": ("1", "null")}),
        (["--number", "null"], {"number": None}),
        (["--again"], {"again": True}),
        (["--again", "false"], {"again": False}),
    ],
)
def test_values_of_own_options(arguments, changed):
    assert JobParser("", Options).given(arguments).own == Options(**changed)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--data.tasks", "ink", "3"], {"tasks": ("ink", "3")}),
        (["--data.tasks", "[ink, neon]"], {"tasks": ("ink", "neon")}),
        (["--data.tasks", "null"], {"tasks": None}),
        (["--data.use_official_splits"], {"use_official_splits": True}),
        (["--data.use_official_splits", "false"], {"use_official_splits": False}),
        (["--data.columns", "{task: domain}"], {"columns": {"task": "domain"}}),
        (["--data.root", "# 1: x"], {"root": "# 1: x"}),
        (["--data.root", "2024"], {"root": "2024"}),
        (["--data.root", "null"], {"root": None}),
    ],
)
def test_values_of_config_fields_are_written_in_the_same_way(arguments, changed):
    data = JobParser("").given(arguments).config().data
    assert {name: getattr(data, name) for name in changed} == changed


def test_lists_of_lists_and_of_numbers():
    options = ["--grouping.must_link", "[a, b]", "[c, d]", "--training.augmentation.crop_scale", "0.2", "1"]
    config = JobParser("").given(options).config()
    assert config.grouping.must_link == (("a", "b"), ("c", "d"))
    assert config.training.augmentation.crop_scale == (0.2, 1)
    nested = JobParser("").given(["--grouping.must_link", "[[a, b], [c, d]]"]).config()
    assert nested.grouping.must_link == config.grouping.must_link


def test_a_job_with_few_fields_takes_these_alone():
    parser = JobParser("", takes={"cluster.address": "Ray to join."})
    assert parser.given(["--cluster.address", "auto"]).nested() == {"cluster": {"address": "auto"}}
    assert fields_shown(parser.format_help()) == ["cluster.address"]
    for arguments in (["--seed", "1"], ["--config", "x.yaml"], ["--help-all"]):
        with pytest.raises(UserError, match="unknown option"):
            parser.given(arguments)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("training.epoch", "training.epochs"),
        ("trainin.epochs", "training.epochs"),
        ("learning_rate", "training.learning_rate"),
        ("training.nonsense", None),
        ("nonsense", None),
    ],
)
def test_the_nearest_name_is_suggested(name, found):
    hint = did_you_mean(name, [of for of, *_ in fields()])
    assert hint == (f"; did you mean {found}?" if found else ".")


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        (UserError("no [red] images"), 2, "error: no [red] images\n"),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on from here\n"),
    ],
)
def test_a_job_ends_with_a_status_and_no_traceback(fault, status, told, capsys):
    with pytest.raises(SystemExit) as end, report_user_errors():
        raise fault
    assert (end.value.code, *capsys.readouterr()) == (status, "", told)


def test_the_own_options_of_no_job_hide_a_field(answer):
    for job in job_names():
        own = set(re.findall(r"^  --(\w+)(?: |$)", answer(job, "--help")[1].split("\nFields of the config")[0], re.M))
        assert not own & set(Config.model_fields), job
