"""Keys of runs and artifacts change with all that results depend on, and with nothing else.

Every field of the config is changed, and the keys that change are those of what it says that it affects, and of what
rests on that. That fields say it rightly is seen where work is done: it reads no field that does not affect it.
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

from pipeline.clip.load import build_meta_towers, load_clip
from pipeline.config import BUILTIN_DIGITS, RESULT_EFFECTS, Config, Section, field_effects, fields, parse_config
from pipeline.config.fields import affects
from pipeline.data.checked_images import check_images
from pipeline.data.parquet import SplitReader, plan_parts, scan_image, write_part
from pipeline.methods.registry import METHODS, VARIANTS, get_method, training_config
from pipeline.runtime.stage import WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages import data_check, training_spec
from pipeline.stages import plan as plans
from pipeline.stages import splits as splits_stage
from pipeline.stages.global_prompt import global_prompt_work_item
from pipeline.stages.group_trainings import plan_trainings
from pipeline.stages.grouping import compute_grouping, grouping_artifact
from pipeline.stages.plan import Plan, make_plan
from pipeline.stages.training_spec import TrainingSpec

TASKS, CLASSES, PER_CLASS = ("ink", "chalk", "neon"), ("one", "two"), 5
BASE: dict[str, Any] = {
    "data": {"shots": 2, "columns": {"label": "label"}},
    "clip": {"model": BUILTIN_DIGITS, "pretrained": BUILTIN_DIGITS},
    "mmap": {"prompt_length": 4, "source_rows": 4},
    "training": {"epochs": 2, "batch_size": 3},
    **{
        section: {**SMALL.model_dump(mode="json")[section], "training": {"epochs": None, "batch_size": 2}}
        for section in {method.section for method in METHODS.values()} - {None, "mmap"}
    },
}
OTHERS: dict[str, Any] = {
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
    "clip.template": "a sketch of a {}.",
    "clip.task_templates": {"neon": "a light that shows a {}."},
    "mmap.prompt_length": 8,
    "mmap.source_rows": 2,
    "mmap.source_columns": 4,
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
"""Field → another valid value, where its type does not give one."""
FIELDS = {name: field for name, field, _ in fields()}
TASK_WITH_TEMPLATE = "neon"
FOUND = {
    *("data.root", "data.columns", "data.use_official_splits", "data.tasks", "data.class_names"),
    *("clip.pretrained", "clip.quick_gelu"),
}
"""Fields whose other value finds something else; the others' finds the same by another way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and tables of them."""
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
        *path, last = name.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse_config(values)


@dataclass(frozen=True)
class Planned:
    """A key, and what it should change with."""

    key: Any
    effects: frozenset[str] = frozenset()
    """Of the fields that enter it by their values."""
    rests_on: tuple[str, ...] = ()
    method: str | None = None
    """Whose section and training enters."""
    tasks: tuple[str, ...] = TASKS


def checked(config: Config) -> Plan:
    """With finished splits, which stage 1 would make on Ray."""
    plan = make_plan(config, Console(quiet=True))
    if not plan.splits.is_complete():
        root = plan.dataset_index.root
        images = [
            replace(scan_image(root, of.path, of.task, of.class_folder), official_split=of.official_split)
            for of in plan.dataset_index.images
        ]
        splits, description = splits_stage.draw_splits(plan, [image for image in images if not image.error])
        sizes = {image.path: image.size for image in images}
        parts = plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes)
        with plan.splits.writer() as writer:
            for part in parts:
                write_part(root, part, description, writer.folder)
            (writer.folder / "splits.json").write_text(json.dumps(asdict(description)))
    return plan


def grouping_of(plan: Plan, key: str) -> dict[str, Any]:
    """What stage 3 could find: the same groups, and affinities that are others under another key."""
    affinity = np.full((len(plan.tasks), len(plan.tasks)), int(key, 16) / 2**64)
    return {"groups": [list(plan.tasks[:2]), list(plan.tasks[2:])], "affinity": affinity.tolist()}


def planned(config: Config) -> dict[str, Planned]:
    """All keys of a run, in the order of its work; what is found, and no key, in brackets."""
    plan = checked(config)
    description = SplitReader(plan.splits.download()).description
    found = {
        "(images)": Planned(plan.dataset_index.fingerprint()),
        "(clip)": Planned(asdict(plan.clip)),
        "(split images)": Planned(description.content),
        "(words)": Planned([description.class_names_for(task) for task in description.tasks]),
    }
    encoded, trained_on = ("(clip)", "(split images)"), ("(clip)", "(split images)", "(words)")
    found["run"] = Planned(plan.key, frozenset(RESULT_EFFECTS), ("(images)", "(clip)"))
    found["data check"] = Planned(data_check._artifact(plan).key, rests_on=("(images)",))
    found["splits"] = Planned(plan.splits.key, frozenset({"splits"}), ("(images)",))
    global_prompt = global_prompt_work_item(plan).artifact
    found["global prompt"] = Planned(
        global_prompt.key, frozenset({"training", "method", "global_prompt"}), trained_on, "mmap"
    )
    grouping = grouping_artifact(plan, global_prompt)
    found["grouping"] = Planned(grouping.key, frozenset({"grouping"}), ("global prompt",))
    trainings = {}
    for variant in VARIANTS:
        plan_trainings(plan, variant, grouping_of(plan, grouping.key), trainings)
    for variant, of_variant in trainings.items():
        for training in of_variant:
            method, tasks = training.spec.method, training.spec.tasks
            for kind, features in (
                ("test", training.spec.test_features),
                ("training", training.spec.training_features),
            ):
                for task, artifact in features.items():
                    name = f"{kind} features of {task}" + (f" for {method}" if kind == "training" else "")
                    of_method = method if kind == "training" else None
                    found[name] = Planned(artifact.key, frozenset({f"{kind}_features"}), encoded, of_method, (task,))
            rests_on = [*trained_on, *(["grouping"] if get_method(method).uses_affinities else [])]
            if training.init_from:
                rests_on.append(f"{training.init_from.variant}: {training.init_from.spec.tasks}")
            effects = {"method", "training", "evaluation"} if get_method(method).trainable else {"evaluation"}
            name = f"{variant}: {tasks}"
            found[name] = Planned(training.artifact.key, frozenset(effects), tuple(rests_on), method, tasks)
    return found


@pytest.fixture(scope="module", autouse=True)
def towers_once():
    """What takes long, and knows nothing but the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "build_meta_towers", cache(build_meta_towers))
        yield


@pytest.fixture(scope="module")
def base(folder):
    config = config_with(folder)
    return config, planned(config)


def another_value(name: str, value: Any) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.75 * value or 0.125
    for candidate in values_of(FIELDS[name].annotation):
        if candidate != value:
            return candidate
    pytest.fail(f"{name}={value!r}: give another valid value in OTHERS")


def values_of(annotation: Any) -> tuple[Any, ...]:
    """Of an annotation that says them, or allows numbers."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if annotation in (int, float):
        return (3,)
    return tuple(value for of in typing.get_args(annotation) for value in values_of(of))


def value_at(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def concerns(name: str, of: Planned, before: Config, after: Config) -> bool:
    """Whether a key is of what a field is about: fields are about methods, tasks, or all."""
    if of.method is None:
        return True
    if ".training." in f".{name}":
        return training_config(of.method, before) != training_config(of.method, after)
    if field_effects(FIELDS[name]) == {"method"}:
        return name.partition(".")[0] == get_method(of.method).section
    return name != "clip.task_templates" or TASK_WITH_TEMPLATE in of.tasks


def changed_keys(before: dict[str, Planned], after: dict[str, Planned]) -> set[str]:
    names = before.keys() | after.keys()
    return {name for name in names if name not in before or name not in after or before[name].key != after[name].key}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_the_keys_of_what_it_affects_and_no_others(name, folder, base, monkeypatch):
    monkeypatch.chdir(folder)
    config, before = base
    changed = config_with(folder, (name, another_value(name, value_at(config, name))))
    assert value_at(changed, name) != value_at(config, name)
    after, effects = planned(changed), field_effects(FIELDS[name])
    if ".training." in name:  # what a method has instead affects the same
        effects |= field_effects(FIELDS[name.partition(".")[2]])
    expected = set()
    for of, key in after.items():
        found_another = of.startswith("(") and before[of].key != key.key
        rests_on_changed = any(up in expected for up in key.rests_on)
        if found_another or rests_on_changed or (effects & key.effects and concerns(name, key, config, changed)):
            expected.add(of)
    expected |= before.keys() - after.keys()
    assert changed_keys(before, after) == expected
    assert bool(expected) == bool(effects - {"data", "clip"} or name in FOUND)


def test_other_code_changes_the_keys_of_all_numbers(folder, base, monkeypatch):
    for module in (plans, training_spec):
        monkeypatch.setattr(module, "RESULTS_VERSION", plans.RESULTS_VERSION + 1)
    config, before = base
    same = {name for name in before if name.startswith("(")} | {"data check", "splits"}
    assert changed_keys(before, planned(config)) == before.keys() - same


def test_the_place_of_data_and_model_changes_no_key(folder, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "another folder").mkdir()
    (copy / "digits_clip.json").rename(copy / "another folder" / "digits_clip.json")
    here = planned(config_with(folder, ("clip.model", "digits_clip.json")))
    there = planned(config_with(copy, ("clip.model", "another folder/digits_clip.json")))
    assert changed_keys(here, there) == set()


def test_times_of_files_change_nothing_that_takes_long(folder, base, tmp_path):
    """They tell that an image may have changed, so that images are read again; what is then the same is found."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    os.utime(copy / "images/ink/one/0.png", (10**9, 10**9))
    there = planned(config_with(copy))
    assert changed_keys(base[1], there) == {"(images)", "data check", "splits", "run"}


def test_a_field_that_does_not_say_what_it_affects_does_not_import():
    with pytest.raises(TypeError, match=r"Silent\.value does not declare what it affects.*affects\("):

        class Silent(Section):
            value: int = 1

    class Said(Section, affects=("training",)):
        value: int = 1
        other: Annotated[int, affects("splits")] = 1

    class Heir(Said):
        more: int = 1

    effects = {name: field_effects(field) for name, field in Heir.model_fields.items()}
    assert effects == {"value": {"training"}, "other": {"splits"}, "more": {"training"}}
    with pytest.raises(TypeError, match="unknown effect 'trainings'"):
        affects("trainings")


# What work reads

CHANGES_NO_NUMBER = {
    "clip.activation_memory_gib",  # memory
    "training.checkpoint_every",
    "cluster.cpus_per_worker",  # threads
}
VALIDATORS = ("_rows_divide_length", "_ordered")
"""Look at every config that is made, such as that of a prompts file."""
READERS = ("splits", "test_features", "training_features", "global_prompt", "grouping", *VARIANTS)


@pytest.fixture(scope="module")
def work(folder):
    """Name → work and what has to be done before, its method, and the effects of what it may read."""
    changes = {"storage": "worked", "training.epochs": 1, "data.root": "broken.csv", "data.max_broken_fraction": 0.5}
    plan = checked(config_with(folder, *changes.items()))
    global_prompt = global_prompt_work_item(plan)
    grouping = grouping_artifact(plan, global_prompt.artifact)
    solve = WorkItem("grouping", group, (plan, global_prompt, grouping), grouping)
    found = {
        "splits": ([WorkItem("splits", build_here, (plan, plan.splits), plan.splits)], "mmap", {"splits"}),
        "global_prompt": ([global_prompt], "mmap", {"training", "global_prompt"}),
        "grouping": ([global_prompt, solve], "mmap", {"grouping"}),
    }
    trainings = {}
    for variant in VARIANTS:
        (training, *_) = plan_trainings(plan, variant, grouping_of(plan, "ff"), trainings)
        before = [features.work_item for features in training.features]
        if training.init_from:
            before += [*(features.work_item for features in training.init_from.features), training.init_from.work_item]
        method = training.spec.method
        effects = {"training", "evaluation"} if get_method(method).trainable else {"evaluation"}
        found[variant] = ([*before, training.work_item], method, effects)
        for features in training.features:
            split = features.artifact.inputs["split"]
            effect = "test_features" if split == "test" else "training_features"
            found.setdefault(effect, ([features.work_item], method, {effect}))
    return found


@pytest.mark.parametrize("name", READERS)
def test_work_reads_only_fields_that_affect_it(name, work, monkeypatch):
    monkeypatch.setattr(TrainingSpec, "device", lambda work: torch.device("cpu"))  # which asks Ray
    todo, method, effects = work[name]
    for item in todo[:-1]:
        execute(item)
    names = {}
    for path, _, _ in fields():
        *sections, last = path.split(".")
        names[type(value_at(Config(), ".".join(sections))) if sections else Config, last] = path
    read, get = set(), Section.__getattribute__

    def recording(section: Section, attribute: str) -> Any:
        if (type(section), attribute) in names and sys._getframe(1).f_code.co_name not in VALIDATORS:
            read.add(names[type(section), attribute])
        return get(section, attribute)

    load_clip.cache_clear()
    shutil.rmtree(todo[-1].artifact.folder, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", recording, raising=False)
        execute(todo[-1])
    assert len(read) >= 3
    own = {path for path in read if path.partition(".")[0] == get_method(method).section}
    said = {path for path in read if field_effects(FIELDS[path]) & {*effects, "data", "clip"}}
    said |= {path for path in own if "method" in field_effects(FIELDS[path])}
    if name.endswith("features"):
        said.add("mmap.text_prompt_position")  # of the text tower
    assert read - said <= CHANGES_NO_NUMBER


def execute(item: WorkItem) -> None:
    """In this process."""
    if not item.artifact.is_complete():
        item.function(*item.arguments, BOARD)


ignored = SimpleNamespace(remote=lambda *arguments: None)
BOARD = SimpleNamespace(post=ignored, expect=ignored, advance=ignored)


def build_here(plan: Plan, artifact: Artifact, progress: Any) -> None:
    """Stage 1, but for Ray."""
    with data_check._artifact(plan).writer() as writer:
        table = check_images(plan.dataset_index.root, plan.dataset_index.images, samples=())
        pq.write_table(table, writer.folder / data_check.IMAGES)

    def execute_all(work: list[WorkItem]) -> list[Any]:
        return [item.function(*item.arguments, progress) for item in work]

    stage = SimpleNamespace(session=SimpleNamespace(progress=progress, folder=plan.storage.folder), execute=execute_all)
    with artifact.writer() as writer:
        splits_stage._build(plan, stage, writer)


def group(plan: Plan, global_prompt: WorkItem, artifact: Artifact, progress: Any) -> None:
    compute_grouping(plan, global_prompt.artifact, artifact)
