"""Few-shot sampling of training and test images.

Choices:
- images with the lowest hash of (seed, task, class, content) train: the same on every machine, independent of file
  names, their order, and the number of other images;
- images are identified by content: an exact duplicate of a training image, in any task, is in no test set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.names import pluralize
from pipeline.data.official_splits import OfficialSplit
from pipeline.errors import UserError

MULTI_LABEL = b"multi-label\n"
"""Start of what is hashed for a data set with several labels per image; that of others is unchanged."""


@dataclass(frozen=True, slots=True)
class ScannedImage:
    """An image that was read once. `error` is the reason why it cannot be decoded, or None; `sha256` is empty if it
    cannot be read."""

    path: str
    task: str
    class_folder: str
    sha256: str
    error: str | None = None
    size: int = 0
    """Bytes; 0 if unknown."""
    official_split: OfficialSplit | None = None
    """None: may train or test."""
    other_classes: tuple[str, ...] = ()
    """Further classes, sorted, with data.multi_label."""

    @property
    def class_folders(self) -> tuple[str, ...]:
        """All classes of the image."""
        return (self.class_folder, *self.other_classes)


@dataclass(frozen=True)
class Splits:
    """Images of both splits, sorted by path; `duplicates`: (path, path of the training image with the same content).
    Official training images that were not drawn are in neither."""

    train: tuple[ScannedImage, ...]
    test: tuple[ScannedImage, ...]
    duplicates: tuple[tuple[str, str], ...]


def sample_splits(
    images: Iterable[ScannedImage], classes: Mapping[str, Sequence[str]], shots: int, seed: int
) -> Splits:
    """Draw `shots` training images of each class of each task from decodable `images`; the rest are test images. Images
    with an official split stay in it.

    Raises:
        UserError: lists every class with fewer than `shots` training images and one test image.
    """
    images_by_class: dict[tuple[str, str], list[ScannedImage]] = {
        (task, name): [] for task, names in classes.items() for name in names
    }
    for image in sorted(images, key=lambda image: image.path):
        images_by_class[image.task, image.class_folder].append(image)

    too_few: list[str] = []
    most_shots = shots  # that all classes have
    train: dict[str, ScannedImage] = {}  # path → image
    training_path_by_sha256: dict[str, str] = {}
    for (task, name), members in images_by_class.items():
        may_train = [image for image in members if image.official_split in (None, "train")]
        # The first path represents its duplicates.
        distinct = {image.sha256: image for image in reversed(may_train)}
        needs_test_image = not any(image.official_split == "test" for image in members)
        if len(distinct) < shots + needs_test_image:
            most_shots = min(most_shots, len(distinct) - needs_test_image)
            num_duplicates = len(may_train) - len(distinct)
            duplicates_text = f" and {num_duplicates} exact duplicates" if num_duplicates else ""
            official = [image.official_split for image in members]
            splits_text = f" ({official.count('train')} train, {official.count('test')} test)" if any(official) else ""
            too_few.append(f"{task}/{name} has {pluralize(len(distinct), 'image')}{duplicates_text}{splits_text}")
            continue
        for image in sorted(distinct.values(), key=lambda image: rank(seed, image, image.class_folder))[:shots]:
            train[image.path] = image
            training_path_by_sha256.setdefault(image.sha256, image.path)
    if too_few:
        raise UserError(
            f"data.shots={shots} needs at least {shots + 1} distinct images per class ({shots} to train, 1 to test): "
            f"{'; '.join(too_few)}. {LEAVE_OUT}" + (f", or set --data.shots {most_shots}" if most_shots > 0 else "")
        )

    without_test: list[str] = []
    test: list[ScannedImage] = []
    duplicates: list[tuple[str, str]] = []
    for (task, name), members in images_by_class.items():
        candidates = [image for image in members if image.path not in train and image.official_split != "train"]
        class_test = [image for image in candidates if image.sha256 not in training_path_by_sha256]
        if not class_test:
            example = candidates[0]
            without_test.append(
                f"{task}/{name} has {pluralize(len(members), 'image')}; "
                f"each of {pluralize(len(candidates), 'candidate')} is a duplicate of a training image (such as "
                f"{example.path} of {training_path_by_sha256[example.sha256]})"
            )
        test += class_test
        for image in candidates:
            if image.sha256 in training_path_by_sha256:
                duplicates.append((image.path, training_path_by_sha256[image.sha256]))
    if without_test:
        raise UserError(
            f"data.shots={shots} leaves no test images, which must not be exact duplicates of a training image of any "
            f"task: {'; '.join(without_test)}. {LEAVE_OUT}"
        )
    sorted_train = sorted(train.values(), key=lambda image: image.path)
    return Splits(tuple(sorted_train), tuple(sorted(test, key=lambda image: image.path)), tuple(sorted(duplicates)))


LEAVE_OUT = "Add images of these classes, or leave them out: --data.class_names FILE lists those to use"


def content_fingerprint(images: Iterable[ScannedImage], multi_label: bool = False) -> str:
    """Return the SHA-256 of the images' paths, contents, tasks, classes and official splits, in order of their paths,
    and of data.multi_label. Manifests of the same files may differ in tasks, labels or splits."""
    digest = hashlib.sha256(MULTI_LABEL if multi_label else b"")
    for image in sorted(images, key=lambda image: image.path):
        values = (image.path, image.sha256, image.task, *image.class_folders, image.official_split or "")
        digest.update(("\0".join(values) + "\n").encode())
    return digest.hexdigest()


def rank(seed: int, image: ScannedImage, class_folder: str) -> bytes:
    """Return the rank of an image among those of one of its classes: the lowest train."""
    return hashlib.sha256(f"{seed}\0{image.task}\0{class_folder}\0{image.sha256}".encode()).digest()
