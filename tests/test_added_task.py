"""A task that is added to a finished run: its gradients, its place among the groups, its training, the job."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from pipelines import the_run
from reference_partitions import OBJECTIVES
from reference_towers import plain_encode_image, plain_encode_text
from safetensors.torch import load_file
from servers import S3Server, free_ports
from small_clip import CLASS_WORDS, small_towers, tokenizer
from small_problem import CONFIG, TASKS, TEMPLATE, group_prompts, mmap_shape, small_problem

import pipeline
from pipeline.clip.class_tokens import class_tokens
from pipeline.config import GroupingConfig
from pipeline.data.images import read_image
from pipeline.grouping.partition import best_partition
from pipeline.grouping.study import partition_score, set_partitions
from pipeline.methods.mmap import GroupMmap, SharedMmap
from pipeline.report.added_task import AddedTask, added_task_to_markdown
from pipeline.stages.finished_run import read_finished_run
from pipeline.stages.grouping import with_fixed_groups
from pipeline.training.gradient_replay import replay_gradients
from pipeline.training.trainer import Trainer

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BEFORE, LATER = ["chalk", "ink", "noise", "rotated"], ["neon", "outline"]
QUICK = ("--training.epochs", "3", "--global_prompt.epochs", "2")
JOB = ("jobs/add_task.py",)


@pytest.fixture(scope="module")
def problem():
    return small_problem()


# --- its gradients ----------------------------------------------------------------------------------------


def test_later_gradients_are_those_of_a_training_with_the_task_in_it(problem):
    """And, in float64, those of the plain towers at the same values."""
    towers, model, tokens, sets = problem
    shared = SharedMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3).double()
    options = {"snapshot": shared.task_gradients, "snapshot_every": 3}
    trainer = Trainer(towers, shared, sets, tokens, CONFIG, epochs=2, seed=5, **options)
    trainer.train()
    points = [(of.record.step, of.record.epoch, of.parameters) for of in trainer.snapshots]
    own_tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_WORDS])
    ids = tokenizer()([TEMPLATE.format(name) for name in CLASS_WORDS])
    for number, of_task in enumerate(sets):
        alone = SharedMmap(mmap_shape(towers), [of_task.task], seed=9, init_std=0.3).double()
        found = replay_gradients(towers, alone, of_task, own_tokens, points, CONFIG, seed=5)
        assert [of.record.step for of in found] == [1, 4, 7]
        for of, together in zip(found, trainer.snapshots, strict=True):
            # The values were stored in float32.
            torch.testing.assert_close(of.gradients[0].float(), together.gradients[number], rtol=1e-5, atol=1e-5)
            assert of.record.losses[0] == pytest.approx(together.record.losses[number], rel=1e-5)
            assert of.record.accuracies[0] == pytest.approx(together.record.accuracies[number])
            plain = plain_gradient(towers, model, ids, of_task, of.record.step, of.parameters)
            assert plain.abs().max() > 1e-4
            torch.testing.assert_close(of.gradients[0], plain, **EXACT)


def test_later_gradients_in_bfloat16_are_those_of_the_training(problem):
    """To the bit, where a processor multiplies the rows of one task as it does those of two."""
    _, _, tokens, sets = problem
    towers, _ = small_towers(dtype=torch.float32)
    shared = SharedMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3)
    options = {"seed": 5, "precision": "bfloat16"}
    trainer = Trainer(towers, shared, sets, tokens, CONFIG, epochs=1, snapshot_fn=shared.task_gradients, **options)
    trainer.train()
    points = [(of.record.step, of.record.epoch, of.parameters) for of in trainer.snapshots]
    own_tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_WORDS])
    for number, of_task in enumerate(sets):
        alone = SharedMmap(mmap_shape(towers), [of_task.task], seed=9)
        found = replay_gradients(towers, alone, of_task, own_tokens, points, CONFIG, **options)
        for of, together in zip(found, trainer.snapshots, strict=True):
            expected = together.gradients[number]
            assert (of.gradients[0] - expected).norm() < 3e-3 * expected.norm()  # 12e-3: logits in bfloat16


def plain_gradient(towers, model, ids, of_task, step, point):
    shared = SharedMmap(mmap_shape(towers), [of_task.task], seed=2).double()
    torch.nn.utils.vector_to_parameters(point.double(), shared.parameters())
    made = shared()
    pixels, labels = of_task.batch(step - 1, CONFIG.batch_size, towers.image_size, CONFIG.augmentation, 5)
    x = plain_encode_image(model, towers.normalize_pixels(pixels), made.vision_prompts[0])
    z = plain_encode_text(model, ids, made.text_prompts[0])
    gradients = torch.autograd.grad(F.cross_entropy(towers.logits(x, z), labels), list(shared.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- its training -----------------------------------------------------------------------------------------


def test_only_the_task_prompt_of_a_joined_group_is_trained(problem):
    """Against plain SGD on the task's prompt alone, with the plain towers."""
    towers, model, _, sets = problem
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_WORDS])
    group = group_prompts(towers).state_dict()

    def joined() -> GroupMmap:
        method = GroupMmap(mmap_shape(towers), ["neon"], seed=7, init_std=0.3).double()
        method.load_frozen_group_prompt(group)
        return method

    fast, slow = joined(), joined()
    Trainer(towers, fast, sets[:1], tokens, CONFIG, epochs=2, seed=5).train()
    ids = tokenizer()([TEMPLATE.format(name) for name in CLASS_WORDS])
    optimizer = torch.optim.SGD(slow.task.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 4 else 0.05
        made = slow()
        pixels, labels = sets[0].batch(step, 3, towers.image_size, CONFIG.augmentation, 5)
        x = plain_encode_image(model, towers.normalize_pixels(pixels), made.vision_prompts[0])
        z = plain_encode_text(model, ids, made.text_prompts[0])
        optimizer.zero_grad()
        F.cross_entropy(towers.logits(x, z), labels).backward()
        optimizer.step()
    for name, value in fast.state_dict().items():
        if name.startswith("group."):
            assert torch.equal(value, group[name])
        else:
            assert (value != joined().state_dict()[name]).all()
            torch.testing.assert_close(value, slow.state_dict()[name], **EXACT)


# --- its place --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_tasks=st.integers(2, 6), objective=st.sampled_from(OBJECTIVES))
def test_the_place_is_the_best_of_every_group_and_alone(data, num_tasks, objective):
    """Of all groups with the new task in them, and of it alone, by the score of the whole partition."""
    values = data.draw(st.lists(st.integers(-20, 20), min_size=num_tasks * (num_tasks - 1) // 2, max_size=num_tasks**2))
    affinity = np.zeros((num_tasks, num_tasks))
    for (i, j), value in zip(combinations(range(num_tasks), 2), values):
        affinity[i, j] = affinity[j, i] = value
    new = data.draw(st.integers(0, num_tasks - 1))
    others = [task for task in range(num_tasks) if task != new]
    before = data.draw(st.sampled_from(list(set_partitions(num_tasks - 1))))
    groups = [tuple(others[task] for task in group) for group in before]
    max_size = data.draw(st.sampled_from([None, max(map(len, groups))]))

    options = with_fixed_groups(GroupingConfig(objective=objective, max_size=max_size), named(groups))
    tasks = [str(task) for task in range(num_tasks)]
    found = best_partition(affinity, objective=objective, **options.constraints, tasks=tasks)
    allowed = [
        tuple(sorted(tuple(sorted((*group, new))) if at == place else group for at, group in enumerate(groups)))
        for place, joined in enumerate(groups)
        if max_size is None or len(joined) < max_size
    ]
    allowed.append(tuple(sorted([*groups, (new,)])))
    assert found.groups in allowed and found.num_candidates == len(allowed)
    best = max(partition_score(affinity, partition, objective) for partition in allowed)
    assert partition_score(affinity, found.groups, objective) == pytest.approx(best, abs=1e-9)


def named(groups):
    return [[str(task) for task in group] for group in groups]


# --- its report -------------------------------------------------------------------------------------------


def run_summary(accuracy: dict[str, float], parameters: int) -> dict:
    methods = {
        name: {"accuracy": accuracy, "average": 0.0, "trained_parameters": count}
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
    }


def test_the_report_shows_it_beside_all_tasks_trained_again():
    before = run_summary({"b": 0.5, "c": 0.7}, 100)
    rerun = run_summary({"a": 0.6, "b": 0.4, "c": 0.8}, 400)
    added = AddedTask(before, "a", [["a", "c"], ["b"]], 0.2, 0.45, 30, {"splits": 3.0}, rerun)
    text = added_task_to_markdown(added)
    assert "| task | zero-shot | before | a added | all trained again |" in text
    assert "| a | 20.0 |  | 45.0 | 60.0 |" in text and "| b | 50.0 | 50.0 | 50.0 | 40.0 |" in text
    assert "| average of the tasks before | 60.0 | 60.0 | 60.0 | 60.0 |" in text
    assert "| average | 46.7 |  | 55.0 | 60.0 |" in text
    assert "| trained parameters | 0 | 100 | 30 | 400 |" in text and "| seconds |  | 12 | 3 | 12 |" in text
    assert "a joined c. Groups: a + c | b;" in text
    of_all = added.summary()
    assert of_all.tasks == ["a", "b", "c"] and of_all.methods["grouped"]["trained_parameters"] == 130
    assert of_all.methods["grouped"]["average"] == pytest.approx((0.45 + 0.5 + 0.7) / 3)
    alone = AddedTask(before, "a", [["a"], ["b"], ["c"]], 0.2, 0.45, 60, {"splits": 3.0}, None)
    assert "a is a group of its own." in added_task_to_markdown(alone)
    assert "again" not in added_task_to_markdown(alone)


# --- the job ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_job):
    """A finished run of four of the six domains, with a temperature saved for one of them."""
    storage = tmp_path_factory.mktemp("added") / "storage"
    options = ("--data.tasks", f"[{', '.join(BEFORE)}]", "--baselines", "[clip_adapter]")
    done = run_job("full_pipeline", "--storage", storage, *QUICK, *options)
    assert done.status == 0, done.output
    folder = the_run(storage)
    pipeline.load(folder, temperature={"ink": 2.5}).save_options()
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def added(run_job):
    return partial(add_task, run_job)


def add_task(run_job, finished: Path, task: str, *arguments: str):
    """The job's end, and the folder of the run that it made."""
    done = run_job("add_task", "--run", finished, "--task", task, *arguments)
    assert done.status == 0, done.output
    return done, Path(done.output.split("prompts: ")[-1].strip()).parent.parent


@pytest.mark.slow
def test_a_task_is_added_and_nothing_of_the_others_changes(finished, added):
    before = digests(finished)
    done, folder = added(finished, LATER[0], "--tracking.registered_model", "with_later")
    assert digests(finished) == before
    report = json.loads((folder / "report" / "summary.json").read_text())
    first = json.loads((finished / "report" / "summary.json").read_text())
    assert report["tasks"] == sorted([*BEFORE, LATER[0]])
    without = [[task for task in group if task != LATER[0]] for group in report["groups"]]
    assert [group for group in without if group] == first["groups"]
    for name in ("zero_shot", "grouped"):
        of_all, of_first = (of["methods"][name]["accuracy"] for of in (report, first))
        assert {task: of_all[task] for task in BEFORE} == of_first
    assert (folder / "report" / "grouping.html").is_file()

    # The prompts of the tasks before: the same bits in the file, and the same bits of every probability.
    old, new = (load_file(at / "adapters" / "grouped.safetensors") for at in (finished, folder))
    assert all(torch.equal(new[name], value) for name, value in old.items()) and len(new) > len(old)
    images = [read_image(path) for path in sorted((finished.parent.parent / "datasets/digits/ink").rglob("*.png"))[:70]]
    models = [pipeline.load(at) for at in (finished, folder)]
    for task in BEFORE:
        assert models[0].predict(images, task) == models[1].predict(images, task)
    assert models[1].temperature("ink") == 2.5
    assert models[1].labels(LATER[0]) == models[1].labels("ink")

    # It took the group prompt of the group that it joined, and has a task prompt of its own.
    joined = next(group for group in report["groups"] if LATER[0] in group)
    number = len(first["groups"])
    others = [task for task in joined if task != LATER[0]]
    one_mmap = sum(new[f"{number}.task.{part}"].numel() for part in ("source", "text_scaling", "vision_scaling"))
    newly = report["methods"]["grouped"]["trained_parameters"] - first["methods"]["grouped"]["trained_parameters"]
    if others:
        of_group = next(at for at, group in enumerate(first["groups"]) if others[0] in group)
        assert torch.equal(new[f"{number}.group.source"], new[f"{of_group}.group.source"])
        assert newly == one_mmap
    else:
        assert newly == 2 * one_mmap
    assert f"{LATER[0]} joined {' + '.join(others)}" in done.output or not others

    client = MlflowClient(f"sqlite:///{finished.parent.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("mmap-clip").experiment_id
    (tracked,) = client.search_runs([experiment], f"tags.added_task = '{LATER[0]}'")
    assert tracked.data.tags["joins_run"] == finished.name and tracked.info.status == "FINISHED"
    (version,) = client.search_model_versions("name='with_later'")
    assert version.run_id == tracked.info.run_id


@pytest.mark.fault_injection
def test_tasks_are_added_one_after_another_and_beside_all_trained_again(finished, added, run_job):
    _, once = added(finished, LATER[0])
    again, same = added(finished, LATER[0])
    assert same == once and again.output.count("cached (computed in") == 5  # all but the report
    _, twice = added(once, LATER[1], "--rerun", "--grouping.num_groups", str(len(summary_of(once)["groups"])))
    report = summary_of(twice)
    assert report["tasks"] == sorted([*BEFORE, *LATER])
    assert len(report["groups"]) == len(summary_of(once)["groups"])  # so it had to join one
    assert "all trained again" in (twice / "report" / "report.md").read_text()
    models = [pipeline.load(at) for at in (once, twice)]
    images = [read_image(path) for path in sorted((once.parent.parent / "datasets/digits/neon").rglob("*.png"))[:30]]
    for task in (*BEFORE, LATER[0]):
        assert models[0].predict(images, task) == models[1].predict(images, task)
    # The run with all tasks is the pipeline's own.
    storage = once.parent.parent
    num_groups = str(len(report["groups"]))
    plain = run_job("full_pipeline", "--storage", storage, *QUICK, "--grouping.num_groups", num_groups)
    assert plain.status == 0 and plain.output.count("cached (computed in") == 5
    assert read_finished_run(str(twice), "").groups == report["groups"]


@pytest.mark.fault_injection
def test_a_task_is_added_to_a_run_in_a_bucket_from_another_machine(run_job, tmp_path):
    server = S3Server(tmp_path, *free_ports(1, first=9500))
    try:
        place, options = server.uri.split("?")
        tracking = ("--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
        options = ("--storage", f"{place}/folder?{options}", "--cache", tmp_path / "here", *tracking, *QUICK)
        first = run_job("full_pipeline", *options, "--data.tasks", "[chalk, ink, noise]")
        assert first.status == 0, first.output
        report = next(line for line in first.output.splitlines() if line.startswith("report: "))
        finished = report.removeprefix("report: ").replace("/report?", "?")
        assert finished.startswith(f"{place}/folder/runs/demo-")
        options = ("--run", finished, "--task", "neon", "--cache", tmp_path / "there", *tracking)
        second = run_job("add_task", *options)
        assert second.status == 0, second.output
        prompts = second.output.split("prompts: ")[-1].strip()
        assert prompts.startswith(f"{place}/folder/runs/demo-")
        assert sorted(pipeline.load(prompts).tasks) == ["chalk", "ink", "neon", "noise"]
    finally:
        server.kill()


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "report" / "summary.json").read_text())


@pytest.mark.slow
def test_faults_are_named_before_anything_starts(finished, tmp_path, monkeypatch, capsys):
    def fault(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["add_task.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("jobs/add_task.py", run_name="__main__")
        assert end.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    place = ("--run", str(finished))
    assert "the run has that task; its tasks are chalk, ink, noise, rotated" in fault(*place, "--task", "ink")
    assert "data.tasks: oil not found under" in fault(*place, "--task", "oil")
    assert "mmap.prompt_length=8: the run's prompts were trained with 4" in fault(
        *place, "--task", "neon", "--mmap.prompt_length", "8", "--mmap.source_rows", "8"
    )
    assert "clip.template=a {}.: the run's" in fault(*place, "--task", "neon", "--clip.template", "a {}.")
    assert "clip.pretrained=None is another CLIP than the run's" in fault(
        *place, "--task", "neon", "--clip.pretrained", "null"
    )
    assert "--storage is not an option of this job: use --run" in fault(*place, "--task", "neon", "--storage", "other")
    assert "does not exist" in fault("--run", str(tmp_path / "runs" / "none"), "--task", "neon")
    assert "give <storage>/runs/<run>" in fault("--run", str(tmp_path), "--task", "neon")
    assert len(summary_of(finished)["groups"]) > 1
    assert "no partition of the 5 tasks meets" in fault(*place, "--task", "neon", "--grouping.num_groups", "1")
    unfinished = tmp_path / "runs" / "demo-0"
    unfinished.mkdir(parents=True)
    (unfinished / "config.yaml").write_text("name: demo\n")
    assert "it has no report/summary.json" in fault("--run", str(unfinished), "--task", "neon")
