"""What a user should know of a data set before training on it, and what to do about it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from pipeline.data.image_stats import STORED_UPRIGHT, ImageStats
from pipeline.data.images import SUFFIXES_OF_FORMAT
from pipeline.data.names import split_synonyms
from pipeline.data.near_duplicates import MAX_HAMMING_DISTANCE, near_duplicate_groups
from pipeline.data.splits import ScannedImage

Severity = Literal["error", "warning", "note"]
"""error: a run stops at it. warning: it makes results worse, or look better than they are. note: good to know."""
IMBALANCE_RATIO = 10
"""A class is told of that has this many times fewer images than the largest of its task."""
SMALL_SIDE = 32
LONG_RATIO = 5.0
FLAT_CONTRAST = 2.0
MAX_SUBWORDS = 3
"""A word of a class name in this many pieces is one that CLIP has hardly read."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A file of the data set; `stats` is None for a broken one."""

    image: ScannedImage
    stats: ImageStats | None


@dataclass(frozen=True)
class Finding:
    severity: Severity
    title: str
    """With how many there are."""
    remedy: str
    examples: tuple[str, ...]
    """All of them, a line each."""


def find_issues(
    images: Sequence[CheckedImage],
    classes: Mapping[str, Sequence[str]],
    class_names: Mapping[str, str],
    subwords: Mapping[str, Sequence[str]],
    shots: int,
    training_paths: Iterable[str] = (),
    no_splits: str | None = None,
    max_broken_fraction: float = 0.0,
) -> list[Finding]:
    """Findings, errors first.

    Args:
        classes: task → class folders.
        class_words: class folder → words shown to CLIP.
        pieces: word of a class → what CLIP's tokenizer cuts it into, as of `tokenize_words`.
        shots: training images of each class.
        training_paths: of the images that would train.
        no_splits: why there can be none.
        max_broken_fraction: of the images, 0 to 1, that may be broken.
    """
    whole = [image for image in images if image.stats]
    found = [
        *_broken(images, max_broken_fraction),
        *_cannot_split(whole, classes, shots, no_splits),
        *_exact_duplicates(whole),
        *_near_duplicates(whole, set(training_paths)),
        *_odd_images(whole),
        *_classes_of_some_tasks(classes),
        *_imbalance(whole, classes),
        *_class_names(classes, class_names, subwords),
    ]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def tokenize_words(
    words: Iterable[str], encode: Callable[[str], list[int]], decode: Callable[[int], str]
) -> dict[str, list[str]]:
    """Each word of the class names → its pieces.

    Args:
        encode: text → token ids.
        decode: one token id → its text.
    """
    single = {word for text in words for word in re.findall(r"\w+", text)}
    return {word: [decode(token).replace("</w>", "") for token in encode(word)] for word in sorted(single)}


def _finding(severity: Severity, what: str, examples: Sequence[str], remedy: str) -> list[Finding]:
    """None without examples; `what` has {} for their number."""
    return [Finding(severity, what.format(f"{len(examples):,}"), remedy, tuple(examples))] if examples else []


def _broken(images: Sequence[CheckedImage], allowed: float) -> list[Finding]:
    broken = [f"{of.image.path}: {of.image.error}" for of in images if of.image.error]
    share = len(broken) / max(len(images), 1)
    what = f"{{}} files are broken ({100 * share:.2g} %)"
    if share <= allowed:
        return _finding("warning", what, broken, f"A run leaves them out: data.max_broken_fraction is {allowed:g}.")
    return _finding(
        "error",
        what,
        broken,
        "Mend or remove them, or let a run leave them out, which it records, with --data.max_broken_fraction.",
    )


def _cannot_split(
    images: Sequence[CheckedImage], classes: Mapping[str, Sequence[str]], shots: int, why: str | None
) -> list[Finding]:
    remedy = "take fewer with --data.shots, add images, or leave the class out with a file of --data.class_names."
    distinct: dict[tuple[str, str], set[str]] = defaultdict(set)
    for of in images:
        distinct[of.image.task, of.image.class_folder].add(of.image.sha256)
    lacking = [
        f"{task}/{name}: {len(distinct[task, name])} different images"
        for task, names in classes.items()
        for name in names
        if len(distinct[task, name]) <= shots
    ]
    if why and not lacking:  # given splits, or copies in several classes, leave too few
        remedy = f"Every class needs {shots} images to train and one to test: {remedy}"
        return [Finding("error", "the images cannot be split", remedy, tuple(why.split("; ")))]
    return _finding(
        "error",
        f"{{}} classes have no more than {shots} different images",
        lacking,
        f"{shots} train and one tests: {remedy}",
    )


def _exact_duplicates(images: Sequence[CheckedImage]) -> list[Finding]:
    by_content: dict[str, list[ScannedImage]] = defaultdict(list)
    for of in images:
        by_content[of.image.sha256].append(of.image)
    copies = [group for group in by_content.values() if len(group) > 1]
    classes = [{(image.task, image.class_folder) for image in group} for group in copies]
    contradicting = [
        _paths(group) for group, of_group in zip(copies, classes) if len(of_group) > len({task for task, _ in of_group})
    ]
    across = [
        _paths(group)
        for group, of_group in zip(copies, classes)
        if len({task for task, _ in of_group}) == len(of_group) > 1
    ]
    within = [_paths(group) for group, of_group in zip(copies, classes) if len(of_group) == 1]
    return [
        *_finding(
            "warning",
            "{} images are in several classes of one task",
            contradicting,
            "One of their labels is wrong: remove the wrong ones.",
        ),
        *_finding(
            "note",
            "{} images are in several tasks",
            across,
            "Copies of training images are in no test set. If the tasks should be different domains, see why they "
            "share images.",
        ),
        *_finding(
            "note",
            "{} images are in their class more than once",
            within,
            "Of copies one trains at most, and copies of training images do not test. Those that all test count more "
            "than once: remove all but one.",
        ),
    ]


def _near_duplicates(images: Sequence[CheckedImage], training: set[str]) -> list[Finding]:
    """Of images that are no exact copies of each other."""
    distinct = list({of.image.sha256: of for of in images}.values())
    distinct = [of for of in distinct if of.stats and of.stats.contrast > FLAT_CONTRAST]
    groups = [
        [distinct[at].image for at in group]
        for group in near_duplicate_groups([of.stats.phash for of in distinct if of.stats])
    ]
    leaking, mixed, rest = [], [], []
    for group in groups:
        trains = [image for image in group if image.path in training]
        if len({image.class_folder for image in group}) > 1:
            mixed.append(_paths(group))
        elif trains and any(image.path not in training and image.official_split != "train" for image in group):
            leaking.append(_paths([*trains, *(image for image in group if image.path not in training)]))
        else:
            rest.append(_paths(group))
    how = (
        f"Their 64-bit perceptual hashes differ in at most {MAX_HAMMING_DISTANCE} bits; look at them: it may be chance."
    )
    return [
        *_finding(
            "warning",
            "{} groups of images that look alike are in several classes",
            mixed,
            f"{how} If they show the same, some labels are wrong.",
        ),
        *_finding(
            "warning",
            "{} groups of images that look alike would be in training and test",
            leaking,
            f"{how} If they do (frames of one video, one photo at two sizes), the test accuracy is too good: keep one "
            "of each group.",
        ),
        *_finding("note", "{} other groups of images look alike", rest, how),
    ]


def _odd_images(images: Sequence[CheckedImage]) -> list[Finding]:
    small, long, flat, misnamed, turned, moving = [], [], [], [], [], []
    for of in images:
        stats, path = of.stats, of.image.path
        assert stats
        size = f"{stats.width} x {stats.height}"
        if min(stats.width, stats.height) < SMALL_SIDE:
            small.append(f"{path}: {size}")
        if max(stats.width, stats.height) > LONG_RATIO * min(stats.width, stats.height):
            long.append(f"{path}: {size}")
        if stats.contrast <= FLAT_CONTRAST:
            flat.append(path)
        if Path(path).suffix.lower() not in SUFFIXES_OF_FORMAT.get(stats.format, (Path(path).suffix.lower(),)):
            misnamed.append(f"{path}: {stats.format}")
        if stats.orientation != STORED_UPRIGHT:
            turned.append(f"{path}: orientation {stats.orientation}")
        if stats.frames > 1:
            moving.append(f"{path}: {stats.frames} frames")
    return [
        *_finding("warning", "{} images are of one color", flat, "They show nothing: remove them."),
        *_finding(
            "warning",
            f"{{}} images have a side of fewer than {SMALL_SIDE} pixels",
            small,
            "Thumbnails? Get the full ones, or remove them.",
        ),
        *_finding(
            "note",
            f"{{}} images are more than {LONG_RATIO:g} times as long as they are wide, or the other way",
            long,
            "The test sees the square in their middle: cut them to what matters.",
        ),
        *_finding(
            "note",
            "{} images are turned by their EXIF data",
            turned,
            "CLIP's own preprocessing shows them as they are stored, and so is done here. If they should be upright, "
            "store them so (mogrify -auto-orient, jhead -autorot).",
        ),
        *_finding("note", "{} images have several frames", moving, "The first one is used."),
        *_finding(
            "note",
            "{} files are of another format than their names say",
            misnamed,
            "They are read by what they hold. If a page was saved in place of an image it would be among the broken.",
        ),
    ]


def _classes_of_some_tasks(classes: Mapping[str, Sequence[str]]) -> list[Finding]:
    everywhere = sorted({name for names in classes.values() for name in names})
    lacking = {name: [task for task, names in classes.items() if name not in names] for name in everywhere}
    return _finding(
        "note",
        "{} classes are not in every task",
        [f"{name}: not in {', '.join(tasks)}" for name, tasks in lacking.items() if tasks],
        "That may be meant: tasks may have different classes. If not, look for another spelling of the folder, or list "
        "the classes that all have with --data.class_names.",
    )


def _imbalance(images: Sequence[CheckedImage], classes: Mapping[str, Sequence[str]]) -> list[Finding]:
    counts = Counter((of.image.task, of.image.class_folder) for of in images)
    rare = []
    for task, names in classes.items():
        of_task = {name: counts[task, name] for name in names}
        most = max(of_task.values())
        middle = median(of_task.values())
        rare += [
            f"{task}/{name}: {count:,} images, the largest class has {most:,}, the median is {middle:g}"
            for name, count in of_task.items()
            if 0 < count * IMBALANCE_RATIO <= most
        ]
    return _finding(
        "note",
        f"{{}} classes have less than a {IMBALANCE_RATIO}th of the images of their task's largest",
        rare,
        "Training is not affected: each class has as many shots. The accuracy is over test images, so large classes "
        "count more.",
    )


def _class_names(
    classes: Mapping[str, Sequence[str]], class_names: Mapping[str, str], subwords: Mapping[str, Sequence[str]]
) -> list[Finding]:
    odd: list[str] = []
    for folder, text in sorted(class_names.items()):
        reasons = []
        is_number = bool(re.fullmatch(r"[a-z]{0,2}[\d\W_]+", text, re.IGNORECASE))
        if is_number:
            reasons.append("a number, not a name")
        for word in [] if is_number else re.findall(r"\w+", text):
            if re.search(r"[a-z][A-Z]", word):
                apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", word)
                reasons.append(f"read as one word; is {apart!r} meant?")
            elif len(subwords.get(word, ())) >= MAX_SUBWORDS and not word.isdigit():
                reasons.append(f"{word!r} is cut into {' · '.join(subwords[word])}")
        if reasons:
            odd.append(f"{folder}: {'; '.join(reasons)}")
    same = []
    for task, names in classes.items():
        of_words: dict[str, list[str]] = defaultdict(list)
        for name in names:
            for own in split_synonyms(class_names[name]):
                of_words[" ".join(own.casefold().split())].append(name)
        same += [f"{task}: {', '.join(of)} are all {text!r}" for text, of in of_words.items() if len(of) > 1]
    say = "Say them in plain words with --data.class_names FILE: a line is the folder, a tab, and the words."
    return [
        *_finding("warning", "{} times, classes of one task have the same words", same, say),
        *_finding("note", "{} class names are ones that CLIP has hardly read", odd, say),
    ]


def _paths(images: Sequence[ScannedImage]) -> str:
    return ", ".join(image.path for image in images)
