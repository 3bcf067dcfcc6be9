"""Stage 1: images that the data check has looked at → few-shot splits in Parquet, written in parallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline.data.parquet import Part, SplitDescription, SplitReader, plan_parts, write_part
from pipeline.data.splits import ScannedImage, Splits, content_fingerprint, sample_splits
from pipeline.errors import UserError
from pipeline.files import read_json, write_file, write_json
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact, ArtifactWriter, upload_part
from pipeline.stages.data_check import ImageSource, checked_images
from pipeline.stages.flow import stage_title
from pipeline.stages.plan import Plan

NAME = "splits"
BROKEN_SHOWN = 20
_WRITING = "writing"


def build_splits(plan: Plan, session: Session) -> SplitReader:
    """Makes the splits unless that is done; the data must be checked.

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
    scanned = [of.image for of in checked_images(plan)]
    broken = [image for image in scanned if image.error]
    if broken:
        _check_broken_fraction(
            broken, len(scanned), data.max_broken_fraction, stage.session.folder / "broken_images.txt"
        )
    whole = [image for image in scanned if not image.error]
    splits, description = draw_splits(plan, whole)
    sizes = {image.path: image.size for image in whole}
    more: dict[str, Any] = {
        "layout": dataset_index.layout,
        "dropped": [{"path": image.path, "error": image.error} for image in broken],
        "copies_of_training_images": [
            {"path": path, "copy_of": training_path} for path, training_path in splits.copies
        ],
        "ignored_files": list(dataset_index.ignored),
        "classes_left_out": list(dataset_index.excluded_classes),
    }
    if data.use_official_splits:
        more["use_official_splits"] = {
            "training_images_not_drawn": len(whole) - len(splits.train) - len(splits.test) - len(splits.copies),
            "images_of_neither_split": sum(dataset_index.unused_images.values()),
        }
    write_splits(plan, stage, writer, splits, description, sizes, more)


def draw_splits(plan: Plan, images: Sequence[ScannedImage]) -> tuple[Splits, SplitDescription]:
    """Raises: UserError: classes with too few images."""
    dataset_index, shots, seed = plan.dataset_index, plan.config.data.shots, plan.config.seed
    splits = sample_splits(images, dataset_index.classes, shots, seed)
    return splits, SplitDescription(
        classes={task: list(names) for task, names in dataset_index.classes.items()},
        class_names=dataset_index.class_names,
        shots=shots,
        seed=seed,
        source_fingerprint=content_fingerprint(images),
        counts={"train": _count(splits.train, plan.tasks), "test": _count(splits.test, plan.tasks)},
    )


def write_splits(
    plan: Plan,
    stage: Stage,
    writer: ArtifactWriter,
    splits: Splits,
    description: SplitDescription,
    sizes: dict[str, int],
    more: dict[str, Any],
) -> None:
    """Writes the images of both splits in parallel, and splits.json with `more` beside the description.

    Args:
        sizes: path → bytes.
    """
    source = ImageSource.of(plan)
    parts = plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes)
    stage.session.progress.expect(_WRITING, len(splits.train) + len(splits.test), "images")
    for uploaded in stage.execute(
        [
            WorkItem(f"write {part.file}", _write, (source, part, description, writer.artifact, writer.folder))
            for part in parts
        ]
    ):
        writer.uploaded |= uploaded
    write_json(writer.folder / "splits.json", {**vars(description), **more})


def _write(
    source: ImageSource, part: Part, description: SplitDescription, artifact: Artifact, folder: Path, progress: Any
) -> dict[str, tuple[int, str]]:
    rows = write_part(source.local_root(), part, description, folder)
    progress.advance(_WRITING, rows, "images")
    return upload_part(artifact, folder, part.file)


def _check_broken_fraction(broken: Sequence[ScannedImage], total: int, max_fraction: float, report_file: Path) -> None:
    if len(broken) / total <= max_fraction:
        return
    lines = [f"{image.path}: {image.error}" for image in broken]
    write_file(report_file, "\n".join(lines) + "\n")
    shown = "\n  ".join(lines[:BROKEN_SHOWN])
    more = f"\n  and {len(lines) - BROKEN_SHOWN} more" if len(lines) > BROKEN_SHOWN else ""
    enough = math.ceil(1000 * len(broken) / total) / 1000
    raise UserError(
        f"{len(broken)} of {total} images are broken, more than data.max_broken_fraction={max_fraction:g} allows:"
        f"\n  {shown}{more}\nAll are listed in {report_file}. "
        f"Mend or remove them, or allow to drop them with --data.max_broken_fraction {enough:g}"
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
        f"  {train} training and {test} test images, {description.shots} shots per class, "
        f"{max(map(len, description.classes.values()))} classes",
        highlight=False,
    )
    values = read_json(file)
    left_out = {
        "broken images dropped": values["dropped"],
        "exact copies of training images in neither split": values["copies_of_training_images"],
        "other files ignored": values["ignored_files"],
        "class folders left out": values["classes_left_out"],
    }
    num_by_name = {what: len(items) for what, items in left_out.items()}
    num_by_name |= {name.replace("_", " "): number for name, number in values.get("use_official_splits", {}).items()}
    if told := [f"{number} {what}" for what, number in num_by_name.items() if number]:
        session.console.print(
            f"  [yellow]{', '.join(told)}[/]: listed in {escape(plan.storage.display_uri(file))}", highlight=False
        )
