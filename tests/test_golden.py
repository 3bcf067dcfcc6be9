"""Whole runs reproduce the golden numbers; each method trains the right parameters, for the right tasks, from the right
initialization (the paper's Table 3, and methods with several stages)."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import golden
import pyarrow.parquet as pq
import pytest
import torch
from golden import ALL_METHODS, DEMO, differences, read_numbers, run_pipeline, training_folders
from pipelines import REPOSITORY, the_run

import pipeline
from pipeline.config import load_yaml, parse_config
from pipeline.data.parquet import SplitReader
from pipeline.demo.digits import ANGLES, PENS
from pipeline.methods.adapter_file import load_adapter
from pipeline.methods.registry import DEFAULT_VARIANTS, METHODS, VARIANTS, training_config
from pipeline.stages.plan import RESULTS_VERSION
from pipeline.training.batches import load_training_sets
from pipeline.training.trainer import Trainer

TASKS = ["blur_left", "blur_right", "ink_right"]
ONE_MMAP = 4 * (4 * 64 + 1 + 2)
"""Parameters of one MmAP: in each of 4 layers the source prompt, and the scaling matrices of text and images."""


@pytest.fixture(scope="module")
def all_methods(run_job, tmp_path_factory):
    """A small run of all methods. Its storage, a few hundred MB, mostly of full fine-tuning, is deleted afterwards."""
    storage = tmp_path_factory.mktemp("all methods") / "storage"
    run_pipeline(ALL_METHODS, storage)
    adapters = {file.stem: load_adapter(file) for file in (the_run(storage) / "adapters").glob("*.safetensors")}
    yield SimpleNamespace(
        storage=storage,
        config=parse_config(load_yaml(the_run(storage) / "config.yaml")),
        numbers=read_numbers(storage),
        trainings=training_folders(storage),
        adapters=adapters,
        adapters_folder=the_run(storage) / "adapters",
        groups={name: [list(tasks) for tasks in adapter.groups] for name, adapter in adapters.items()},
    )
    shutil.rmtree(storage)


def losses(training_folder):
    """Loss of each step."""
    return pq.read_table(training_folder / "history.parquet")["loss"].to_pylist()


# The golden numbers


def check_golden(run, numbers):
    if lines := differences(run.stored(), numbers, run.tolerance):
        advice = "numbers changed: if this is intended, raise RESULTS_VERSION and run `make golden`"
        pytest.fail("\n".join([advice, *lines]), pytrace=False)


@pytest.mark.slow
def test_every_method_reproduces_its_golden_numbers(all_methods):
    assert set(all_methods.numbers["methods"]) == set(VARIANTS)
    check_golden(ALL_METHODS, all_methods.numbers)


@pytest.mark.fault_injection
def test_the_demo_reproduces_its_golden_numbers(run_job, tmp_path):
    """Zero-shot CLIP is poor on all turned digits; prompts clearly improve it, most in groups of the same turn."""
    run_pipeline(DEMO, tmp_path / "storage")
    numbers = read_numbers(tmp_path / "storage")
    check_golden(DEMO, numbers)
    methods = numbers["methods"]
    zero_shot = methods["zero_shot"]["accuracy"]
    assert 0.5 < methods["zero_shot"]["average"] < 0.65
    assert min(zero_shot.values()) > 0.45 and max(zero_shot.values()) < 0.7
    for name in DEFAULT_VARIANTS:
        assert methods[name]["average"] > methods["zero_shot"]["average"] + 0.05
    assert numbers["groups"] == [[f"{pen}_{side}" for pen in sorted(PENS)] for side in ANGLES]
    assert methods["grouped"]["average"] == max(methods[name]["average"] for name in DEFAULT_VARIANTS)


def test_the_readme_shows_the_demos_golden_numbers():
    rows = re.findall(r"^│ (.+?) │$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    cells = ([cell.partition(" ±")[0].strip() for cell in row.split("│")] for row in rows)
    table = {name: numbers for name, *numbers, _ in cells}  # the last column has the numbers of test images
    methods = list(DEMO.stored()["methods"].values())
    tasks = methods[0]["accuracy"]
    expected = {task: [f"{100 * method['accuracy'][task]:.1f}" for method in methods] for task in tasks}
    expected["average"] = [f"{100 * method['average']:.1f}" for method in methods]
    expected["trained parameters"] = [f"{method['trained_parameters']:,}" for method in methods]
    assert table == expected


def changed(path, value):
    """Return the golden numbers of all methods with another value at a path."""
    numbers = ALL_METHODS.stored()
    *parents, name = path
    parent = numbers
    for part in parents:
        parent = parent[part]
    parent[name] = value(parent[name]) if callable(value) else value
    return numbers


def change_labels(count):
    return lambda labels: "".join(str((int(label) + 1) % 4) for label in labels[:count]) + labels[count:]


COOP = ("trainings", "coop: ink_right")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("results_version",), RESULTS_VERSION + 1, "results_version: "),
        (("splits", "test ink_right", "digest"), "0", "splits test ink_right: digest a86b"),
        (("groups", 1), ["blur_right", "blur_left"], "groups 2: 2 ink_right -> blur_left"),
        (("affinity", 0, 1), lambda value: value + 1, "affinity 1: 2 -0.1312713 -> 0.8687287 (1)"),
        (
            ("methods", "coop", "accuracy", "ink_right"),
            lambda value: value + 0.03,
            "methods coop: accuracy ink_right 0.8819444 -> ",
        ),
        (("methods", "coop", "trained_parameters"), 769, "methods coop: trained_parameters 768 -> 769 (1)"),
        (
            (*COOP, "losses", 3, 0),
            lambda value: value + 1e-3,
            "trainings coop: ink_right: losses 4 1 0.9062233 -> 0.9072233",
        ),
        ((*COOP, "losses", 3, 0), math.nan, "trainings coop: ink_right: losses 4 1 0.9062233 -> nan"),
        ((*COOP, "losses", 3), [], "trainings coop: ink_right: losses 4 1 0.9062233 -> None"),
        ((*COOP, "learning_rate", 1), 2e-5, "trainings coop: ink_right: learning_rate 2 1e-05 -> 2e-05"),
        ((*COOP, "predictions", "ink_right", "labels"), change_labels(2), "ink_right labels of 2 images"),
        (
            (*COOP, "predictions", "ink_right", "mean_probability"),
            lambda value: value + 1e-3,
            "ink_right mean_probability 0.7196703 -> 0.7206703",
        ),
        (("methods", "coop", "test_loss", "ink_right"), lambda value: value + 1e-3, "test_loss ink_right"),
        (("methods", "coop", "standard_error", "ink_right"), lambda value: value + 2e-3, "standard_error ink_right"),
        (("trainings", "new: ink_right"), {"losses": [[1.0]]}, "trainings new: ink_right: new"),
    ],
)
def test_differences_from_the_golden_numbers_are_reported(path, value, message):
    stored, fresh = ALL_METHODS.stored(), changed(path, value)
    (difference,) = differences(stored, fresh, ALL_METHODS.tolerance)
    assert message in difference
    assert not differences(stored, copy.deepcopy(stored))


def test_a_borderline_image_and_rounding_are_tolerated():
    stored = ALL_METHODS.stored()
    for path, value in (
        ((*COOP, "losses", 3, 0), lambda value: value + 1e-5),
        ((*COOP, "predictions", "ink_right", "labels"), change_labels(1)),
        ((*COOP, "predictions", "ink_right", "accuracy"), lambda value: value + 1 / 144),
        (("methods", "coop", "test_loss", "ink_right"), lambda value: value + 5e-5),
        (("methods", "coop", "standard_error", "ink_right"), lambda value: value + 1e-3),
    ):
        assert differences(stored, changed(path, value)) and not differences(
            stored, changed(path, value), ALL_METHODS.tolerance
        )


@pytest.mark.parametrize("run", golden.RUNS.values(), ids=golden.RUNS)
def test_golden_files_are_formatted(run):
    assert run.file.read_text() == golden.format_json(run.stored()) + "\n"
    assert run.file.stat().st_size < 100_000


# Prompts and tasks of MmAP's ablations


@pytest.mark.slow
def test_task_only_trains_one_prompt_per_task(all_methods):
    assert sorted(all_methods.groups["mmap_task_only"]) == [[task] for task in TASKS]
    assert all_methods.numbers["methods"]["mmap_task_only"]["trained_parameters"] == 3 * ONE_MMAP


@pytest.mark.slow
def test_group_only_trains_one_prompt_per_group(all_methods):
    groups = all_methods.numbers["groups"]
    assert all_methods.groups["mmap_group_only"] == groups and len(groups) == 2
    assert all_methods.numbers["methods"]["mmap_group_only"]["trained_parameters"] == 2 * ONE_MMAP


@pytest.mark.slow
def test_random_groups_have_the_same_sizes(all_methods):
    groups, random_groups = all_methods.numbers["groups"], all_methods.groups["mmap_random_groups"]
    assert sorted(map(len, random_groups)) == sorted(map(len, groups)) == [1, 2]
    assert sorted(task for group in random_groups for task in group) == TASKS
    assert sorted(random_groups) != sorted(groups)
    parameters = {name: method["trained_parameters"] for name, method in all_methods.numbers["methods"].items()}
    assert parameters["mmap_random_groups"] == parameters["grouped"] == (2 + 3) * ONE_MMAP


# Methods with several stages, and methods that share parameters between tasks


def mvlpt_first_loss(all_methods, adapter, task, from_first_stage):
    """Return the first loss of a training of one task that is initialized from this adapter, or by MVLPT itself."""
    config, towers = all_methods.config, adapter.towers()
    class_names = {task: adapter.class_names[task]}
    method = METHODS["mvlpt"].build(config, towers, class_names)
    if from_first_stage:
        method.load_state_dict(adapter.select_group(task).states[0])
    reader = SplitReader(next(all_methods.storage.glob("splits/[!.]*")))
    random_crop = config.training.augmentation.random_crop
    sets = load_training_sets(reader, [task], towers.preprocessing, random_crop, towers.device, threads=1)
    tokens = METHODS["mvlpt"].tokenize(config, towers.tokenizer, class_names)
    training = training_config("mvlpt", config)
    return Trainer(towers, method, sets, tokens, training, epochs=1, seed=config.seed).train()[0].losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_mvlpts_second_stage_is_initialized_from_its_first(all_methods, task):
    (first_loss, *_) = losses(all_methods.trainings[f"mvlpt: {task}"])
    expected, uninitialized = (
        mvlpt_first_loss(all_methods, all_methods.adapters["mvlpt_mt"], task, value) for value in (True, False)
    )
    assert first_loss == pytest.approx(expected, rel=1e-5)
    assert abs(first_loss - uninitialized) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.scope == "multi-task"])
def test_multi_task_baselines_train_on_mixed_batches(all_methods, name):
    """24 images; methods of groups take a batch of each task's 8."""
    kind = METHODS[VARIANTS[name].method]
    if kind.takes_steps:
        history = all_methods.numbers["trainings"][f"{kind.name}: {' + '.join(TASKS)}"]
        assert len(history["losses"]) == 2 * (6 if kind.mixes_tasks else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if METHODS[variant.method].merges])
def test_merged_adapters_are_made_of_trained_ones(all_methods, name):
    """The trainings are those of other variants, and count as its trained parameters."""
    variant, merged = VARIANTS[name], all_methods.adapters[name]
    source, towers = all_methods.adapters[variant.init_from], merged.towers()
    for group, state in zip(merged.groups, merged.states, strict=True):
        method = METHODS[variant.method].build(all_methods.config, towers, group)
        frozen = {key: value.clone() for key, value in method.state_dict().items()}
        parts = [part for tasks, part in zip(source.groups, source.states) if set(tasks) <= set(group)]
        assert len(parts) == (3 if variant.scope == "multi-task" and not variant.init_from.endswith("_mt") else 1)
        method.merge(all_methods.config, parts)
        torch.testing.assert_close(method.state_dict(), state)
        assert any(not torch.allclose(frozen[key], value) for key, value in state.items())
    parameters = {name: method["trained_parameters"] for name, method in all_methods.numbers["methods"].items()}
    assert parameters[name] == parameters[variant.init_from]


def first_merged_tasks(hipro):
    """Return the tasks that HiPro's tree merges first."""
    (state,) = hipro.states
    mask = state["below"][len(TASKS)]
    return [task for task, is_merged in zip(TASKS, mask) if is_merged]


@pytest.mark.slow
def test_hipros_tree_first_merges_the_tasks_with_the_largest_affinity(all_methods, run_job):
    """The same gradients merge blur_right + ink_right by dot products, blur_left + blur_right by cosines."""
    affinity = all_methods.numbers["affinity"]
    assert affinity[1][2] == max(affinity[0][1], affinity[0][2], affinity[1][2])
    assert all_methods.groups["hipro"] == [TASKS]
    assert first_merged_tasks(all_methods.adapters["hipro"]) == ["blur_right", "ink_right"]

    previous_runs = set(all_methods.storage.glob("runs/*"))
    finished = run_job(
        "full_pipeline",
        *("--storage", all_methods.storage, *ALL_METHODS.options),
        *("--baselines", "[hipro]", "--grouping.gradient_similarity", "cosine"),
    )
    assert finished.status == 0, finished.output
    (cosine_run,) = set(all_methods.storage.glob("runs/*")) - previous_runs
    affinity = json.loads((cosine_run / "report" / "summary.json").read_text())["methods"]["hipro"]["accuracy"]
    assert first_merged_tasks(load_adapter(cosine_run / "adapters" / "hipro.safetensors")) == [
        "blur_left",
        "blur_right",
    ]
    assert affinity != all_methods.numbers["methods"]["hipro"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("name, is_shared", [("coop_mt", True), ("softcpt", False), ("hipro", False)])
def test_contexts_of_multi_task_methods(all_methods, name, is_shared):
    """SoftCPT generates a context per task from its name, HiPro has one per leaf; CoOp shares one."""
    assert all_methods.groups[name] == [TASKS]
    model = pipeline.load(all_methods.adapters_folder / f"{name}.safetensors", device="cpu")
    image = next(all_methods.storage.glob("datasets/digits/ink_right/test/two/*"))
    probabilities = [model.predict([image], task)[0].probabilities for task in TASKS]
    for task_probabilities in probabilities[1:]:
        assert (task_probabilities == pytest.approx(probabilities[0], abs=1e-5)) == is_shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mmap_task_only", "mmap_group_only", "mmap_random_groups", "mvlpt", "mvlpt_mt", "softcpt", "hipro"]
)
def test_saved_adapters_reproduce_the_predictions_of_the_run(all_methods, name):
    model = pipeline.load(all_methods.adapters_folder / f"{name}.safetensors", device="cpu")
    method = all_methods.adapters[name].method
    for group in all_methods.groups[name]:
        predictions = pq.read_table(all_methods.trainings[f"{method}: {' + '.join(group)}"] / "predictions.parquet")
        for task in group:
            rows = [row for row in predictions.to_pylist() if row["task"] == task][::10]
            images = [all_methods.storage / "datasets" / "digits" / row["path"] for row in rows]
            for row, prediction in zip(rows, model.predict(images, task)):
                assert prediction.label == model.labels(task)[row["predicted"]]
                assert prediction.probability == pytest.approx(row["probability"], abs=1e-4)
