"""Validation split of a search: part of the training images, on which trials are measured instead of the test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import content_hash
from pipeline.data.parquet import Split, SplitDescription, SplitReader
from pipeline.data.splits import ScannedImage, Splits, content_fingerprint, sample_splits
from pipeline.errors import UserError
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import run_stages
from pipeline.stages.plan import Plan
from pipeline.stages.splits import write_splits

NAME = "validation_split"


def make_validation_split(plan: Plan, session: Session, validation_shots: int) -> Artifact:
    """Return the splits that a search uses instead of the run's: the last `validation_shots` training images of each
    class and task are its test images, the remaining ones its training images.

    Raises:
        UserError: too few images.
    """
    artifact = plan.artifact("splits", {**plan.splits.inputs, "validation_shots": validation_shots})
    if artifact.is_complete():
        return artifact
    reader = run_stages(plan, session, "splits")["splits"]
    shots, seed = plan.config.data.shots - validation_shots, plan.config.seed
    images, sizes = _training_images(reader)
    splits = split_train_validation(images, plan.dataset_index.classes, shots, seed)
    images_by_split: dict[Split, Sequence[ScannedImage]] = {"train": splits.train, "test": splits.test}
    description = SplitDescription(
        classes={task: list(names) for task, names in plan.dataset_index.classes.items()},
        class_names=plan.dataset_index.class_names,
        shots=shots,
        seed=seed,
        # Differs from that of any data set with these test images.
        source_fingerprint=content_hash(["held out", validation_shots, content_fingerprint(images)]),
        counts={
            name: {task: sum(image.task == task for image in split) for task in plan.tasks}
            for name, split in images_by_split.items()
        },
    )
    with Stage(session, NAME, "validation split") as stage:
        stage.computed = True
        with artifact.writer() as writer:
            write_splits(plan, stage, writer, splits, description, sizes, {})
        num_by_split = {name: sum(counts.values()) for name, counts in description.counts.items()}
        session.console.print(
            f"  {num_by_split['train']} training images, {num_by_split['test']} validation images: {shots} and "
            f"{validation_shots} per class",
            highlight=False,
        )
    return artifact


def split_train_validation(
    images: Sequence[ScannedImage], classes: Mapping[str, Sequence[str]], shots: int, seed: int
) -> Splits:
    """Split training images: the first `shots` of each class by rank are training images, the others test images.

    Raises:
        UserError: the test images of a class are all duplicates of training images of other classes or tasks.
    """
    try:
        return sample_splits(images, classes, shots, seed)
    except UserError as error:
        raise UserError(f"no validation split is possible: {error}") from None


def _training_images(reader: SplitReader) -> tuple[list[ScannedImage], dict[str, int]]:
    """Return the training images, and their sizes in bytes by path."""
    images, sizes = [], {}
    for task, names in reader.description.classes.items():
        for row in reader.rows("train", task, ("image", "label", "path", "sha256")):
            images.append(ScannedImage(row["path"], task, names[row["label"]], row["sha256"]))
            sizes[row["path"]] = len(row["image"])
    return images, sizes
