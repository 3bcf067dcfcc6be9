"""Stage 1: images in folders or tables → few-shot splits in Parquet, read, checked and written in parallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline.config import BUILTIN_DIGITS
from pipeline.data.find import ImageFile
from pipeline.data.parquet import Part, SplitDescription, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.splits import ScannedImage, Splits, content_fingerprint, sample_splits
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.run import PARENT, Run
from pipeline.stages.stage import Stage, Work
from pipeline.storage import Artefact, Making, read_json, send_part, write_atomically, write_json

NAME = "splits"
IMAGES_PER_SCAN = 512
BROKEN_SHOWN = 20
_READING, _WRITING = "reading", "writing"


def build_splits(run: Run) -> SplitReader:
    """Makes the splits unless they are there.

    Raises:
        UserError: broken images above data.max_dropped_share, classes with too few images.
    """
    artefact = run.splits
    with Stage(run, NAME, "1 few-shot splits") as stage:
        if not artefact.finished():
            stage.computed = True
            with artefact.making() as made:
                _build(stage, made)
        reader = SplitReader(artefact.local())
        _report(run, reader)
    return reader


@dataclass(frozen=True)
class _Source:
    """Where a worker reads images."""

    root: Path
    embedded: bool

    def here(self) -> Path:
        if self.embedded:  # on a machine that shares no folder with the driver
            write_digits(self.root)
        return self.root


def _build(stage: Stage, made: Making) -> None:
    run = stage.run
    listing, data = run.listing, run.config.data
    scanned = _scan(stage, _source(run), listing.images)
    broken = [image for image in scanned if image.error]
    if broken:
        _judge_broken(broken, len(scanned), data.max_dropped_share, run.folder / "broken_images.txt")
    whole = [image for image in scanned if not image.error]
    splits = sample_splits(whole, listing.classes, data.shots, run.config.seed)
    description = SplitDescription(
        classes={task: list(names) for task, names in listing.classes.items()},
        class_words=listing.class_words,
        shots=data.shots,
        seed=run.config.seed,
        source_fingerprint=content_fingerprint(whole),
        counts={"train": _count(splits.train, run.tasks), "test": _count(splits.test, run.tasks)},
    )
    sizes = {image.path: image.size for image in whole}
    more: dict[str, Any] = {
        "layout": listing.layout,
        "dropped": [{"path": image.path, "error": image.error} for image in broken],
        "copies_of_training_images": [
            {"path": path, "copy_of": training_path} for path, training_path in splits.copies
        ],
        "ignored_files": list(listing.ignored),
        "classes_left_out": list(listing.left_out_classes),
    }
    if data.given_splits:
        more["given_splits"] = {
            "training_images_not_drawn": len(whole) - len(splits.train) - len(splits.test) - len(splits.copies),
            "images_of_neither_split": sum(listing.in_neither_split.values()),
        }
    write_splits(stage, made, splits, description, sizes, more)


def write_splits(
    stage: Stage,
    made: Making,
    splits: Splits,
    description: SplitDescription,
    sizes: dict[str, int],
    more: dict[str, Any],
) -> None:
    """Writes the images of both splits in parallel, and splits.json with `more` beside the description.

    Args:
        sizes: path → bytes.
    """
    run, source = stage.run, _source(stage.run)
    parts = plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes)
    run.board.expect.remote(_WRITING, len(splits.train) + len(splits.test), "images")
    for sent in stage.execute(
        [Work(f"write {part.file}", _write, (source, part, description, made.artefact, made.folder)) for part in parts]
    ):
        made.sent |= sent
    write_json(made.folder / "splits.json", {**vars(description), **more})


def _source(run: Run) -> _Source:
    return _Source(run.listing.root, run.config.data.root == BUILTIN_DIGITS)


def _scan(stage: Stage, source: _Source, images: Sequence[ImageFile]) -> list[ScannedImage]:
    work = [
        Work(f"scan {number}", _scan_chunk, (source, [(i.path, i.task, i.class_folder) for i in chunk]))
        for number, chunk in enumerate(_chunks(images))
    ]
    stage.run.board.expect.remote(_READING, len(images), "images")
    scanned = [image for chunk in stage.execute(work) for image in chunk]
    return [replace(image, given_split=of.given_split) for image, of in zip(scanned, images)]


def _chunks(images: Sequence[ImageFile]) -> list[Sequence[ImageFile]]:
    """Of IMAGES_PER_SCAN images; a row group of a table is in one of them, as its end is not read without the rest."""
    chunks, start = [], 0
    for at in range(1, len(images) + 1):
        if at == len(images) or (at - start >= IMAGES_PER_SCAN and not _read_together(images[at - 1], images[at])):
            chunks.append(images[start:at])
            start = at
    return chunks


def _read_together(one: ImageFile, other: ImageFile) -> bool:
    if one.row_group is None or one.row_group != other.row_group:
        return False
    return one.path.rpartition("#")[0] == other.path.rpartition("#")[0]


def _scan_chunk(source: _Source, images: Sequence[tuple[str, str, str]], board: Any) -> list[ScannedImage]:
    root = source.here()
    scanned = [scan_image(root, *image) for image in images]
    board.advance.remote(_READING, len(images), "images")
    return scanned


def _write(
    source: _Source, part: Part, description: SplitDescription, artefact: Artefact, folder: Path, board: Any
) -> dict[str, tuple[int, str]]:
    rows = write_part(source.here(), part, description, folder)
    board.advance.remote(_WRITING, rows, "images")
    return send_part(artefact, folder, part.file)


def _judge_broken(broken: Sequence[ScannedImage], total: int, allowed: float, listing: Path) -> None:
    if len(broken) / total <= allowed:
        return
    lines = [f"{image.path}: {image.error}" for image in broken]
    write_atomically(listing, "\n".join(lines) + "\n")
    shown = "\n  ".join(lines[:BROKEN_SHOWN])
    more = f"\n  and {len(lines) - BROKEN_SHOWN} more" if len(lines) > BROKEN_SHOWN else ""
    enough = math.ceil(1000 * len(broken) / total) / 1000
    raise UserError(
        f"{len(broken)} of {total} images are broken, more than data.max_dropped_share={allowed:g} allows:"
        f"\n  {shown}{more}\nAll are listed in {listing}. "
        f"Mend or remove them, or allow to drop them with --data.max_dropped_share {enough:g}"
    )


def _count(images: Sequence[ScannedImage], tasks: Sequence[str]) -> dict[str, int]:
    return {task: sum(image.task == task for image in images) for task in tasks}


def _report(run: Run, reader: SplitReader) -> None:
    description = reader.description
    for split, counts in description.counts.items():
        run.tracker.log_params(NAME, {f"images.{split}": sum(counts.values())})
    run.tracker.log_dataset(
        PARENT,
        dataset_name=run.listing.root.name,
        digest=description.source_fingerprint[:32],
        source=str(run.listing.root),
        profile={"tasks": description.tasks, "counts": description.counts, "shots": description.shots},
    )
    file = reader.folder / "splits.json"
    run.tracker.log_artifact(NAME, file)
    train, test = (sum(description.counts[split].values()) for split in ("train", "test"))
    run.console.print(
        f"  {train} training and {test} test images, {description.shots} shots a class, "
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
    counted = {what: len(items) for what, items in left_out.items()}
    counted |= {name.replace("_", " "): number for name, number in values.get("given_splits", {}).items()}
    if told := [f"{number} {what}" for what, number in counted.items() if number]:
        run.console.print(
            f"  [yellow]{', '.join(told)}[/]: listed in {escape(run.storage.shown(file))}", highlight=False
        )
