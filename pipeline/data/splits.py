"""Few-shot sampling: which images train, which test.

Choices:
- an image's rank is a hash of (seed, task, class, content), and the smallest ranks train: the same on every
  machine, whatever the file names, their order, or the number of other images;
- an image is its content: a copy of a training image, in any task and under any name, is in no test set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.official_splits import OfficialSplit
from pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class ScannedImage:
    """An image file that was read once. `error` says why it cannot be decoded, or is None."""

    path: str
    task: str
    class_folder: str
    sha256: str
    error: str | None = None
    size: int = 0
    """Bytes, where somebody needs them."""
    official_split: OfficialSplit | None = None
    """None: it may train or test."""


@dataclass(frozen=True)
class Splits:
    """Images of both splits, sorted by path; `copies`: (path, path of the training image that it copies). Images that
    are given to train and were not drawn are in neither."""

    train: tuple[ScannedImage, ...]
    test: tuple[ScannedImage, ...]
    copies: tuple[tuple[str, str], ...]


def sample_splits(
    images: Iterable[ScannedImage], classes: Mapping[str, Sequence[str]], shots: int, seed: int
) -> Splits:
    """Draws `shots` training images of each class of each task from decodable `images`; the rest tests. Of images with
    a given split only those of train are drawn, and only those of test test.

    Raises:
        UserError: naming every class that cannot give `shots` training images and one test image.
    """
    by_class: dict[tuple[str, str], list[ScannedImage]] = {
        (task, name): [] for task, names in classes.items() for name in names
    }
    for image in sorted(images, key=lambda image: image.path):
        by_class[image.task, image.class_folder].append(image)

    too_few: list[str] = []
    train: dict[str, ScannedImage] = {}  # path → image
    training_path: dict[str, str] = {}  # content → path of a training image
    for (task, name), members in by_class.items():
        may_train = [image for image in members if image.official_split in (None, "train")]
        # Of copies, the first path stands for all.
        distinct = {image.sha256: image for image in reversed(may_train)}
        one_tests = not any(image.official_split == "test" for image in members)
        if len(distinct) < shots + one_tests:
            num_copies = len(may_train) - len(distinct)
            and_copies = f" and {num_copies} exact copies of them" if num_copies else ""
            given = [image.official_split for image in members]
            of_splits = f", {given.count('train')} to train and {given.count('test')} to test" if any(given) else ""
            too_few.append(f"{task}/{name} has {len(distinct)} image(s){and_copies}{of_splits}")
            continue
        for image in sorted(distinct.values(), key=lambda image: _rank(seed, image))[:shots]:
            train[image.path] = image
            training_path.setdefault(image.sha256, image.path)
    if too_few:
        raise UserError(
            f"data.shots={shots} needs at least {shots + 1} different images of every class "
            f"({shots} to train, 1 to test): " + "; ".join(too_few)
        )

    only_copies: list[str] = []
    test: list[ScannedImage] = []
    copies: list[tuple[str, str]] = []
    for (task, name), members in by_class.items():
        rest = [image for image in members if image.path not in train and image.official_split != "train"]
        of_class = [image for image in rest if image.sha256 not in training_path]
        if not of_class:
            only_copies.append(
                f"{task}/{name} has {len(members)} image(s), and the {len(rest)} that do not train there are "
                f"copies of training images (such as {rest[0].path} of {training_path[rest[0].sha256]})"
            )
        test += of_class
        copies += [(i.path, training_path[i.sha256]) for i in rest if i.sha256 in training_path]
    if only_copies:
        raise UserError(
            f"data.shots={shots} leaves no test image (one that is no exact copy of a training image of any "
            "task): " + "; ".join(only_copies)
        )
    by_path = sorted(train.values(), key=lambda image: image.path)
    return Splits(tuple(by_path), tuple(sorted(test, key=lambda image: image.path)), tuple(sorted(copies)))


def content_fingerprint(images: Iterable[ScannedImage]) -> str:
    """SHA-256 over the images' paths, contents, tasks, classes, and given splits, in the order of the paths. A table
    may give the same files other tasks, labels or splits."""
    digest = hashlib.sha256()
    for image in sorted(images, key=lambda image: image.path):
        values = (image.path, image.sha256, image.task, image.class_folder, image.official_split or "")
        digest.update(("\0".join(values) + "\n").encode())
    return digest.hexdigest()


def _rank(seed: int, image: ScannedImage) -> bytes:
    return hashlib.sha256(f"{seed}\0{image.task}\0{image.class_folder}\0{image.sha256}".encode()).digest()
