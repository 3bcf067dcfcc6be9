"""The pipeline from Python: `pipeline.fit`, `check`, and runs as objects."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import ray
from mlflow import MlflowClient
from notebooks import FROM_PYTHON, execute_in_process, num_images, stdout
from pipelines import EPOCHS, GLOBAL_PROMPT_EPOCHS

import pipeline
from pipeline.config import Config, JobParser
from pipeline.files import read_record
from pipeline.workflows import fit as fit_module
from pipeline.workflows.fit import make_config

QUICK = {
    **{"epochs": EPOCHS, "global_prompt": {"epochs": GLOBAL_PROMPT_EPOCHS}},
    "training": {"batch_size": 8, "checkpoint_every": 1},
}
"""The settings of `quick_run`."""


def artifacts(storage: Path) -> set[Path]:
    return set(storage.glob("*/*/artifact.json"))


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "command_line"),
    [
        ({}, ""),
        ({"epochs": 3, "seed": 2}, "--training.epochs 3 --seed 2"),
        ({"root": Path("/data/shops"), "shots": np.int64(4)}, "--data.root /data/shops --data.shots 4"),
        ({"root": "/data/shops", "tasks": ("a", "b")}, "--data.root /data/shops --data.tasks a b"),
        (
            {"data": "/data/shops", "k": 4, "lr": 0.01, "tasks": [2019, 2020]},
            "--data.root /data/shops --data.shots 4 --training.learning_rate 0.01 --data.tasks 2019 2020",
        ),
        ({"tasks": "ink", "baselines": "coop"}, "--data.tasks [ink] --baselines [coop]"),
        ({"model": "ViT-B-32", "pretrained": "openai"}, "--clip.model ViT-B-32 --clip.pretrained openai"),
        (
            {"grouping": {"objective": "sum", "must_link": [("ink", "neon")]}},
            "--grouping.objective sum --grouping.must_link [[ink,neon]]",
        ),
        ({"grouping.objective": "sum", "batch_size": 4}, "--grouping.objective sum --training.batch_size 4"),
        (
            {"clip": {"task_templates": {"v1.0": "a {}."}, "pretrained": None}},
            "--clip.task_templates '{v1.0: \"a {}.\"}' --clip.pretrained null",
        ),
        (
            {"config": {"data.root": "/data/shops", "training": {"epochs": 9, "batch_size": 4}}, "epochs": 2},
            "--data.root /data/shops --training.epochs 2 --training.batch_size 4",
        ),
        ({"config": "configs/pacs.yaml", "root": "/data/PACS"}, "--config configs/pacs.yaml --data.root /data/PACS"),
        ({"config": [Path("configs/pacs.yaml"), "configs/demo.yaml"]}, "--config configs/pacs.yaml configs/demo.yaml"),
    ],
    ids=str,
)
def test_a_call_has_the_settings_of_the_command_line(call, command_line):
    arguments = {name: value for name, value in call.items() if name != "config"}
    expected = JobParser("").parse(shlex.split(command_line)).config()
    assert make_config(call.get("config"), arguments, "fit") == expected


def test_a_config_object_is_taken_as_it_is():
    config = Config(seed=7, data={"root": "/data/shops"})
    assert make_config(config, {}, "fit") == config
    assert make_config(config, {"seed": 3, "name": None}, "fit") == config.model_copy(update={"seed": 3})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"learning_rat": 0.1}, "'learning_rat'; did you mean training.learning_rate?"),
        ({"shotz": 4}, "'shotz'; did you mean data.shots?"),
        ({"device": "cuda"}, "'device': GPUs are used if there are any; cluster.gpus_per_worker sets"),
        ({"configs": "a.yaml"}, "'configs'; did you mean config?"),
        ({"verbos": True}, "'verbos'; did you mean verbose?"),
        ({"objectiv": "mean"}, "'objectiv'; did you mean grouping.objective?"),
        ({"grouping": "mean"}, "grouping='mean'"),
        ({"training": {"epoch": 3}}, "unknown config field training.epoch; did you mean training.epochs?"),
        ({"epochs": 3, "training": {"epochs": 4}}, "training.epochs twice"),
        ({"epochs": 3, "training.epochs": 4}, "training.epochs twice"),
        ({"epochs": -1}, "training.epochs=-1: "),
        ({"root": "/no/such/folder"}, "/no/such/folder"),
        ({"root": pd.DataFrame({"path": []})}, "not DataFrame: give a folder of images or a table"),
        ({"config": "no_such.yaml"}, "no_such.yaml does not exist"),
        ({"until": "groups"}, "until groups is not a stage; did you mean grouping?"),
    ],
    ids=str,
)
def test_a_wrong_call_is_told_with_the_remedy(call, message, tmp_path):
    with pytest.raises(pipeline.UserError) as error:
        pipeline.fit(storage=tmp_path, **call)
    assert message in str(error.value)
    assert error.value._render_traceback_() == [f"UserError: {error.value}"]  # all that a notebook shows


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(quick_run, tmp_path_factory):
    """A copy of the quick run's, so that it keeps its only run."""
    return shutil.copytree(quick_run[0], tmp_path_factory.mktemp("fit") / "storage")


@pytest.fixture(scope="module")
def run(storage):
    """The quick run again, from Python, in a thread."""
    existing = artifacts(storage)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(pipeline.fit, storage=storage, verbose=False, **QUICK).result()
    assert ray.is_initialized()  # as before the call
    assert artifacts(storage) == existing  # nothing is computed again
    return result


def test_the_run_of_a_call_is_that_of_the_command_line(quick_run, run):
    assert f"/runs/{run.folder.name}/adapters/grouped.safetensors" in quick_run[1]
    assert run.adapters["grouped"] == run.folder / "adapters" / "grouped.safetensors"
    report = read_record(run.folder / "report" / "summary.json")
    assert run.is_finished and run.summary == report
    assert run.tasks == report["tasks"] and run.groups == report["groups"]
    assert run.test_loss.to_dict() == {name: method["test_loss"] for name, method in report["methods"].items()}
    assert run.accuracy.to_dict() == {name: method["accuracy"] for name, method in report["methods"].items()}
    assert run.affinities.loc["blur_right", "ink_left"] == run.affinities.loc["ink_left", "blur_right"]
    assert list(run.affinities) == run.tasks and list(run.adapters) == ["all_in_one", "each_alone", "grouped"]
    assert run.config.training.epochs == EPOCHS
    assert f"pipeline.fit(epochs={EPOCHS}, storage=" in unescape(run.report.read_text())
    assert {finding.severity for finding in run.findings} >= {"warning"}


def test_the_tables_of_a_run_agree(run):
    correct = run.predictions["true_label"] == run.predictions["label"]
    accuracy = correct.groupby([run.predictions["task"], run.predictions["method"]]).mean().unstack()
    assert np.allclose(accuracy.loc[run.tasks, list(run.accuracy)], run.accuracy)
    assert (run.standard_error > 0).any(axis=None) and run.standard_error.shape == run.accuracy.shape
    for method in run.accuracy:
        matrix = run.confusion_matrix("ink_left", method)
        assert list(matrix.index) == list(matrix) == run.model.labels("ink_left")
        assert np.trace(matrix) / matrix.sum(axis=None) == pytest.approx(run.accuracy.loc["ink_left", method])
        classes = run.class_accuracy.query("task == 'ink_left' and method == @method")
        assert classes["correct"].tolist() == np.diag(matrix).tolist()
        assert classes["images"].tolist() == matrix.sum(axis=1).tolist()
    with pytest.raises(pipeline.UserError, match="unknown task 'oil'; the run has: blur_left, "):
        run.confusion_matrix("oil")
    with pytest.raises(pipeline.UserError, match="unknown method 'coop'; the run has: "):
        run.confusion_matrix("ink_left", "coop")


def test_a_run_predicts(run):
    digits = run.storage.folder / "datasets" / "digits"
    images = sorted((digits / "blur_right").glob("test/*/*.png"))[::20]
    predictions = run.predict([str(image) for image in images], task="blur_right")
    stored = run.predictions.query("task == 'blur_right' and method == 'grouped'").set_index("path")["label"]
    assert [prediction.label for prediction in predictions] == [
        stored[str(image.relative_to(digits))] for image in images
    ]
    assert run.model is run.model and run.load("all_in_one").tasks == run.tasks
    with pytest.raises(
        pipeline.UserError, match="has no adapter of 'zero_shot'; it has: all_in_one, each_alone, grouped"
    ):
        run.load("zero_shot")


def test_an_existing_run_is_opened(storage, run):
    assert pipeline.open_run(str(run.folder)) == run
    assert run in pipeline.runs(storage)
    for wrong in (storage, storage / "runs" / "none", "nowhere"):
        with pytest.raises(pipeline.UserError, match="not a run directory|does not exist"):
            pipeline.open_run(wrong)
    with pytest.raises(pipeline.UserError, match="does not exist"):
        pipeline.runs(storage / "none")


def test_a_run_until_the_grouping_has_groups_and_no_report(storage, run):
    partial = pipeline.fit(storage=storage, name="partial", until="grouping", verbose=False, **QUICK)
    assert partial.groups == run.groups and not partial.is_finished
    assert partial.affinities.equals(run.affinities)
    assert "not finished" in repr(partial) and "Not finished" in partial._repr_html_()
    with pytest.raises(pipeline.UserError, match="has no report yet: finish the run"):
        _ = partial.accuracy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"root": "no/such"}, "data.root=no/such is not a folder or file"),
        ({"pretrained": "no/such.pt"}, "no/such.pt"),
        ({"model": "no/such.json"}, "clip.model=no/such.json"),
    ],
)
def test_paths_are_looked_for_before_anything_is_opened(monkeypatch, tmp_path, call, message):
    monkeypatch.setattr("pipeline.stages.run.open_run", None)
    with pytest.raises(pipeline.UserError, match=message):
        pipeline.fit(storage=tmp_path, **call)
    assert not list(tmp_path.iterdir())


def test_a_report_of_an_older_version_is_refused(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "runs" / "older", ignore=shutil.ignore_patterns("tracking-*", "adapters"))
    file = tmp_path / "runs" / "older" / "report" / "summary.json"
    file.write_text(json.dumps({"tasks": [], "groups": [], "methods": {}}))
    with pytest.raises(pipeline.UserError, match="summary.json is damaged, or of an older version: rerun"):
        _ = pipeline.open_run(tmp_path / "runs" / "older").accuracy


def test_a_run_is_shown_with_groups_and_accuracies(run):
    average = f"{100 * run.summary['methods']['grouped']['average']:.1f}"
    for text in (repr(run), run._repr_html_()):
        assert str(run.folder) in text and " + ".join(run.groups[0]) in text and average in text
    assert run.conclusion and run.conclusion in unescape(run._repr_html_())
    assert run.conclusion in unescape(run.report.read_text())


def test_check_returns_the_findings_and_prints_tables(storage, run, capsys):
    assert pipeline.check(storage=storage, config=run.config) == run.findings
    assert run.findings[0].title in capsys.readouterr().out
    assert run.findings[0].title in repr(run.findings) and len(repr(run.findings)) < 1000 * len(run.findings)
    assert run.findings[0].examples[0].images[0].path in run.findings[0].examples[0].text


def test_an_interrupted_call_can_be_repeated(storage, run, monkeypatch):

    def interrupted(plan, session, last_stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "run_stages", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted: the same call resumes") as error:
        pipeline.fit(storage=storage, name="interrupted", **QUICK)
    assert error.value._render_traceback_() == [str(error.value)]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("mmap-clip")
    (recorded,) = client.search_runs([experiment.experiment_id], "params.name = 'interrupted'")
    assert recorded.info.status == "KILLED" and recorded.data.tags["mlflow.source.name"] == "pipeline.fit"


def test_the_notebook_goes_from_images_to_mistakes(storage, run, tmp_path, monkeypatch, capsys):
    existing = artifacts(storage)
    monkeypatch.chdir(tmp_path)  # where it writes the digits
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    names = execute_in_process(
        FROM_PYTHON,
        IMAGES=storage / "datasets" / "digits",
        SETTINGS={"config": "configs/demo.yaml", "storage": storage, **QUICK},
    )
    plt.close("all")
    assert artifacts(storage) == existing
    assert names["run"].accuracy.equals(run.accuracy)
    assert names["matrix"].equals(run.confusion_matrix(names["task"]))
    assert {prediction.label for prediction in names["predictions"]} <= set(run.model.labels("thick_left"))
    assert set(names["wrong"]["task"]) == {names["task"]}
    assert not list(storage.glob("runs/*/tracking-*/refused.jsonl"))  # by MLflow, of another data.root
    output = capsys.readouterr().out
    assert "4 grouping" in output and "5 group trainings" not in output and str(run.report) in output


def test_the_committed_notebook_has_outputs_and_no_local_paths():
    cells = [cell for cell in nbformat.read(FROM_PYTHON, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert num_images(outputs) == 4 and "blur_left + ink_left + thick_left | blur_right" in stdout(outputs)
    assert not re.findall(r"(?<![\w:/<])/(?:home|root|tmp|work|Users|mnt|data)/\S*", FROM_PYTHON.read_text())
    assert FROM_PYTHON.stat().st_size < 400_000
