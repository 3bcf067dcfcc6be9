"""Options, help pages and exit statuses that all jobs share."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from typing import ClassVar

import pytest
import shtab
from pipelines import REPOSITORY
from pydantic import Field

from jobs.__main__ import GROUPS, USUAL_NAMES, job_names, main, run_script
from jobs.completion import completion_parser
from pipeline.command_line import report_user_errors
from pipeline.config import Config, JobOptions, JobParser, Section, did_you_mean, fields, parse_config
from pipeline.config.help_pages import COMMON_FIELDS, is_method_field
from pipeline.config.suggestions import RENAMED
from pipeline.config.values import list_arguments
from pipeline.errors import UserError

REPLACED_FIELDS = {
    "add_task": {"storage", "data.tasks"},
    "benchmark": {"seed", "data.shots", "baselines"},
    "grouping_study": {"seed"},
}
JOBS_WITH_FEW_FIELDS = {
    "completion",
    "export",
    "list_models",
    "predict",
    "push",
    "register_model",
    "resend",
    "runs",
    "serve",
    "verify",
}
MISSPELLED = {
    "completion": ("halp", "help"),
    "list_models": ("metod", "method"),
    "resend": ("tracking.urj", "tracking.uri"),
    "runs": ("storag", "storage"),
    "verify": ("halp", "help"),
}
RUN_JOBS = sorted({*job_names()} - JOBS_WITH_FEW_FIELDS)


@pytest.fixture
def run_to_exit(monkeypatch, capsys):
    """Run a job that ends at its command line: (job, *arguments) → exit status, stdout, stderr."""

    def run(job: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "120")
        script = str(REPOSITORY / "jobs" / f"{job}.py")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exited:
            run_script(job)
        return exited.value.code, *capsys.readouterr()

    return run


def listed_fields(page: str) -> list[str]:
    """Config fields that have an entry on the page."""
    names = {name for name, *_ in fields()}
    return [option for option in re.findall(r"^  --(\S+)", page, re.MULTILINE) if option in names]


@pytest.mark.parametrize("job", job_names())
def test_help_fits_one_screen(job, run_to_exit):
    status, page, _ = run_to_exit(job, "--help")
    assert status == 0 and page.startswith(f"usage: {job}.py ")
    assert len(page.splitlines()) <= 50
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("job", RUN_JOBS)
def test_every_field_is_in_the_long_help_and_the_common_ones_in_the_short(job, run_to_exit):
    common, methods, all_fields = (
        listed_fields(run_to_exit(job, page)[1]) for page in ("--help", "--help-methods", "--help-all")
    )
    accepted = {name for name, *_ in fields()} - REPLACED_FIELDS.get(job, set())
    assert sorted(all_fields) == sorted(accepted)
    assert common == [name for name in COMMON_FIELDS if name in accepted]
    assert sorted(methods) == sorted(filter(is_method_field, accepted))


def test_help_shows_the_defaults_of_own_data_and_what_the_demo_changes(run_to_exit):
    page = " ".join(run_to_exit("full_pipeline", "--help")[1].split())
    entries, _, demo = page.partition("The demo, which runs without --data.root")
    for name, value, in_demo in (
        ("training.epochs", "5", "40"),
        ("clip.model", "ViT-B-16-quickgelu", "builtin:digits"),
    ):
        assert f"--{name} {value} " in entries and f"{name} {in_demo}," in demo


def test_help_all_has_the_whole_help_of_every_field(run_to_exit):
    page = " ".join(run_to_exit("full_pipeline", "--help-all")[1].split())
    for name, field, _ in fields():
        assert f"--{name} " in page and " ".join(field.description.split()) in page


@pytest.mark.parametrize(("columns", "width"), [("20", 80), ("80", 80), ("300", 120)])
def test_entries_fill_the_width_of_the_terminal(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    page = JobParser("").format_help("all")
    assert width - 5 < max(len(line) for line in page.splitlines() if line.startswith("  --")) <= width


@pytest.mark.parametrize("job", job_names())
def test_an_unknown_option_is_reported_on_stderr(job, run_to_exit):
    required = re.findall(
        r"--\w+(?= VALUE)|RUN|INPUTS|SHELL", run_to_exit(job, "--help")[1].splitlines()[0].split(" [")[0]
    )
    arguments = [text for option in required for text in ([option, "x"] if option.startswith("--") else ["x"])]
    misspelled, name = MISSPELLED.get(job, ("clip.pretraned", "clip.pretrained"))
    status, output, error = run_to_exit(job, *arguments, f"--{misspelled}", "x")
    assert (status, output) == (2, "")
    assert error.startswith(f"error: unknown option --{misspelled}; did you mean --{name}? ")


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("serve", ["--models", "a=b", "--max-image", "3"], "unknown option --max-image; did you mean --max_images?"),
        ("full_pipeline", ["--epoch", "3"], "unknown option --epoch; did you mean --training.epochs?"),
        ("full_pipeline", ["--nonsense=3"], "unknown option --nonsense. See --help"),
        ("full_pipeline", ["nonsense"], "unexpected argument nonsense"),
        ("full_pipeline", ["--seed"], "--seed needs a value"),
        ("list_models", ["RN50", "--method", "coop_m"], "--method: unknown method coop_m; did you mean coop_mt?"),
        ("predict", ["x"], "required: INPUTS"),
        ("predict", [], "required: RUN, INPUTS"),
        ("predict", ["--adapter", "x", "y"], "--adapter is not an option of this job: use predict RUN INPUTS"),
        (
            "predict",
            ["x", "x", "--threshold", "2"],
            "threshold=2: must be less than or equal to 1",
        ),
        ("predict", ["x", "x", "--cluster.address", "auto"], "--cluster.address has an effect on Parquet output only"),
        ("benchmark", ["--shots", "1", "x"], "shots='x': must be a whole number"),
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


TEXTS = [
    *("/data/a #1/x", "2024", "007", "yes", "no", "2024-11-28", "/data/x: y", "~", "@x", "[a]", "{a}", "{a: 1}"),
    *("%x", "'quoted", '"quoted"', "colon:", "*x", "&x", "!x", "# x", "1e3", "0x1", "1_000", "1:30", "- x", "a,b"),
    *(" x ", "|", ">", "?", "x\\n", "$HOME", "`ls`"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(text):
    class TextOptions(JobOptions):
        positional: ClassVar[tuple[str, ...]] = ("inputs",)
        inputs: tuple[str, ...] = Field(description="Files.")
        model: str = Field(description="A name.")
        output: str | None = Field(None, description="A file.")

    config = JobParser("").parse(["--data.root", text, "--storage", text, f"--cache={text}"]).config()
    assert (config.data.root, config.storage, config.cache) == (text, text, text)
    assert JobParser("").parse([f"--data.class_names={text}"]).config().data.class_names in (text, {"a": "1"})
    if "," not in text:
        expected = ("a",) if text == "[a]" else (text.strip(),)
        assert JobParser("").parse([f"--data.tasks={text}"]).config().data.tasks == expected
        assert JobParser("").parse(["--data.tasks", "x", text]).config().data.tasks == ("x", text.strip())
    options = JobParser("", TextOptions).parse([text, "--model", text, "--output", text]).options
    assert (options.inputs, options.model, options.output) == ((text,), text, text)


@pytest.mark.parametrize(
    "names", [["a"], ["a b", "c"], ["a,b", "c"], ["[a]"], ["-x", "'y"], ["null"], [" x"], ['"é"', "@"]]
)
def test_a_list_in_a_message_can_be_pasted(names):
    """As layouts.py suggests them."""
    arguments = shlex.split(f"--data.tasks {list_arguments(names)}")
    assert JobParser("").parse(arguments).config().data.tasks == tuple(names)


@pytest.mark.parametrize("option", ["--data.root", "--name", "--data.tasks", "--config", "--training.epochs"])
def test_an_empty_value_is_refused_by_name(option):
    for arguments in ([option, ""], [f"{option}="]):
        with pytest.raises(UserError, match=f"{option} is empty"):
            JobParser("").parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--data.tasks", "ink", "3"], {"tasks": ("ink", "3")}),
        (["--data.tasks", "[ink, neon]"], {"tasks": ("ink", "neon")}),
        (["--data.tasks", "[2019, no, 007, 1e3]"], {"tasks": ("2019", "no", "007", "1e3")}),
        (["--data.tasks", "[ink,", "no]"], {"tasks": ("ink", "no")}),
        (["--data.tasks", "ink,no"], {"tasks": ("ink", "no")}),
        (["--data.tasks", "ink,", "no"], {"tasks": ("ink", "no")}),
        (["--data.tasks=ink", "no"], {"tasks": ("ink", "no")}),
        (["--data.tasks", "Real World"], {"tasks": ("Real World",)}),
        (["--data.tasks", '["Art, old", no]'], {"tasks": ("Art, old", "no")}),
        (["--data.tasks", "null"], {"tasks": None}),
        (["--data.tasks", "[null, ~]"], {"tasks": ("null", "~")}),
        (["--data.use_official_splits"], {"use_official_splits": True}),
        (["--data.use_official_splits", "false"], {"use_official_splits": False}),
        (["--data.use_official_splits", "yes"], {"use_official_splits": True}),
        (["--data.columns", "{task: domain, label: 2}"], {"columns": {"task": "domain", "label": "2"}}),
        (["--data.class_names", "{ink: no, 2019: 1e3}"], {"class_names": {"ink": "no", "2019": "1e3"}}),
        (["--data.root", "null"], {"root": None}),
        (["--data.shots", "1_0"], {"shots": 10}),
        (["--data.shots", "5.0"], {"shots": 5}),
        (["--data.max_broken_fraction", "1e-3"], {"max_broken_fraction": 0.001}),
        (["--data.max_broken_fraction", ".5"], {"max_broken_fraction": 0.5}),
    ],
)
def test_values_of_config_fields(arguments, changed):
    data = JobParser("").parse(arguments).config().data
    assert {name: getattr(data, name) for name in changed} == changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.tasks", "[a #1]"], r"--data\.tasks \[a #1\]: not valid YAML .* in quotes"),
        (["--data.tasks", "[a: b]"], r"data\.tasks=.*: must be text"),
        (["--data.tasks", ","], r"--data\.tasks ,: no value"),
        (["--clip.task_templates", "x"], r"clip\.task_templates='x': must be a mapping"),
        (["--clip.task_templates", "{a: x {}}"], r"--clip\.task_templates .*in quotes"),
        (["--name", "a b"], r"name='a b': must be .*: a-b"),
        (["--name", "null"], None),
        (["--name", "-x"], r"--name needs a value; .*--name=-"),
        (["data.root=/x"], r"unexpected argument data\.root: write --data\.root VALUE"),
        (["lr=3"], r"unexpected argument lr: write --training\.learning_rate VALUE"),
        (["/"], r"unexpected argument /: write --data\.root /"),
        (["--cluster.gpus_per_worker", "None"], r"gpus_per_worker='None': must be a number, or null"),
        (["--tracking.registered_model", "a/b"], r"registered_model='a/b': must have .* without /"),
        (["--data.layout", "folder"], r"data\.layout='folder': must be 'auto', .*did you mean folders\?"),
    ],
)
def test_messages_about_values_have_a_remedy(arguments, message):
    if message is None:
        assert JobParser("").parse(arguments).config().name == arguments[1]
        return
    with pytest.raises(UserError, match=message):
        JobParser("").parse(arguments).config()


PYDANTIC = re.compile(
    r"Input|should|pattern|valid (tuple|string|integer|number|boolean|dict)|instance|pars|Field|JSON|\bNone\b"
)


@pytest.mark.parametrize(
    "value",
    ["x", "-1", "a/b", " ", "9" * 5000, "inf", "1.5", [], ["x"], ["1", "2", "3", "4"], {"x": "y"}, {1: 2}, 3.5, -1],
)
def test_messages_are_without_terms_of_pydantic(value):
    for name, *_ in fields():
        values = value
        for part in reversed(name.split(".")):
            values = {part: values}
        try:
            parse_config(values)
        except UserError as error:
            assert not PYDANTIC.search(str(error)), (name, value)
            assert str(error).startswith(name.partition(".")[0])
    for section in Config.model_fields:
        if isinstance(getattr(Config(), section), Section) and not isinstance(value, dict):
            with pytest.raises(UserError, match=rf"^{section}=.*: is a section"):
                parse_config({section: value})


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        *(("lr", "training.learning_rate"), ("learning-rate", "training.learning_rate")),
        *(("training.lr", "training.learning_rate"), ("coop.training.lr", "coop.training.learning_rate")),
        *(("epochs", "training.epochs"), ("optimizer", "training.optimizer"), ("wd", "training.weight_decay")),
        *((name, "training.batch_size") for name in ("batch", "bs", "batch_size", "batch-size", "training.batch-size")),
        *((name, "data.shots") for name in ("shots", "k", "num-shots", "data.k")),
        *((name, "data.root") for name in ("data", "dataset", "root", "data_dir", "data-root")),
        *((name, "data.tasks") for name in ("tasks", "domains")),
        *((name, "storage") for name in ("output", "out", "output_dir", "output-dir")),
        *((name, "clip.model") for name in ("model", "arch", "backbone", "clip.arch")),
        *(("weights", "clip.pretrained"), ("random_state", "seed"), ("methods", "baselines")),
        *(("data.max-broken-fraction", "data.max_broken_fraction"), ("momentum", "training.momentum")),
        *(("LR", "training.learning_rate"), ("Data.Root", "data.root"), ("training-epochs", "training.epochs")),
        *(("crop_ratio", "training.augmentation.crop_ratio"), ("context_length", None), ("depth", None), ("x", None)),
    ],
)
def test_other_names_of_options(typed, field):
    for arguments in ([f"--{typed}", "1"], [f"--{typed}=1"]):
        if field:
            assert list(JobParser("").parse(arguments).fields) == [field]
        else:
            with pytest.raises(UserError, match=f"unknown option --{typed}"):
                JobParser("").parse(arguments)


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        *((name, "--cluster.gpus_per_worker") for name in ("device", "gpus", "num-gpus")),
        *((name, "--cluster.cpus_per_worker") for name in ("workers", "num_workers")),
        *((name, "MLflow") for name in ("wandb", "tensorboard", "log_dir", "log-dir")),
        *((name, "mmap-clip tune") for name in ("early_stopping", "patience")),
        *((name, "--training.epochs") for name in ("time_budget", "max_time")),
    ],
)
def test_options_that_do_not_exist_are_answered(typed, remedy):
    with pytest.raises(UserError, match=f"--{typed} is not an option: .*{remedy}"):
        JobParser("").parse([f"--{typed}", "1"])


def test_options_of_a_job_come_before_aliases():
    class OwnOptions(JobOptions):
        positional: ClassVar[tuple[str, ...]] = ("inputs",)
        inputs: tuple[str, ...] = Field((), description="Files.")
        dataset: str | None = Field(None, description="A config.")
        max_images: int = Field(3, description="A number.")
        tags: bool = Field(False, description="A flag.")

    arguments = JobParser("", OwnOptions).parse(["--tags", "x", "--dataset", "pacs", "--max-images", "5"])
    assert arguments.options == OwnOptions(inputs=("x",), dataset="pacs", max_images=5, tags=True)
    assert not arguments.fields


def test_lists_of_lists_and_of_numbers():
    options = ["--grouping.must_link", "[a, b]", "[c, d]", "--training.augmentation.crop_scale", "0.2", "1"]
    config = JobParser("").parse(options).config()
    assert config.grouping.must_link == (("a", "b"), ("c", "d"))
    assert config.training.augmentation.crop_scale == (0.2, 1)
    nested = JobParser("").parse(["--grouping.must_link", "[[a, b], [c, d]]"]).config()
    assert nested.grouping.must_link == config.grouping.must_link
    assert JobParser("").parse(["--grouping.must_link", "a,b"]).config().grouping.must_link == (("a", "b"),)
    assert JobParser("").parse(["--grouping.must_link", "[a, no]"]).config().grouping.must_link == (("a", "no"),)


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


@pytest.fixture
def mmap_clip(monkeypatch, capsys):
    """Call the command mmap-clip: (*arguments) → exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmap-clip", *arguments])
        status = 0
        try:
            main()
        except SystemExit as exited:
            status = exited.code
        return status, *capsys.readouterr()

    return call


def test_the_command_lists_all_jobs_in_groups_with_a_line_each(mmap_clip):
    assert sorted(job for jobs in GROUPS.values() for job in jobs) == job_names()
    status, page, _ = mmap_clip()
    assert status == 0 and page == mmap_clip("--help")[1] == mmap_clip("help")[1]
    for job in job_names():
        assert re.search(rf"^  {job.replace('_', '-')} +[A-Z].{{20,}}$", page, re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("job", job_names())
def test_every_job_runs_by_either_spelling(job, mmap_clip):
    """As the main module: pydantic looks there for the types of the options."""
    for name in (job, job.replace("_", "-")):
        status, page, error = mmap_clip(name, "--help")
        assert (status, error) == (0, "") and page.startswith(f"usage: mmap-clip {job.replace('_', '-')} ")
        assert mmap_clip("help", name)[1] == page
    assert mmap_clip(job, "--nonsense", "--x")[0] == 2


def test_an_invalid_value_is_reported_by_the_command(mmap_clip):
    status, _, error = mmap_clip("predict", "run", "image", "--threshold", "2")
    assert (status, error) == (2, "error: threshold=2: must be less than or equal to 1\n")


@pytest.mark.parametrize(
    ("typed", "job"),
    [
        *(("train", "full-pipeline"), ("fit", "full-pipeline"), ("run", "full-pipeline"), ("ls", "runs")),
        *(("evaluate", "full-pipeline"), ("publish", "push"), ("Predict", "predict"), ("predct", "predict")),
        *(("check", "check-data"), ("hpo", "tune"), ("full_pipline", "full-pipeline"), ("xyz", None)),
    ],
)
def test_an_unknown_job_is_answered_with_the_closest(typed, job, mmap_clip):
    status, output, error = mmap_clip(typed)
    assert (status, output) == (2, "")
    hint = f"; did you mean {job}?" if job else "."
    assert error.startswith(f"error: unknown job {typed}{hint}") and "mmap-clip --help" in error
    assert set(USUAL_NAMES.values()) <= {name.replace("_", "-") for name in job_names()}


def test_the_version_is_that_of_the_package(mmap_clip):
    assert mmap_clip("--version") == (0, f"mmap-clip {importlib.metadata.version('mmap-clip')}\n", "")


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    """Press Tab after each of some command lines in bash: [words] → [[suggestions]]."""
    file = tmp_path_factory.mktemp("completion") / "mmap-clip"
    file.write_text(shtab.complete(completion_parser(), "bash"))

    def press_tab(*lines: list[str]) -> list[list[str]]:
        script = [f"source {shlex.quote(str(file))}"]
        for words in lines:
            script.append(
                f"COMP_WORDS=({shlex.join(['mmap-clip', *words])}); COMP_CWORD={len(words)}; COMPREPLY=(); "
                f"_shtab_mmap_clip mmap-clip {shlex.quote(words[-1])}; "
                '(IFS=" "; echo "${COMPREPLY[*]}")'
            )
        output = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True, text=True, check=True).stdout
        return [line.split() for line in output.splitlines()]

    return press_tab


def test_the_tab_key_completes_jobs_options_and_values(completions, tmp_path):
    (tmp_path / "photos").mkdir()
    jobs, tune, options, objective, methods, flag, stage, folder = completions(
        [""],
        ["tu"],
        ["full-pipeline", "--training.e"],
        ["full-pipeline", "--grouping.objective", ""],
        ["check-data", "--baselines", "maple"],
        ["tune", "--data.use_official_splits", ""],
        ["full-pipeline", "--until", "gro"],
        ["full-pipeline", "--data.root", f"{tmp_path}/ph"],
    )
    assert jobs == [name.replace("_", "-") for name in job_names()] and tune == ["tune"]
    assert options == ["--training.epochs"] and objective == ["sum", "mean", "density"]
    assert methods == ["maple", "maple_mt"] and flag == ["true", "false"]
    assert stage == ["grouping", "group_trainings"] and folder == [f"{tmp_path}/photos"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell, mmap_clip):
    status, script, _ = mmap_clip("completion", shell)
    assert status == 0 and "full-pipeline" in script and "training.epochs" in script and "mvlpt" in script
    assert "did you mean zsh? Valid: bash, zsh" in mmap_clip("completion", "zshh")[2]


def test_job_options_do_not_shadow_config_fields(run_to_exit):
    for job in job_names():
        options = set(
            re.findall(r"^  --(\w+)(?: |$)", run_to_exit(job, "--help")[1].split("\nCommon config fields")[0], re.M)
        )
        assert options & set(Config.model_fields) == ({"storage"} if job == "runs" else set()), job
