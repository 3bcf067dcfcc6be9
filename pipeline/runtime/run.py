"""One pipeline run on the driver: what the user can get wrong is checked here, before any worker starts."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import ClipIdentity, clip_identity, towers_without_weights, weights_file
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, Config, content_hash, to_yaml
from pipeline.data.find import Listing, find_images, unexpected_counts
from pipeline.data.parquet import FORMAT
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.files import make_folder, write_atomically
from pipeline.grouping.search.constraints import check_constraints
from pipeline.methods.mmap import MmapShape
from pipeline.methods.registry import ALWAYS, METHODS, VARIANTS, training_of
from pipeline.runtime.cluster import IN_SUBMITTED_JOB, WorkerNeeds, check_shared, joined
from pipeline.runtime.environment import run_environment
from pipeline.runtime.progress import progress_board
from pipeline.runtime.run_lock import alone_at
from pipeline.runtime.storage import Artefact, Storage, is_uri
from pipeline.runtime.tracking.journal import JOURNAL
from pipeline.runtime.tracking.mlflow_adapter import check_reachable, resolve_tracking_uri
from pipeline.runtime.tracking.tracker import Tracker, end_status

if TYPE_CHECKING:
    from rich.console import Console

PARENT = "pipeline"
"""Local name of the MLflow parent run."""
LEAST_FREE_BYTES = 200 << 20
NUMBERS_VERSION = 6
"""To be raised by every change of the code that changes the numbers of a training or evaluation: artefacts and runs of
before are then not taken for today's."""


@dataclass
class Run:
    """A pipeline run: checked by `check_run`, then `connected` and `tracked`."""

    config: Config
    storage: Storage
    listing: Listing
    clip: ClipIdentity
    mmap_shape: MmapShape
    splits: Artefact
    folder: Path
    """Reports of this run; named by the hash of all that decides its results."""
    key: str
    """That hash."""
    console: Console
    needs: WorkerNeeds = WorkerNeeds(1, 0.0)
    """Of a training's worker, on the cluster that is connected."""
    board: Any = None
    """The workers' ProgressBoard actor."""
    tracker: Tracker = field(init=False)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends the run's work from another thread."""

    @property
    def tasks(self) -> list[str]:
        return list(self.listing.classes)

    @property
    def title(self) -> str:
        """For people; the end tells runs apart that differ in other options."""
        config = self.config
        return f"{config.name}, {config.data.shots} shots, seed {config.seed} ({self.key[:6]})"

    def artefact(self, stage: str, made_from: dict[str, Any]) -> Artefact:
        return Artefact(self.storage, stage, made_from)


@contextmanager
def open_run(config: Config, console: Console) -> Iterator[Run]:
    """Checks the config against data, model, storage, tracking server and cluster; connects to them.

    Raises:
        UserError: the first thing that is wrong, with the remedy.
    """
    console.print(f"[bold]{config.name}[/]: checking data, model, storage, tracking and cluster", highlight=False)
    run = check_run(config, console)
    with connected([run]), tracked(run):
        yield run


def check_run(
    config: Config,
    console: Console,
    like: Run | None = None,
    place: str = "runs",
    decided_by: Mapping[str, Any] = MappingProxyType({}),
    other_tasks: Sequence[str] = (),
) -> Run:
    """What needs no cluster: config against data, model, storage and tracking server.

    Args:
        like: a checked run whose config differs in shots and seed only: what it has checked is not checked again.
        place: folder of the storage in which the run's own is.
        decided_by: what decides its results beside the config.
        other_tasks: whose groups the run's tasks join; the grouping's constraints are on all of them.

    Raises:
        UserError: the first thing that is wrong, with the remedy.
    """
    config = _with_absolute_paths(config)
    if like:
        storage, listing, clip, shape = like.storage, like.listing, like.clip, like.mmap_shape
    else:
        storage = open_storage(config)
        listing = _find_data(config, storage)
        without_task = set(config.clip.task_templates) - {*listing.classes, *other_tasks}
        notes = [f"clip.task_templates: there is no task {task!r}" for task in sorted(without_task)]
        if config.clip.model == BUILTIN_DIGITS != config.data.root:
            notes.append(
                "clip.model=builtin:digits, the demo's tiny CLIP, knows handwritten digits alone: for other images "
                "--clip.model ViT-B-16 --clip.pretrained openai, or a --config FILE that says so"
            )
        for note in [*unexpected_counts(config.data, listing), *notes]:
            console.print(f"  {note}", style="yellow", markup=False, highlight=False)
        clip, shape = _check_model(config, listing)
        check_constraints([*other_tasks, *listing.classes], **config.grouping.constraints)
        check_reachable(resolve_tracking_uri(config.tracking.uri, storage.folder))

    splits = Artefact(
        storage,
        "splits",
        {
            "format": FORMAT,
            "source": listing.fingerprint(),
            "shots": config.data.shots,
            "max_dropped_share": config.data.max_dropped_share,
            "seed": config.seed,
        },
    )
    # The splits stand for the data, the identity of CLIP for its name and file.
    deciding = config.model_dump(
        mode="json",
        exclude={"name": True, "storage": True, "cache": True, "data": True, "cluster": True, "tracking": True}
        | {"clip": {"model", "pretrained", "quick_gelu", "activations_gib"}},
    )
    deciding |= {"identity": asdict(clip), "splits": splits.key, "version": NUMBERS_VERSION, **decided_by}
    key = content_hash(deciding)
    folder = make_folder(storage.folder / place / f"{config.name}-{key}")
    write_atomically(folder / "config.yaml", to_yaml(config))
    return Run(config, storage, listing, clip, shape, splits, folder, key, console)


@contextmanager
def connected(runs: Sequence[Run], dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster for checked runs of the same storage, data, CLIP and cluster, and leaves it at the end, unless
    this process had joined it before; `dashboard` as of `cluster.connect`.

    Raises:
        UserError: no cluster, or one that cannot hold a training.
    """
    first = runs[0]
    console = first.console
    with joined(first.config.cluster, lambda text: console.print(f"  {text}", highlight=False), dashboard) as needs:
        weights = weights_file(first.config.clip)
        own_weights = [weights] if weights and first.config.clip.pretrained != BUILTIN_DIGITS else []
        own_data = [first.listing.root] if first.config.data.root != BUILTIN_DIGITS else []
        check_shared(first.storage, [*own_data, *own_weights])
        for run in runs:
            run.needs, run.board = needs, progress_board()
        yield


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Gives a run its MLflow parent run, which ends as the block does; one job at a time is at a run."""

    def say(text: str) -> None:
        run.console.print(f"  {text}", markup=False, highlight=False)

    with alone_at(run.storage, run.folder, say, run.stop.is_set):
        if run.storage.is_bucket:  # an earlier job, on another machine, may have recorded more than is known here
            (there,) = run.storage.sizes([journal := run.folder / f"tracking-{run.key}" / JOURNAL])
            if (there or 0) > (journal.stat().st_size if journal.exists() else 0):
                run.storage.fetch(run.folder)
        with _tracked(run):
            yield
        run.storage.send(run.folder)


@contextmanager
def _tracked(run: Run) -> Iterator[None]:
    config = run.config
    uri = resolve_tracking_uri(config.tracking.uri, run.storage.folder)
    run.tracker = Tracker(uri, config.tracking.experiment, run.folder / f"tracking-{run.key}")
    try:
        _announce(run)
        yield
    except BaseException as error:
        with suppress(UserError):  # the disk is full: that the error says
            run.tracker.end_run(PARENT, end_status(error))
        run.tracker.close(timeout_s=10)
        raise
    run.tracker.end_run(PARENT)
    run.tracker.close(timeout_s=20)  # says what could not be sent


def _announce(run: Run) -> None:
    config = run.config
    environment = {f"env.{name}": value for name, value in run_environment().items()}
    run.tracker.start_run(
        PARENT,
        tags={
            "mlflow.runName": run.title,
            "mlflow.source.name": sys.argv[0],
            "level": "pipeline",
            "run_folder": run.storage.shown(run.folder),
            **environment,
        },
        params=_flat(config.model_dump(mode="json", exclude=_sections_of_others(config))),
    )
    run.tracker.log_artifact(PARENT, run.folder / "config.yaml")
    run.console.print(
        f"  {len(run.tasks)} tasks, {len(run.listing.images)} images · {config.clip.model} · "
        f"{run.mmap_shape.num_parameters:,} parameters a MmAP · results in {run.storage.shown(run.folder)}",
        markup=False,
        highlight=False,
    )


def _sections_of_others(config: Config) -> set[str]:
    """Of methods that the run does not train, which would only fill MLflow's lists; config.yaml has them."""
    own = {METHODS[VARIANTS[name].method].section for name in (*ALWAYS, *config.compare)}
    return {method.section for method in METHODS.values() if method.section and method.section not in own}


def _with_absolute_paths(config: Config) -> Config:
    """Workers may run in other folders than the driver."""
    changes: dict[str, str] = {}
    if config.clip.model.endswith(".json"):
        changes["model"] = str(Path(config.clip.model).expanduser().absolute())
    if (file := weights_file(config.clip)) and config.clip.pretrained != BUILTIN_DIGITS:
        changes["pretrained"] = str(file.absolute())
    return config.model_copy(update={"clip": config.clip.model_copy(update=changes)})


def open_storage(config: Config) -> Storage:
    """Raises: UserError: a folder or bucket that cannot be written, or a disk that is nearly full."""
    cache = Path(config.cache).expanduser().absolute()
    if is_uri(config.storage):
        storage = Storage(config.storage, cache / content_hash(config.storage))
        storage.mark()
        _check_space("cache", cache)
        return storage
    path = Path(config.storage).expanduser()
    if not path.is_absolute():
        # The working directory of a submitted job is a copy that Ray deletes.
        path = (Path.home() if IN_SUBMITTED_JOB else Path.cwd()) / path
    make_folder(path)
    if not os.access(path, os.W_OK):
        raise UserError(f"storage={path} cannot be written; change `storage`")
    _check_space("storage", path)
    storage = Storage.of_folder(path.resolve())
    storage.mark()
    return storage


def _check_space(name: str, path: Path) -> None:
    free = shutil.disk_usage(path).free
    if free < LEAST_FREE_BYTES:
        raise UserError(f"{name}={path} has {free >> 20} MiB free, less than {LEAST_FREE_BYTES >> 20}; free some space")


def _find_data(config: Config, storage: Storage) -> Listing:
    if config.data.root is None:
        raise UserError("data.root is not set: give the folder of your images, <root>/<task>/<class>/*, or a table")
    root = Path(config.data.root).expanduser()
    if config.data.root == BUILTIN_DIGITS:
        root = storage.folder / "datasets" / "digits"
        try:
            write_digits(root)
        except OSError as error:
            raise UserError(f"the embedded digits cannot be written to {root}: {error}; remove that folder") from None
    return find_images(config.data, root.absolute())


def _check_model(config: Config, listing: Listing) -> tuple[ClipIdentity, MmapShape]:
    identity = clip_identity(config.clip)
    return identity, check_methods(config, listing, towers_without_weights(config.clip), (*ALWAYS, *config.compare))


def check_methods(config: Config, listing: Listing, towers: ClipTowers, names: Sequence[str]) -> MmapShape:
    """Whether the options of some of registry.VARIANTS fit towers, of which only the shapes are looked at.

    Raises:
        UserError: the first that does not.
    """
    shape = MmapShape.of(config.mmap, towers)
    words = [[listing.class_words[name] for name in names] for names in listing.classes.values()]
    workers, num_classes = config.cluster.workers_per_training, min(map(len, words))
    for name in names:
        method = VARIANTS[name].method
        kind, batch = METHODS[method], training_of(method, config).batch_size
        kind.check(config, towers)
        templates = kind.templates(config, listing.classes)
        class_tokens(towers.tokenizer, list(templates.values()), words, kind.num_prompt_positions(config))
        if workers > min(batch, num_classes):
            raise UserError(
                f"cluster.workers_per_training={workers} share a step's images and classes, of which a task has "
                f"{batch} (batch_size of {kind.title}) and {num_classes}: use no more workers than those"
            )
    return shape


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
