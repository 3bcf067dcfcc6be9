"""Issues of a data set that a user should know before training on it, each with a suggested fix."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from pipeline.data.image_stats import STORED_UPRIGHT, ImageStats
from pipeline.data.images import SUFFIXES_OF_FORMAT
from pipeline.data.names import pluralize, split_synonyms
from pipeline.data.near_duplicates import MAX_HAMMING_DISTANCE, near_duplicate_groups
from pipeline.data.splits import ScannedImage
from pipeline.data.table_images import ROW_PATH
from pipeline.data.walk import Skipped, describe_skipped, skip_remedy, unread_images_note

Severity = Literal["error", "warning", "note"]
"""error: stops a run. warning: makes results worse, or look better than they are. note: for information."""
IMBALANCE_RATIO = 10
"""A class is rare if the largest class of its task has this many times its images."""
SMALL_SIDE = 32
LONG_RATIO = 5.0
FLAT_CONTRAST = 2.0
UNIFORM_FRACTION = 0.995
"""Fraction of nearly black, or nearly white, pixels of an image that shows nothing but for a few."""
MIN_TRANSPARENT = 0.01
"""Fraction of transparent pixels to report: cut corners have fewer."""
MAX_SUBWORDS = 3
"""A word that the tokenizer splits into this many subwords is rare in CLIP's training data."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image of the data set; `stats` is None if it is broken."""

    image: ScannedImage
    stats: ImageStats | None


@dataclass(frozen=True, slots=True)
class ShownImage:
    """An image of an example."""

    path: str
    task: str
    class_folder: str


@dataclass(frozen=True, slots=True)
class Example:
    """One occurrence: an image, a group of images, or, without images, a class or task."""

    detail: str = ""
    images: tuple[ShownImage, ...] = ()

    @property
    def text(self) -> str:
        """The example in one line."""
        return ": ".join(filter(None, (", ".join(image.path for image in self.images), self.detail)))


@dataclass(frozen=True)
class Finding:
    severity: Severity
    title: str
    """Includes the number of examples."""
    remedy: str
    examples: tuple[Example, ...] = field(repr=False)
    """All of them, which may be thousands."""


def find_issues(
    images: Sequence[CheckedImage],
    classes: Mapping[str, Sequence[str]],
    class_names: Mapping[str, str],
    subwords: Mapping[str, Sequence[str]],
    shots: int,
    training_paths: Iterable[str] = (),
    split_error: str | None = None,
    max_broken_fraction: float = 0.0,
    skipped: Sequence[Skipped] = (),
) -> list[Finding]:
    """Return all findings, errors first.

    Args:
        classes: task → class folders.
        class_names: class folder → class name shown to CLIP.
        subwords: word of a class name → its tokens, from `tokenize_words`.
        shots: training images per class.
        training_paths: paths of the images that would train.
        split_error: why the images cannot be split, if so.
        max_broken_fraction: fraction of images, 0 to 1, that may be broken.
        skipped: what is not read of the data set's folder.
    """
    decodable = [image for image in images if image.stats]
    findings = [
        *_broken(images, max_broken_fraction),
        *_files_not_read(skipped),
        *_too_few_images(decodable, classes, shots, split_error, skipped),
        *_exact_duplicates(decodable),
        *_near_duplicates(decodable, set(training_paths)),
        *_unusual_images(decodable),
        *_class_spellings(classes),
        *_partly_missing_classes(classes),
        *_imbalance(decodable, classes),
        *_class_names(classes, class_names, subwords),
    ]
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def tokenize_words(
    class_names: Iterable[str], encode: Callable[[str], list[int]], decode: Callable[[int], str]
) -> dict[str, list[str]]:
    """Return word of the class names → its subwords.

    Args:
        encode: text → token ids.
        decode: one token id → its text.
    """
    words = {word for class_name in class_names for word in re.findall(r"\w+", class_name)}
    return {word: [decode(token).replace("</w>", "") for token in encode(word)] for word in sorted(words)}


def _finding(severity: Severity, one: str, many: str, examples: Sequence[Example], remedy: str) -> list[Finding]:
    """Return a finding, or none without examples.

    Args:
        one, many: title for one example and for several, without their number.
    """
    if not examples:
        return []
    title = f"1 {one}" if len(examples) == 1 else f"{len(examples):,} {many}"
    return [Finding(severity, title, remedy, tuple(examples))]


def _texts(lines: Iterable[str]) -> list[Example]:
    return [Example(line) for line in lines]


def _group(images: Iterable[ScannedImage], detail: str = "") -> Example:
    return Example(detail, tuple(ShownImage(image.path, image.task, image.class_folder) for image in images))


def _broken(images: Sequence[CheckedImage], max_fraction: float) -> list[Finding]:
    broken = [_group([checked.image], checked.image.error) for checked in images if checked.image.error]
    fraction = len(broken) / max(len(images), 1)
    titles = f"file is broken ({100 * fraction:.2g} %)", f"files are broken ({100 * fraction:.2g} %)"
    if fraction <= max_fraction:
        return _finding(
            "warning", *titles, broken, f"A run drops what is broken: data.max_broken_fraction is {max_fraction:g}."
        )
    return _finding(
        "error",
        *titles,
        broken,
        "Fix or remove what is broken, or let runs drop (and record) it with --data.max_broken_fraction.",
    )


def _files_not_read(skipped: Sequence[Skipped]) -> list[Finding]:
    """Report each kind of files that may be images, and all others together."""
    paths: dict[str, list[str]] = defaultdict(list)
    other_files = []
    for file in skipped:
        if skip_remedy(file.kind):
            paths[file.kind].append(file.path)
        else:
            other_files.append(file)
    findings = []
    for kind, examples in sorted(paths.items()):
        remedy = skip_remedy(kind) or ""
        findings += _finding(
            "warning",
            f"file is not read: {kind}",
            f"files are not read: {kind}",
            _texts(examples),
            f"{remedy[:1].upper()}{remedy[1:]}.",
        )
    kinds = describe_skipped(other_files)
    return findings + _finding(
        "note",
        f"other file is not read: {kinds}",
        f"other files are not read: {kinds}",
        _texts(file.path for file in other_files),
        "Nothing is to be done, unless they are images.",
    )


def _too_few_images(
    images: Sequence[CheckedImage],
    classes: Mapping[str, Sequence[str]],
    shots: int,
    split_error: str | None,
    skipped: Sequence[Skipped],
) -> list[Finding]:
    remedy = "use fewer with --data.shots, add images, or exclude the class with a file of --data.class_names."
    if note := unread_images_note(skipped):
        remedy += f" {note}."
    distinct: dict[tuple[str, str], set[str]] = defaultdict(set)
    for checked in images:
        for name in checked.image.class_folders:
            distinct[checked.image.task, name].add(checked.image.sha256)
    small_classes = [
        f"{task}/{name}: {pluralize(len(distinct[task, name]), 'distinct image')}"
        for task, names in classes.items()
        for name in names
        if len(distinct[task, name]) <= shots
    ]
    if split_error and not small_classes:  # official splits, or duplicates in several classes, leave too few
        remedy = f"Every class needs {pluralize(shots, 'training image')} and one test image: {remedy}"
        return [Finding("error", "the images cannot be split", remedy, tuple(_texts(split_error.split("; "))))]
    limit = pluralize(shots, "distinct image")
    return _finding(
        "error",
        f"class has no more than {limit}",
        f"classes have no more than {limit}",
        _texts(small_classes),
        f"Training takes {shots}, the test at least one: {remedy}",
    )


def _exact_duplicates(images: Sequence[CheckedImage]) -> list[Finding]:
    images_by_sha256: dict[str, list[ScannedImage]] = defaultdict(list)
    for checked in images:
        images_by_sha256[checked.image.sha256].append(checked.image)
    contradicting, across_tasks, within_class = [], [], []
    for group in images_by_sha256.values():
        classes = {(image.task, image.class_folders) for image in group}
        if len(classes) > len({task for task, _ in classes}):
            contradicting.append(_group(group))
        elif len(classes) > 1:
            across_tasks.append(_group(group))
        elif len(group) > 1:
            within_class.append(_group(group))
    return [
        *_finding(
            "warning",
            "image is in several classes of one task",
            "images are in several classes of one task",
            contradicting,
            "At least one label is wrong: remove the wrong copies.",
        ),
        *_finding(
            "note",
            "image is in several tasks",
            "images are in several tasks",
            across_tasks,
            "Duplicates of training images are excluded from all test sets. If the tasks are different domains, check "
            "why they share images.",
        ),
        *_finding(
            "note",
            "image is in its class more than once",
            "images are in their class more than once",
            within_class,
            "At most one copy of an image trains, and duplicates of training images are not tested. Among test images "
            "they count repeatedly: keep one.",
        ),
    ]


def _near_duplicates(images: Sequence[CheckedImage], training: set[str]) -> list[Finding]:
    """Find near-duplicates that are not exact duplicates."""
    distinct = list({checked.image.sha256: checked for checked in images}.values())
    distinct = [checked for checked in distinct if checked.stats and checked.stats.contrast > FLAT_CONTRAST]
    groups = [
        [distinct[position].image for position in group]
        for group in near_duplicate_groups([checked.stats.phash for checked in distinct if checked.stats])
    ]
    leaking, contradicting, harmless = [], [], []
    for group in groups:
        trains = [image for image in group if image.path in training]
        if len({image.class_folders for image in group}) > 1:
            contradicting.append(_group(group))
        elif trains and any(image.path not in training and image.official_split != "train" for image in group):
            leaking.append(_group([*trains, *(image for image in group if image.path not in training)]))
        else:
            harmless.append(_group(group))
    hint = f"Perceptual hashes differ in at most {MAX_HAMMING_DISTANCE} of 64 bits; check by eye."
    return [
        *_finding(
            "warning",
            "group of near-duplicate images is in several classes",
            "groups of near-duplicate images are in several classes",
            contradicting,
            f"{hint} If they show the same, some labels are wrong.",
        ),
        *_finding(
            "warning",
            "group of near-duplicate images would be in training and test",
            "groups of near-duplicate images would be in training and test",
            leaking,
            f"{hint} If they show the same (frames of a video, a photo at two sizes), the test accuracy is too "
            "optimistic: keep one of each group.",
        ),
        *_finding(
            "note",
            "other group of near-duplicate images",
            "other groups of near-duplicate images",
            harmless,
            hint,
        ),
    ]


_FLATTEN = "mogrify -background white -alpha remove"


class _ImageIssue(NamedTuple):
    """An issue that the stats of an image show by themselves."""

    severity: Severity
    one: str
    many: str
    remedy: str
    occurs: Callable[[ImageStats], bool]
    detail: Callable[[ImageStats], str] = lambda stats: ""


_IMAGE_ISSUES = (
    _ImageIssue(
        "warning",
        "image is blank (a single color)",
        "images are blank (a single color)",
        f"Remove what shows nothing. Transparent drawings may be read so: {_FLATTEN}",
        lambda stats: stats.contrast <= FLAT_CONTRAST,
    ),
    _ImageIssue(
        "warning",
        "image is nearly black",
        "images are nearly black",
        "Colors of 10 to 14 bits in 16-bit files are black (mogrify -auto-level scales them), so may be what "
        f"transparent images have behind their objects ({_FLATTEN}).",
        lambda stats: stats.contrast > FLAT_CONTRAST and stats.dark > UNIFORM_FRACTION,
    ),
    _ImageIssue(
        "warning",
        "image is nearly white",
        "images are nearly white",
        "Overexposed, or scaled wrongly before saving with 8 bits?",
        lambda stats: stats.contrast > FLAT_CONTRAST and stats.bright > UNIFORM_FRACTION,
    ),
    _ImageIssue(
        "warning",
        f"image has a side below {SMALL_SIDE} pixels",
        f"images have a side below {SMALL_SIDE} pixels",
        "Replace thumbnails with the full images; remove icons and the like.",
        lambda stats: min(stats.width, stats.height) < SMALL_SIDE,
        lambda stats: f"{stats.width} x {stats.height}",
    ),
    _ImageIssue(
        "note",
        f"image has an aspect ratio above {LONG_RATIO:g}",
        f"images have an aspect ratio above {LONG_RATIO:g}",
        "Only the center square is tested: crop to the relevant part.",
        lambda stats: max(stats.width, stats.height) > LONG_RATIO * min(stats.width, stats.height),
        lambda stats: f"{stats.width} x {stats.height}",
    ),
    _ImageIssue(
        "note",
        "image is partly transparent",
        "images are partly transparent",
        f"The color stored behind transparency is used, which is often black. On white: {_FLATTEN}",
        lambda stats: stats.transparent > MIN_TRANSPARENT,
        lambda stats: f"{100 * stats.transparent:.0f} % transparent",
    ),
    _ImageIssue(
        "note",
        "image has an EXIF orientation",
        "images have an EXIF orientation",
        "It is ignored, as in CLIP's own preprocessing. To have images upright, rotate the stored pixels (mogrify "
        "-auto-orient, jhead -autorot).",
        lambda stats: stats.orientation != STORED_UPRIGHT,
        lambda stats: f"orientation {stats.orientation}",
    ),
    _ImageIssue(
        "note",
        "image has several frames",
        "images have several frames",
        "The first frame is used.",
        lambda stats: stats.frames > 1,
        lambda stats: f"{stats.frames} frames",
    ),
)


def _unusual_images(images: Sequence[CheckedImage]) -> list[Finding]:
    """Report the issues of single images; `images` can be decoded."""
    decoded = [(checked.image, checked.stats) for checked in images if checked.stats]
    findings = []
    for issue in _IMAGE_ISSUES:
        examples = [_group([image], issue.detail(stats)) for image, stats in decoded if issue.occurs(stats)]
        findings += _finding(issue.severity, issue.one, issue.many, examples, issue.remedy)
    misnamed = [
        _group([image], stats.format) for image, stats in decoded if _has_other_suffix(image.path, stats.format)
    ]
    return [
        *findings,
        *_gray_depths(images),
        *_finding(
            "note",
            "file has a format that differs from its suffix",
            "files have a format that differs from their suffix",
            misnamed,
            "Files are read by content. (A web page saved as an image would be among the broken files.)",
        ),
    ]


def _has_other_suffix(path: str, image_format: str) -> bool:
    suffix = Path(path).suffix.lower()
    if ROW_PATH.fullmatch(path):  # the suffix is that of the table
        return False
    return suffix not in SUFFIXES_OF_FORMAT.get(image_format, (suffix,))


def _gray_depths(images: Sequence[CheckedImage]) -> list[Finding]:
    """Report gray images of more than 8 bits that do not use all of 16, or of which some use fewer than others."""
    deep = [(checked.image, checked.stats.bits) for checked in images if checked.stats and checked.stats.mode[0] == "I"]
    counts = Counter(bits for _, bits in deep)
    if not counts or [*counts] == [16]:
        return []
    usual = counts.most_common(1)[0][0]
    listed = ", ".join(f"{number:,} use {bits}" for bits, number in sorted(counts.items()))
    if len(counts) == 1:
        return _finding(
            "note",
            f"gray image of more than 8 bits uses {usual}",
            f"gray images of more than 8 bits use {usual}",
            [_group([image], f"{bits} bits") for image, bits in deep],
            "Each is scaled to 8 bits by the bits that its brightest pixel needs.",
        )
    return _finding(
        "warning",
        f"gray image of more than 8 bits uses other bits than the rest ({listed})",
        f"gray images of more than 8 bits use other bits than the rest ({listed})",
        [_group([image], f"{bits} bits") for image, bits in deep if bits != usual],
        "Each is scaled to 8 bits by the bits that its brightest pixel needs, so that dark ones become brighter than "
        "others. If their brightness matters, convert all to 8 bits with one scale.",
    )


def _class_spellings(classes: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Find classes whose names differ only in case, accents, separators and an s at the end: to a run they are
    different classes."""
    tasks_by_folder: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for task, folders in classes.items():
        for folder in folders:
            letters = unicodedata.normalize("NFKD", folder.casefold())
            key = "".join(letter for letter in letters if letter.isalnum()).removesuffix("s")
            tasks_by_folder[key or folder][folder].append(task)
    return _finding(
        "warning",
        "class has several spellings",
        "classes have several spellings",
        _texts(
            ", ".join(f"{folder!r} (in {', '.join(tasks)})" for folder, tasks in spellings.items())
            for spellings in tasks_by_folder.values()
            if len(spellings) > 1
        ),
        "Each spelling is a class of its own: if they mean the same, rename the folders or labels to one of them.",
    )


def _partly_missing_classes(classes: Mapping[str, Sequence[str]]) -> list[Finding]:
    all_classes = sorted({name for names in classes.values() for name in names})
    missing = {name: [task for task, names in classes.items() if name not in names] for name in all_classes}
    return _finding(
        "note",
        "class is not in every task",
        "classes are not in every task",
        _texts(f"{name}: not in {', '.join(tasks)}" for name, tasks in missing.items() if tasks),
        "Tasks may have different classes. If this is not intended, look for another spelling of the folder, or list "
        "the common classes with --data.class_names.",
    )


def _imbalance(images: Sequence[CheckedImage], classes: Mapping[str, Sequence[str]]) -> list[Finding]:
    counts = Counter((checked.image.task, name) for checked in images for name in checked.image.class_folders)
    rare = []
    for task, names in classes.items():
        class_sizes = {name: counts[task, name] for name in names}
        largest = max(class_sizes.values())
        typical = median(class_sizes.values())
        rare += [
            f"{task}/{name}: {pluralize(size, 'image')}; the largest class has {largest:,}, the median is {typical:g}"
            for name, size in class_sizes.items()
            if 0 < size * IMBALANCE_RATIO <= largest
        ]
    return _finding(
        "note",
        f"class has at most 1/{IMBALANCE_RATIO} of the images of its task's largest class",
        f"classes have at most 1/{IMBALANCE_RATIO} of the images of their task's largest class",
        _texts(rare),
        "Training is not affected: all classes have the same number of shots. Accuracy is averaged over test images, "
        "so large classes weigh more.",
    )


def _class_names(
    classes: Mapping[str, Sequence[str]], class_names: Mapping[str, str], subwords: Mapping[str, Sequence[str]]
) -> list[Finding]:
    unclear: list[str] = []
    for folder, text in sorted(class_names.items()):
        reasons = []
        is_number = bool(re.fullmatch(r"[a-z]{0,2}[\d\W_]+", text, re.IGNORECASE))
        if is_number:
            reasons.append("a number, not a name")
        for word in [] if is_number else re.findall(r"\w+", text):
            if re.search(r"[a-z][A-Z]", word):
                separated = re.sub(r"([a-z])([A-Z])", r"\1 \2", word)
                reasons.append(f"a single word to CLIP; did you mean {separated!r}?")
            elif len(subwords.get(word, ())) >= MAX_SUBWORDS and not word.isdigit():
                reasons.append(f"{word!r} is split into {' · '.join(subwords[word])}")
        if reasons:
            unclear.append(f"{folder}: {'; '.join(reasons)}")
    ambiguous = []
    for task, folders in classes.items():
        folders_by_name: dict[str, list[str]] = defaultdict(list)
        for folder in folders:
            for name in split_synonyms(class_names[folder]):
                folders_by_name[" ".join(name.casefold().split())].append(folder)
        ambiguous += [
            f"{task}: {', '.join(shared)} are {'both' if len(shared) == 2 else 'all'} {name!r}"
            for name, shared in folders_by_name.items()
            if len(shared) > 1
        ]
    remedy = "Give better names with --data.class_names FILE; its lines are the folder, a tab, and the class name."
    return [
        *_finding(
            "warning",
            "class name is shared by classes of one task",
            "class names are shared by classes of one task",
            _texts(ambiguous),
            remedy,
        ),
        *_finding(
            "note",
            "class name is unclear to CLIP (a number, joined or rare words)",
            "class names are unclear to CLIP (numbers, joined or rare words)",
            _texts(unclear),
            remedy,
        ),
    ]
