"""Stage 1: sample few-shot splits from the scanned images, and write them to Parquet in parallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline.data.multi_label_splits import sample_multi_label_splits
from pipeline.data.names import pluralize
from pipeline.data.parquet import Part, SplitDescription, SplitReader, plan_parts, write_part
from pipeline.data.splits import ScannedImage, Splits, content_fingerprint, sample_splits
from pipeline.data.walk import unread_images_note
from pipeline.errors import UserError
from pipeline.files import read_json, write_file, write_json
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact, ArtifactWriter, upload_part
from pipeline.stages.data_check import ImageSource, checked_images
from pipeline.stages.flow import stage_title
from pipeline.stages.plan import Plan

NAME = "splits"
MAX_BROKEN_SHOWN = 20
_WRITING = "writing"


def build_splits(plan: Plan, session: Session) -> SplitReader:
    """Build the splits unless cached, after the data check.

    Raises:
        UserError: broken images above data.max_broken_fraction, classes with too few images.
    """
    artifact = plan.splits
    with Stage(session, NAME, stage_title(NAME)) as stage:
        if not artifact.is_complete():
            stage.computed = True
            with artifact.writer() as writer:
                _build(plan, stage, writer)
        reader = SplitReader(artifact.download())
        _report(plan, session, reader)
    return reader


def _build(plan: Plan, stage: Stage, writer: ArtifactWriter) -> None:
    dataset_index, data = plan.dataset_index, plan.config.data
    scanned = [checked.image for checked in checked_images(plan)]
    broken = [image for image in scanned if image.error]
    if broken:
        _check_broken_fraction(
            broken, len(scanned), data.max_broken_fraction, stage.session.folder / "broken_images.txt"
        )
    decodable = [image for image in scanned if not image.error]
    splits, description = draw_splits(plan, decodable)
    sizes = {image.path: image.size for image in decodable}
    extra: dict[str, Any] = {
        "layout": dataset_index.layout,
        "dropped": [{"path": image.path, "error": image.error} for image in broken],
        "duplicates_of_training_images": [
            {"path": path, "duplicate_of": training_path} for path, training_path in splits.duplicates
        ],
        "excluded_classes": list(dataset_index.excluded_classes),
    }
    if data.use_official_splits:
        extra["use_official_splits"] = {
            "training_images_not_drawn": len(decodable) - len(splits.train) - len(splits.test) - len(splits.duplicates),
            "images_in_neither_split": sum(dataset_index.unused_images.values()),
        }
    write_splits(plan, stage, writer, splits, description, sizes, extra)


def draw_splits(plan: Plan, images: Sequence[ScannedImage]) -> tuple[Splits, SplitDescription]:
    """Sample the splits and describe them. Raises UserError if classes have too few images."""
    dataset_index, shots, seed = plan.dataset_index, plan.config.data.shots, plan.config.seed
    sample = sample_multi_label_splits if dataset_index.multi_label else sample_splits
    try:
        splits = sample(images, dataset_index.classes, shots, seed)
    except UserError as error:
        raise UserError("; ".join(filter(None, (str(error), unread_images_note(dataset_index.skipped))))) from None
    return splits, SplitDescription(
        classes={task: list(names) for task, names in dataset_index.classes.items()},
        class_names=dataset_index.class_names,
        shots=shots,
        seed=seed,
        source_fingerprint=content_fingerprint(images, dataset_index.multi_label),
        counts={"train": _count(splits.train, plan.tasks), "test": _count(splits.test, plan.tasks)},
        multi_label=dataset_index.multi_label,
    )


def write_splits(
    plan: Plan,
    stage: Stage,
    writer: ArtifactWriter,
    splits: Splits,
    description: SplitDescription,
    sizes: dict[str, int],
    extra: dict[str, Any],
) -> None:
    """Write the images of both splits in parallel, and splits.json with the description and `extra`.

    Args:
        sizes: path → bytes.
    """
    source = ImageSource.from_plan(plan)
    parts = plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes)
    stage.session.progress.expect(_WRITING, len(splits.train) + len(splits.test), "images")
    for uploaded in stage.execute(
        [
            WorkItem(f"write {part.file}", _write, (source, part, description, writer.artifact, writer.folder))
            for part in parts
        ]
    ):
        writer.uploaded |= uploaded
    write_json(writer.folder / "splits.json", {**description.to_dict(), **extra})


def _write(
    source: ImageSource, part: Part, description: SplitDescription, artifact: Artifact, folder: Path, progress: Any
) -> dict[str, tuple[int, str]]:
    rows = write_part(source.open_root(), part, description, folder)
    progress.advance(_WRITING, rows, "images")
    return upload_part(artifact, folder, part.file)


def _check_broken_fraction(broken: Sequence[ScannedImage], total: int, max_fraction: float, report_file: Path) -> None:
    if len(broken) / total <= max_fraction:
        return
    lines = [f"{image.path}: {image.error}" for image in broken]
    write_file(report_file, "\n".join(lines) + "\n")
    listed = "\n  ".join(lines[:MAX_BROKEN_SHOWN])
    remainder = f"\n  and {len(lines) - MAX_BROKEN_SHOWN} more" if len(lines) > MAX_BROKEN_SHOWN else ""
    sufficient = math.ceil(1000 * len(broken) / total) / 1000
    raise UserError(
        f"{len(broken)} of {total} images are broken, more than data.max_broken_fraction={max_fraction:g} allows:"
        f"\n  {listed}{remainder}\nAll are listed in {report_file}. "
        f"Fix or remove them, or let them be dropped with --data.max_broken_fraction {sufficient:g}"
    )


def _count(images: Sequence[ScannedImage], tasks: Sequence[str]) -> dict[str, int]:
    return {task: sum(image.task == task for image in images) for task in tasks}


def _report(plan: Plan, session: Session, reader: SplitReader) -> None:
    description = reader.description
    for split, counts in description.counts.items():
        session.tracker.log_params(NAME, {f"images.{split}": sum(counts.values())})
    session.tracker.log_dataset(
        PARENT,
        dataset_name=plan.dataset_index.root.name,
        digest=description.source_fingerprint[:32],
        source=str(plan.dataset_index.root),
        profile={"tasks": description.tasks, "counts": description.counts, "shots": description.shots},
    )
    file = reader.folder / "splits.json"
    session.tracker.log_artifact(NAME, file)
    train, test = (sum(description.counts[split].values()) for split in ("train", "test"))
    session.console.print(
        f"  {train} training and {test} test images, {pluralize(description.shots, 'shot')} per class"
        f"{' or more' * description.multi_label}, "
        f"{max(map(len, description.classes.values()))} classes",
        highlight=False,
    )
    if unused := unused_images(reader):
        session.console.print(
            f"  [yellow]{', '.join(unused)}[/]: listed in {escape(plan.storage.display_uri(file))}", highlight=False
        )


def unused_images(reader: SplitReader) -> list[str]:
    """Return what is in neither split, and why, with its number."""
    values = read_json(reader.folder / "splits.json")
    num_by_name = {
        "broken images dropped": len(values["dropped"]),
        "exact duplicates of training images dropped": len(values["duplicates_of_training_images"]),
        "class folders excluded": len(values["excluded_classes"]),
    }
    num_by_name |= {name.replace("_", " "): number for name, number in values.get("use_official_splits", {}).items()}
    return [f"{number} {name}" for name, number in num_by_name.items() if number]
