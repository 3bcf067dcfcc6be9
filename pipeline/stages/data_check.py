"""Stage 0: every image is read and decoded once, in parallel; what should be known of the data set before it trains is
told, and shown on a page. Stage 1 takes what it knows of the images from here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.markup import escape

from pipeline.clip.load import load_tokenizer
from pipeline.config import BUILTIN_DIGITS
from pipeline.data.checked_images import COLUMNS, check_images, read_checked_images, read_samples, sample_paths
from pipeline.data.findings import CheckedImage, Finding, find_issues, tokenize_words
from pipeline.data.index import ImageRecord
from pipeline.data.splits import sample_splits
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.files import create_folder, read_json, write_file, write_json
from pipeline.report.data_check import COLORS, TaskOverview, check_page, check_tables, summary_line, task_overviews
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import stage_title
from pipeline.stages.plan import Plan

NAME = "data_check"
IMAGES = "images.parquet"
PAGE, FINDINGS = "check.html", "check.json"
FORMAT = 2
"""To be raised by every change of what is kept of an image, or of what is found: checks of before are made again."""
IMAGES_PER_CHUNK = 512
_READING = "reading"
_one_at_a_time = threading.Lock()
"""Several runs of one process mostly have the same images, which one of them reads for all."""


@dataclass(frozen=True)
class ImageSource:
    """Where a worker reads images."""

    root: Path
    embedded: bool

    @staticmethod
    def of(plan: Plan) -> ImageSource:
        return ImageSource(plan.dataset_index.root, plan.config.data.root == BUILTIN_DIGITS)

    def local_root(self) -> Path:
        if self.embedded:  # on a machine that shares no folder with the driver
            write_digits(self.root)
        return self.root


def check_data(plan: Plan, session: Session, verbose: bool = False) -> list[Finding]:
    """Tells what was found, as far as that is not known yet by looking at every image; raises nothing for it.

    Args:
        in_full: as tables, not in one line.
    """
    folder = create_folder(plan.folder / NAME)
    with Stage(session, NAME, stage_title(NAME)) as stage:
        artifact = _artifact(plan)
        with _one_at_a_time:
            if not artifact.is_complete():
                stage.computed = True
                with artifact.writer() as writer:
                    pq.write_table(_look(plan, stage), writer.folder / IMAGES, compression="zstd")
        if not (found := _read(folder / FINDINGS)):
            found = _find(plan, artifact.download() / IMAGES, folder)
        findings, tasks = found
        _tell(plan, session, findings, tasks, folder, verbose)
    return findings


def checked_images(plan: Plan) -> list[CheckedImage]:
    """The listing's images, in its order, after `check_data`."""
    return read_checked_images(_artifact(plan).download() / IMAGES, plan.dataset_index.images)


def _artifact(plan: Plan) -> Artifact:
    return plan.artifact(NAME, {"format": FORMAT, "listing": plan.dataset_index.fingerprint()})


def _look(plan: Plan, stage: Stage) -> pa.Table:
    images = plan.dataset_index.images
    source, samples = ImageSource.of(plan), sample_paths(images)
    stage.session.progress.expect(_READING, len(images), "images")
    work = [
        WorkItem(f"check {number}", _check_chunk, (source, chunk, samples & {image.path for image in chunk}))
        for number, chunk in enumerate(split_into_chunks(images))
    ]
    return pa.concat_tables([COLUMNS.empty_table(), *stage.execute(work)]).unify_dictionaries()


def _check_chunk(
    source: ImageSource, images: Sequence[ImageRecord], samples: frozenset[str], progress: Any
) -> pa.Table:
    table = check_images(source.local_root(), images, samples)
    progress.advance(_READING, len(images), "images")
    return table


def split_into_chunks(images: Sequence[ImageRecord]) -> list[Sequence[ImageRecord]]:
    """Of IMAGES_PER_CHUNK images; a row group of a table is in one of them, as its end is not read without the rest."""
    found, start = [], 0
    for at in range(1, len(images) + 1):
        if at == len(images) or (at - start >= IMAGES_PER_CHUNK and not _read_together(images[at - 1], images[at])):
            found.append(images[start:at])
            start = at
    return found


def _read_together(one: ImageRecord, other: ImageRecord) -> bool:
    if one.row_group is None or one.row_group != other.row_group:
        return False
    return one.path.rpartition("#")[0] == other.path.rpartition("#")[0]


def _find(plan: Plan, file: Path, folder: Path) -> tuple[list[Finding], list[TaskOverview]]:
    """Also writes them, for people and for the next time."""
    dataset_index, data = plan.dataset_index, plan.config.data
    images = read_checked_images(file, dataset_index.images)
    training: list[str] = []
    no_splits = None
    try:
        whole = [of.image for of in images if of.stats]
        training = [
            image.path for image in sample_splits(whole, dataset_index.classes, data.shots, plan.config.seed).train
        ]
    except UserError as fault:
        no_splits = str(fault)
    tokenizer = load_tokenizer(plan.config.clip)
    findings = find_issues(
        images,
        dataset_index.classes,
        dataset_index.class_names,
        tokenize_words(dataset_index.class_names.values(), tokenizer.encode, tokenizer.decoder.__getitem__),
        data.shots,
        training,
        no_splits,
        data.max_broken_fraction,
    )
    tasks = task_overviews(images, dataset_index.classes)
    page = check_page(plan.config.name, tasks, findings, read_samples(file), dataset_index.class_names)
    write_file(folder / PAGE, page)
    values = {
        "format": FORMAT,
        "shots": data.shots,
        "seed": plan.config.seed,
        "tasks": [asdict(of) for of in tasks],
        "findings": [asdict(finding) for finding in findings],
    }
    write_json(folder / FINDINGS, values)
    return findings, tasks


def _read(file: Path) -> tuple[list[Finding], list[TaskOverview]] | None:
    """What `_find` wrote for the same run, if it did; run folders are named by all that decides it."""
    if not file.is_file() or not (file.parent / PAGE).is_file():
        return None
    values = read_json(file)
    if values["format"] != FORMAT:
        return None
    findings = [Finding(**{**of, "examples": tuple(of["examples"])}) for of in values["findings"]]
    return findings, [TaskOverview(**of) for of in values["tasks"]]


def _tell(
    plan: Plan,
    session: Session,
    findings: Sequence[Finding],
    tasks: Sequence[TaskOverview],
    folder: Path,
    verbose: bool,
) -> None:
    counts = Counter[str](finding.severity for finding in findings)
    metrics = {f"findings/{severity}": float(counts[severity]) for severity in COLORS}
    session.tracker.log_metrics(NAME, {**metrics, "images": sum(of.images for of in tasks)}, step=0)
    for name in (PAGE, FINDINGS):
        session.tracker.log_artifact(NAME, folder / name)
    if verbose:
        session.console.print(check_tables(plan.config.name, tasks, findings))
    where = escape(plan.storage.display_uri(folder / PAGE))
    session.console.print(f"  {summary_line(findings)}: {where}", highlight=False)
    for finding in [] if verbose else findings:
        if finding.severity != "note":
            session.console.print(
                f"  [{COLORS[finding.severity]}]{finding.severity}[/]: {escape(finding.title)}", highlight=False
            )
