"""jobs/tune.py: search files, points, validation images; a search on the demo that breaks off, goes on, and ends in a
run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient
from pipelines import Job
from ray.tune import TuneError
from rich.console import Console
from small_problem import CONFIG, TEST_COUNTS, group_prompts, prompted_classifier, small_problem, write_test_splits

from jobs.tune import main
from pipeline.config import DEMO_CONFIG, Config, load_yaml, parse_config
from pipeline.data.parquet import SplitReader
from pipeline.data.splits import ScannedImage, sample_splits
from pipeline.errors import UserError
from pipeline.runtime.storage import Artifact, Storage
from pipeline.stages.finished_run import read_finished_run
from pipeline.stages.plan import make_plan
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.evaluate import decoded_batches, evaluate, evaluate_decoded
from pipeline.training.trainer import Trainer
from pipeline.tuning.points import planned_points
from pipeline.tuning.search_file import config_at, read_search
from pipeline.tuning.trials import Trial, best_trial
from pipeline.workflows import tuning
from pipeline.workflows.tuning_searchers import OptunaPoints, early_stopping
from pipeline.workflows.tuning_trial import TrialSetup, measured_epochs, run_trial
from pipeline.workflows.validation_split import sample_validation

BASE = parse_config(load_yaml(DEMO_CONFIG))
TUNE = ("jobs/tune.py",)
TRIALS = 3
TWO_TASKS = ("--data.tasks", "[ink, neon]", "--global_prompt.epochs", "1")
SPACE = {
    "method": {"choice": ["all_in_one", "grouped", "clip_adapter_mt"]},
    "training.learning_rate": {"loguniform": [0.0003, 0.03]},
    "mmap.prompt_length": {"choice": [2, 4]},
    "mmap.source_rows": {"choice": [2, 4]},
    "grouping.num_groups": {"integer": [1, 2]},
    "clip_adapter.ratio": {"uniform": [0.1, 0.9]},
}


def search_file(folder: Path, **values) -> Path:
    path = folder / f"search_{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump({"searcher": "random", "trials": 4, "fields": SPACE, **values}))
    return path


def search_of(folder: Path, **values):
    return read_search(search_file(folder, **values), BASE)


def check(point):
    config_at(BASE, point, ("grouped",))


# Search files


def test_a_search_file_says_what_each_field_may_be(tmp_path):
    search = search_of(tmp_path, early_stopping="median", validation_shots=3)
    assert search.options.trials == 4 and search.options.validation_shots == 3
    assert search.methods == ("all_in_one", "grouped", "clip_adapter_mt")
    assert search.fields_of("clip_adapter_mt") == ["method", "clip_adapter.ratio"]  # which has its own rate
    of_all_in_one = ["method", "mmap.prompt_length", "mmap.source_rows", "training.learning_rate"]
    assert search.fields_of("all_in_one") == of_all_in_one
    assert search.fields_of("grouped") == [*of_all_in_one, "grouping.num_groups"]
    config, method = config_at(BASE, {"method": "coop", "mmap.prompt_length": 8}, search.methods)
    assert (method, config.mmap.prompt_length, config.mmap.source_rows) == ("coop", 8, 4)


@pytest.mark.parametrize(
    "name, value", [("mmap.text_prompt_position", "before_sos"), ("clip.template", "art of a {}.")]
)
def test_what_affects_all_trainings_matters_to_every_method(tmp_path, name, value):
    search = search_of(tmp_path, method="joint_prompts_mt", fields={name: {"choice": [value]}})
    assert search.fields_of("joint_prompts_mt") == [name]


def test_the_shipped_search_files_can_be_read():
    files = sorted((DEMO_CONFIG.parent / "searches").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        read_search(file, BASE if file.stem == "demo" else Config())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"trails": 3}, "unknown option trails; did you mean trials?"),
        ({"seed": -1}, "seed=-1"),
        ({"training.epochs": 3}, "unknown option training.epochs; config fields stand under `fields`."),
        ({"trials": None}, "trials is missing"),
        ({"searcher": "grid"}, "searcher grid tries all points: leave out trials"),
        ({"searcher": "bayes"}, "searcher='bayes'"),
        ({"validation_shots": 8}, "leaves nothing to train on of data.shots=8"),
        ({"fields": {}}, "fields is missing"),
        ({"method": "grouped"}, "method stands among the fields and beside them"),
        ({"method": "groupd", "fields": {"training.momentum": {"choice": [0.5]}}}, "'groupd' is not one that can be"),
        ({"fields": {"training.lerning_rate": {"choice": [1]}}}, "did you mean training.learning_rate?"),
        ({"fields": {"learning_rate": {"choice": [1]}}}, "did you mean training.learning_rate?"),
        ({"fields": {"seed": {"choice": [1, 2]}}}, "seed cannot be searched"),
        ({"fields": {"data.shots": {"choice": [1, 2]}}}, "data.shots cannot be searched"),
        ({"fields": {"clip.model": {"choice": ["ViT-B-32"]}}}, "clip.model cannot be searched"),
        ({"fields": {"training.checkpoint_every": {"choice": [1, 2]}}}, "it changes no result"),
        ({"fields": {"training.epochs": {"choices": [1, 2]}}}, "did you mean choice?"),
        ({"fields": {"training.epochs": [1, 2]}}, "takes one of choice, uniform, loguniform, integer"),
        ({"fields": {"training.epochs": {"choice": [5, -1]}}}, "training.epochs=-1"),
        ({"fields": {"training.epochs": {"choice": [5, 5]}}}, "5 is given twice"),
        ({"fields": {"training.epochs": {"uniform": [5, 10]}}}, "use integer"),
        ({"fields": {"training.epochs": {"integer": [10, 5]}}}, "two numbers, the smaller first"),
        ({"fields": {"training.learning_rate": {"integer": [0.1, 0.5]}}}, "two whole numbers"),
        ({"fields": {"training.weight_decay": {"loguniform": [0, 1]}}}, "loguniform begins above 0"),
        ({"fields": {"grouping.objective": {"choice": ["sum", "most"]}}}, "grouping.objective='most'"),
        ({"fields": {"method": {"choice": ["zero_shot"]}}}, "'zero_shot' is not one that can be searched"),
        ({"fields": {"method": {"uniform": [0, 1]}}}, "it is no number: use choice"),
        ({"fields": {"vpt.prompt_length": {"choice": [2]}}}, "vpt.prompt_length does not matter to grouped"),
        (
            {"method": "clip_adapter_mt", "fields": {"training.learning_rate": {"choice": [0.1]}}},
            "does not matter to clip_adapter_mt (its own section has a value that goes before)",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_faults_of_a_search_file_are_named(tmp_path, values, message):
    with pytest.raises(UserError) as fault:
        search_of(tmp_path, **values)
    assert message in str(fault.value) and "search_0.yaml" in str(fault.value)


def test_all_faults_of_fields_are_told_at_once(tmp_path):
    with pytest.raises(UserError, match=r"(?s)seed cannot.*training\.epochs=0"):
        search_of(tmp_path, fields={"seed": {"choice": [1]}, "training.epochs": {"choice": [0]}})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"fields": {"mmap.source_rows": {"choice": [3, 5]}}}, "no point of the search can be: mmap.source_rows="),
        ({"fields": {"mmap.source_columns": {"choice": [5]}}}, "mmap.source_columns=5 must divide the text width"),
        ({"fields": {"grouping.num_groups": {"choice": [7]}}}, "num_groups=7"),
    ],
    ids=["rows", "columns", "groups"],
)
def test_a_search_without_a_point_that_can_be_ends_at_the_door(tmp_path, monkeypatch, capsys, values, message):
    arguments = ["--search", str(search_file(tmp_path, **values)), "--storage", str(tmp_path / "storage")]
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "storage" / "splits").exists()


# Points


def test_a_grid_leaves_out_what_does_not_go_together(tmp_path):
    fields = {"mmap.prompt_length": {"choice": [2, 4]}, "mmap.source_rows": {"choice": [2, 4]}}
    planned = planned_points(search_of(tmp_path, searcher="grid", trials=None, fields=fields), check)
    assert [tuple(point.values()) for point in planned.points] == [(2, 2), (4, 2), (4, 4)]
    assert planned.refused == 1 and "mmap.source_rows=4 does not divide" in planned.reason


def test_points_that_differ_in_what_does_not_matter_are_one(tmp_path):
    fields = {"method": {"choice": ["all_in_one", "coop_mt"]}, "mmap.prompt_length": {"choice": [4, 8]}}
    planned = planned_points(search_of(tmp_path, searcher="grid", trials=None, fields=fields), check)
    assert {"method": "coop_mt"} in planned.points and len(planned.points) == 3


def test_draws_are_those_of_the_seed(tmp_path):
    draw = [planned_points(search_of(tmp_path, trials=30, seed=seed), check).points for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2] and len(draw[0]) == 30
    for point in draw[0]:
        check(point)
        assert 0.0003 <= point.get("training.learning_rate", 0.001) <= 0.03
        assert point.get("grouping.num_groups", 1) in (1, 2)


def test_a_space_with_few_points_gives_all_of_them(tmp_path):
    planned = planned_points(search_of(tmp_path, trials=50, fields={"mmap.source_rows": {"choice": [1, 2, 3]}}), check)
    assert sorted(point["mmap.source_rows"] for point in planned.points) == [1, 2]


def test_optuna_tries_no_point_twice_and_none_that_cannot_be(tmp_path):
    fields = {"mmap.prompt_length": {"choice": [2, 4]}, "mmap.source_rows": {"choice": [1, 2, 4]}}
    optuna = OptunaPoints(search_of(tmp_path, searcher="optuna", fields=fields), check)
    points = []
    for number in range(5):
        suggested = optuna.suggest(str(number))["trial"]
        assert suggested["number"] == number
        points.append(tuple(suggested["point"].values()))
        optuna.on_trial_complete(str(number), {"validation_accuracy": 0.5})
    assert sorted(points) == [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    assert optuna.suggest("5") == optuna.FINISHED


def test_optuna_goes_by_what_was_measured_also_when_it_was_saved(tmp_path):
    search = search_of(tmp_path, searcher="optuna", fields={"training.learning_rate": {"loguniform": [1e-4, 1]}})

    def rates(optuna: OptunaPoints, numbers: range) -> list[float]:
        found = []
        for number in numbers:
            trial = optuna.suggest(str(number))["trial"]
            assert trial["number"] == number
            found.append(trial["point"]["training.learning_rate"])
            optuna.on_trial_complete(str(number), {"validation_accuracy": 1 - abs(math.log10(found[-1]) + 1) / 4})
        return found

    optuna, restored = OptunaPoints(search, check), OptunaPoints(search, check)
    rates(optuna, range(30))
    optuna.save(str(tmp_path / "state"))
    restored.restore(str(tmp_path / "state"))
    after = rates(optuna, range(30, 40))
    assert after == rates(restored, range(30, 40))
    assert sum(0.03 < rate < 0.3 for rate in after) >= 6  # around 0.1; one draw of four would be by chance


@pytest.mark.parametrize("rule, decision", [("asha", "STOP"), ("median", "STOP"), ("none", "CONTINUE")])
def test_a_trial_below_the_others_ends_early(tmp_path, rule, decision):
    scheduler = early_stopping(search_of(tmp_path, early_stopping=rule, grace_period=2), BASE)

    class Trying:
        """A trial, of which the rules look at the id alone."""

        def __init__(self, trial_id: str):
            self.trial_id = trial_id

    def measured(trial: Trying, accuracy: float, epoch: int) -> str:
        return scheduler.on_trial_result(None, trial, {"validation_accuracy": accuracy, "epoch": epoch})

    good, late = [Trying(str(number)) for number in range(6)], Trying("late")
    for trial in (*good, late):
        scheduler.on_trial_add(None, trial)
    assert {measured(trial, 0.9, epoch) for epoch in (1, 2) for trial in good} == {"CONTINUE"}
    assert [measured(late, 0.2, epoch) for epoch in (1, 2)] == ["CONTINUE", decision]


def test_the_best_trial_is_one_that_trained_to_its_end():
    def trial(number, state, accuracy, parameters):
        return Trial(number, {}, state, 1, accuracy, {}, parameters)

    trials = [
        trial(0, "stopped", 0.9, 1),
        trial(1, "whole", 0.7, 9),
        trial(2, "whole", 0.8, 9),
        trial(3, "whole", 0.8, 5),
        trial(4, "whole", 0.8, 5),
        trial(5, "failed", 1.0, 1),
    ]
    assert best_trial(trials).number == 3
    assert best_trial(trials[:1]) is None


# Validation images


def test_validation_images_are_the_last_of_the_training_images_by_rank():
    classes = {"ink": ("a", "b"), "neon": ("a", "b")}
    images = [
        ScannedImage(f"{task}/{name}/{at}", task, name, hashlib.sha256(f"{task}{name}{at}".encode()).hexdigest())
        for task, names in classes.items()
        for name in names
        for at in range(20)
    ]
    full, smaller = (sample_splits(images, classes, shots, seed=3) for shots in (6, 4))
    held = sample_validation(full.train, classes, 4, seed=3)
    assert held == sample_validation(tuple(reversed(full.train)), classes, 4, seed=3)
    assert held.train == smaller.train
    assert not set(held.train) & set(held.test)
    assert sorted((*held.train, *held.test), key=lambda image: image.path) == list(full.train)
    assert not set(held.test) & set(full.test)


def test_a_class_whose_validation_images_are_all_copies_is_named():
    images = [ScannedImage(f"{task}/a/{at}", task, "a", str(at)) for task in ("ink", "neon") for at in range(2)]
    with pytest.raises(UserError, match="validation images cannot be held out: .*copies"):
        for seed in range(20):  # until the two tasks train on each other's second image
            sample_validation(images, {"ink": ("a",), "neon": ("a",)}, 1, seed)


# What trials are made of


def test_a_training_by_epochs_is_the_training(tmp_path):
    towers, _, tokens, sets = small_problem()
    whole, by_epoch, interrupted = (group_prompts(towers) for _ in range(3))
    options = {"epochs": 4, "seed": 1}
    history = Trainer(towers, whole, sets, tokens, CONFIG, **options).train()
    trainer, seen = Trainer(towers, by_epoch, sets, tokens, CONFIG, **options), []
    while trainer.epoch < trainer.epochs:
        trainer.run_epoch()
        seen.append((trainer.epoch, by_epoch.group.source.detach().clone()))
    assert trainer.history == history
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4]
    assert all(not torch.equal(before, after) for (_, before), (_, after) in zip(seen, seen[1:]))
    options["checkpoints"] = Checkpoints(tmp_path)
    first = Trainer(towers, interrupted, sets, tokens, CONFIG, **options)
    for _ in range(2):
        first.run_epoch()
    again = group_prompts(towers)
    second = Trainer(towers, again, sets, tokens, CONFIG, **options)
    assert second.epoch == 2
    assert second.train() == history
    for method in (by_epoch, again):
        for one, other in zip(whole.parameters(), method.parameters()):
            assert torch.equal(one, other)


def test_images_decoded_before_are_evaluated_as_those_that_are_streamed(tmp_path):
    write_test_splits(tmp_path)
    reader, classifier = SplitReader(tmp_path / "splits"), prompted_classifier()
    batches = list(decoded_batches(reader, list(TEST_COUNTS), classifier.towers.image_size, 1))
    assert evaluate_decoded(classifier, batches) == evaluate(classifier, reader, list(TEST_COUNTS), 1)


# Searches


def trials_of(storage: Path) -> dict[int, dict]:
    """The trials of the newest search."""
    folder = max((storage / "searches").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return {trial["number"]: trial for trial in json.loads((folder / "search.json").read_text())["trials"]}


def one_trial_ended(storage: Path) -> bool:
    """Whether Ray Tune's state in the storage says so."""
    files = (storage / "searches").glob("*/tune/experiment_state-*.json")
    return any("TERMINATED" in file.read_text() for file in files)


def ended_in(output: str) -> set[int]:
    """Numbers of the trials of which a job says that they ended."""
    return {int(number) for number in re.findall(r"^  trial (\d+): ", output, re.MULTILINE)}


def search_arguments(folder: Path, searcher: str) -> tuple[str, ...]:
    """Optuna's second point is one whose loss is not finite after the first epoch, which warms up."""
    fields = {**SPACE, "training.learning_rate": {"choice": [0.003, 1e30]}}
    file = search_file(folder, searcher=searcher, trials=TRIALS, grace_period=2, fields=fields)
    epochs = ("--training.epochs", "2", "--clip_adapter.training.epochs", "2")
    return ("--search", str(file), *epochs, *TWO_TASKS)


def check_resumed(folder: Path, output: str) -> None:
    """A search of which one trial at least had ended before the job that says `output`."""
    (before,) = re.findall(r"(\d+) trials were done before", output)
    assert 1 <= int(before) < TRIALS and len(ended_in(output)) == TRIALS - int(before)
    trials = trials_of(folder.parent.parent)
    assert list(trials) == list(range(TRIALS))
    for trial in trials.values():
        if trial["point"].get("training.learning_rate") == 1e30:
            assert trial["state"] == "failed" and "lower the learning_rate" in trial["fault"]
            assert trial["validation_accuracy"] == 0 and trial["epochs"] == 1
        else:
            assert trial["state"] == "whole" and trial["epochs"] == 2
            assert trial["validation_accuracy"] == pytest.approx(fmean(trial["accuracy"].values()))
            assert trial["trained_parameters"] > 0 and not trial["fault"]
        assert set(trial["point"]) >= {"method"}
    assert len({json.dumps(trial["point"]) for trial in trials.values()}) == TRIALS
    assert not (folder / "checkpoints").exists() and not (folder / "tune").exists()


@pytest.fixture(scope="module")
def searched(tmp_path_factory, run_job):
    """A search with Optuna and ASHA that broke off after its first trial, and then went on; its folder and output."""
    folder = tmp_path_factory.mktemp("tuning")
    storage, arguments = folder / "storage", search_arguments(folder, "optuna")
    track = tuning._track

    def break_off(run, trial):
        track(run, trial)
        if one_trial_ended(storage):
            raise OSError("broken off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.5")
        patch.setattr(tuning, "_track", break_off)
        with pytest.raises(TuneError, match="broken off"):
            run_job("tune", "--storage", storage, *arguments)
    finished = run_job("tune", "--storage", storage, *arguments)
    assert finished.status == 0, finished.output
    (of_search,) = (storage / "searches").iterdir()
    return of_search, finished.output, arguments


@pytest.mark.slow
def test_a_search_that_broke_off_goes_on(searched):
    folder, output, _ = searched
    check_resumed(folder, output)
    assert "early stopping does not know what they measured" in output
    assert any(trial["fault"] for trial in trials_of(folder.parent.parent).values())


@pytest.mark.fault_injection
def test_a_killed_search_goes_on(tmp_path, run_job):
    storage, arguments = tmp_path / "storage", search_arguments(tmp_path, "random")
    job = Job(storage, *arguments, prefix=TUNE, env={"TUNE_GLOBAL_CHECKPOINT_S": "0.5"})
    try:
        job.wait_until(lambda: one_trial_ended(storage))
    finally:
        job.stop()
    finished = run_job("tune", "--storage", storage, *arguments, "--final_run", "false")
    assert finished.status == 0, finished.output
    (folder,) = (storage / "searches").iterdir()
    check_resumed(folder, finished.output)


def test_a_state_that_ray_tune_cannot_read_is_told_and_left_out(tmp_path):
    storage, output = Storage.from_folder(tmp_path), io.StringIO()
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "tuner.pkl").write_bytes(b"of another version")
    plan, session = SimpleNamespace(storage=storage), SimpleNamespace(console=Console(file=output))
    assert tuning._restored(plan, session, search_of(tmp_path), tmp_path / "tune", run_trial) is None
    assert "trials go on from their checkpoints" in " ".join(output.getvalue().split())
    assert not (tmp_path / "tune").exists()


@pytest.mark.slow
def test_a_search_is_reported_and_ends_in_a_run(searched):
    folder, output, _ = searched
    storage = folder.parent.parent
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert len(rows) == TRIALS and rows[0]["state"] == "whole" and float(rows[0]["validation_accuracy"]) <= 1
    assert (folder / "trials.png").stat().st_size > 5000
    assert f"best: trial {rows[0]['trial']}:" in output

    config = parse_config(load_yaml(folder / "best.yaml"))
    assert config.data.shots == 8 and config.training.epochs == 2
    if rows[0]["mmap.prompt_length"]:
        assert config.mmap.prompt_length == int(rows[0]["mmap.prompt_length"])
    (of_best,) = (storage / "runs").iterdir()
    methods = json.loads((of_best / "report" / "summary.json").read_text())["methods"]
    accuracy = methods[rows[0]["method"]]["average"]
    assert f"{100 * accuracy:.1f} % on the test set" in output
    assert make_plan(config, Console(quiet=True)).folder == of_best  # which full_pipeline.py would find finished
    assert set(read_finished_run(str(of_best), "").tasks) == set(config.data.tasks)  # so that add_task.py can add to it

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    found = {of.data.tags["mlflow.runName"]: of for of in client.search_runs(["1"])}
    parent = found[folder.name]
    assert parent.data.tags["level"] == "search" and found["trial 0"].data.tags["level"] == "trial"
    assert {"trials.csv", "trials.png", "best.yaml"} <= {of.path for of in client.list_artifacts(parent.info.run_id)}
    assert parent.data.metrics["test_accuracy/average"] == pytest.approx(accuracy)
    for trial in trials_of(storage).values():
        of = found[f"trial {trial['number']}"]
        assert of.info.status == ("FAILED" if trial["fault"] else "FINISHED")
        assert of.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert of.data.params["method"] == trial["point"]["method"]
        history = client.get_metric_history(of.info.run_id, "validation_accuracy/average")
        assert [m.step for m in history] == list(range(1, trial["epochs"] + 1))
        assert trial["fault"] or history[-1].value == trial["validation_accuracy"]


@pytest.mark.slow
def test_a_search_that_ended_does_nothing_again(searched, run_job):
    folder, _, arguments = searched
    before = (folder / "search.json").stat().st_mtime_ns
    again = run_job("tune", "--storage", folder.parent.parent, *arguments)
    assert again.status == 0 and f"found finished: {TRIALS} trials" in again.output
    assert again.output.count("cached (computed in") == 5 and not ended_in(again.output)
    assert (folder / "search.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_trials_do_not_read_the_test_set(searched, run_job, tmp_path):
    folder, *_ = searched
    storage = folder.parent.parent
    all_splits = {
        "validation_shots" in json.loads((splits / "artifact.json").read_text())["inputs"]: splits
        for splits in (storage / "splits").glob("[!.]*")
    }
    held_out, splits = all_splits[True], all_splits[False]

    def images(of: Path, split: str) -> set[str]:
        return {sha for file in (of / split).glob("*.parquet") for sha in pq.read_table(file)["sha256"].to_pylist()}

    assert images(held_out, "train") | images(held_out, "test") == images(splits, "train")
    assert not (images(held_out, "train") | images(held_out, "test")) & images(splits, "test")
    for file in (splits / "test").glob("*.parquet"):
        file.unlink()
    fields = {"mmap.prompt_length": {"choice": [8]}}
    file = search_file(tmp_path, searcher="grid", trials=None, method="all_in_one", fields=fields)
    options = ("--search", file, "--training.epochs", "1", *TWO_TASKS, "--final_run", "false")
    finished = run_job("tune", "--storage", storage, *options)
    assert finished.status == 0, finished.output
    assert not list((splits / "test").glob("*.parquet"))  # nor were they missed
    assert [trial["state"] for trial in trials_of(storage).values()] == ["whole"]

    # A trial with groups, in this process, interrupted where one group is an epoch ahead of the other.
    base = parse_config(
        load_yaml(DEMO_CONFIG)
        | {
            "storage": str(storage),
            "training": {**BASE.training.model_dump(), "epochs": 3, "checkpoint_every": 1},
            "data": {**BASE.data.model_dump(), "tasks": ["ink", "neon"]},
            "global_prompt": {"epochs": 1},
            "grouping": {"num_groups": 2},
        }
    )
    plan = make_plan(base, Console(quiet=True))
    artifact = Artifact(plan.storage, "splits", json.loads((held_out / "artifact.json").read_text())["inputs"])
    setups = [TrialSetup(replace(plan, splits=artifact), ("grouped",), storage / name) for name in ("one", "two")]
    whole = list(measured_epochs({}, setups[0], setups[0].checkpoints))
    first = list(islice(measured_epochs({}, setups[1], setups[1].checkpoints), 1))
    (storage / "one" / "0").rename(storage / "two" / "0x")
    (storage / "two" / "0").rename(storage / "two" / "gone")
    (storage / "two" / "0x").rename(storage / "two" / "0")
    rest = list(measured_epochs({}, setups[1], setups[1].checkpoints))
    assert [of["epoch"] for of in whole] == [1, 2, 3]
    assert first + rest == whole
