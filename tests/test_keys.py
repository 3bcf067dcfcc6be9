"""Keys of runs and artifacts change with everything that results depend on, and with nothing else.

Every config field is changed; exactly the keys of what it declares to affect, and of their dependents, must change.
The declarations are checked by running the work items: each reads only fields that are declared to affect it.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import typing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_methods import SMALL

from pipeline.clip.load import build_meta_towers, clip_identity, load_clip
from pipeline.config import BUILTIN_DIGITS, RESULT_EFFECTS, Config, Section, field_effects, fields, parse_config
from pipeline.config.fields import affects
from pipeline.data import contents
from pipeline.data.checked_images import check_images
from pipeline.data.parquet import SplitReader, plan_parts, scan_image, write_part
from pipeline.errors import UserError
from pipeline.methods.registry import METHODS, VARIANTS, get_method, training_config, with_sources
from pipeline.runtime.stage import WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages import data_check, training_spec
from pipeline.stages import plan as plans
from pipeline.stages import splits as splits_stage
from pipeline.stages.global_prompt import global_prompt_work_item
from pipeline.stages.group_trainings import plan_trainings
from pipeline.stages.grouping import compute_grouping, grouping_artifact
from pipeline.stages.grouping_sources import GroupingSources, SingleTasks
from pipeline.stages.plan import Plan, make_plan
from pipeline.stages.single_tasks import loss_work_items, single_tasks
from pipeline.stages.training_spec import TrainingSpec

TASKS, CLASSES, PER_CLASS = ("ink", "chalk", "neon"), ("one", "two"), 5
BASE: dict[str, Any] = {
    "data": {"shots": 2, "columns": {"label": "label"}},
    "clip": {"model": BUILTIN_DIGITS, "pretrained": BUILTIN_DIGITS},
    "mmap": {"prompt_length": 4, "source_rows": 4},
    "training": {"epochs": 2, "batch_size": 3},
    **{
        section: options | ({"training": {"epochs": None, "batch_size": 2}} if "training" in options else {})
        for section, options in SMALL.model_dump(mode="json").items()
        if section in {method.section for method in METHODS.values()} - {"mmap"}
    },
}
ALTERNATIVE_VALUES: dict[str, Any] = {
    "name": "another",
    "storage": "elsewhere",
    "cache": "another cache",
    "data.root": "more.csv",
    "data.layout": "manifest",
    "data.columns": {"label": "label", "task": "other_task"},
    "data.tasks": ["ink", "chalk"],
    "data.expected_images": {"ink": 3},
    "data.class_names": "names.txt",
    "clip.model": "digits_clip.json",
    "clip.quick_gelu": True,
    "clip.pretrained": None,
    "clip.image_size": 40,
    "clip.resize_mode": "squash",
    "clip.interpolation": "bilinear",
    "clip.mean": [0.5, 0.5, 0.5],
    "clip.std": [0.5, 0.5, 0.5],
    "clip.template": "a sketch of a {}.",
    "clip.task_templates": {"neon": "a light that shows a {}."},
    "mmap.prompt_length": 8,
    "mmap.source_rows": 2,
    "mmap.source_columns": 4,
    "training.aggregation": "famo",
    "training.augmentation.crop_scale": [0.5, 1.0],
    "baselines": ["coop"],
    "grouping.num_groups": 2,
    "grouping.must_link": [["ink", "neon"]],
    "grouping.cannot_link": [["ink", "neon"]],
    "cluster.address": "auto",
    "tracking.uri": "sqlite:///another.db",
    "tracking.experiment": "another",
    "tracking.registered_model": "a_model",
}
"""Field → a valid value other than the default, where its type does not imply one."""
FIELDS = {name: field for name, field, _ in fields()}
TASK_WITH_TEMPLATE = "neon"
CONTENT_FIELDS = {
    *("data.root", "data.columns", "data.use_official_splits", "data.tasks", "data.class_names", "data.multi_label"),
    *("clip.pretrained", "clip.quick_gelu"),
    *("clip.image_size", "clip.resize_mode", "clip.interpolation", "clip.mean", "clip.std", "clip.fill_color"),
    "clip.jpeg_draft",
}
"""Fields whose alternative value loads other content; with those of other fields the content stays the same."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, and manifests of them."""
    folder, rng = tmp_path_factory.mktemp("keys"), np.random.default_rng(0)
    rows = []
    for task in TASKS:
        for name in CLASSES:
            for number in range(PER_CLASS):
                path = f"images/{task}/{name}/{number}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / path)
                other_task = TASKS[number % 3]
                split = "test" if number == 4 else "train"
                rows.append({"path": path, "task": task, "label": name, "other_task": other_task, "split": split})
    shutil.copyfile(folder / rows[0]["path"], folder / "images/one more.png")
    write_table(folder / "all.csv", rows)
    write_table(folder / "more.csv", [*rows, {**rows[0], "path": "images/one more.png", "split": "test"}])
    (folder / "images/broken.png").write_text("no image")
    write_table(folder / "broken.csv", [*rows, {**rows[0], "path": "images/broken.png"}])
    (folder / "names.txt").write_text("one\ta single\ntwo\n")
    builtin = Path(plans.__file__).parents[1] / "demo" / "digits_clip.json"
    (folder / "digits_clip.json").write_text(json.dumps(json.loads(builtin.read_text())))
    return folder


def write_table(file: Path, rows: list[dict[str, str]]) -> None:
    with open(file, "w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def config_with(folder: Path, *changes: tuple[str, Any]) -> Config:
    values = json.loads(json.dumps(BASE))
    values["data"]["root"] = str(folder / "all.csv")
    values |= {"storage": str(folder / "storage"), "cache": str(folder / "cache")}
    for name, value in changes:
        if isinstance(value, str) and (name in ("storage", "cache") or (folder / value).exists()):
            value = str(folder / value)
        section = values
        *path, field_name = name.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[field_name] = value
    return parse_config(values)


@dataclass(frozen=True)
class ExpectedKey:
    """A key, and what it must change with."""

    key: Any
    effects: frozenset[str] = frozenset()
    """Effects of the fields whose values are part of the key."""
    depends_on: tuple[str, ...] = ()
    method: str | None = None
    """Method whose section and training are part of the key."""
    tasks: tuple[str, ...] = TASKS


def prepare_plan(config: Config) -> Plan:
    """Make a plan with complete splits, as stage 1 would on Ray."""
    plan = make_plan(config, Console(quiet=True))
    if not plan.splits.is_complete():
        root = plan.dataset_index.root
        images = [
            replace(
                scan_image(root, record.path, record.task, record.class_folder), official_split=record.official_split
            )
            for record in plan.dataset_index.images
        ]
        splits, description = splits_stage.draw_splits(plan, [image for image in images if not image.error])
        sizes = {image.path: image.size for image in images}
        parts = plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes)
        with plan.splits.writer() as writer:
            for part in parts:
                write_part(root, part, description, writer.folder)
            (writer.folder / "splits.json").write_text(json.dumps(asdict(description)))
    return plan


def fake_grouping(plan: Plan) -> dict[str, Any]:
    """Return a possible result of stage 4: fixed groups."""
    return {"groups": [list(plan.tasks[:2]), list(plan.tasks[2:])]}


def fake_affinities(plan: Plan, key: str) -> list[list[float]]:
    """Return affinities of gradients that depend on the key."""
    return np.full((len(plan.tasks), len(plan.tasks)), int(key, 16) / 2**64).tolist()


def compute_keys(config: Config) -> dict[str, ExpectedKey]:
    """Return all keys of a run, in the order of its work items; names in parentheses are loaded content, not keys."""
    plan = prepare_plan(config)
    description = SplitReader(plan.splits.download()).description
    keys = {
        "(images)": ExpectedKey(plan.images),
        "(clip)": ExpectedKey(asdict(plan.clip)),
        "(split images)": ExpectedKey(description.content),
        "(class names)": ExpectedKey([description.class_names_for(task) for task in description.tasks]),
    }
    feature_inputs, training_inputs = ("(clip)", "(split images)"), ("(clip)", "(split images)", "(class names)")
    keys["run"] = ExpectedKey(plan.key, frozenset(RESULT_EFFECTS), ("(images)", "(clip)"))
    keys["data check"] = ExpectedKey(data_check._artifact(plan).key, depends_on=("(images)",))
    keys["splits"] = ExpectedKey(plan.splits.key, frozenset({"splits"}), ("(images)",))
    global_prompt = global_prompt_work_item(plan).artifact
    keys["global prompt"] = ExpectedKey(
        global_prompt.key, frozenset({"training", "method", "global_prompt"}), training_inputs, "mmap"
    )
    trainings = {}
    for variant in VARIANTS:
        plan_trainings(plan, variant, fake_grouping(plan), trainings, fake_affinities(plan, global_prompt.key))
    losses = [item.artifact for item in loss_work_items(plan, trainings["each_alone"])]
    for variant, variant_trainings in trainings.items():
        for training in variant_trainings:
            method, tasks = training.spec.method, training.spec.tasks
            for task, artifact in training.spec.test_features.items():
                effects = frozenset({"test_features"})
                keys[f"test features of {task}"] = ExpectedKey(artifact.key, effects, feature_inputs, None, (task,))
            for set_tasks, artifact in training.spec.training_features.items():
                effects = frozenset({"training_features"})
                name = f"training features of {set_tasks} for {method}"
                keys[name] = ExpectedKey(artifact.key, effects, feature_inputs, method, set_tasks)
            depends_on = [*training_inputs, *(["global prompt"] if get_method(method).uses_affinities else [])]
            depends_on += [f"{source.variant}: {source.spec.tasks}" for source in training.init_from]
            names = ("method", "training", "evaluation") if get_method(method).trainable else ("method", "evaluation")
            name, effects = f"{variant}: {tasks}", frozenset(names)
            keys[name] = ExpectedKey(training.artifact.key, effects, tuple(depends_on), method, tasks)
    evaluation, losses_of = frozenset({"evaluation"}), []
    for artifact, task in zip(losses, (None, *plan.tasks), strict=True):
        losses_of.append(f"losses under the prompts of {task}")
        depends_on = (*training_inputs, *([f"each_alone: {(task,)}"] if task else []))
        keys[losses_of[-1]] = ExpectedKey(artifact.key, evaluation, depends_on, "mmap")
    grouping = grouping_artifact(plan, GroupingSources.of(global_prompt, SingleTasks({}, tuple(losses))))
    keys["grouping"] = ExpectedKey(grouping.key, frozenset({"grouping"}), ("global prompt", *losses_of))
    return keys


@pytest.fixture(scope="module", autouse=True)
def cached_clip():
    """Cache what depends only on the CLIP, and is slow to build and to read."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (build_meta_towers, clip_identity):
            patch.setattr(plans, function.__name__, cache(function))
        yield


@pytest.fixture(scope="module")
def base(folder):
    config = config_with(folder)
    return config, compute_keys(config)


def alternative_value(name: str, value: Any) -> Any:
    if name in ALTERNATIVE_VALUES:
        return ALTERNATIVE_VALUES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.75 * value or 0.125
    for candidate in example_values(FIELDS[name].annotation):
        if candidate != value:
            return candidate
    pytest.fail(f"{name}={value!r}: add a valid value to ALTERNATIVE_VALUES")


def example_values(annotation: Any) -> tuple[Any, ...]:
    """Return valid values of a Literal or numeric annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if annotation in (int, float):
        return (3,)
    return tuple(value for argument in typing.get_args(annotation) for value in example_values(argument))


def field_value(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def applies_to(name: str, key: ExpectedKey, old: Config, new: Config) -> bool:
    """Return whether the key is one of the methods and tasks that the field applies to."""
    if key.method is None:
        return True
    if name.endswith("training.aggregation") and len(key.tasks) == 1:
        return False  # nothing to weigh
    if ".training." in f".{name}":
        return training_config(key.method, old) != training_config(key.method, new)
    if field_effects(FIELDS[name]) == {"method"}:
        return name.partition(".")[0] == get_method(key.method).section
    return name != "clip.task_templates" or TASK_WITH_TEMPLATE in key.tasks


def changed_keys(old: dict[str, ExpectedKey], new: dict[str, ExpectedKey]) -> set[str]:
    names = old.keys() | new.keys()
    return {name for name in names if name not in old or name not in new or old[name].key != new[name].key}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_the_keys_of_what_it_affects_and_no_others(name, folder, base, monkeypatch):
    monkeypatch.chdir(folder)
    config, old = base
    changed = config_with(folder, (name, alternative_value(name, field_value(config, name))))
    assert field_value(changed, name) != field_value(config, name)
    new, effects = compute_keys(changed), field_effects(FIELDS[name])
    if ".training." in name:  # a method's override affects the same
        effects |= field_effects(FIELDS[name.partition(".")[2]])
    if name.endswith(".views"):  # the steps of the method's features
        effects |= {"training_features"}
    expected = set()
    for key_name, key in new.items():
        content_changed = key_name.startswith("(") and old[key_name].key != key.key
        dependency_changed = any(dependency in expected for dependency in key.depends_on)
        if content_changed or dependency_changed or (effects & key.effects and applies_to(name, key, config, changed)):
            expected.add(key_name)
    expected |= old.keys() - new.keys()
    assert changed_keys(old, new) == expected
    assert bool(expected) == bool(effects - {"data", "clip"} or name in CONTENT_FIELDS)


def test_a_new_results_version_changes_the_keys_of_all_results(folder, base, monkeypatch):
    for module in (plans, training_spec):
        monkeypatch.setattr(module, "RESULTS_VERSION", plans.RESULTS_VERSION + 1)
    config, old = base
    unchanged = {name for name in old if name.startswith("(")} | {"data check", "splits"}
    assert changed_keys(old, compute_keys(config)) == old.keys() - unchanged


def test_paths_of_data_and_model_change_no_key(folder, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "another folder").mkdir()
    (copy / "digits_clip.json").rename(copy / "another folder" / "digits_clip.json")
    original_keys = compute_keys(config_with(folder, ("clip.model", "digits_clip.json")))
    copy_keys = compute_keys(config_with(copy, ("clip.model", "another folder/digits_clip.json")))
    assert changed_keys(original_keys, copy_keys) == set()


def test_times_of_images_change_no_key_and_one_byte_changes_those_of_all_results(folder, base, tmp_path):
    copy, image = tmp_path / "copy", "images/ink/one/0.png"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # as rsync without -t
    os.utime(copy / image, (0, 0))
    assert changed_keys(base[1], compute_keys(config_with(copy))) == set()
    content = bytearray((copy / image).read_bytes())
    content[-1] ^= 1  # in PNG's checksum of the end, which is not read
    (copy / image).write_bytes(content)
    os.utime(copy / image, (0, 0))
    changed = changed_keys(base[1], compute_keys(config_with(copy)))
    assert changed == base[1].keys() - {"(clip)", "(class names)"}


def test_images_are_read_again_only_when_a_file_may_have_changed(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    config, image, num_read = config_with(tmp_path / "copy"), tmp_path / "copy/images/ink/one/0.png", []
    read = contents.read_image_bytes
    monkeypatch.setattr(contents, "read_image_bytes", lambda *image: num_read.append(1) or read(*image))

    def num_read_for_plan() -> int:
        num_read.clear()
        make_plan(config, Console(quiet=True))
        return len(num_read)

    monkeypatch.setattr(plans, "SETTLED_NS", 10**15)
    assert [num_read_for_plan(), num_read_for_plan()] == [30, 30], "files that changed a moment ago may change again"
    monkeypatch.setattr(plans, "SETTLED_NS", -1)
    assert [num_read_for_plan(), num_read_for_plan()] == [30, 0]
    times, content = image.stat(), image.read_bytes()
    image.write_bytes(content)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [num_read_for_plan(), num_read_for_plan()] == [30, 0], "of the same size and modification time"


def test_images_that_change_between_their_fingerprint_and_the_scan_stop_the_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    plan = make_plan(config_with(tmp_path / "copy"), Console(quiet=True))
    progress = SimpleNamespace(expect=lambda *counts: None, advance=lambda *counts: None)
    stage = SimpleNamespace(
        session=SimpleNamespace(progress=progress),
        execute=lambda work: [item.function(*item.arguments, progress) for item in work],
    )
    assert data_check._scan(plan, stage).num_rows == 30
    (tmp_path / "copy/images/ink/one/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="images of .*copy changed while they were read: rerun"):
        data_check._scan(plan, stage)


def test_images_that_nobody_may_read_stop_the_run_at_once(folder, tmp_path, monkeypatch):
    def refuse(*image: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(contents, "read_image_bytes", refuse)
    with pytest.raises(
        UserError, match="no image of .* can be read .Permission denied.: give this user the permission"
    ):
        make_plan(config_with(folder, ("storage", str(tmp_path / "storage"))), Console(quiet=True))


def test_a_field_must_declare_what_it_affects():
    with pytest.raises(TypeError, match=r"Undeclared\.value does not declare what it affects.*affects\("):

        class Undeclared(Section):
            value: int = 1

    class Declared(Section, affects=("training",)):
        value: int = 1
        shots: Annotated[int, affects("splits")] = 1

    class Subclass(Declared):
        extra: int = 1

    effects = {name: field_effects(field) for name, field in Subclass.model_fields.items()}
    assert effects == {"value": {"training"}, "shots": {"splits"}, "extra": {"training"}}
    with pytest.raises(TypeError, match="unknown effect 'trainings'"):
        affects("trainings")


@pytest.mark.parametrize(
    "variants, affinity, measured",
    [
        (None, "gradient", ["transfer", "gradient", "features"]),
        (["coop", "zero_shot", "all_in_one"], "transfer", []),
        (["coop", "grouped"], "transfer", ["transfer"]),
        (["mmap_random_groups"], "features", ["features"]),
        (["grouped"], "gradient", ["gradient"]),
        (["hipro"], "transfer", ["gradient"]),
        (["hipro", "grouped"], "transfer", ["transfer", "gradient"]),
    ],
)
def test_a_run_measures_the_affinities_that_its_methods_need(folder, variants, affinity, measured):
    """A benchmark trains a global prompt, or each task alone, only if a method needs it; the pipeline measures all."""
    plan = make_plan(config_with(folder, ("grouping.affinity", affinity)), Console(quiet=True), variants=variants)
    assert list(plan.affinities) == measured
    assert len(plan.grouping_costs()) == len(measured)
    costs = "\n".join(plan.grouping_costs())
    assert ("3 trainings of a task alone, 9 forward passes of a task's training images (36 images)" in costs) == (
        "transfer" in measured
    )
    assert costs.startswith(f"affinity {affinity}: ") == ("decides the groups (sum)" in costs) == (affinity in measured)


# Fields that work items read

CHANGES_NO_NUMBER = {
    "clip.activation_memory_gib",  # memory
    "training.checkpoint_every",
    "cluster.cpus_per_worker",  # threads
}
VALIDATORS = ("_rows_divide_length", "_ordered")
"""Validators read fields of every config, such as that of an adapter file."""
READERS = (
    *("splits", "test_features", "training_features", "global_prompt", "zero-shot losses", "losses", "grouping"),
    *VARIANTS,
)


@pytest.fixture(scope="module")
def work(folder):
    """Name → work items (the last one is tested), method, and effects of the fields that it may read."""
    changes = {"storage": "worked", "training.epochs": 1, "data.root": "broken.csv", "data.max_broken_fraction": 0.5}
    plan = prepare_plan(config_with(folder, *changes.items()))
    global_prompt = global_prompt_work_item(plan)
    trainings = {}
    singles = plan_trainings(plan, "each_alone", None, trainings)
    losses = loss_work_items(plan, singles)
    sources = GroupingSources.of(global_prompt.artifact, single_tasks(plan, singles, losses))
    grouping = grouping_artifact(plan, sources)
    solve = WorkItem("grouping", solve_grouping, (plan, sources, grouping), grouping)
    measured = [global_prompt, *(training.work_item for training in singles), *losses]
    work_by_name = {
        "splits": ([WorkItem("splits", build_splits, (plan, plan.splits), plan.splits)], "mmap", {"splits"}),
        "global_prompt": ([global_prompt], "mmap", {"training", "global_prompt"}),
        "zero-shot losses": (losses[:1], "mmap", {"evaluation"}),
        "losses": ([singles[0].work_item, losses[1]], "mmap", {"training", "evaluation"}),
        "grouping": ([*measured, solve], "mmap", {"grouping"}),
    }
    for variant in VARIANTS:
        (training, *_) = plan_trainings(plan, variant, fake_grouping(plan), trainings, fake_affinities(plan, "ff"))
        dependencies = [features.work_item for features in training.features]
        for source in training.init_from:
            dependencies += [*(features.work_item for features in source.features), source.work_item]
        method = training.spec.method
        effects = {"training", "evaluation"} if get_method(method).trainable else {"evaluation"}
        work_by_name[variant] = ([*dependencies, training.work_item], method, effects)
        for features in training.features:
            split = features.artifact.inputs["split"]
            effect = "test_features" if split == "test" else "training_features"
            work_by_name.setdefault(effect, ([features.work_item], method, {effect}))
    return work_by_name


@pytest.mark.parametrize("name", READERS)
def test_work_reads_only_fields_that_affect_it(name, work, monkeypatch):
    monkeypatch.setattr(TrainingSpec, "device", lambda spec: torch.device("cpu"))  # the original asks Ray
    work_items, method, effects = work[name]
    for item in work_items[:-1]:
        execute(item)
    names = {}
    for path, _, _ in fields():
        *sections, field_name = path.split(".")
        names[type(field_value(Config(), ".".join(sections))) if sections else Config, field_name] = path
    fields_read, get_attribute = set(), Section.__getattribute__

    def recording(section: Section, attribute: str) -> Any:
        if (type(section), attribute) in names and sys._getframe(1).f_code.co_name not in VALIDATORS:
            fields_read.add(names[type(section), attribute])
        return get_attribute(section, attribute)

    load_clip.cache_clear()
    shutil.rmtree(work_items[-1].artifact.folder, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", recording, raising=False)
        execute(work_items[-1])
    assert len(fields_read) >= 3
    sources = with_sources([name]) if name in VARIANTS else []
    sections = {get_method(kind).section for kind in (method, *(VARIANTS[source].method for source in sources))}
    method_fields = {path for path in fields_read if path.partition(".")[0] in sections}
    declared = {path for path in fields_read if field_effects(FIELDS[path]) & {*effects, "data", "clip"}}
    declared |= {path for path in method_fields if "method" in field_effects(FIELDS[path])}
    if name.endswith("features"):
        declared.add("mmap.text_prompt_position")  # read by the text tower
    assert fields_read - declared <= CHANGES_NO_NUMBER


def execute(item: WorkItem) -> None:
    """Run a work item in this process."""
    if not item.artifact.is_complete():
        item.function(*item.arguments, PROGRESS)


PROGRESS = SimpleNamespace(**dict.fromkeys(("post", "expect", "advance"), lambda *arguments: None))


def build_splits(plan: Plan, artifact: Artifact, progress: Any) -> None:
    """Run stage 1 without Ray."""
    with data_check._artifact(plan).writer() as writer:
        table = check_images(plan.dataset_index.root, plan.dataset_index.images, samples=())
        pq.write_table(table, writer.folder / data_check.IMAGES)

    def execute_all(work_items: list[WorkItem]) -> list[Any]:
        return [item.function(*item.arguments, progress) for item in work_items]

    stage = SimpleNamespace(session=SimpleNamespace(progress=progress, folder=plan.storage.folder), execute=execute_all)
    with artifact.writer() as writer:
        splits_stage._build(plan, stage, writer)


def solve_grouping(plan: Plan, sources: GroupingSources, artifact: Artifact, progress: Any) -> None:
    compute_grouping(plan, sources, artifact)
