"""A task added to a finished run: its gradients, its group, its training, its report, the job."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from pipelines import the_run
from reference_partitions import OBJECTIVES
from reference_towers import reference_encode_image, reference_encode_text
from rich.console import Console
from safetensors.torch import load_file
from servers import S3Server, free_ports
from small_clip import CLASS_NAMES, small_towers, tokenizer
from small_problem import CONFIG, TASKS, TEMPLATE, group_prompts, mmap_shape, small_problem

import pipeline
from jobs.__main__ import run_script
from pipeline.clip.class_tokens import class_tokens
from pipeline.config import GroupingConfig, load_yaml, parse_config
from pipeline.data.images import read_image
from pipeline.errors import UserError
from pipeline.grouping.partition import best_partition
from pipeline.grouping.study import partition_score, set_partitions
from pipeline.methods.mmap import GroupMmap, SharedMmap
from pipeline.report.added_task import AddedTask, added_task_cells, added_task_notes
from pipeline.runtime.storage import Artifact
from pipeline.stages.finished_run import read_finished_run
from pipeline.stages.grouping import with_fixed_groups
from pipeline.training.gradient_replay import replay_gradients
from pipeline.training.trainer import Trainer
from pipeline.workflows.added_task import plan_addition

EXACT = {"rtol": 1e-9, "atol": 1e-9}
EXISTING, ADDED = ["blur_left", "blur_right", "ink_right", "thick_right"], ["ink_left", "thick_left"]
QUICK = ("--training.epochs", "3", "--global_prompt.epochs", "2")
JOB = ("jobs/add_task.py",)


@pytest.fixture(scope="module")
def problem():
    return small_problem()


# --- its gradients ----------------------------------------------------------------------------------------


def test_replayed_gradients_equal_those_of_a_training_with_the_task(problem):
    """They also equal, in float64, those of the reference towers at the same values."""
    towers, model, tokens, sets = problem
    shared = SharedMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3).double()
    options = {"snapshot_every": 3}
    trainer = Trainer(towers, shared, sets, tokens, CONFIG, epochs=2, seed=5, **options)
    trainer.train()
    points = [(taken.record.step, taken.record.epoch, taken.parameters) for taken in trainer.snapshots]
    task_tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES])
    ids = tokenizer()([TEMPLATE.format(name) for name in CLASS_NAMES])
    for number, task_set in enumerate(sets):
        single_task = SharedMmap(mmap_shape(towers), task_set.tasks, seed=9, init_std=0.3).double()
        replayed = replay_gradients(towers, single_task, task_set, task_tokens, points, CONFIG, seed=5)
        assert [snapshot.record.step for snapshot in replayed] == [1, 4, 7]
        for snapshot, expected in zip(replayed, trainer.snapshots, strict=True):
            # The values were stored in float32.
            torch.testing.assert_close(snapshot.gradients[0].float(), expected.gradients[number], rtol=1e-5, atol=1e-5)
            assert snapshot.record.losses[0] == pytest.approx(expected.record.losses[number], rel=1e-5)
            assert snapshot.record.accuracies[0] == pytest.approx(expected.record.accuracies[number])
            reference = reference_gradient(towers, model, ids, task_set, snapshot.record.step, snapshot.parameters)
            assert reference.abs().max() > 1e-4
            torch.testing.assert_close(snapshot.gradients[0], reference, **EXACT)


def test_replayed_gradients_in_bfloat16_equal_those_of_the_training(problem):
    """Bit-identical if a processor multiplies the rows of one task as it does those of two."""
    _, _, tokens, sets = problem
    towers, _ = small_towers(dtype=torch.float32)
    shared = SharedMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3)
    options = {"seed": 5, "precision": "bfloat16"}
    trainer = Trainer(towers, shared, sets, tokens, CONFIG, epochs=1, snapshot_every=1, **options)
    trainer.train()
    points = [(taken.record.step, taken.record.epoch, taken.parameters) for taken in trainer.snapshots]
    task_tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES])
    for number, task_set in enumerate(sets):
        single_task = SharedMmap(mmap_shape(towers), task_set.tasks, seed=9)
        replayed = replay_gradients(towers, single_task, task_set, task_tokens, points, CONFIG, **options)
        for snapshot, expected in zip(replayed, trainer.snapshots, strict=True):
            gradient = expected.gradients[number]
            assert (snapshot.gradients[0] - gradient).norm() < 3e-3 * gradient.norm()  # 12e-3: logits in bfloat16


def reference_gradient(towers, model, ids, task_set, step, point):
    shared = SharedMmap(mmap_shape(towers), task_set.tasks, seed=2).double()
    torch.nn.utils.vector_to_parameters(point.double(), shared.parameters())
    adaptation = shared()
    pixels, (labels,) = task_set.batch(step - 1, CONFIG.batch_size, towers.preprocessing, CONFIG.augmentation, 5)
    x = reference_encode_image(model, towers.normalize_pixels(pixels), adaptation.vision_prompts[0])
    z = reference_encode_text(model, ids, adaptation.text_prompts[0])
    gradients = torch.autograd.grad(F.cross_entropy(towers.logits(x, z), labels), list(shared.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- its training -----------------------------------------------------------------------------------------


def test_only_the_task_prompt_of_a_joined_group_is_trained(problem):
    """Compared with SGD on the task prompt alone, with the reference towers."""
    towers, model, _, sets = problem
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES])
    group = group_prompts(towers).state_dict()

    def joined_mmap() -> GroupMmap:
        method = GroupMmap(mmap_shape(towers), ["neon"], seed=7, init_std=0.3).double()
        method.load_frozen_group_prompt(group)
        return method

    trained, reference = joined_mmap(), joined_mmap()
    Trainer(towers, trained, sets[:1], tokens, CONFIG, epochs=2, seed=5).train()
    ids = tokenizer()([TEMPLATE.format(name) for name in CLASS_NAMES])
    optimizer = torch.optim.SGD(reference.task.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 4 else 0.05
        adaptation = reference()
        pixels, (labels,) = sets[0].batch(step, 3, towers.preprocessing, CONFIG.augmentation, 5)
        x = reference_encode_image(model, towers.normalize_pixels(pixels), adaptation.vision_prompts[0])
        z = reference_encode_text(model, ids, adaptation.text_prompts[0])
        optimizer.zero_grad()
        F.cross_entropy(towers.logits(x, z), labels).backward()
        optimizer.step()
    for name, value in trained.state_dict().items():
        if name.startswith("group."):
            assert torch.equal(value, group[name])
        else:
            assert (value != joined_mmap().state_dict()[name]).all()
            torch.testing.assert_close(value, reference.state_dict()[name], **EXACT)


# --- its group --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_tasks=st.integers(2, 6), objective=st.sampled_from(OBJECTIVES))
def test_the_task_joins_the_best_group_or_forms_a_new_one(data, num_tasks, objective):
    """The choice maximizes the score of the partition over joining each group and forming a new one."""
    values = data.draw(st.lists(st.integers(-20, 20), min_size=num_tasks * (num_tasks - 1) // 2, max_size=num_tasks**2))
    affinity = np.zeros((num_tasks, num_tasks))
    for (i, j), value in zip(combinations(range(num_tasks), 2), values):
        affinity[i, j] = affinity[j, i] = value
    new = data.draw(st.integers(0, num_tasks - 1))
    existing = [task for task in range(num_tasks) if task != new]
    partition = data.draw(st.sampled_from(list(set_partitions(num_tasks - 1))))
    groups = [tuple(existing[task] for task in group) for group in partition]
    max_size = data.draw(st.sampled_from([None, max(map(len, groups))]))

    options = with_fixed_groups(GroupingConfig(objective=objective, max_size=max_size), to_names(groups))
    tasks = [str(task) for task in range(num_tasks)]
    best = best_partition(affinity, objective=objective, **options.constraints, tasks=tasks)
    allowed = [
        tuple(sorted(tuple(sorted((*group, new))) if group == joined else group for group in groups))
        for joined in groups
        if max_size is None or len(joined) < max_size
    ]
    allowed.append(tuple(sorted([*groups, (new,)])))
    assert best.groups in allowed and best.num_candidates == len(allowed)
    best_score = max(partition_score(affinity, partition, objective) for partition in allowed)
    assert partition_score(affinity, best.groups, objective) == pytest.approx(best_score, abs=1e-9)


def to_names(groups):
    return [[str(task) for task in group] for group in groups]


# --- its report -------------------------------------------------------------------------------------------


def run_summary(accuracy: dict[str, float], parameters: int) -> dict:
    methods = {
        name: {"accuracy": accuracy, "test_loss": accuracy, "average": 0.0, "trained_parameters": count}
        for name, count in (("zero_shot", 0), ("grouped", parameters))
    }
    return {
        "name": "demo",
        "tasks": sorted(accuracy),
        "groups": [[task] for task in accuracy],
        "stages": {"splits": 10.0, "report": 2.0},
        "methods": methods,
        "shots": 8,
        "seed": 1,
        "clip": "small",
        "num_test_images": dict.fromkeys(accuracy, 100),
    }


def test_the_report_compares_with_retraining_all_tasks():
    finished = run_summary({"b": 0.5, "c": 0.7}, 100)
    rerun = run_summary({"a": 0.6, "b": 0.4, "c": 0.8}, 400)
    added = AddedTask(finished, "a", [["a", "c"], ["b"]], 0.2, 0.45, 2.0, 1.25, 30, 25, {"splits": 3.0}, [], rerun)
    assert added_task_cells(added) == [
        ["task", "zero-shot", "finished run", "a added", "all retrained", "test images"],
        ["a", "20.0 ± 8.0", "", "45.0 ± 9.9", "60.0 ± 9.8", "25"],
        ["b", "50.0 ± 5.0", "50.0 ± 5.0", "50.0 ± 5.0", "40.0 ± 4.9", "100"],
        ["c", "70.0 ± 4.6", "70.0 ± 4.6", "70.0 ± 4.6", "80.0 ± 4.0", "100"],
        ["average of existing tasks", "60.0 ± 3.4", "60.0 ± 3.4", "60.0 ± 3.4", "60.0 ± 3.2", "200"],
        ["average", "46.7 ± 3.5", "", "55.0 ± 4.0", "60.0 ± 3.9", "225"],
        ["trained parameters", "0", "100", "30", "400", ""],
        ["seconds", "", "12", "3", "12", ""],
    ]
    assert added_task_notes(added)[0] == "a joined c. Groups: a + c | b."
    assert "all are retrained" in added_task_notes(added)[1]
    summary = added.summary()
    assert summary.tasks == ["a", "b", "c"] and summary.methods["grouped"]["trained_parameters"] == 130
    assert summary.methods["grouped"]["average"] == pytest.approx((0.45 + 0.5 + 0.7) / 3)
    assert summary.methods["grouped"]["test_loss"] == {"a": 1.25, "b": 0.5, "c": 0.7}
    assert summary.methods["zero_shot"]["average_test_loss"] == pytest.approx((2 + 0.5 + 0.7) / 3)
    assert summary.num_test_images == {"a": 25, "b": 100, "c": 100}
    new_group = AddedTask(finished, "a", [["a"], ["b"], ["c"]], 0.2, 0.45, 2.0, 1.25, 60, 25, {"splits": 3.0}, [], None)
    assert "a forms a new group." in added_task_notes(new_group)[0]
    assert "retrained" not in " ".join(added_task_notes(new_group))


# --- the job ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_job):
    """Folder of a finished run of four of the six domains, with a temperature saved for one of them."""
    storage = tmp_path_factory.mktemp("added") / "storage"
    options = ("--data.tasks", f"[{', '.join(EXISTING)}]", "--baselines", "[clip_adapter]")
    job = run_job("full_pipeline", "--storage", storage, *QUICK, *options)
    assert job.status == 0, job.output
    folder = the_run(storage)
    pipeline.load(folder, temperature={"blur_right": 2.5}).save_options()
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def added(run_job):
    return partial(add_task, run_job)


def add_task(run_job, finished: Path, task: str, *arguments: str):
    """Run the job; return its result and the new run's folder."""
    job = run_job("add_task", "--run", finished, "--task", task, *arguments)
    assert job.status == 0, job.output
    return job, Path(re.findall("^adapter: (.+)$", job.output, re.MULTILINE)[-1]).parent.parent


@pytest.mark.slow
def test_a_task_is_added_and_existing_tasks_do_not_change(finished, added):
    original = digests(finished)
    job, folder = added(finished, ADDED[0], "--tracking.registered_model", "with_added")
    assert digests(finished) == original
    report = json.loads((folder / "report" / "summary.json").read_text())
    finished_report = json.loads((finished / "report" / "summary.json").read_text())
    assert report["tasks"] == sorted([*EXISTING, ADDED[0]])
    existing_groups = [[task for task in group if task != ADDED[0]] for group in report["groups"]]
    assert [group for group in existing_groups if group] == finished_report["groups"]
    for name in ("zero_shot", "grouped"):
        for value in ("accuracy", "test_loss"):
            ours, expected = (r["methods"][name][value] for r in (report, finished_report))
            assert {task: ours[task] for task in EXISTING} == expected
    assert (folder / "report" / "grouping.html").is_file()

    # The gains of existing tasks are the finished run's; the new one's, in both directions, are measured.
    old_grouping, grouping = (pipeline.open_run(run).grouping for run in (finished, folder))
    positions = [grouping["tasks"].index(task) for task in old_grouping["tasks"]]
    gains = np.array(grouping["gains"])
    np.testing.assert_array_equal(gains[np.ix_(positions, positions)], old_grouping["gains"])
    assert gains.shape == (5, 5) and gains.all() and grouping["affinity_kind"] == "transfer"
    assert {item["affinity"] for item in grouping["candidates"]} == {"transfer", "gradient", "features"}
    page = (folder / "report" / "report.html").read_text()
    assert f"{ADDED[0]} added" in page and page.count("data:image/jpeg") > 3 and f">{ADDED[0]}</h2>" in page
    predictions = pq.read_table(folder / "report" / "predictions.parquet").to_pandas()
    assert set(predictions.task) == {ADDED[0]} and set(predictions.method) == {"zero_shot", "grouped"}

    # Prompts and probabilities of existing tasks are bit-identical.
    old, new = (load_file(run / "adapters" / "grouped.safetensors") for run in (finished, folder))
    assert all(torch.equal(new[name], value) for name, value in old.items()) and len(new) > len(old)
    folder_of_images = finished.parent.parent / "datasets/digits/blur_right"
    images = [read_image(path) for path in sorted(folder_of_images.rglob("*.png"))[:70]]
    models = [pipeline.load(run) for run in (finished, folder)]
    for task in EXISTING:
        assert models[0].predict(images, task) == models[1].predict(images, task)
    assert models[1].temperature("blur_right") == 2.5
    assert models[1].labels(ADDED[0]) == models[1].labels("blur_right")

    # It has the group prompt of the group that it joined, and its own task prompt.
    joined = next(group for group in report["groups"] if ADDED[0] in group)
    number = len(finished_report["groups"])
    group_mates = [task for task in joined if task != ADDED[0]]
    num_per_mmap = sum(new[f"{number}.task.{part}"].numel() for part in ("source", "text_scaling", "vision_scaling"))
    num_added = (
        report["methods"]["grouped"]["trained_parameters"] - finished_report["methods"]["grouped"]["trained_parameters"]
    )
    if group_mates:
        index = next(i for i, group in enumerate(finished_report["groups"]) if group_mates[0] in group)
        assert torch.equal(new[f"{number}.group.source"], new[f"{index}.group.source"])
        assert num_added == num_per_mmap
    else:
        assert num_added == 2 * num_per_mmap
    assert f"{ADDED[0]} joined {' + '.join(group_mates)}" in job.output or not group_mates

    client = MlflowClient(f"sqlite:///{finished.parent.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("mmap-clip").experiment_id
    (tracked,) = client.search_runs([experiment], f"tags.added_task = '{ADDED[0]}'")
    assert tracked.data.tags["joins_run"] == finished.name and tracked.info.status == "FINISHED"
    (version,) = client.search_model_versions("name='with_added'")
    assert version.run_id == tracked.info.run_id


def test_only_transfer_trains_the_new_task_alone_and_needs_the_images_of_the_others(finished, monkeypatch):
    """Adapters and splits of the finished run are needed by transfer, its losses by all."""
    run, console = read_finished_run(str(finished), ""), Console(file=io.StringIO(), width=1000)
    config = parse_config(load_yaml(run.config_file))

    def plan(affinity: str):
        grouping = config.grouping.model_copy(update={"affinity": affinity})
        return plan_addition(run, config.model_copy(update={"grouping": grouping}), ADDED[0], False, console).plan

    measured = {affinity: set(plan(affinity).affinities) for affinity in ("transfer", "gradient", "features")}
    assert measured["transfer"] == {"transfer", "gradient", "features"}
    assert measured["gradient"] == measured["features"] == {"gradient", "features"}
    assert "1 training of a task alone, 9 forward passes" in console.file.getvalue()
    is_complete = Artifact.is_complete

    def others_complete(missing: Artifact, artifact: Artifact) -> bool:
        return artifact.key != missing.key and is_complete(artifact)

    for artifact in (run.single_tasks.splits[0], run.single_tasks.adapters["ink_right"]):
        with monkeypatch.context() as patch:
            patch.setattr(Artifact, "is_complete", lambda other, missing=artifact: others_complete(missing, other))
            with pytest.raises(UserError, match=f"needs .*{artifact.key}, which is missing .*: rerun the command"):
                plan("transfer")
            plan("features")
    single = run.single_tasks
    adapters = {task: adapter for task, adapter in single.adapters.items() if task != "ink_right"}
    run = replace(run, single_tasks=replace(single, adapters=adapters))
    plan("gradient")
    with pytest.raises(UserError, match="ink_right was added by another affinity: set --grouping.affinity features"):
        plan("transfer")
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "is_complete", lambda other: others_complete(single.losses[-1], other))
        with pytest.raises(UserError, match=f"needs .*{single.losses[-1].key}, which is missing"):
            read_finished_run(str(finished), "")


@pytest.mark.fault_injection
def test_tasks_are_added_successively_and_compared_with_retraining(finished, added, run_job):
    _, first_run = added(finished, ADDED[0])
    repeated, same_run = added(finished, ADDED[0])
    assert same_run == first_run and repeated.output.count("cached (computed in") == 6  # all but the report
    _, second_run = added(
        first_run, ADDED[1], "--rerun", "--grouping.num_groups", str(len(read_summary(first_run)["groups"]))
    )
    assert len(read_finished_run(str(second_run), "").single_tasks.adapters) == 6
    report = read_summary(second_run)
    assert report["tasks"] == sorted([*EXISTING, *ADDED])
    assert len(report["groups"]) == len(read_summary(first_run)["groups"])  # so it had to join a group
    assert "all retrained" in (second_run / "report" / "report.html").read_text()
    models = [pipeline.load(run) for run in (first_run, second_run)]
    images = [
        read_image(path) for path in sorted((first_run.parent.parent / "datasets/digits/ink_left").rglob("*.png"))[:30]
    ]
    for task in (*EXISTING, ADDED[0]):
        assert models[0].predict(images, task) == models[1].predict(images, task)
    # The run with all tasks is that of the full pipeline.
    storage = first_run.parent.parent
    num_groups = str(len(report["groups"]))
    full_run = run_job("full_pipeline", "--storage", storage, *QUICK, "--grouping.num_groups", num_groups)
    assert full_run.status == 0 and full_run.output.count("cached (computed in") == 6
    assert read_finished_run(str(second_run), "").groups == report["groups"]


@pytest.mark.fault_injection
def test_a_task_is_added_to_a_run_in_a_bucket_from_another_machine(run_job, tmp_path):
    server = S3Server(tmp_path, *free_ports(1, start=9500))
    try:
        bucket, options = server.uri.split("?")
        tracking = ("--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
        options = ("--storage", f"{bucket}/folder?{options}", "--cache", tmp_path / "first_cache", *tracking, *QUICK)
        pipeline_job = run_job("full_pipeline", *options, "--data.tasks", "[blur_left, blur_right, ink_right]")
        assert pipeline_job.status == 0, pipeline_job.output
        report = next(line for line in pipeline_job.output.splitlines() if line.startswith("report: "))
        finished = report.removeprefix("report: ").replace("/report/report.html?", "?")
        assert finished.startswith(f"{bucket}/folder/runs/demo-")
        options = ("--run", finished, "--task", "ink_left", "--cache", tmp_path / "second_cache", *tracking)
        addition = run_job("add_task", *options)
        assert addition.status == 0, addition.output
        (adapter,) = re.findall("^adapter: (.+)$", addition.output, re.MULTILINE)
        assert adapter.startswith(f"{bucket}/folder/runs/demo-")
        assert sorted(pipeline.load(adapter).tasks) == ["blur_left", "blur_right", "ink_left", "ink_right"]
    finally:
        server.kill()


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "report" / "summary.json").read_text())


@pytest.mark.slow
def test_errors_are_reported_before_any_work(finished, tmp_path, monkeypatch, capsys):
    def error(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["add_task.py", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            run_script("add_task")
        assert exit_info.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    run = ("--run", str(finished))
    is_there = error(*run, "--task", "blur_right")
    assert f"--task blur_right is already in the run; its tasks are {', '.join(EXISTING)}" in is_there
    assert "data.tasks: oil not found under" in error(*run, "--task", "oil")
    assert "mmap.prompt_length=8: the run's prompts were trained with 4" in error(
        *run, "--task", "ink_left", "--mmap.prompt_length", "8", "--mmap.source_rows", "8"
    )
    squash = error(*run, "--task", "ink_left", "--clip.resize_mode", "squash")
    assert "clip.resize_mode=squash: the run's prompts were trained with shortest" in squash
    assert "clip.template=a {}.: the run's" in error(*run, "--task", "ink_left", "--clip.template", "a {}.")
    assert "clip.pretrained=None differs from the run's CLIP" in error(
        *run, "--task", "ink_left", "--clip.pretrained", "null"
    )
    storage = ("--storage", "other")
    assert "--storage is not an option of this job: use --run" in error(*run, "--task", "ink_left", *storage)
    assert "does not exist" in error("--run", str(tmp_path / "runs" / "none"), "--task", "ink_left")
    assert "give <storage>/runs/<run>" in error("--run", str(tmp_path), "--task", "ink_left")
    assert len(read_summary(finished)["groups"]) > 1
    assert "no partition of the 5 tasks meets" in error(*run, "--task", "ink_left", "--grouping.num_groups", "1")
    unfinished = tmp_path / "runs" / "demo-0"
    unfinished.mkdir(parents=True)
    (unfinished / "config.yaml").write_text("name: demo\n")
    assert "(report/summary.json is missing)" in error("--run", str(unfinished), "--task", "ink_left")
