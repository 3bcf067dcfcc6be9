"""Stage 0: read and decode every image once, in parallel, and report issues of the data set in the terminal and on an
HTML page. Stage 1 uses the results of this scan."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.markup import escape

from pipeline.buckets import AnyPath
from pipeline.clip.load import load_tokenizer
from pipeline.clip.tokenizer import describe_tokenizer
from pipeline.config import BUILTIN_DIGITS
from pipeline.data.checked_images import COLUMNS, check_images, read_checked_images, read_samples, sample_paths
from pipeline.data.contents import UNREADABLE, dataset_fingerprint, read_contents, split_into_chunks
from pipeline.data.findings import CheckedImage, Example, Finding, ShownImage, find_issues, tokenize_words
from pipeline.data.image_stats import thumbnail
from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.index import ImageRecord
from pipeline.data.multi_label_splits import sample_multi_label_splits
from pipeline.data.splits import sample_splits
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.files import DamagedFile, create_folder, read_record, write_file, write_record
from pipeline.report.data_check import (
    COLORS,
    SHOWN_SIDE,
    TaskOverview,
    check_page,
    check_tables,
    shown_examples,
    summary_line,
    task_overviews,
)
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import stage_title
from pipeline.stages.plan import Plan

NAME = "data_check"
IMAGES = "images.parquet"
PAGE, FINDINGS = "check.html", "check.json"
FORMAT = 6
"""Increment on every change of the stored columns or of the findings; older checks are then repeated."""
IMAGES_PER_CHUNK = 512
_READING = "reading"
_scan_lock = threading.Lock()
"""Concurrent runs of one process usually share their images: the first one scans them for all."""


@dataclass(frozen=True)
class ImageSource:
    """Folder from which workers read images."""

    root: AnyPath
    embedded: bool

    @staticmethod
    def from_plan(plan: Plan) -> ImageSource:
        return ImageSource(plan.dataset_index.root, plan.config.data.root == BUILTIN_DIGITS)

    def open_root(self) -> AnyPath:
        if self.embedded:  # the worker may share no folder with the driver
            assert isinstance(self.root, Path)
            write_digits(self.root)
        return self.root


def check_data(plan: Plan, session: Session, verbose: bool = False) -> list[Finding]:
    """Scan all images unless cached, and report the findings; they are returned, not raised.

    Args:
        verbose: print tables instead of a summary.
    """
    folder = create_folder(plan.folder / NAME)
    with Stage(session, NAME, stage_title(NAME)) as stage:
        artifact = _artifact(plan)
        with _scan_lock:
            if not artifact.is_complete():
                stage.computed = True
                with artifact.writer() as writer:
                    pq.write_table(_scan(plan, stage), writer.folder / IMAGES, compression="zstd")
        results = read_results(folder / FINDINGS, _files_not_read(plan))
        findings, tasks = results or _analyze(plan, artifact.download() / IMAGES, folder)
        _report(plan, session, findings, tasks, folder, verbose)
    return findings


def checked_images(plan: Plan) -> list[CheckedImage]:
    """Return the results of `check_data`'s scan, in the order of the index."""
    return read_checked_images(_artifact(plan).download() / IMAGES, plan.dataset_index.images)


def _artifact(plan: Plan) -> Artifact:
    return plan.artifact(NAME, {"format": FORMAT, "images": plan.images})


def _scan(plan: Plan, stage: Stage) -> pa.Table:
    images = plan.dataset_index.images
    source, samples = ImageSource.from_plan(plan), sample_paths(images)
    stage.session.progress.expect(_READING, len(images), "images")
    work = [
        WorkItem(f"check {number}", _check_chunk, (source, chunk, samples & {image.path for image in chunk}))
        for number, chunk in enumerate(split_into_chunks(images, IMAGES_PER_CHUNK))
    ]
    table = pa.concat_tables([COLUMNS.empty_table(), *stage.execute(work)]).unify_dictionaries()
    errors = table["error"].to_pylist()
    identities = (sha256 or error for sha256, error in zip(table["sha256"].to_pylist(), errors))
    if dataset_fingerprint(plan.dataset_index, identities) != plan.images:
        for path, error in zip(table["path"].to_pylist(), errors):
            if error and error.startswith(UNREADABLE):
                raise UserError(f"{plan.dataset_index.root / path} {error}; rerun the command when it can be read")
        raise UserError(
            f"images of {plan.dataset_index.root} changed while they were read: rerun the command when nothing writes "
            "to them"
        )
    return table


def _check_chunk(
    source: ImageSource, images: Sequence[ImageRecord], samples: frozenset[str], progress: Any
) -> pa.Table:
    table = check_images(source.open_root(), images, samples)
    progress.advance(_READING, len(images), "images")
    return table


def _analyze(plan: Plan, file: Path, folder: Path) -> tuple[list[Finding], list[TaskOverview]]:
    """Compute the findings, and write them to `folder` as a page and as JSON."""
    dataset_index, data = plan.dataset_index, plan.config.data
    images = read_checked_images(file, dataset_index.images)
    training: list[str] = []
    split_error = None
    sample = sample_multi_label_splits if dataset_index.multi_label else sample_splits
    try:
        decodable = [checked.image for checked in images if checked.stats]
        training = [
            image.path for image in sample(decodable, dataset_index.classes, data.shots, plan.config.seed).train
        ]
    except UserError as error:
        split_error = str(error)
    tokenizer = describe_tokenizer(load_tokenizer(plan.config.clip))
    findings = find_issues(
        images,
        dataset_index.classes,
        dataset_index.class_names,
        tokenize_words(dataset_index.class_names.values(), tokenizer.encode_name, tokenizer.subword),
        data.shots,
        training,
        split_error,
        data.max_broken_fraction,
        dataset_index.skipped,
    )
    tasks = task_overviews(images, dataset_index.classes)
    thumbnails = find_thumbnails(ImageSource.from_plan(plan).open_root(), findings)
    page = check_page(
        plan.config.name,
        tasks,
        findings,
        read_samples(file),
        dataset_index.class_names,
        thumbnails,
        dataset_index.notes,
    )
    write_file(folder / PAGE, page)
    values = {
        "format": FORMAT,
        "shots": data.shots,
        "seed": plan.config.seed,
        "layout": dataset_index.layout,
        "files_not_read": _files_not_read(plan),
        "tasks": [asdict(task) for task in tasks],
        "findings": [asdict(finding) for finding in findings],
    }
    write_record(folder / FINDINGS, values)
    return findings, tasks


def _files_not_read(plan: Plan) -> dict[str, int]:
    """Return kind → number of files that are not read."""
    return dict(sorted(Counter(kind for _, kind in plan.dataset_index.skipped).items()))


def find_thumbnails(root: AnyPath, findings: Sequence[Finding]) -> dict[str, bytes]:
    """Return path → thumbnail as a JPEG of the images that the page shows and that can be decoded."""
    examples = [example for finding in findings for example in shown_examples(finding)]
    thumbnails = {}
    paths = sorted({image.path for example in examples for image in example.images})  # rows of a table in order
    for path, content in zip(paths, read_contents(root, paths), strict=True):
        with suppress(BrokenImage):  # it is among the broken ones
            thumbnails[path] = thumbnail(decode_rgb(content.data, SHOWN_SIDE), SHOWN_SIDE)
    return thumbnails


def read_results(
    file: Path, files_not_read: Mapping[str, int] | None = None
) -> tuple[list[Finding], list[TaskOverview]] | None:
    """Return what `_analyze` wrote in this run folder, whose name identifies config and images; None: nothing, other
    files were not read, or it is damaged."""
    if not file.is_file() or not (file.parent / PAGE).is_file():
        return None
    try:
        values = read_record(file)
    except DamagedFile:
        return None
    if values["format"] != FORMAT or files_not_read not in (None, values["files_not_read"]):
        return None
    findings = [
        Finding(**{**fields, "examples": tuple(map(_example_from_json, fields["examples"]))})
        for fields in values["findings"]
    ]
    return findings, [TaskOverview(**fields) for fields in values["tasks"]]


def _example_from_json(values: dict[str, Any]) -> Example:
    return Example(values["detail"], tuple(ShownImage(**image) for image in values["images"]))


def _report(
    plan: Plan,
    session: Session,
    findings: Sequence[Finding],
    tasks: Sequence[TaskOverview],
    folder: Path,
    verbose: bool,
) -> None:
    counts = Counter[str](finding.severity for finding in findings)
    metrics = {f"findings/{severity}": float(counts[severity]) for severity in COLORS}
    session.tracker.log_metrics(NAME, {**metrics, "images": sum(task.images for task in tasks)}, step=0)
    for name in (PAGE, FINDINGS):
        session.tracker.log_artifact(NAME, folder / name)
    if verbose:
        session.console.print(check_tables(plan.config.name, tasks, findings))
    page_uri = escape(plan.storage.display_uri(folder / PAGE))
    session.console.print(f"  {summary_line(findings)}: {page_uri}", highlight=False)
    for finding in [] if verbose else findings:
        if finding.severity != "note":
            session.console.print(
                f"  [{COLORS[finding.severity]}]{finding.severity}[/]: {escape(finding.title)}", highlight=False
            )
