"""The plan of a run: all that is decided before its work. What the user can get wrong is checked here, before any
worker starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import ClipIdentity, build_meta_towers, clip_identity, weights_file
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, RESULT_EFFECTS, Config, content_hash, to_yaml, values_affecting
from pipeline.data.index import DatasetIndex, index_dataset, unexpected_counts
from pipeline.data.parquet import FORMAT, SplitDescription, SplitReader
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.files import create_folder, write_file
from pipeline.grouping.search.constraints import check_constraints
from pipeline.methods.mmap import MmapShape
from pipeline.methods.registry import DEFAULT_VARIANTS, METHODS, VARIANTS, training_config
from pipeline.runtime.session import open_storage
from pipeline.runtime.storage import Artifact, Storage
from pipeline.runtime.tracking.mlflow_adapter import check_reachable, resolve_tracking_uri

if TYPE_CHECKING:
    from rich.console import Console

RESULTS_VERSION = 6
"""To be raised by every change of the code that changes the numbers of a training or evaluation: artifacts and runs of
before are then not taken for today's."""


@dataclass(frozen=True)
class Plan:
    """A run as it was checked; `dataclasses.replace` gives the plan of another config, or of other splits."""

    config: Config
    storage: Storage
    dataset_index: DatasetIndex
    clip: ClipIdentity
    mmap_shape: MmapShape
    splits: Artifact
    output_kind: str = "runs"
    """Folder of the storage in which the run's own is."""
    extra_key_inputs: Mapping[str, Any] = field(default_factory=dict)
    """What decides its results beside the config."""

    @cached_property
    def key(self) -> str:
        """Hash of all that decides the run's results."""
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
        """Of the splits, when they are made."""
        return SplitReader(self.splits.download()).description

    @property
    def folder(self) -> Path:
        """Of the run's reports."""
        return self.storage.folder / self.output_kind / f"{self.config.name}-{self.key}"

    @property
    def tasks(self) -> list[str]:
        return list(self.dataset_index.classes)

    @property
    def title(self) -> str:
        """For people; the end tells runs apart that differ in other options."""
        config = self.config
        return f"{config.name}, {config.data.shots} shots, seed {config.seed} ({self.key[:6]})"

    @property
    def shared_paths(self) -> list[Path]:
        """Data and weights of the user, which all machines must see."""
        config, weights = self.config, weights_file(self.config.clip)
        of_data = [self.dataset_index.root] if config.data.root != BUILTIN_DIGITS else []
        return [*of_data, *([weights] if weights and config.clip.pretrained != BUILTIN_DIGITS else [])]

    def artifact(self, stage: str, inputs: dict[str, Any]) -> Artifact:
        return Artifact(self.storage, stage, inputs)


def make_plan(
    config: Config,
    console: Console,
    reuse_checks_of: Plan | None = None,
    output_kind: str = "runs",
    extra_key_inputs: Mapping[str, Any] | None = None,
    other_tasks: Sequence[str] = (),
) -> Plan:
    """Checks the config against data, model, storage and tracking server, and makes the run's folder.

    Args:
        like: the plan of a config that differs in shots and seed only: what it has checked is not checked again.
        place, decided_by: as of Plan.
        other_tasks: whose groups the run's tasks join; the grouping's constraints are on all of them.

    Raises:
        UserError: the first thing that is wrong, with the remedy.
    """
    config = _with_absolute_paths(config)
    if reuse_checks_of:
        storage, dataset_index, clip, shape = (
            reuse_checks_of.storage,
            reuse_checks_of.dataset_index,
            reuse_checks_of.clip,
            reuse_checks_of.mmap_shape,
        )
    else:
        storage = open_storage(config.storage, config.cache)
        dataset_index = _find_data(config, storage)
        without_task = set(config.clip.task_templates) - {*dataset_index.classes, *other_tasks}
        notes = [f"clip.task_templates: there is no task {task!r}" for task in sorted(without_task)]
        if config.clip.model == BUILTIN_DIGITS != config.data.root:
            notes.append(
                "clip.model=builtin:digits, the demo's tiny CLIP, knows handwritten digits alone: for other images "
                "--clip.model ViT-B-16 --clip.pretrained openai, or a --config FILE that says so"
            )
        for note in [*unexpected_counts(config.data, dataset_index), *notes]:
            console.print(f"  {note}", style="yellow", markup=False, highlight=False)
        clip, shape = _check_model(config, dataset_index)
        check_constraints([*other_tasks, *dataset_index.classes], **config.grouping.constraints)
        check_reachable(resolve_tracking_uri(config.tracking.uri, storage.folder))

    splits = Artifact(
        storage,
        "splits",
        {"format": FORMAT, "listing": dataset_index.fingerprint(), "config": values_affecting(config, "splits")},
    )
    plan = Plan(config, storage, dataset_index, clip, shape, splits, output_kind, extra_key_inputs or {})
    write_file(create_folder(plan.folder) / "config.yaml", to_yaml(config))
    return plan


def _with_absolute_paths(config: Config) -> Config:
    """Workers may run in other folders than the driver."""
    changes: dict[str, str] = {}
    if config.clip.model.endswith(".json"):
        changes["model"] = str(Path(config.clip.model).expanduser().absolute())
    if (file := weights_file(config.clip)) and config.clip.pretrained != BUILTIN_DIGITS:
        changes["pretrained"] = str(file.absolute())
    return config.model_copy(update={"clip": config.clip.model_copy(update=changes)})


def _find_data(config: Config, storage: Storage) -> DatasetIndex:
    if config.data.root is None:
        raise UserError("data.root is not set: give the folder of your images, <root>/<task>/<class>/*, or a table")
    root = Path(config.data.root).expanduser()
    if config.data.root == BUILTIN_DIGITS:
        root = storage.folder / "datasets" / "digits"
        try:
            write_digits(root)
        except OSError as error:
            raise UserError(f"the embedded digits cannot be written to {root}: {error}; remove that folder") from None
    return index_dataset(config.data, root.absolute())


def _check_model(config: Config, dataset_index: DatasetIndex) -> tuple[ClipIdentity, MmapShape]:
    identity = clip_identity(config.clip)
    return identity, check_methods(
        config, dataset_index, build_meta_towers(config.clip), (*DEFAULT_VARIANTS, *config.baselines)
    )


def check_methods(config: Config, dataset_index: DatasetIndex, towers: ClipTowers, names: Sequence[str]) -> MmapShape:
    """Whether the options of some of registry.VARIANTS fit towers, of which only the shapes are looked at.

    Raises:
        UserError: the first that does not.
    """
    shape = MmapShape.of(config.mmap, towers)
    class_names = [[dataset_index.class_names[name] for name in names] for names in dataset_index.classes.values()]
    workers, num_classes = config.cluster.workers_per_training, min(map(len, class_names))
    for name in names:
        method = VARIANTS[name].method
        kind, batch = METHODS[method], training_config(method, config).batch_size
        kind.check(config, towers)
        templates = kind.templates_by_task(config, dataset_index.classes)
        class_tokens(towers.tokenizer, list(templates.values()), class_names, kind.num_prompt_positions(config))
        if workers > min(batch, num_classes):
            raise UserError(
                f"cluster.workers_per_training={workers} share a step's images and classes, of which a task has "
                f"{batch} (batch_size of {kind.title}) and {num_classes}: use no more workers than those"
            )
    return shape
