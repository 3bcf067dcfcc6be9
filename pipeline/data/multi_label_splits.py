"""Few-shot sampling where an image may have several classes.

Classes are served one after another, those with the fewest images first, equal ones by name. A class takes the images
with its lowest ranks (as of `sample_splits`) until `shots` training images have it, counting those that earlier classes
took. So every class has at least `shots` training images, frequent ones more; with one class per image it is the
sampling of `sample_splits`. An image that is the last of one of its classes is never taken: the test needs it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pipeline.data.names import pluralize
from pipeline.data.splits import LEAVE_OUT, ScannedImage, Splits, rank
from pipeline.errors import UserError


def sample_multi_label_splits(
    images: Iterable[ScannedImage], classes: Mapping[str, Sequence[str]], shots: int, seed: int
) -> Splits:
    """Draw training images of each task, `shots` or more of each class, from decodable `images`; the rest are test
    images. Images with an official split stay in it.

    Raises:
        UserError: lists every class that cannot have `shots` training images and one test image.
    """
    images_by_task: dict[str, list[ScannedImage]] = {task: [] for task in classes}
    for image in sorted(images, key=lambda image: image.path):
        images_by_task[image.task].append(image)
    too_few: list[str] = []
    train: dict[str, ScannedImage] = {}  # path → image
    for task, members in images_by_task.items():
        taken, missing = _draw(members, classes[task], shots, seed)
        train |= {image.path: image for image in taken}
        too_few += [f"{task}/{name} has {text}" for name, text in missing.items()]
    if too_few:
        raise UserError(
            f"data.shots={shots} needs at least {shots + 1} distinct images per class ({shots} to train, 1 to test): "
            f"{'; '.join(too_few)}. {LEAVE_OUT}, or lower --data.shots"
        )
    training_path_by_sha256: dict[str, str] = {}
    for image in train.values():
        training_path_by_sha256.setdefault(image.sha256, image.path)
    test: list[ScannedImage] = []
    duplicates: list[tuple[str, str]] = []
    for image in (image for members in images_by_task.values() for image in members):
        if image.path in train or image.official_split == "train":
            continue
        if training_path := training_path_by_sha256.get(image.sha256):
            duplicates.append((image.path, training_path))
        else:
            test.append(image)
    tested = {(image.task, name) for image in test for name in image.class_folders}
    if untested := [
        f"{task}/{name}" for task, names in classes.items() for name in names if (task, name) not in tested
    ]:
        raise UserError(
            f"data.shots={shots} leaves no test images, which must not be exact duplicates of a training image of any "
            f"task: {'; '.join(untested)}. {LEAVE_OUT}"
        )
    by_path = [sorted(part, key=lambda image: image.path) for part in (train.values(), test)]
    return Splits(tuple(by_path[0]), tuple(by_path[1]), tuple(sorted(duplicates)))


def _draw(
    members: Sequence[ScannedImage], names: Sequence[str], shots: int, seed: int
) -> tuple[list[ScannedImage], dict[str, str]]:
    """Return the training images of a task, and class → what it has, for the classes with too few."""
    # The first path represents its duplicates.
    distinct = {image.sha256: image for image in reversed(members) if image.official_split in (None, "train")}
    images_by_class: dict[str, list[ScannedImage]] = defaultdict(list)
    for image in distinct.values():
        for name in image.class_folders:
            images_by_class[name].append(image)
    has_test_image = {name for image in members if image.official_split == "test" for name in image.class_folders}
    num_left = {name: len(images_by_class[name]) for name in names}
    num_taken: Counter[str] = Counter()
    taken: dict[str, ScannedImage] = {}
    for name in sorted(names, key=lambda name: (len(images_by_class[name]), name)):
        for image in sorted(images_by_class[name], key=lambda image: rank(seed, image, name)):
            if num_taken[name] >= shots:
                break
            is_last = any(num_left[label] == 1 and label not in has_test_image for label in image.class_folders)
            if image.path not in taken and not is_last:
                taken[image.path] = image
                num_taken.update(image.class_folders)
                for label in image.class_folders:
                    num_left[label] -= 1
    missing = {
        name: f"{pluralize(len(images_by_class[name]), 'image')}, of which {num_taken[name]} can train"
        for name in names
        if num_taken[name] < shots
    }
    return list(taken.values()), missing
