"""Before a search: the training images, split once more. Trials train on some and are measured on the others; the test
set is not among them."""

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

NAME = "held_out"


def hold_out(plan: Plan, session: Session, validation_shots: int) -> Artifact:
    """Splits whose training images are those of the run's splits but for the last `validation_shots` of each class and
    task, and whose test images are these. They stand in for the run's splits in a search, which opens no others.

    Raises:
        UserError: too few images.
    """
    artifact = plan.artifact("splits", {**plan.splits.inputs, "validation_shots": validation_shots})
    if artifact.is_complete():
        return artifact
    reader = run_stages(plan, session, "splits")["splits"]
    shots, seed = plan.config.data.shots - validation_shots, plan.config.seed
    images, sizes = _training_images(reader)
    splits = sample_validation(images, plan.dataset_index.classes, shots, seed)
    of_splits: dict[Split, Sequence[ScannedImage]] = {"train": splits.train, "test": splits.test}
    description = SplitDescription(
        classes={task: list(names) for task, names in plan.dataset_index.classes.items()},
        class_names=plan.dataset_index.class_names,
        shots=shots,
        seed=seed,
        # Not that of any data set whose test images these are.
        source_fingerprint=content_hash(["held out", validation_shots, content_fingerprint(images)]),
        counts={
            name: {task: sum(image.task == task for image in of_split) for task in plan.tasks}
            for name, of_split in of_splits.items()
        },
    )
    with Stage(session, NAME, "validation images") as stage:
        stage.computed = True
        with artifact.writer() as writer:
            write_splits(plan, stage, writer, splits, description, sizes, {})
        num_by_split = {name: sum(of_split.values()) for name, of_split in description.counts.items()}
        session.console.print(
            f"  {num_by_split['train']} images to train on, {num_by_split['test']} validation images: {shots} and "
            f"{validation_shots} per class",
            highlight=False,
        )
    return artifact


def sample_validation(
    images: Sequence[ScannedImage], classes: Mapping[str, Sequence[str]], shots: int, seed: int
) -> Splits:
    """Of training images: the first `shots` of each class by rank, as training images, the rest as test images.

    Raises:
        UserError: a class whose rest has only copies of the other classes' or tasks' training images.
    """
    try:
        return sample_splits(images, classes, shots, seed)
    except UserError as error:
        raise UserError(f"validation images cannot be held out: {error}") from None


def _training_images(reader: SplitReader) -> tuple[list[ScannedImage], dict[str, int]]:
    """And the bytes of each, by path."""
    images, sizes = [], {}
    for task, names in reader.description.classes.items():
        for row in reader.rows("train", task, ("image", "label", "path", "sha256")):
            images.append(ScannedImage(row["path"], task, names[row["label"]], row["sha256"]))
            sizes[row["path"]] = len(row["image"])
    return images, sizes
