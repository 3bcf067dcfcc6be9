"""jobs/tune.py: search files, planned trials, validation split; an interrupted and resumed search on the demo."""

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
from pipeline.training import aggregation
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.evaluate import decoded_batches, evaluate, evaluate_decoded
from pipeline.training.trainer import Trainer
from pipeline.tuning.points import plan_trials
from pipeline.tuning.search_file import read_search, trial_config
from pipeline.tuning.trials import Trial, best_trial
from pipeline.workflows import tuning
from pipeline.workflows.tuning_searchers import UniqueOptunaSearch, early_stopping
from pipeline.workflows.tuning_trial import TrialSetup, run_trial, train_epochs
from pipeline.workflows.validation_split import split_train_validation

BASE = parse_config(load_yaml(DEMO_CONFIG))
TUNE = ("jobs/tune.py",)
TRIALS = 3
TWO_TASKS = ("--data.tasks", "[blur_right, ink_left]", "--global_prompt.epochs", "1")
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


def make_search(folder: Path, **values):
    return read_search(search_file(folder, **values), BASE)


def check(params):
    trial_config(BASE, params, ("grouped",))


# Search files


def test_a_search_file_gives_the_range_of_each_field(tmp_path):
    search = make_search(tmp_path, early_stopping="median", validation_shots=3)
    assert search.options.trials == 4 and search.options.validation_shots == 3
    assert search.methods == ("all_in_one", "grouped", "clip_adapter_mt")
    assert search.fields_for("clip_adapter_mt") == ["method", "clip_adapter.ratio"]  # which has its own learning rate
    all_in_one_fields = ["method", "mmap.prompt_length", "mmap.source_rows", "training.learning_rate"]
    assert search.fields_for("all_in_one") == all_in_one_fields
    assert search.fields_for("grouped") == [*all_in_one_fields, "grouping.num_groups"]
    config, method = trial_config(BASE, {"method": "coop", "mmap.prompt_length": 8}, search.methods)
    assert (method, config.mmap.prompt_length, config.mmap.source_rows) == ("coop", 8, 4)


@pytest.mark.parametrize(
    "name, value", [("mmap.text_prompt_position", "before_sos"), ("clip.template", "art of a {}.")]
)
def test_fields_that_affect_all_trainings_affect_every_method(tmp_path, name, value):
    search = make_search(tmp_path, method="joint_prompts_mt", fields={name: {"choice": [value]}})
    assert search.fields_for("joint_prompts_mt") == [name]


def test_the_global_prompt_affects_groups_by_gradients_and_hipro_only(tmp_path):
    fields = {"global_prompt.snapshot_every": {"choice": [1, 2]}, "grouping.gradient_similarity": {"choice": ["dot"]}}

    def affected(base, *methods, **more_fields) -> list[str]:
        space = {"method": {"choice": list(methods)}, "mmap.prompt_length": {"choice": [4, 8]}, **fields, **more_fields}
        search = read_search(search_file(tmp_path, fields=space), base)
        return [name for name in fields if name in search.fields_for(methods[0])]

    gradient = BASE.model_copy(update={"grouping": BASE.grouping.model_copy(update={"affinity": "gradient"})})
    assert affected(BASE, "hipro", "grouped") == affected(gradient, "grouped") == list(fields)
    assert affected(BASE, "grouped", **{"grouping.affinity": {"choice": ["transfer", "gradient"]}}) == list(fields)
    with pytest.raises(UserError, match="global_prompt.snapshot_every has no effect on method grouped"):
        affected(BASE, "grouped")


def test_the_aggregation_affects_trainings_with_a_batch_of_each_task(tmp_path):
    fields = {"training.aggregation": {"choice": ["sum", "upgrad"]}}
    for method in ("grouped", "all_in_one"):
        assert make_search(tmp_path, method=method, fields=fields).fields_for(method) == list(fields)
    for method in ("each_alone", "joint_prompts", "joint_prompts_mt"):
        with pytest.raises(UserError, match=f"aggregation has no effect on method {method} .it trains tasks alone"):
            make_search(tmp_path, method=method, fields=fields)


def test_a_search_needs_the_packages_of_all_aggregations_before_any_trial(tmp_path, monkeypatch):
    """A trial without them would count as invalid, and be skipped."""
    search = make_search(
        tmp_path, method="all_in_one", fields={"training.aggregation": {"choice": ["famo", "upgrad", "sum"]}}
    )
    monkeypatch.setattr(aggregation, "find_spec", lambda package: None)
    with pytest.raises(
        UserError, match="aggregation=upgrad needs torchjd, qpsolvers, quadprog, which are not installed"
    ):
        tuning.run_search(BASE, search, Console(quiet=True))


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
        ({"training.epochs": 3}, "unknown option training.epochs; config fields belong under `fields`."),
        ({"trials": None}, "trials is required"),
        ({"searcher": "grid"}, "searcher grid runs all points: remove trials"),
        ({"searcher": "bayes"}, "searcher='bayes'"),
        ({"validation_shots": 4}, "leaves no training images of data.shots=4"),
        ({"fields": {}}, "fields is required"),
        ({"method": "grouped"}, "method is given twice, at the top level and under fields"),
        ({"method": "groupd", "fields": {"training.momentum": {"choice": [0.5]}}}, "'groupd' cannot be searched"),
        ({"fields": {"training.lerning_rate": {"choice": [1]}}}, "did you mean training.learning_rate?"),
        ({"fields": {"learning_rate": {"choice": [1]}}}, "did you mean training.learning_rate?"),
        ({"fields": {"seed": {"choice": [1, 2]}}}, "seed cannot be searched"),
        ({"fields": {"data.shots": {"choice": [1, 2]}}}, "data.shots cannot be searched"),
        ({"fields": {"clip.model": {"choice": ["ViT-B-32"]}}}, "clip.model cannot be searched"),
        ({"fields": {"training.checkpoint_every": {"choice": [1, 2]}}}, "it does not change results"),
        ({"fields": {"training.epochs": {"choices": [1, 2]}}}, "did you mean choice?"),
        ({"fields": {"training.epochs": [1, 2]}}, "takes one of choice, uniform, loguniform, integer"),
        ({"fields": {"training.epochs": {"choice": [5, -1]}}}, "training.epochs=-1"),
        ({"fields": {"training.epochs": {"choice": [5, 5]}}}, "5 is given twice"),
        ({"fields": {"training.epochs": {"uniform": [5, 10]}}}, "use integer"),
        ({"fields": {"training.epochs": {"integer": [10, 5]}}}, "two numbers, the smaller first"),
        ({"fields": {"training.learning_rate": {"integer": [0.1, 0.5]}}}, "two integers"),
        ({"fields": {"training.weight_decay": {"loguniform": [0, 1]}}}, "loguniform needs a lower bound above 0"),
        ({"fields": {"grouping.objective": {"choice": ["sum", "most"]}}}, "grouping.objective='most'"),
        ({"fields": {"method": {"choice": ["zero_shot"]}}}, "'zero_shot' cannot be searched"),
        ({"fields": {"method": {"uniform": [0, 1]}}}, "it is not a number: use choice"),
        ({"fields": {"vpt.prompt_length": {"choice": [2]}}}, "vpt.prompt_length has no effect on method grouped"),
        (
            {"method": "clip_adapter_mt", "fields": {"training.learning_rate": {"choice": [0.1]}}},
            "has no effect on method clip_adapter_mt (its own section overrides this field)",
        ),
        ({"method": "gda", "fields": {"training.epochs": {"choice": [2]}}}, "has no effect on method gda"),
        ({"method": "gda", "fields": {"training.weight_decay": {"choice": [0]}}}, "has no effect on method gda"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_errors_of_a_search_file_are_reported(tmp_path, values, message):
    with pytest.raises(UserError) as error:
        make_search(tmp_path, **values)
    assert message in str(error.value) and "search_0.yaml" in str(error.value)


def test_values_of_a_search_file_are_those_of_their_fields(tmp_path):
    """Text as it is written, numbers in the forms that YAML 1.1 reads as text, null where the field allows it."""
    (file := tmp_path / "search.yaml").write_text(
        "searcher: random\ntrials: 3\nfields:\n  training.learning_rate: {loguniform: [1e-4, 1e-1]}\n"
        "  training.epochs: {integer: [5, 1_0]}\n  grouping.num_groups: {choice: [null, 2]}\n"
        "  clip.template: {choice: ['no {}', '2024 {}', \"~ {}\"]}\n"
        "  training.augmentation.flip: {choice: [no, true]}\n"
        "  training.augmentation.crop_scale: {choice: [[.5, 1], [1, 1.0]]}\n  method: {choice: [grouped, all_in_one]}\n"
    )
    space = {name: entry.values for name, entry in read_search(file, BASE).space.items()}
    assert space == {
        "method": ("grouped", "all_in_one"),
        "training.learning_rate": (1e-4, 0.1),
        "training.epochs": (5, 10),
        "grouping.num_groups": (None, 2),
        "clip.template": ("no {}", "2024 {}", "~ {}"),
        "training.augmentation.flip": (False, True),
        "training.augmentation.crop_scale": ([0.5, 1.0], [1.0, 1.0]),
    }
    assert all(
        type(value) in (str, int, float, bool, list, type(None)) for values in space.values() for value in values
    )
    json.dumps(read_search(file, BASE).to_json())


def test_all_invalid_fields_are_reported_together(tmp_path):
    with pytest.raises(UserError, match=r"(?s)seed cannot.*training\.epochs=0"):
        make_search(tmp_path, fields={"seed": {"choice": [1]}, "training.epochs": {"choice": [0]}})


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"fields": {"mmap.source_rows": {"choice": [3, 5]}}},
            "no valid configuration: mmap.source_rows=",
        ),
        ({"fields": {"mmap.source_columns": {"choice": [5]}}}, "mmap.source_columns=5 must divide the text width"),
        ({"fields": {"grouping.num_groups": {"choice": [7]}}}, "num_groups=7"),
    ],
    ids=["rows", "columns", "groups"],
)
def test_a_search_without_a_valid_configuration_is_rejected_early(
    tmp_path, new_storage, monkeypatch, capsys, values, message
):
    arguments = ["--search", str(search_file(tmp_path, **values)), "--storage", str(new_storage)]
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (new_storage / "splits").exists()


# Planned trials


def test_a_grid_skips_invalid_points(tmp_path):
    fields = {"mmap.prompt_length": {"choice": [2, 4]}, "mmap.source_rows": {"choice": [2, 4]}}
    planned = plan_trials(make_search(tmp_path, searcher="grid", trials=None, fields=fields), check)
    assert [tuple(params.values()) for params in planned.params] == [(2, 2), (4, 2), (4, 4)]
    assert planned.num_invalid == 1 and "mmap.source_rows=4 does not divide" in planned.reason


def test_points_that_differ_only_in_fields_without_effect_are_one_trial(tmp_path):
    fields = {"method": {"choice": ["all_in_one", "coop_mt"]}, "mmap.prompt_length": {"choice": [4, 8]}}
    planned = plan_trials(make_search(tmp_path, searcher="grid", trials=None, fields=fields), check)
    assert {"method": "coop_mt"} in planned.params and len(planned.params) == 3


def test_random_trials_are_determined_by_the_seed(tmp_path):
    planned = [plan_trials(make_search(tmp_path, trials=30, seed=seed), check).params for seed in (1, 1, 2)]
    assert planned[0] == planned[1] != planned[2] and len(planned[0]) == 30
    for params in planned[0]:
        check(params)
        assert 0.0003 <= params.get("training.learning_rate", 0.001) <= 0.03
        assert params.get("grouping.num_groups", 1) in (1, 2)


def test_a_small_space_is_searched_completely(tmp_path):
    planned = plan_trials(make_search(tmp_path, trials=50, fields={"mmap.source_rows": {"choice": [1, 2, 3]}}), check)
    assert sorted(params["mmap.source_rows"] for params in planned.params) == [1, 2]


def test_optuna_repeats_no_trial_and_skips_invalid_ones(tmp_path):
    fields = {"mmap.prompt_length": {"choice": [2, 4]}, "mmap.source_rows": {"choice": [1, 2, 4]}}
    optuna = UniqueOptunaSearch(make_search(tmp_path, searcher="optuna", fields=fields), check)
    suggestions = []
    for number in range(5):
        suggested = optuna.suggest(str(number))["trial"]
        assert suggested["number"] == number
        suggestions.append(tuple(suggested["params"].values()))
        optuna.on_trial_complete(str(number), {"validation_accuracy": 0.5})
    assert sorted(suggestions) == [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    assert optuna.suggest("5") == optuna.FINISHED


def test_optuna_learns_from_results_also_when_restored(tmp_path):
    search = make_search(tmp_path, searcher="optuna", fields={"training.learning_rate": {"loguniform": [1e-4, 1]}})

    def learning_rates(optuna: UniqueOptunaSearch, numbers: range) -> list[float]:
        suggestions = []
        for number in numbers:
            trial = optuna.suggest(str(number))["trial"]
            assert trial["number"] == number
            suggestions.append(trial["params"]["training.learning_rate"])
            optuna.on_trial_complete(str(number), {"validation_accuracy": 1 - abs(math.log10(suggestions[-1]) + 1) / 4})
        return suggestions

    optuna, restored = UniqueOptunaSearch(search, check), UniqueOptunaSearch(search, check)
    learning_rates(optuna, range(30))
    optuna.save(str(tmp_path / "state"))
    restored.restore(str(tmp_path / "state"))
    suggested = learning_rates(optuna, range(30, 40))
    assert suggested == learning_rates(restored, range(30, 40))
    assert sum(0.03 < rate < 0.3 for rate in suggested) >= 6  # around 0.1; by chance it would be a quarter


@pytest.mark.parametrize("rule, decision", [("asha", "STOP"), ("median", "STOP"), ("none", "CONTINUE")])
def test_a_trial_below_the_others_is_pruned(tmp_path, rule, decision):
    scheduler = early_stopping(make_search(tmp_path, early_stopping=rule, grace_period=2), BASE)

    class FakeTrial:
        """A trial's id, which is all that the rules read."""

        def __init__(self, trial_id: str):
            self.trial_id = trial_id

    def report(trial: FakeTrial, accuracy: float, epoch: int) -> str:
        return scheduler.on_trial_result(None, trial, {"validation_accuracy": accuracy, "epoch": epoch})

    good, late = [FakeTrial(str(number)) for number in range(6)], FakeTrial("late")
    for trial in (*good, late):
        scheduler.on_trial_add(None, trial)
    assert {report(trial, 0.9, epoch) for epoch in (1, 2) for trial in good} == {"CONTINUE"}
    assert [report(late, 0.2, epoch) for epoch in (1, 2)] == ["CONTINUE", decision]


def test_the_best_trial_is_a_completed_one():
    def trial(number, state, accuracy, parameters):
        return Trial(number, {}, state, 1, accuracy, {}, parameters)

    trials = [
        trial(0, "pruned", 0.9, 1),
        trial(1, "completed", 0.7, 9),
        trial(2, "completed", 0.8, 9),
        trial(3, "completed", 0.8, 5),
        trial(4, "completed", 0.8, 5),
        trial(5, "failed", 1.0, 1),
    ]
    assert best_trial(trials).number == 3
    assert best_trial(trials[:1]) is None


# Validation split


def test_validation_images_are_the_last_of_the_training_images_by_rank():
    classes = {"ink": ("a", "b"), "neon": ("a", "b")}
    images = [
        ScannedImage(f"{task}/{name}/{i}", task, name, hashlib.sha256(f"{task}{name}{i}".encode()).hexdigest())
        for task, names in classes.items()
        for name in names
        for i in range(20)
    ]
    full, smaller = (sample_splits(images, classes, shots, seed=3) for shots in (6, 4))
    split = split_train_validation(full.train, classes, 4, seed=3)
    assert split == split_train_validation(tuple(reversed(full.train)), classes, 4, seed=3)
    assert split.train == smaller.train
    assert not set(split.train) & set(split.test)
    assert sorted((*split.train, *split.test), key=lambda image: image.path) == list(full.train)
    assert not set(split.test) & set(full.test)


def test_a_class_whose_validation_images_are_all_duplicates_is_reported():
    images = [ScannedImage(f"{task}/a/{i}", task, "a", str(i)) for task in ("ink", "neon") for i in range(2)]
    with pytest.raises(UserError, match="no validation split is possible: .*duplicates"):
        for seed in range(20):  # until the two tasks train on each other's second image
            split_train_validation(images, {"ink": ("a",), "neon": ("a",)}, 1, seed)


# Parts of a trial


def test_training_epoch_by_epoch_equals_training_at_once(tmp_path):
    towers, _, tokens, sets = small_problem()
    at_once, epoch_by_epoch, interrupted = (group_prompts(towers) for _ in range(3))
    options = {"epochs": 4, "seed": 1}
    history = Trainer(towers, at_once, sets, tokens, CONFIG, **options).train()
    trainer, sources = Trainer(towers, epoch_by_epoch, sets, tokens, CONFIG, **options), []
    while trainer.epoch < trainer.epochs:
        trainer.run_epoch()
        sources.append((trainer.epoch, epoch_by_epoch.group.source.detach().clone()))
    assert trainer.history == history
    assert [epoch for epoch, _ in sources] == [1, 2, 3, 4]
    assert all(not torch.equal(previous, source) for (_, previous), (_, source) in zip(sources, sources[1:]))
    options["checkpoints"] = Checkpoints(tmp_path)
    stopped_trainer = Trainer(towers, interrupted, sets, tokens, CONFIG, **options)
    for _ in range(2):
        stopped_trainer.run_epoch()
    resumed = group_prompts(towers)
    resumed_trainer = Trainer(towers, resumed, sets, tokens, CONFIG, **options)
    assert resumed_trainer.epoch == 2
    assert resumed_trainer.train() == history
    for method in (epoch_by_epoch, resumed):
        for expected, parameter in zip(at_once.parameters(), method.parameters()):
            assert torch.equal(expected, parameter)


def test_decoded_images_are_evaluated_like_streamed_ones(tmp_path):
    write_test_splits(tmp_path)
    reader, classifier = SplitReader(tmp_path / "splits"), prompted_classifier()
    batches = list(decoded_batches(reader, list(TEST_COUNTS), classifier.towers.preprocessing, 1))
    assert evaluate_decoded(classifier, batches) == evaluate(classifier, reader, list(TEST_COUNTS), 1)


# Searches


def newest_trials(storage: Path) -> dict[int, dict]:
    """Trials of the newest search, by number."""
    folder = max((storage / "searches").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return {trial["number"]: trial for trial in json.loads((folder / "search.json").read_text())["trials"]}


def has_ended_trial(storage: Path) -> bool:
    """Return whether Ray Tune's state in the storage has an ended trial."""
    files = (storage / "searches").glob("*/tune/experiment_state-*.json")
    return any("TERMINATED" in file.read_text() for file in files)


def ended_trials(output: str) -> set[int]:
    """Numbers of the trials that a job reports as ended."""
    return {int(number) for number in re.findall(r"^  trial (\d+): ", output, re.MULTILINE)}


def search_arguments(folder: Path, searcher: str) -> tuple[str, ...]:
    """Arguments of a search whose second trial by Optuna has a non-finite loss after the first epoch, the warm-up."""
    fields = {**SPACE, "training.learning_rate": {"choice": [0.003, 1e30]}}
    file = search_file(folder, searcher=searcher, trials=TRIALS, grace_period=2, fields=fields)
    epochs = ("--training.epochs", "2", "--clip_adapter.training.epochs", "2")
    return ("--search", str(file), *epochs, *TWO_TASKS)


def check_resumed(folder: Path, output: str) -> None:
    """Check a search of which at least one trial had ended before the job that printed `output`."""
    (num_ended,) = re.findall(r"resumed: (\d+) trials had ended", output)
    assert 1 <= int(num_ended) < TRIALS and len(ended_trials(output)) == TRIALS - int(num_ended)
    trials = newest_trials(folder.parent.parent)
    assert list(trials) == list(range(TRIALS))
    for trial in trials.values():
        if trial["params"].get("training.learning_rate") == 1e30:
            assert trial["state"] == "failed" and "lower the learning_rate" in trial["error"]
            # grouped MmAP: the prompts of each task alone are not finite, before its own first epoch
            assert trial["params"]["method"] == "grouped" and trial["validation_accuracy"] == trial["epochs"] == 0
        else:
            assert trial["state"] == "completed" and trial["epochs"] == 2
            assert trial["validation_accuracy"] == pytest.approx(fmean(trial["accuracy"].values()))
            assert trial["trained_parameters"] > 0 and not trial["error"]
        assert set(trial["params"]) >= {"method"}
    assert len({json.dumps(trial["params"]) for trial in trials.values()}) == TRIALS
    assert not (folder / "checkpoints").exists() and not (folder / "tune").exists()


@pytest.fixture(scope="module")
def searched(tmp_path_factory, run_job):
    """Folder and output of a search with Optuna and ASHA, interrupted after its first trial and resumed."""
    folder = tmp_path_factory.mktemp("tuning")
    storage, arguments = folder / "storage", search_arguments(folder, "optuna")
    track = tuning._track

    def interrupt(run, trial):
        track(run, trial)
        if has_ended_trial(storage):
            raise OSError("interrupted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.5")
        patch.setattr(tuning, "_track", interrupt)
        with pytest.raises(TuneError, match="interrupted"):
            run_job("tune", "--storage", storage, *arguments)
    finished = run_job("tune", "--storage", storage, *arguments)
    assert finished.status == 0, finished.output
    (search_folder,) = (storage / "searches").iterdir()
    return search_folder, finished.output, arguments


@pytest.mark.slow
def test_an_interrupted_search_resumes(searched):
    folder, output, _ = searched
    check_resumed(folder, output)
    assert "early stopping ignores their results" in output
    assert any(trial["error"] for trial in newest_trials(folder.parent.parent).values())


@pytest.mark.fault_injection
def test_a_killed_search_resumes(tmp_path, run_job):
    storage, arguments = tmp_path / "storage", search_arguments(tmp_path, "random")
    job = Job(storage, *arguments, prefix=TUNE, env={"TUNE_GLOBAL_CHECKPOINT_S": "0.5"})
    try:
        job.wait_until(lambda: has_ended_trial(storage))
    finally:
        job.stop()
    finished = run_job("tune", "--storage", storage, *arguments, "--final_run", "false")
    assert finished.status == 0, finished.output
    (folder,) = (storage / "searches").iterdir()
    check_resumed(folder, finished.output)


def test_a_state_that_ray_tune_cannot_read_is_reported_and_removed(tmp_path):
    storage, output = Storage.from_folder(tmp_path), io.StringIO()
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "tuner.pkl").write_bytes(b"of another version")
    plan, session = SimpleNamespace(storage=storage), SimpleNamespace(console=Console(file=output))
    assert tuning._restore_tuner(plan, session, make_search(tmp_path), tmp_path / "tune", run_trial) is None
    assert "trials resume from their checkpoints" in " ".join(output.getvalue().split())
    assert not (tmp_path / "tune").exists()


@pytest.mark.slow
def test_a_search_is_reported_and_runs_the_pipeline(searched):
    folder, output, _ = searched
    storage = folder.parent.parent
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert len(rows) == TRIALS and rows[0]["state"] == "completed" and float(rows[0]["validation_accuracy"]) <= 1
    assert (folder / "trials.png").stat().st_size > 5000
    assert f"best: trial {rows[0]['trial']}:" in output

    config = parse_config(load_yaml(folder / "best.yaml"))
    assert config.data.shots == 4 and config.training.epochs == 2
    if rows[0]["mmap.prompt_length"]:
        assert config.mmap.prompt_length == int(rows[0]["mmap.prompt_length"])
    (best_run,) = (storage / "runs").iterdir()
    methods = json.loads((best_run / "report" / "summary.json").read_text())["methods"]
    accuracy = methods[rows[0]["method"]]["average"]
    assert f"test accuracy {100 * accuracy:.1f} %" in output
    assert make_plan(config, Console(quiet=True)).folder == best_run  # as full_pipeline.py would run it
    assert set(read_finished_run(str(best_run), "").tasks) == set(config.data.tasks)  # usable by add_task.py

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs(["1"])}
    parent = runs[folder.name]
    assert parent.data.tags["level"] == "search" and runs["trial 0"].data.tags["level"] == "trial"
    assert {"trials.csv", "trials.png", "best.yaml"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }
    assert parent.data.metrics["test_accuracy/average"] == pytest.approx(accuracy)
    for trial in newest_trials(storage).values():
        run = runs[f"trial {trial['number']}"]
        assert run.info.status == ("FAILED" if trial["error"] else "FINISHED")
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["method"] == trial["params"]["method"]
        history = client.get_metric_history(run.info.run_id, "validation_accuracy/average")
        assert [metric.step for metric in history] == list(range(1, trial["epochs"] + 1))
        assert trial["error"] or history[-1].value == trial["validation_accuracy"]


@pytest.mark.slow
def test_a_finished_search_is_cached(searched, run_job):
    folder, _, arguments = searched
    modified = (folder / "search.json").stat().st_mtime_ns
    repeated = run_job("tune", "--storage", folder.parent.parent, *arguments)
    assert repeated.status == 0 and f"cached: {TRIALS} trials" in repeated.output
    assert repeated.output.count("cached (computed in") == 7 and not ended_trials(repeated.output)
    assert (folder / "search.json").stat().st_mtime_ns == modified


@pytest.mark.slow
def test_trials_do_not_read_the_test_set(searched, run_job, tmp_path):
    folder, *_ = searched
    storage = folder.parent.parent
    all_splits = {
        "validation_shots" in json.loads((splits / "artifact.json").read_text())["inputs"]: splits
        for splits in (storage / "splits").glob("[!.]*")
    }
    validation_split, splits = all_splits[True], all_splits[False]

    def images(folder: Path, split: str) -> set[str]:
        return {sha for file in (folder / split).glob("*.parquet") for sha in pq.read_table(file)["sha256"].to_pylist()}

    assert images(validation_split, "train") | images(validation_split, "test") == images(splits, "train")
    assert not (images(validation_split, "train") | images(validation_split, "test")) & images(splits, "test")
    for file in (splits / "test").glob("*.parquet"):
        file.unlink()
    fields = {"mmap.prompt_length": {"choice": [8]}}
    file = search_file(tmp_path, searcher="grid", trials=None, method="all_in_one", fields=fields)
    options = ("--search", file, "--training.epochs", "1", *TWO_TASKS, "--final_run", "false")
    finished = run_job("tune", "--storage", storage, *options)
    assert finished.status == 0, finished.output
    assert not list((splits / "test").glob("*.parquet"))  # which no trial needed
    assert [trial["state"] for trial in newest_trials(storage).values()] == ["completed"]

    # A trial with groups, in this process, interrupted while one group is an epoch ahead of the other.
    base = parse_config(
        load_yaml(DEMO_CONFIG)
        | {
            "storage": str(storage),
            "training": {**BASE.training.model_dump(), "epochs": 3, "checkpoint_every": 1},
            "data": {**BASE.data.model_dump(), "tasks": ["blur_right", "ink_left"]},
            "global_prompt": {"epochs": 1},
            "grouping": {"num_groups": 2},
        }
    )
    plan = make_plan(base, Console(quiet=True))
    artifact = Artifact(plan.storage, "splits", json.loads((validation_split / "artifact.json").read_text())["inputs"])
    setups = [TrialSetup(replace(plan, splits=artifact), ("grouped",), storage / name) for name in ("full", "cut")]
    reports = list(train_epochs({}, setups[0], setups[0].checkpoints))
    interrupted = list(islice(train_epochs({}, setups[1], setups[1].checkpoints), 1))
    (storage / "cut" / "0").rename(storage / "cut" / "removed")
    (storage / "full" / "0").rename(storage / "cut" / "0")
    resumed = list(train_epochs({}, setups[1], setups[1].checkpoints))
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    assert interrupted + resumed == reports
