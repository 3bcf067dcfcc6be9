"""Whole runs give the golden numbers again, and each method's place in the pipeline: what it trains, for which tasks,
from which start (the paper's Table 3, and the methods of several stages)."""

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
from golden import ALL_METHODS, DEMO, differences, read_numbers, run_pipeline, training_folders
from pipelines import REPOSITORY, the_run

import pipeline
from pipeline.clip.class_tokens import class_tokens
from pipeline.config import load_yaml, parse_config
from pipeline.data.parquet import SplitReader
from pipeline.methods.adapter_file import load_adapter
from pipeline.methods.registry import METHODS, VARIANTS, training_config
from pipeline.stages.plan import RESULTS_VERSION
from pipeline.training.batches import load_training_sets
from pipeline.training.trainer import Trainer

TASKS = ["noise", "outline", "rotated"]
ONE_MMAP = 4 * (4 * 64 + 1 + 2)
"""Numbers of one MmAP: in each of 4 layers the source prompt, and the text's and the images' scaling."""


@pytest.fixture(scope="module")
def all_methods(shared_ray, tmp_path_factory):
    """A tiny run of all methods. Its storage is of a few hundred MB, mostly of full fine-tuning, so it is removed."""
    storage = tmp_path_factory.mktemp("all methods") / "storage"
    run_pipeline(ALL_METHODS, storage)
    prompts = {file.stem: load_adapter(file) for file in (the_run(storage) / "adapters").glob("*.safetensors")}
    yield SimpleNamespace(
        storage=storage,
        config=parse_config(load_yaml(the_run(storage) / "config.yaml")),
        numbers=read_numbers(storage),
        trainings=training_folders(storage),
        prompts=prompts,
        prompts_folder=the_run(storage) / "adapters",
        groups={name: [list(words) for words in of_method.groups] for name, of_method in prompts.items()},
    )
    shutil.rmtree(storage)


def losses(training_folder):
    """Of each step."""
    return pq.read_table(training_folder / "history.parquet")["loss"].to_pylist()


# The golden numbers


def check_golden(run, numbers):
    if lines := differences(run.stored(), numbers, run.tolerance):
        advice = "numbers changed: if that is meant, raise NUMBERS_VERSION, and `make golden`"
        pytest.fail("\n".join([advice, *lines]), pytrace=False)


@pytest.mark.slow
def test_every_method_gives_its_golden_numbers(all_methods):
    assert set(all_methods.numbers["methods"]) == set(VARIANTS)
    check_golden(ALL_METHODS, all_methods.numbers)


@pytest.mark.fault_injection
def test_the_demo_gives_its_golden_numbers_and_is_fair(shared_ray, tmp_path):
    """`make demo`: zero-shot CLIP is good on the domain of its training and poor elsewhere; prompts help clearly."""
    run_pipeline(DEMO, tmp_path / "storage")
    numbers = read_numbers(tmp_path / "storage")
    check_golden(DEMO, numbers)
    methods = numbers["methods"]
    zero_shot = methods["zero_shot"]["accuracy"]
    assert zero_shot["ink"] > 0.9 and min(zero_shot.values()) < 0.5 and min(zero_shot.values()) > 0.25
    for name in ("all_in_one", "grouped"):
        assert methods[name]["average"] > methods["zero_shot"]["average"] + 0.05


def test_the_readme_shows_the_demos_golden_numbers():
    rows = re.findall(r"^│ (.+?) │$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    shown = {name: numbers for name, *numbers in ([cell.strip() for cell in row.split("│")] for row in rows)}
    methods = list(DEMO.stored()["methods"].values())
    tasks = methods[0]["accuracy"]
    expected = {task: [f"{100 * of['accuracy'][task]:.1f}" for of in methods] for task in tasks}
    expected["average"] = [f"{100 * of['average']:.1f}" for of in methods]
    expected["trained parameters"] = [f"{of['trained_parameters']:,}" for of in methods]
    assert shown == expected


def changed(path, value):
    """The golden numbers of all methods with another value at a path."""
    numbers = ALL_METHODS.stored()
    *parents, last = path
    inner = numbers
    for part in parents:
        inner = inner[part]
    inner[last] = value(inner[last]) if callable(value) else value
    return numbers


def other_labels(count):
    return lambda labels: "".join(str((int(label) + 1) % 4) for label in labels[:count]) + labels[count:]


COOP = ("trainings", "coop: noise")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("numbers_version",), RESULTS_VERSION + 1, "numbers_version: "),
        (("splits", "test noise", "digest"), "0", "splits test noise: digest 02e4"),
        (("groups", 0), ["noise", "outline"], "groups 1: 2 rotated -> outline"),
        (("affinity", 0, 1), lambda value: value + 1, "affinity 1: 2 100.7322 -> 101.7322 (1)"),
        (("methods", "coop", "accuracy", "noise"), lambda value: value + 0.03, "methods coop: accuracy noise 0.75 -> "),
        (("methods", "coop", "trained_parameters"), 769, "methods coop: trained_parameters 768 -> 769 (1)"),
        ((*COOP, "losses", 3, 0), lambda value: value + 1e-3, "trainings coop: noise: losses 4 1 0.499877 -> 0.500877"),
        ((*COOP, "losses", 3, 0), math.nan, "trainings coop: noise: losses 4 1 0.499877 -> nan"),
        ((*COOP, "losses", 3), [], "trainings coop: noise: losses 4 1 0.499877 -> None"),
        ((*COOP, "learning_rate", 1), 2e-5, "trainings coop: noise: learning_rate 2 1e-05 -> 2e-05"),
        ((*COOP, "predictions", "noise", "labels"), other_labels(2), "noise labels of 2 images"),
        ((*COOP, "predictions", "noise", "mean_probability"), lambda value: value + 1e-3, "noise mean_probability 0.7"),
        (("trainings", "new: noise"), {"losses": [[1.0]]}, "trainings new: noise: new"),
    ],
)
def test_differences_from_the_golden_numbers_are_named(path, value, message):
    stored, fresh = ALL_METHODS.stored(), changed(path, value)
    (difference,) = differences(stored, fresh, ALL_METHODS.tolerance)
    assert message in difference
    assert not differences(stored, copy.deepcopy(stored))


def test_a_test_image_on_the_fence_and_roundings_are_no_differences():
    stored = ALL_METHODS.stored()
    for path, value in (
        ((*COOP, "losses", 3, 0), lambda value: value + 1e-5),
        ((*COOP, "predictions", "noise", "labels"), other_labels(1)),
        ((*COOP, "predictions", "noise", "accuracy"), lambda value: value + 1 / 80),
    ):
        assert differences(stored, changed(path, value)) and not differences(
            stored, changed(path, value), ALL_METHODS.tolerance
        )


@pytest.mark.parametrize("run", golden.RUNS.values(), ids=golden.RUNS)
def test_golden_numbers_are_stored_as_the_command_writes_them(run):
    assert run.file.read_text() == golden.to_text(run.stored()) + "\n"
    assert run.file.stat().st_size < 100_000


# Which prompts MmAP's ablations train, and for which tasks


@pytest.mark.slow
def test_task_only_trains_a_task_prompt_for_each_task_alone(all_methods):
    assert sorted(all_methods.groups["mmap_task_only"]) == [[task] for task in TASKS]
    assert all_methods.numbers["methods"]["mmap_task_only"]["trained_parameters"] == 3 * ONE_MMAP


@pytest.mark.slow
def test_group_only_trains_one_prompt_for_each_found_group(all_methods):
    found = all_methods.numbers["groups"]
    assert all_methods.groups["mmap_group_only"] == found and len(found) == 2
    assert all_methods.numbers["methods"]["mmap_group_only"]["trained_parameters"] == 2 * ONE_MMAP


@pytest.mark.slow
def test_random_groups_have_the_found_sizes_and_are_others(all_methods):
    found, drawn = all_methods.numbers["groups"], all_methods.groups["mmap_random_groups"]
    assert sorted(map(len, drawn)) == sorted(map(len, found)) == [1, 2]
    assert sorted(task for group in drawn for task in group) == TASKS
    assert sorted(drawn) != sorted(found)
    parameters = {name: of["trained_parameters"] for name, of in all_methods.numbers["methods"].items()}
    assert parameters["mmap_random_groups"] == parameters["grouped"] == (2 + 3) * ONE_MMAP


# Methods of several stages, and those that share something between tasks


def mvlpt_first_loss(all_methods, trained, task):
    """Of a training of one task that goes on from these prompts."""
    config, towers = all_methods.config, trained.towers()
    words = {task: trained.class_names[task]}
    method = METHODS["mvlpt"].build(config, towers, words)
    method.load_state_dict(trained.select_group(task).states[0])
    reader = SplitReader(next(all_methods.storage.glob("splits/[!.]*")))
    sets = load_training_sets(reader, [task], towers.image_size, towers.device, threads=1)
    template = METHODS["mvlpt"].template(config.clip.template)
    tokens = class_tokens(towers.tokenizer, template, list(words.values()))
    training = training_config("mvlpt", config)
    return Trainer(towers, method, sets, tokens, training, epochs=1, seed=config.seed).train()[0].losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_mvlpts_second_stage_goes_on_from_its_first(all_methods, task):
    first_stage = all_methods.trainings[f"mvlpt: {' + '.join(TASKS)}"]
    second_stage_losses = losses(all_methods.trainings[f"mvlpt: {task}"])
    expected = mvlpt_first_loss(all_methods, all_methods.prompts["mvlpt_mt"], task)
    assert second_stage_losses[0] == pytest.approx(expected, rel=1e-5)
    # A task has the same first batch in all its trainings, so this would be the loss at MVLPT's own start.
    assert abs(second_stage_losses[0] - losses(first_stage)[TASKS.index(task)]) > 0.01


def joined_tasks(hipro):
    """Tasks below the first join of HiPro's tree."""
    (state,) = hipro.states
    first_join = state["below"][len(TASKS)]
    return [task for task, is_below in zip(TASKS, first_join) if is_below]


@pytest.mark.slow
def test_hipros_tree_first_joins_the_tasks_with_the_largest_affinity(all_methods, run_job):
    """noise + rotated by inner products; outline + rotated by cosines, of the same gradients."""
    affinity = all_methods.numbers["affinity"]
    assert affinity[0][2] == max(affinity[0][1], affinity[0][2], affinity[1][2])
    assert all_methods.groups["hipro"] == [TASKS]
    assert joined_tasks(all_methods.prompts["hipro"]) == ["noise", "rotated"]

    before = set(all_methods.storage.glob("runs/*"))
    finished = run_job(
        "full_pipeline",
        *("--storage", all_methods.storage, *ALL_METHODS.options),
        *("--baselines", "[hipro]", "--grouping.affinity", "cosine"),
    )
    assert finished.status == 0, finished.output
    (by_cosine,) = set(all_methods.storage.glob("runs/*")) - before
    affinity = json.loads((by_cosine / "report" / "summary.json").read_text())["methods"]["hipro"]["accuracy"]
    assert joined_tasks(load_adapter(by_cosine / "adapters" / "hipro.safetensors")) == ["outline", "rotated"]
    assert affinity != all_methods.numbers["methods"]["hipro"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("name, alike", [("coop_mt", True), ("softcpt", False), ("hipro", False)])
def test_one_training_of_all_tasks_gives_each_a_context_of_its_own(all_methods, name, alike):
    """SoftCPT's is made from the task's name, HiPro's by its leaf; CoOp's is the same for all."""
    assert all_methods.groups[name] == [TASKS]
    model = pipeline.load(all_methods.prompts_folder / f"{name}.safetensors", device="cpu")
    image = next(all_methods.storage.glob("datasets/digits/outline/two/*"))
    probabilities = [model.predict([image], task)[0].probabilities for task in TASKS]
    for other in probabilities[1:]:
        assert (other == pytest.approx(probabilities[0], abs=1e-5)) == alike


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mmap_task_only", "mmap_group_only", "mmap_random_groups", "mvlpt", "mvlpt_mt", "softcpt", "hipro"]
)
def test_saved_prompts_predict_as_the_run_did(all_methods, name):
    model = pipeline.load(all_methods.prompts_folder / f"{name}.safetensors", device="cpu")
    method = all_methods.prompts[name].method
    for group in all_methods.groups[name]:
        predictions = pq.read_table(all_methods.trainings[f"{method}: {' + '.join(group)}"] / "predictions.parquet")
        for task in group:
            rows = [row for row in predictions.to_pylist() if row["task"] == task][::10]
            images = [all_methods.storage / "datasets" / "digits" / row["path"] for row in rows]
            for row, prediction in zip(rows, model.predict(images, task)):
                assert prediction.label == model.labels(task)[row["predicted"]]
                assert prediction.probability == pytest.approx(row["probability"], abs=1e-4)
