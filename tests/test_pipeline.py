"""The whole pipeline on the embedded demo, run as users run it: the same numbers always, whatever was killed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient
from pipelines import EPOCHS, GLOBAL_PROMPT_EPOCHS, QUICK, REPOSITORY, every_step_once, numbers, summary, the_run
from safetensors.torch import load_file

import pipeline
from pipeline import command_line
from pipeline.config import ClusterConfig
from pipeline.data.images import decode_rgb
from pipeline.data.parquet import SplitReader
from pipeline.errors import UserError
from pipeline.methods.registry import DEFAULT_VARIANTS
from pipeline.runtime import stage as runtime_stage
from pipeline.runtime.cluster import WorkerResources, ray_connection
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.stages.flow import NAMES

pytestmark = pytest.mark.slow
TASKS = ["blur_left", "blur_right", "ink_left", "ink_right", "thick_left", "thick_right"]


def test_report(quick_run):
    storage, output = quick_run
    result = summary(storage)
    assert result["tasks"] == TASKS
    assert result["recommended"] in result["methods"] and result["conclusion"].startswith("Train ")
    assert {result["conclusion"], result["grouping"]} <= set(output.splitlines())
    assert sorted(task for group in result["groups"] for task in group) == TASKS
    assert list(result["stages"]) == list(NAMES)
    assert all(seconds >= 0 for seconds in result["stages"].values())
    assert list(result["methods"]) == ["zero_shot", *DEFAULT_VARIANTS]
    for method in result["methods"].values():
        assert list(method["accuracy"]) == TASKS
        assert all(0 <= value <= 1 for value in method["accuracy"].values())
        assert method["average"] == pytest.approx(sum(method["accuracy"].values()) / 6)
    methods = result["methods"]
    assert methods["zero_shot"]["trained_parameters"] == 0
    one_mmap = 4 * (4 * 64 + 1 + 2)
    assert methods["each_alone"]["trained_parameters"] == 12 * one_mmap
    assert methods["all_in_one"]["trained_parameters"] == 7 * one_mmap
    assert methods["grouped"]["trained_parameters"] == (6 + len(result["groups"])) * one_mmap
    assert result["num_test_images"] == dict.fromkeys(TASKS, 360)
    assert "trained parameters" in output and "cached (computed in" not in output
    for picture in (
        "accuracy.png",
        "affinity_heat_map.png",
        "affinity_graph.png",
        "co_assignment_map.png",
        "ranked_partitions.png",
        "grouping.html",
        "report.html",
    ):
        assert (the_run(storage) / "report" / picture).stat().st_size > 5000


def test_predictions_of_all_test_images_are_stored(quick_run):
    """The tables of accuracies, classes and confusions follow from them."""
    folder = the_run(quick_run[0]) / "report"
    predictions = pq.read_table(folder / "predictions.parquet").to_pandas()
    assert list(predictions) == ["path", "task", "method", "true_label", "label", "probability", "loss"]
    assert len(predictions) == 4 * 2160
    correct = predictions.label == predictions.true_label
    accuracy, loss = (
        values.groupby([predictions.method, predictions.task]).mean() for values in (correct, predictions.loss)
    )
    for method, values in summary(quick_run[0])["methods"].items():
        assert accuracy[method].to_dict() == pytest.approx(values["accuracy"])
        assert loss[method].to_dict() == pytest.approx(values["test_loss"])  # stored in float32
        assert values["average_test_loss"] == pytest.approx(loss[method].mean())
    classes = pq.read_table(folder / "class_accuracy.parquet").to_pandas()
    assert classes.images.sum() == 4 * 2160 and classes.correct.sum() == correct.sum()
    confusions = pq.read_table(folder / "confusions.parquet").to_pandas()
    assert confusions.images.sum() == 4 * 2160
    assert confusions.images[confusions.label == confusions.true_label].sum() == correct.sum()


def test_the_page_shows_each_task_and_the_output_ends_with_next_steps(quick_run):
    storage, output = quick_run
    page = (the_run(storage) / "report" / "report.html").read_text()
    for task in TASKS:
        assert f">{task}</h2>" in page
    assert page.count("data:image/jpeg") > 50 and "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#|grouping.html|../data_check/check.html|http://127.0.0.1:)', page)
    command = next(shlex.split(line) for line in output.splitlines() if " predict " in line)
    assert command[1:3] == ["predict", str(the_run(storage))] and Path(command[3]).is_dir()
    assert f"sqlite:///{storage}/mlflow.db" in output
    assert "http://127.0.0.1:5000/#/experiments/1/runs?" in output


def test_mlflow_holds_the_run(quick_run):
    storage, _ = quick_run
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "mmap-clip"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["level"] == "pipeline"]
    names = {r.data.tags["mlflow.runName"]: r for r in runs}
    assert {"splits", "global_prompt", "grouping", "group_trainings", "report", "all in one", "zero shot"} <= set(names)
    assert all(r.info.status == "FINISHED" for r in runs)
    result = summary(storage)
    for method, values in result["methods"].items():
        for task in TASKS:
            assert parent.data.metrics[f"accuracy/{method}/{task}"] == values["accuracy"][task]
            assert parent.data.metrics[f"test_loss/{method}/{task}"] == values["test_loss"][task]
        assert parent.data.metrics[f"trained_parameters/{method}"] == values["trained_parameters"]
    assert parent.data.tags["mlflow.runName"].startswith("demo, 4 shots, seed 1 (")
    assert "| average |" in parent.data.tags["mlflow.note.content"]
    assert "mmap.prompt_length" in parent.data.params and "coop.context_length" not in parent.data.params
    assert parent.data.params["training.epochs"] == str(EPOCHS)
    assert parent.data.params["groups"] == " | ".join(" + ".join(group) for group in result["groups"])
    assert "env.torch" in parent.data.tags
    assert "tags.level = 'method'" in experiment.tags["mlflow.note.content"]
    levels = Counter(r.data.tags["level"] for r in runs)
    trainings = {tuple(group) for group in result["groups"]} | {(task,) for task in TASKS} | {tuple(TASKS)}
    assert levels == {"pipeline": 1, "stage": 7, "method": 4, "training": 1 + len(trainings)}
    method_runs = {r.data.tags["method"]: r for r in runs if r.data.tags["level"] == "method"}
    for method, values in result["methods"].items():
        run = method_runs[method].data
        by_task = {f"{name}/{task}": values[name][task] for name in ("accuracy", "test_loss") for task in TASKS}
        assert run.metrics == by_task | {
            "accuracy/average": values["average"],
            "test_loss/average": values["average_test_loss"],
            "trained_parameters": values["trained_parameters"],
        }
        assert (run.params["shots"], run.params["seed"], run.params["data"]) == ("4", "1", "demo")
    assert method_runs["grouped"].data.tags["groups"] == parent.data.params["groups"]
    assert method_runs["grouped"].data.params["num_groups"] == str(len(result["groups"]))
    system = client.get_metric_history(names["all in one"].info.run_id, "system/process_memory_usage_megabytes")
    assert system and all(value.value > 100 for value in system)
    assert parent.inputs.dataset_inputs[0].dataset.name == "digits"
    artifacts = {
        file.path for folder in ("report", "adapters") for file in client.list_artifacts(parent.info.run_id, folder)
    }
    assert {
        "report/report.html",
        "report/predictions.parquet",
        "report/affinity_graph.png",
        "adapters/grouped.safetensors",
    } <= artifacts
    assert every_step_once(storage)


def runs_in_mlflow(storage) -> list:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("mmap-clip").experiment_id])


def test_mlflow_holds_each_trainings_results(quick_run):
    """Metrics that the training itself wrote, not the report."""
    storage, _ = quick_run
    results = {}
    for file in (storage / "group_trainings").glob("[!.]*/artifact.json"):
        inputs = json.loads(file.read_text())["inputs"]
        results[inputs["method"], tuple(inputs["group"])] = json.loads((file.parent / "result.json").read_text())
    trainings = [run for run in runs_in_mlflow(storage) if run.data.tags["level"] == "training"]
    assert len(trainings) == len(results)
    for training in trainings:
        method = "zero_shot" if training.data.tags["method"] == "zero_shot" else "mmap"
        result = results[method, tuple(training.data.tags["tasks"].split(", "))]
        accuracy = result["accuracy"]
        expected = {}
        for metric in ("accuracy", "test_loss"):
            expected |= {f"{metric}/{task}": value for task, value in result[metric].items()}
            mean = sum(result[metric].values()) / len(accuracy)
            expected[f"{metric}/average"] = pytest.approx(mean, abs=1e-12)
        expected |= {"trained_parameters": result["trained_parameters"], "training_seconds": result["seconds"]}
        metrics = training.data.metrics
        assert {
            name: value
            for name, value in metrics.items()
            if name in expected or name.startswith(("accuracy/", "test_loss/"))
        } == expected
        logged_tasks = {name.split("/")[1] for name in metrics if name.startswith(("train_loss/", "train_accuracy/"))}
        assert logged_tasks == (set() if method == "zero_shot" else set(accuracy))


def test_mlflow_nests_trainings_in_their_stage_and_stages_in_the_run(quick_run):
    runs = runs_in_mlflow(quick_run[0])
    (pipeline,) = [run for run in runs if run.data.tags["level"] == "pipeline"]
    stages = {run.data.tags["stage"]: run for run in runs if run.data.tags["level"] == "stage"}
    assert set(stages) == set(NAMES)
    for run in runs:
        tags = run.data.tags
        is_single = tags.get("method") == "each_alone"
        trainings = stages["single_tasks" if is_single else "group_trainings"]
        parent_of = {"pipeline": None, "method": None, "stage": pipeline, "training": trainings}
        parent = parent_of[tags["level"]]
        assert run.data.tags.get("mlflow.parentRunId") == (parent and parent.info.run_id), run.data.tags


def test_mlflow_holds_the_grouping(quick_run):
    storage, _ = quick_run
    (file,) = storage.glob("grouping/[!.]*/grouping.json")
    grouping = json.loads(file.read_text())
    (stage,) = [run for run in runs_in_mlflow(storage) if run.data.tags.get("stage") == "grouping"]
    assert stage.data.metrics["score"] == grouping["score"]
    assert stage.data.metrics["num_groups"] == len(grouping["groups"])
    assert stage.data.params["groups"] == " | ".join(" + ".join(group) for group in grouping["groups"])
    assert stage.data.params["objective"] == grouping["objective"]
    assert stage.data.params["affinity"] == grouping["affinity_kind"] == "transfer"
    for candidate in grouping["candidates"]:
        groups = " | ".join(" + ".join(group) for group in candidate["groups"])
        assert stage.data.params[f"groups/{candidate['affinity']}"] == groups
    assert [candidate["affinity"] for candidate in grouping["candidates"]] == ["transfer", "gradient", "features"]


def test_transfer_is_the_gain_of_training_images_from_the_prompts_of_other_tasks(quick_run):
    """The tasks have the same classes and template, so the adapter of each predicts the images of all."""
    storage, output = quick_run
    (file,) = storage.glob("grouping/[!.]*/grouping.json")
    grouping = json.loads(file.read_text())
    gains, tasks = np.array(grouping["gains"]), grouping["tasks"]
    np.testing.assert_allclose(grouping["affinity"], (gains + gains.T) / 2, atol=1e-12)
    model = pipeline.load(the_run(storage) / "adapters" / "each_alone.safetensors", device="cpu")
    reader = SplitReader(next(storage.glob("splits/[!.]*")))
    rows = list(reader.rows("train", "ink_right"))
    images = [decode_rgb(row["image"]) for row in rows]

    def mean_loss(trained_on: str) -> float:
        predictions = model.predict(images, trained_on)
        pairs = zip(predictions, rows, strict=True)
        return -np.mean([np.log(list(prediction.probabilities.values())[row["label"]]) for prediction, row in pairs])

    losses = {task: mean_loss(task) for task in ("ink_right", "blur_right", "thick_right")}
    ink_right = tasks.index("ink_right")
    for task, loss in losses.items():
        gain_over_blur_right = gains[tasks.index(task), ink_right] - gains[tasks.index("blur_right"), ink_right]
        assert gain_over_blur_right == pytest.approx(losses["blur_right"] - loss, abs=1e-4)
    assert abs(losses["blur_right"] - losses["ink_right"]) > 0.01
    assert "affinity transfer: 6 trainings of a task alone, 36 forward passes of a task's training images" in output


def test_a_task_that_is_alone_in_its_group_is_not_trained_twice(quick_run):
    """Its training, that of stage 3, is the group's: there is one artifact for each group of tasks."""
    storage, _ = quick_run
    groups = [
        json.loads(file.read_text())["inputs"]["group"] for file in storage.glob("group_trainings/[!.]*/artifact.json")
    ]
    expected = {(task,) for task in TASKS} | {tuple(TASKS)} | {tuple(group) for group in summary(storage)["groups"]}
    assert sorted(map(tuple, groups)) == sorted([*expected, tuple(TASKS)])  # and zero-shot CLIP


def test_a_finished_run_is_only_read(quick_run):
    """A new process shows it again, without Ray, and without the libraries that take seconds to import."""
    storage, output = quick_run
    numbers_before, page = numbers(storage), (the_run(storage) / "report" / "report.html").read_bytes()
    code = (
        "import atexit, runpy, sys\n"
        "libraries = ('mlflow', 'matplotlib', 'pandas', 'sqlalchemy')\n"
        "atexit.register(lambda: print('imported:', *(name for name in libraries if name in sys.modules)))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(REPOSITORY / "jobs" / "full_pipeline.py")
    command = [sys.executable, "-c", code, script, "--storage", str(storage), *QUICK]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("cached (computed in") == 7 and "starting" not in finished.stdout
    assert "\nimported:\n" in finished.stdout
    results = "± is the standard error"
    assert output[output.index(results) :] in finished.stdout
    assert numbers(storage) == numbers_before
    assert (the_run(storage) / "report" / "report.html").read_bytes() == page


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def test_a_changed_bit_in_any_stored_file_is_noticed_and_mended(quick_run, run_job, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(quick_run[0], storage)
    run = pipeline.open_run(the_run(storage))
    stages = ["data_check", "splits", "global_prompt", "single_tasks", "grouping", "image_features", "group_trainings"]
    artifacts = [sorted((storage / stage).glob("[!.]*"))[0] for stage in stages]
    for artifact in artifacts:
        flip_a_bit(max(artifact.rglob("*.*"), key=lambda file: file.stat().st_size))
    records = ["grouping.json", "report/summary.json", "artifacts.json", "stage_seconds.json", "data_check/check.json"]
    for name in (*records, "config.yaml", "report/predictions.parquet"):
        flip_a_bit(run.folder / name)
    for read in (lambda: run.grouping, lambda: run.accuracy, lambda: run.predictions, lambda: run.config):
        with pytest.raises(UserError, match="is damaged.*rerun the command that made it"):
            read()
    assert "damaged" in run_job("runs", "--storage", storage).output
    verified = run_job("verify", storage)
    assert verified.status == 1 and f"{len(artifacts) + 3} damaged or missing" in verified.output, verified.output
    added = run_job("add_task", "--run", run.folder, "--task", "ink_left", "--data.root", tmp_path)
    assert added.status == 2 and "is damaged" in added.output, added.output
    finished = run_job("full_pipeline", "--storage", storage, *QUICK)
    assert finished.status == 0, finished.output
    assert numbers(storage) == numbers(quick_run[0])
    assert [len([*(storage / stage).glob(".damaged-*")]) for stage in stages] == [1] * len(stages)
    assert run_job("verify", storage).status == 0
    assert pipeline.open_run(run.folder).accuracy.equals(pipeline.open_run(the_run(quick_run[0])).accuracy)


def demo_clip_folder(folder: Path) -> Path:
    """The demo's CLIP as a snapshot of open_clip, with weights as training scripts save them."""
    demo = REPOSITORY / "pipeline" / "demo"
    state = load_file(demo / "digits_clip.safetensors")
    folder.mkdir()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "epoch_1.pt")
    values = {"model_cfg": json.loads((demo / "digits_clip.json").read_text()), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return folder


def test_another_grouping_reuses_the_global_prompt(quick_run, run_job, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(quick_run[0], storage)
    model = demo_clip_folder(tmp_path / "clip")  # the same CLIP, in another form
    finished = run_job(
        *("full_pipeline", "--until", "grouping", "--storage", storage, *QUICK, "--grouping.num_groups", "3"),
        *("--grouping.affinity", "gradient", "--clip.model", model, "--clip.pretrained", model),
    )
    assert finished.status == 0, finished.output
    assert finished.output.count("cached (computed in") == 4 and "5 group trainings" not in finished.output
    assert "optimal among 90 partitions" in finished.output
    groupings = [json.loads(file.read_text()) for file in storage.glob("grouping/[!.]*/grouping.json")]
    (of_three,) = [grouping for grouping in groupings if len(grouping["groups"]) == 3]
    assert of_three["stability"]["ranked"][0]["groups"] == of_three["groups"]
    assert all(len(candidate["groups"]) == 3 for candidate in of_three["candidates"])
    assert all(len(ranked["groups"]) == 3 for ranked in of_three["stability"]["ranked"])
    assert sum(resampled["frequency"] for resampled in of_three["stability"]["resampled"]) == pytest.approx(1, abs=0.2)
    num_steps = 5 * GLOBAL_PROMPT_EPOCHS
    assert [part["first_step"] for part in of_three["training"]["phases"]] == list(
        range(1, num_steps + 1, num_steps // 5)
    )
    runs = MlflowClient(f"sqlite:///{storage}/mlflow.db").search_runs(["1"], "tags.`mlflow.runName` = 'global_prompt'")
    first_history, second_history = (
        {k: v for k, v in run.data.metrics.items() if k != "seconds" and not k.startswith("system/")} for run in runs
    )
    assert (
        first_history == second_history and "train_loss/blur_right" in first_history
    )  # whoever finds a training finished has its steps too


def test_saved_prompts_give_the_same_predictions(quick_run, run_job, tmp_path):
    storage, _ = quick_run
    expected = {}
    for folder in (storage / "group_trainings").glob("[!.]*"):
        inputs = json.loads((folder / "artifact.json").read_text())["inputs"]
        if inputs["method"] == "mmap" and len(inputs["group"]) == 6:
            for row in pq.read_table(folder / "predictions.parquet").to_pylist():
                expected[row["path"]] = row
    words = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]
    for task in ("ink_right", "thick_right"):
        output = tmp_path / f"{task}.csv"
        prompts = the_run(storage) / "adapters" / "all_in_one.safetensors"
        images = storage / "datasets" / "digits" / task
        weights = ["--clip.pretrained", demo_clip_folder(tmp_path / "clip")] if task == "thick_right" else []
        finished = run_job("predict", prompts, images, "--task", task, "--output", output, *weights)
        assert finished.status == 0, finished.output
        rows = {row["path"]: row for row in csv.DictReader(output.open())}
        compared = 0
        for path, row in rows.items():
            relative = path.split("/datasets/digits/")[1]
            if relative in expected:  # the test images
                compared += 1
                assert row["label"] == words[expected[relative]["predicted"]]
                assert float(row["probability"]) == pytest.approx(expected[relative]["probability"], abs=1e-4)
        assert compared == 10 * 36


def test_a_local_ray_listens_on_this_machine_only(shared_ray):
    process = psutil.Process()
    pids = {process.pid, *(child.pid for child in process.children(recursive=True))}
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids
    }
    assert addresses == {"127.0.0.1"}
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")


def test_ray_train_is_told_its_cluster(shared_ray, monkeypatch):
    """Else its actors ask another Ray of the machine, and take a living training for a dead one."""
    monkeypatch.setattr(runtime_stage, "train_on_workers", lambda *arguments: os.environ.get("RAY_ADDRESS"))
    stage = Stage.__new__(Stage)
    stage.session = SimpleNamespace(
        cluster=ClusterConfig(workers_per_training=2),
        worker_resources=WorkerResources(1, 0),
        storage=None,
        progress=None,
    )
    artifact = SimpleNamespace(stage="global_prompt", key="0")
    training = WorkItem("global prompt", print, (), artifact, uses_gpu=True, num_workers=2)
    assert ray.get(stage._submit(training)) == ray.get_runtime_context().gcs_address


def test_a_ray_that_the_process_has_joined_is_used_and_kept(shared_ray):
    joined_at = ray.get_runtime_context().gcs_address
    for address in (None, "auto", joined_at):
        with ray_connection(ClusterConfig(address=address), print) as worker:
            assert worker.cpus == 1
        assert ray.is_initialized()
    message = f"already connected to Ray at {joined_at}, not to cluster.address=127.0.0.1:1: remove cluster.address"
    with pytest.raises(UserError, match=re.escape(message)):
        with ray_connection(ClusterConfig(address="127.0.0.1:1"), print):
            pytest.fail("another cluster")
    assert ray.is_initialized()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data.root", "/nowhere"], "data.root=/nowhere is not a folder"),
        (["--data.tasks", "[blur_right, oil]"], "data.tasks: oil not found"),
        (["--clip.model", "ViT-B-99"], "clip.model='ViT-B-99' is not an open_clip model"),
        (["--clip.model", "ViT-B-32", "--clip.pretrained", "opennai"], "'opennai' is neither a file nor a tag"),
        (["--mmap.source_columns", "48"], "mmap.source_columns=48 must divide"),
        (["--grouping.num_groups", "7"], "num_groups=7 is impossible for 6 tasks"),
        (["--tracking.uri", "http://127.0.0.1:9"], "MLflow at http://127.0.0.1:9 cannot be used"),
        (["--baselines", "[maple]", "--maple.depth", "9"], "maple.depth=9: the shallower tower has 4 layers"),
        (["--baselines", "[cooop]"], "baselines='cooop': not a baseline; did you mean coop?"),
        (["--cluster.gpus_per_worker", "1"], "but the cluster has 0 GPUs"),
        (
            ["--cluster.workers_per_training", "11"],
            "images of a batch (16, batch_size of MmAP) or the classes of a task (10): use fewer",
        ),
        (["--training.epoch", "3"], "did you mean --training.epochs?"),
        (["--training.epochs", "0"], "training.epochs=0"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_user_errors_are_reported_up_front(shared_ray, new_storage, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", "--storage", str(new_storage), *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.run_job("", lambda run: pytest.fail("the job started"))
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (new_storage / "splits").exists()
