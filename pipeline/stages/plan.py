"""Plan of a run: everything that is decided, and validated, before any worker starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.buckets import AnyPath
from pipeline.clip.load import (
    ClipIdentity,
    assumed_preprocessing,
    build_meta_towers,
    clip_identity,
    fetch_weights,
    local_paths,
    with_absolute_paths,
)
from pipeline.clip.towers import ClipTowers
from pipeline.config import (
    BUILTIN_DIGITS,
    RESULT_EFFECTS,
    ClipConfig,
    Config,
    MmapConfig,
    content_hash,
    to_yaml,
    values_affecting,
)
from pipeline.data.contents import UNREADABLE, dataset_fingerprint, read_identities
from pipeline.data.index import DatasetIndex, index_dataset, open_root, unexpected_counts
from pipeline.data.names import pluralize
from pipeline.data.parquet import FORMAT, SplitDescription, SplitReader
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.files import SETTLED_NS, create_folder, read_json, write_advice, write_file, write_json
from pipeline.grouping.affinities import AFFINITIES, Features, Gradient, Transfer
from pipeline.grouping.search.constraints import check_constraints
from pipeline.methods.method import Method
from pipeline.methods.mmap import MmapShape
from pipeline.methods.registry import DEFAULT_VARIANTS, METHODS, VARIANTS, training_config, with_sources
from pipeline.runtime.session import is_below_home, open_storage
from pipeline.runtime.storage import Artifact, Storage
from pipeline.runtime.tracking.mlflow_adapter import check_reachable, resolve_tracking_uri, without_password
from pipeline.stages.finished_run import CONFIG, PROVENANCE
from pipeline.training.aggregation import check_packages

if TYPE_CHECKING:
    from rich.console import Console

RESULTS_VERSION = 9
"""Part of all keys; increased with every change of the code that changes results of a training or evaluation, so that
earlier artifacts and runs are not reused."""

IMAGE_CONTENTS = "image_contents"
FINGERPRINT = "fingerprint.json"
FIRST_MESSAGE_AFTER_S, NEXT_MESSAGE_AFTER_S = 3, 15


@dataclass(frozen=True)
class Plan:
    """Validated run; `dataclasses.replace` makes the plan of another config or of other splits."""

    config: Config
    storage: Storage
    dataset_index: DatasetIndex
    images: str
    """Fingerprint of the data set's contents."""
    clip: ClipIdentity
    mmap_shape: MmapShape | None
    """None: no method of the run is MmAP."""
    splits: Artifact
    output_kind: str = "runs"
    """Folder of the storage that contains the run's folder."""
    extra_key_inputs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of the key besides the config."""
    affinities: tuple[str, ...] = tuple(AFFINITIES)
    """Affinities that the run measures; the groups are by that of the config."""

    @cached_property
    def key(self) -> str:
        """Hash of everything that determines the run's results."""
        return content_hash(
            {
                "version": RESULTS_VERSION,
                "clip": asdict(self.clip),
                "splits": self.splits.key,
                "config": values_affecting(self.config, *RESULT_EFFECTS),
                **self.extra_key_inputs,
            }
        )

    @cached_property
    def split_description(self) -> SplitDescription:
        """Description of the splits, which must be complete."""
        return SplitReader(self.splits.download("splits.json")).description

    @property
    def num_test_images(self) -> dict[str, int]:
        """Task → number of its test images; the splits must be complete."""
        counts = self.split_description.counts["test"]
        return {task: counts[task] for task in self.tasks}

    def grouping_costs(self, num_existing: int = 0, num_existing_images: int = 0) -> list[str]:
        """Describe the work that the affinities take, a line for each affinity.

        Args:
            num_existing: number of tasks of a finished run to which the run's tasks are added.
            num_existing_images: number of their training images.
        """
        num_tasks, similarity = len(self.tasks), self.config.grouping.gradient_similarity
        num_images = self.config.data.shots * sum(map(len, self.dataset_index.classes.values()))
        num_passes = num_tasks * (num_tasks + 2 * num_existing)
        num_passed = num_images * (num_tasks + num_existing) + num_tasks * num_existing_images
        gradients = "gradients at the global prompt's snapshots" if num_existing else "one training of all tasks"
        costs = {
            Transfer.name: f"{pluralize(num_tasks, 'training')} of a task alone, "
            f"{pluralize(num_passes, 'forward pass')} of a task's training images ({num_passed:,} images)",
            Gradient.name: f"{gradients} ({similarity})",
            Features.name: f"one forward pass of all training images ({num_images:,} images)",
        }
        taken = self.config.grouping.affinity
        return [
            f"affinity {name}: {costs[name]}"
            + (f"; it decides the groups ({self.config.grouping.objective})" * (name == taken))
            for name in sorted(self.affinities, key=lambda name: name != taken)
        ]

    @property
    def folder(self) -> Path:
        """Folder of the run's reports."""
        return self.storage.folder / self.output_kind / f"{self.config.name}-{self.key}"

    @property
    def tasks(self) -> list[str]:
        return list(self.dataset_index.classes)

    @property
    def title(self) -> str:
        """Title for the user; it ends with a part of the key, as runs may differ in other options."""
        config = self.config
        return f"{config.name}, {pluralize(config.data.shots, 'shot')}, seed {config.seed} ({self.key[:6]})"

    @property
    def shared_paths(self) -> list[AnyPath]:
        """The user's data, model and weights, which all machines must see."""
        data = [self.dataset_index.root] if self.config.data.root != BUILTIN_DIGITS else []
        return [*data, *local_paths(self.config.clip)]

    def artifact(self, stage: str, inputs: dict[str, Any]) -> Artifact:
        return Artifact(self.storage, stage, inputs)


def make_plan(
    config: Config,
    console: Console,
    reuse_checks_of: Plan | None = None,
    output_kind: str = "runs",
    extra_key_inputs: Mapping[str, Any] | None = None,
    other_tasks: Sequence[str] = (),
    variants: Sequence[str] | None = None,
    fetches_weights: bool = True,
) -> Plan:
    """Check the config against data, model, storage and tracking server, and create the run's folder.

    Args:
        reuse_checks_of: plan of a config that differs only in shots and seed, whose checks are not repeated.
        output_kind, extra_key_inputs: see Plan.
        other_tasks: tasks whose groups the run's tasks join; the grouping's constraints cover all of them.
        variants: names of registry.VARIANTS that the run trains; None: those of the pipeline.
        fetches_weights: whether CLIP's weights are fetched, if they are on the Hugging Face Hub and not in its cache.

    Raises:
        UserError: The first problem found, with a remedy.
    """
    if reuse_checks_of:
        config = _with_absolute_paths(config)
        storage, dataset_index, images, clip, shape = (
            reuse_checks_of.storage,
            reuse_checks_of.dataset_index,
            reuse_checks_of.images,
            reuse_checks_of.clip,
            reuse_checks_of.mmap_shape,
        )
    else:
        storage = open_storage(config.storage, config.cache)
        if is_below_home(config.storage):
            console.print(
                f"  results are in {storage.folder}, below the home folder of the head, since the working directory of "
                "a submitted job is temporary; --storage /FOLDER or s3://BUCKET/FOLDER chooses another place",
                markup=False,
                highlight=False,
            )
        dataset_index = _find_data(config, storage)
        unknown_tasks = set(config.clip.task_templates) - {*dataset_index.classes, *other_tasks}
        notes = [f"clip.task_templates: unknown task {task!r}" for task in sorted(unknown_tasks)]
        if config.clip.model == BUILTIN_DIGITS != config.data.root:
            notes.append(
                "clip.model=builtin:digits, the tiny CLIP of the demo, only knows handwritten digits: for other images "
                f"leave out clip.model, clip.pretrained and configs/demo.yaml, to get {ClipConfig().model} with the "
                f"weights {ClipConfig().pretrained!r}, or name another CLIP (mmap-clip list-models)"
            )
        console.print(f"  {dataset_index.describe()}", markup=False, highlight=False)
        _print_notes(console, *dataset_index.notes, *unexpected_counts(config.data, dataset_index), *notes)
        if "open_clip" not in sys.modules:
            console.print("  importing open_clip ...", highlight=False)
        if fetches_weights:
            fetch_weights(config.clip, lambda text: console.print(f"  {text}", markup=False, highlight=False))
        config = _with_absolute_paths(config)
        clip, shape = _check_model(config, dataset_index, variants or (*DEFAULT_VARIANTS, *config.baselines))
        _print_notes(console, *assumed_preprocessing(config.clip))
        check_constraints([*other_tasks, *dataset_index.classes], **config.grouping.constraints)
        tracking_uri = resolve_tracking_uri(config.tracking.uri, storage.folder)
        if not tracking_uri.startswith("sqlite:"):
            console.print(
                f"  connecting to MLflow at {without_password(tracking_uri)} ...", markup=False, highlight=False
            )
        check_reachable(tracking_uri)
        images = _content_fingerprint(dataset_index, storage, console)  # last, since it may take minutes

    splits = Artifact(
        storage,
        "splits",
        {"format": FORMAT, "images": images, "config": values_affecting(config, "splits")},
    )
    affinities = reuse_checks_of.affinities if reuse_checks_of else _measured_affinities(config, variants)
    inputs = extra_key_inputs or {}
    plan = Plan(config, storage, dataset_index, images, clip, shape, splits, output_kind, inputs, affinities)
    file, text = create_folder(plan.folder) / CONFIG, to_yaml(config)
    if not file.is_file() or file.read_bytes() != text.encode():
        storage.remove(plan.folder / PROVENANCE)  # it has the SHA-256 of the earlier config
    write_file(file, text)
    return plan


def _measured_affinities(config: Config, variants: Sequence[str] | None) -> tuple[str, ...]:
    """Return the affinities that a run of these variants needs; the pipeline itself measures all."""
    if variants is None:
        return tuple(AFFINITIES)
    used = [VARIANTS[name] for name in variants]
    needed = {config.grouping.affinity} if any(variant.uses_grouping for variant in used) else set()
    needed |= {Gradient.name} if any(variant.uses_gradients for variant in used) else set()
    return tuple(name for name in AFFINITIES if name in needed)


def _with_absolute_paths(config: Config) -> Config:
    """Make paths absolute: workers may have other working directories."""
    return config.model_copy(update={"clip": with_absolute_paths(config.clip)})


def _print_notes(console: Console, *notes: str) -> None:
    for note in notes:
        console.print(f"  {note}", style="yellow", markup=False, highlight=False)


def _find_data(config: Config, storage: Storage) -> DatasetIndex:
    if config.data.root is None:
        raise UserError(
            f"data.root is not set: give a folder of images, <root>/<task>/<class>/*, a table, or {BUILTIN_DIGITS}"
        )
    root = open_root(config.data.root)
    if config.data.root == BUILTIN_DIGITS:
        root = storage.folder / "datasets" / "digits"
        try:
            write_digits(root)
        except OSError as error:
            advice = "remove this folder" if root.exists() else write_advice(error)
            raise UserError(f"the embedded digits cannot be written to {root}: {error}; {advice}") from None
    return index_dataset(config.data, root)


def _content_fingerprint(index: DatasetIndex, storage: Storage, console: Console) -> str:
    """Return the fingerprint of the images' contents, which is read again only when a file has changed."""
    artifact = Artifact(storage, IMAGE_CONTENTS, {"listing": index.listing_fingerprint()})
    if artifact.is_complete():
        return str(read_json(artifact.download() / FINGERPRINT))
    started_ns, num_read, next_message_s = time.time_ns(), 0, time.monotonic() + FIRST_MESSAGE_AFTER_S

    def on_read(number: int) -> None:
        nonlocal num_read, next_message_s
        num_read += number
        if time.monotonic() >= next_message_s:
            next_message_s = time.monotonic() + NEXT_MESSAGE_AFTER_S
            console.print(
                f"  reading the images, to find what is cached for them: {num_read:,} of {len(index.images):,}",
                highlight=False,
            )

    identities = list(read_identities(index, on_read))
    if identities and all(identity.startswith(UNREADABLE) for identity in identities):
        raise UserError(
            f"no image of {index.root} can be read ({identities[0].removeprefix(UNREADABLE)}): give this user the "
            "permission to read the files, not only to list them"
        )
    images = dataset_fingerprint(index, identities)
    is_settled = all(abs(started_ns - image.changed_ns) > SETTLED_NS for image in index.images)
    if is_settled and not any(identity.startswith(UNREADABLE) for identity in identities):
        with artifact.writer() as writer:
            write_json(writer.folder / FINGERPRINT, images)
    return images


def _check_model(
    config: Config, dataset_index: DatasetIndex, variants: Sequence[str]
) -> tuple[ClipIdentity, MmapShape | None]:
    identity, towers = clip_identity(config.clip), build_meta_towers(config.clip)
    check_methods(config, dataset_index, towers, variants)
    used = [VARIANTS[name] for name in variants]
    uses_mmap = any(
        variant.uses_grouping or variant.uses_gradients or METHODS[variant.method].Options is MmapConfig
        for variant in used
    )
    return identity, MmapShape.of(config.mmap, towers) if uses_mmap else None


def check_methods(config: Config, dataset_index: DatasetIndex, towers: ClipTowers, names: Sequence[str]) -> None:
    """Check that some of registry.VARIANTS, and their options, fit the towers.

    Raises:
        UserError: The first that does not fit.
    """
    class_names = {
        task: [dataset_index.class_names[name] for name in names] for task, names in dataset_index.classes.items()
    }
    workers, num_classes = config.cluster.workers_per_training, min(map(len, class_names.values()))
    check_packages(config.training.aggregation)
    for name in with_sources(names):
        method = VARIANTS[name].method
        kind, batch = METHODS[method], training_config(method, config).batch_size
        _check_aggregation(config, name, [variant for variant in names if name in with_sources([variant])])
        if dataset_index.multi_label and not kind.takes_several_labels:
            valid = [name for name, method in METHODS.items() if method.takes_several_labels]
            raise UserError(
                f"{kind.title} takes one label per image, by its loss or its classifier, and data.multi_label is true: "
                f"use other methods: {', '.join(valid)}"
            )
        _check_image_layers(config, kind, towers)
        kind.check(config, towers)
        kind.tokenize(config, towers.tokenizer, class_names)
        if workers > min(batch, num_classes):
            raise UserError(
                f"cluster.workers_per_training={workers} is more than the images of a batch ({batch}, batch_size of "
                f"{kind.title}) or the classes of a task ({num_classes}): use fewer workers"
            )


def _check_aggregation(config: Config, name: str, variants: Sequence[str]) -> None:
    """`variants`: those of the run that need this one."""
    variant = VARIANTS[name]
    kind, aggregation = METHODS[variant.method], training_config(variant.method, config).aggregation
    if kind.takes_steps and kind.mixes_tasks and variant.scope != "single-task" and aggregation != "sum":
        raise UserError(
            f"training.aggregation={aggregation} weighs tasks that have a batch each, and {variant.title} draws its "
            f"batches from the images of all tasks: add --{kind.section}.training.aggregation sum, or leave out "
            f"{', '.join(variants)}"
        )


def check_single_label(config: Config, job: str) -> None:
    """Raise UserError if images may have several labels, which a job does not take."""
    if config.data.multi_label:
        raise UserError(
            f"{job} takes one label per image, and data.multi_label is true: use mmap-clip full-pipeline or benchmark"
        )


def _check_image_layers(config: Config, kind: type[Method], towers: ClipTowers) -> None:
    if kind.needs_image_layers() and not towers.takes_image_prompts:
        others = [name for name, other in METHODS.items() if not other.needs_image_layers()]
        raise UserError(
            f"clip.model={config.clip.model} takes no prompts in its image tower ({towers.image_tower.reason}), which "
            f"{kind.title} needs. Use a model that takes them (mmap-clip list-models --method {kind.name}), or "
            f"other methods: mmap-clip benchmark --methods {' '.join(others)}"
        )
