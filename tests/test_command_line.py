"""Options, help pages and exit statuses that all jobs share."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from pipelines import REPOSITORY
from pydantic import Field

from jobs.__main__ import job_names
from pipeline.command_line import report_user_errors
from pipeline.config import Config, JobOptions, JobParser, did_you_mean, fields, parse_config
from pipeline.config.help_pages import is_method_field
from pipeline.config.suggestions import RENAMED
from pipeline.errors import UserError

REPLACED_FIELDS = {
    "add_task": {"storage", "data.tasks"},
    "benchmark": {"seed", "data.shots", "baselines"},
    "grouping_study": {"seed"},
}
JOBS_WITH_FEW_FIELDS = {"list_models", "predict", "register_model", "serve"}
RUN_JOBS = sorted({*job_names()} - JOBS_WITH_FEW_FIELDS)


@pytest.fixture
def run_to_exit(monkeypatch, capsys):
    """Run a job that ends at its command line: (job, *arguments) → exit status, stdout, stderr."""

    def run(job: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "120")
        script = str(REPOSITORY / "jobs" / f"{job}.py")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(script, run_name="__main__")
        return exited.value.code, *capsys.readouterr()

    return run


def listed_fields(page: str) -> list[str]:
    """Config fields that have an entry on the page."""
    names = {name for name, *_ in fields()}
    return [option for option in re.findall(r"^  --(\S+)", page, re.MULTILINE) if option in names]


@pytest.mark.parametrize("job", job_names())
def test_help_fits_two_screens(job, run_to_exit):
    status, page, _ = run_to_exit(job, "--help")
    assert status == 0 and page.startswith(f"usage: {job}.py ")
    assert len(page.splitlines()) <= 100
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("job", RUN_JOBS)
def test_every_field_is_on_one_page_of_help(job, run_to_exit):
    short, methods = (listed_fields(run_to_exit(job, page)[1]) for page in ("--help", "--help-methods"))
    assert sorted(short + methods) == sorted({name for name, *_ in fields()} - REPLACED_FIELDS.get(job, set()))
    assert not any(map(is_method_field, short)) and all(map(is_method_field, methods))


def test_help_all_has_the_whole_help_of_every_field(run_to_exit):
    page = " ".join(run_to_exit("full_pipeline", "--help-all")[1].split())
    for name, field, _ in fields():
        assert f"--{name} " in page and " ".join(field.description.split()) in page


@pytest.mark.parametrize(("columns", "width"), [("20", 80), ("80", 80), ("300", 120)])
def test_entries_fill_the_width_of_the_terminal(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    page = JobParser("").format_help()
    assert width - 5 < max(len(line) for line in page.splitlines() if line.startswith("  --")) <= width


@pytest.mark.parametrize("job", job_names())
def test_an_unknown_option_is_reported_on_stderr(job, run_to_exit):
    required = re.findall(r"--\w+(?= VALUE)|RUN|INPUTS", run_to_exit(job, "--help")[1].splitlines()[0].split(" [")[0])
    arguments = [text for option in required for text in ([option, "x"] if option.startswith("--") else ["x"])]
    misspelled, name = ("metod", "method") if job == "list_models" else ("clip.pretraned", "clip.pretrained")
    status, output, error = run_to_exit(job, *arguments, f"--{misspelled}", "x")
    assert (status, output) == (2, "")
    assert error.startswith(f"error: unknown option --{misspelled}; did you mean --{name}? ")


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("serve", ["--models", "a=b", "--max-images", "3"], "unknown option --max-images; did you mean --max_images?"),
        ("full_pipeline", ["--epochs", "3"], "unknown option --epochs; did you mean --training.epochs?"),
        ("full_pipeline", ["--nonsense=3"], "unknown option --nonsense. See --help"),
        ("full_pipeline", ["nonsense"], "unexpected argument nonsense"),
        ("full_pipeline", ["--seed"], "--seed: expected one argument"),
        ("list_models", ["RN50", "--method", "coop_m"], "--method: unknown method coop_m; did you mean coop_mt?"),
        ("predict", ["x"], "required: INPUTS"),
        ("predict", [], "required: RUN, INPUTS"),
        ("predict", ["--adapter", "x", "y"], "--adapter is not an option of this job: use predict RUN INPUTS"),
        (
            "predict",
            ["x", "x", "--threshold", "2"],
            "threshold=2: Input should be less than",
        ),
        ("predict", ["x", "x", "--cluster.address", "auto"], "--cluster.address has no effect on CSV"),
        ("benchmark", ["--shots", "1", "x"], "shots.1='x': Input should be a valid integer"),
        ("benchmark", ["--seed", "3"], "--seed is not an option of this job: use --seeds"),
    ],
)
def test_command_line_errors(job, arguments, message, run_to_exit):
    status, _, error = run_to_exit(job, *arguments)
    assert status == 2 and message in " ".join(error.split())


class Options(JobOptions):
    tasks: tuple[str, ...] = Field(("a",), description="Names.")
    number: int | None = Field(3, description="A number.")
    dry_run: bool = Field(False, description="A flag.")


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["--tasks", "b", "c d"], {"tasks": ("b", "c d")}),
        (["--tasks", "[b, c d]"], {"tasks": ("b", "c d")}),
        (["--tasks", "1", "null"], {"tasks": ("1", "null")}),
        (["--number", "null"], {"number": None}),
        (["--dry_run"], {"dry_run": True}),
        (["--dry_run", "false"], {"dry_run": False}),
    ],
)
def test_values_of_job_options(arguments, changed):
    assert JobParser("", Options).parse(arguments).options == Options(**changed)


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
def test_values_of_config_fields(arguments, changed):
    data = JobParser("").parse(arguments).config().data
    assert {name: getattr(data, name) for name in changed} == changed


def test_lists_of_lists_and_of_numbers():
    options = ["--grouping.must_link", "[a, b]", "[c, d]", "--training.augmentation.crop_scale", "0.2", "1"]
    config = JobParser("").parse(options).config()
    assert config.grouping.must_link == (("a", "b"), ("c", "d"))
    assert config.training.augmentation.crop_scale == (0.2, 1)
    nested = JobParser("").parse(["--grouping.must_link", "[[a, b], [c, d]]"]).config()
    assert nested.grouping.must_link == config.grouping.must_link


def test_a_job_with_few_fields_accepts_only_these():
    parser = JobParser("", field_help={"cluster.address": "Ray to join."})
    assert parser.parse(["--cluster.address", "auto"]).nested_fields() == {"cluster": {"address": "auto"}}
    assert listed_fields(parser.format_help()) == ["cluster.address"]
    for arguments in (["--seed", "1"], ["--config", "x.yaml"], ["--help-all"]):
        with pytest.raises(UserError, match="unknown option"):
            parser.parse(arguments)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("training.epoch", "training.epochs"),
        ("trainin.epochs", "training.epochs"),
        ("learning_rate", "training.learning_rate"),
        ("training.nonsense", None),
        ("nonsense", None),
    ],
)
def test_the_closest_name_is_suggested(name, suggestion):
    hint = did_you_mean(name, [field for field, *_ in fields()])
    assert hint == (f"; did you mean {suggestion}?" if suggestion else ".")


def test_a_renamed_name_is_reported_with_the_new_one(tmp_path, run_to_exit):
    names = {name for name, *_ in fields()}
    for old, new in RENAMED.items():
        if "." in old:
            assert new in names and old not in names
            with pytest.raises(UserError, match=rf"unknown option --{old}; it was renamed to --{new}\."):
                JobParser("").parse([f"--{old}", "1"])
            section, _, field = old.partition(".")
            with pytest.raises(UserError, match=rf"unknown config field {old}; it was renamed to {new}\."):
                parse_config({section: {field: 1}})
    for old, new in (("compare", "baselines"), ("full", "full_finetune")):
        with pytest.raises(UserError, match=rf"unknown config field {old}; it was renamed to {new}\."):
            parse_config({old: {}})
    with pytest.raises(
        UserError, match=r"--full\.training\.epochs; it was renamed to --full_finetune\.training\.epochs"
    ):
        JobParser("").parse(["--full.training.epochs", "1"])
    (tmp_path / "search.yaml").write_text("fewest_epochs: 3\nfields: {grouping.together: {choice: [[]]}}\n")
    errors = run_to_exit("tune", "--search", str(tmp_path / "search.yaml"))[2]
    for message in ("fewest_epochs; it was renamed to grace_period.", "it was renamed to grouping.must_link."):
        assert message in errors
    assert "it was renamed to full_finetune_mt." in run_to_exit("benchmark", "--methods", "full_mt")[2]


@pytest.mark.parametrize(
    ("error", "status", "output"),
    [
        (UserError("no [red] images"), 2, "error: no [red] images\n"),
        (KeyboardInterrupt(), 130, "interrupted: rerun the same command to resume\n"),
    ],
)
def test_a_job_exits_with_a_status_and_no_traceback(error, status, output, capsys):
    with pytest.raises(SystemExit) as exited, report_user_errors():
        raise error
    assert (exited.value.code, *capsys.readouterr()) == (status, "", output)


def test_job_options_do_not_shadow_config_fields(run_to_exit):
    for job in job_names():
        options = set(re.findall(r"^  --(\w+)(?: |$)", run_to_exit(job, "--help")[1].split("\nConfig fields")[0], re.M))
        assert not options & set(Config.model_fields), job
