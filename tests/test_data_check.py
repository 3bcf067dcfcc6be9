"""The data check: image statistics, findings, its page and its job."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import the_run
from rich.console import Console
from scipy import ndimage
from small_clip import tokenizer

from pipeline.config import DataConfig
from pipeline.data import checked_images, near_duplicates
from pipeline.data.checked_images import check_images, read_checked_images, read_samples, sample_paths
from pipeline.data.findings import CheckedImage, Finding, find_issues, tokenize_words
from pipeline.data.image_stats import THUMBNAIL, image_stats, thumbnail
from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.index import ImageRecord, index_dataset
from pipeline.data.names import pluralize
from pipeline.data.near_duplicates import MAX_HAMMING_DISTANCE, near_duplicate_groups
from pipeline.data.splits import ScannedImage
from pipeline.data.walk import JUNK_KIND, Skipped, skip_kind
from pipeline.report.data_check import (
    MAX_PAGE_CHARACTERS,
    MAX_SHOWN,
    MAX_SHOWN_OF_EXAMPLE,
    check_page,
    check_tables,
    shown_examples,
    summary_line,
    task_overviews,
)
from pipeline.stages.data_check import read_results


def photo(seed: int, size: tuple[int, int] = (96, 128)) -> Image.Image:
    """Draw smooth shapes, like a photograph."""
    noise = np.random.default_rng(seed).normal(size=(*size, 3))
    smooth = np.stack([ndimage.gaussian_filter(noise[..., c], 9, mode="wrap") for c in range(3)], axis=-1)
    return Image.fromarray(np.uint8(np.clip(128 + 60 * smooth / smooth.std(), 0, 255)))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- an image -------------------------------------------------------------------------------------------


def test_facts_of_an_image():
    turned = Image.Exif()
    turned[0x0112] = 6
    stats = image_stats(encoded(photo(1), "JPEG", exif=turned))
    assert (stats.width, stats.height, stats.mode, stats.format) == (128, 96, "RGB", "JPEG")
    assert (stats.orientation, stats.frames) == (6, 1) and stats.contrast > 20
    gray = Image.fromarray(np.full((40, 50), 30_000, np.uint16))
    assert image_stats(encoded(gray)).mode == "I;16" and image_stats(encoded(gray)).contrast == 0
    moving = encoded(photo(1).convert("P"), "GIF", save_all=True, append_images=[photo(2).convert("P")])
    assert (image_stats(moving).frames, image_stats(moving).mode, image_stats(moving).orientation) == (2, "P", 1)
    with pytest.raises(BrokenImage):
        image_stats(b"<html>not found</html>")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_metadata_and_later_frames_break_no_image():
    """Only what is used may stop a run: the pixels of the first frame."""
    frames = [photo(seed).convert("P") for seed in range(4)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image_stats(moving[:-2000]).frames >= 1 and image_stats(moving).frames == 4
    word = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x0112, 2, 3, b"up") + bytes(4)  # no number
    for exif in (word, b"MM\0*\xff\xff\xff\xff", b"\xff" * 40):
        assert image_stats(encoded(photo(1), "JPEG", exif=b"Exif\0\0" + exif)).orientation == 1


def test_thumbnails_are_small():
    for size in ((96, 128), (400, 40), (20, 30)):
        small = decode_rgb(thumbnail(photo(1, size)))
        assert max(small.size) == min(THUMBNAIL, max(size))


@pytest.mark.parametrize("change", ["smaller", "worse", "other format"])
def test_changed_copies_are_near_duplicates_and_other_images_are_not(change):
    phash = []
    for seed in range(12):
        image = photo(seed)
        copy = {
            "smaller": encoded(image.resize((64, 48), Image.Resampling.BICUBIC)),
            "worse": encoded(image, "JPEG", quality=40),
            "other format": encoded(image, "WEBP", lossless=True),
        }[change]
        phash += [image_stats(encoded(image)).phash, image_stats(copy).phash]
    assert near_duplicate_groups(phash) == [[first, first + 1] for first in range(0, 24, 2)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), max_distance=st.integers(0, 6), pairs_at_once=st.sampled_from([1, 5, 1 << 22]))
def test_groups_of_alike_are_those_of_comparing_all_pairs(data, max_distance, pairs_at_once):
    phash = data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=12))
    for _ in range(data.draw(st.integers(0, 20)) if phash else 0):
        near = data.draw(st.sampled_from(phash))
        for bit in data.draw(st.lists(st.integers(0, 63), max_size=max_distance + 1)):
            near ^= 1 << bit
        phash.append(near)
    group_of = list(range(len(phash)))
    for a, b in combinations(range(len(phash)), 2):
        if (phash[a] ^ phash[b]).bit_count() <= max_distance and group_of[a] != group_of[b]:
            old, new = group_of[b], group_of[a]
            group_of = [new if group == old else group for group in group_of]
    groups = [[i for i, label in enumerate(group_of) if label == group] for group in dict.fromkeys(group_of)]
    with patch.object(near_duplicates, "MAX_PAIRS_IN_MEMORY", pairs_at_once):
        assert near_duplicate_groups(phash, max_distance) == [group for group in groups if len(group) > 1]


def test_many_alike_are_compared_in_bounded_memory():
    phash = [0b1111 << shift for shift in range(60)] * 400
    assert [len(group) for group in near_duplicate_groups(phash, MAX_HAMMING_DISTANCE)] == [24_000]
    rng = np.random.default_rng(0)
    assert near_duplicate_groups([int(value) for value in rng.integers(0, 2**63, 50_000)], MAX_HAMMING_DISTANCE) == []
    # Nearly all pairs of these are alike, which are 36 million.
    near = [sum(1 << int(bit) for bit in rng.choice(16, 8, replace=False)) for _ in range(6_000)]
    (group,) = near_duplicate_groups(near, MAX_HAMMING_DISTANCE)
    assert group == list(range(6_000))


# --- a data set -----------------------------------------------------------------------------------------

CLASSES = {"art": ("cat", "dog"), "photo": ("cat", "dog")}
WORDS = {"cat": "cat", "dog": "dog"}


def checked(path: str, data: bytes, sha256: str | None = None) -> CheckedImage:
    task, folder, _ = path.split("/")
    try:
        stats, error = image_stats(data), None
    except BrokenImage as exception:
        stats, error = None, str(exception)
    return CheckedImage(ScannedImage(path, task, folder, sha256 or f"sha of {path}", error), stats)


def clean_set() -> list[CheckedImage]:
    places = [f"{task}/{name}/{number}.png" for task, names in CLASSES.items() for name in names for number in range(4)]
    return [checked(path, encoded(photo(100 + seed))) for seed, path in enumerate(places)]


def found(images, classes=CLASSES, words=WORDS, shots=3, training=(), skipped=()):
    subwords = tokenize_words(words.values(), tokenizer().encode, tokenizer().decoder.__getitem__)
    return find_issues(images, classes, words, subwords, shots, training, skipped=skipped)


def texts(finding) -> list[str]:
    return [example.text for example in finding.examples]


def only(findings):
    (finding,) = findings
    return finding


def test_a_clean_dataset_has_no_findings():
    assert found(clean_set()) == []


@pytest.mark.parametrize(
    ("extra", "severity", "title", "example"),
    [
        (
            {"art/cat/9.png": b"<html>"},
            "error",
            "1 file is broken (5.9 %)",
            "art/cat/9.png: not an image of a supported",
        ),
        (
            {"art/cat/9.png": encoded(Image.new("RGB", (64, 64), "red"))},
            "warning",
            "1 image is blank (a single color)",
            "9.png",
        ),
        ({"art/cat/9.png": encoded(photo(7, (20, 60)))}, "warning", "1 image has a side below 32", "60 x 20"),
        ({"art/cat/9.png": encoded(photo(7, (40, 300)))}, "note", "1 image has an aspect ratio above 5", "300 x 40"),
        ({"art/cat/9.png": encoded(photo(7), "JPEG")}, "note", "1 file has a format that differs", "9.png: JPEG"),
        (
            {"art/cat/9.jpg": encoded(photo(100), "JPEG", quality=60)},
            "note",
            "1 other group of near-duplicate images",
            "art/cat/0.png, art/cat/9.jpg",
        ),
        (
            {"photo/dog/9.jpg": encoded(photo(100), "JPEG", quality=60)},
            "warning",
            "1 group of near-duplicate images is in several classes",
            "art/cat/0.png, photo/dog/9.jpg",
        ),
    ],
)
def test_each_issue_of_an_image_is_one_finding(extra, severity, title, example):
    finding = only(found(clean_set() + [checked(path, data) for path, data in extra.items()]))
    assert finding.severity == severity and finding.title.startswith(title)
    assert len(finding.examples) == 1 and example in finding.examples[0].text and finding.remedy
    for image in finding.examples[0].images:
        assert image.path.startswith(f"{image.task}/{image.class_folder}/")


@pytest.mark.parametrize(
    ("path", "severity", "title"),
    [
        ("art/dog/9.png", "warning", "1 image is in several classes of one task"),
        ("photo/cat/9.png", "note", "1 image is in several tasks"),
        ("art/cat/9.png", "note", "1 image is in its class more than once"),
    ],
)
def test_exact_copies_by_where_they_are(path, severity, title):
    original = clean_set()[0]
    finding = only(found([*clean_set(), checked(path, encoded(photo(100)), original.image.sha256)]))
    assert (finding.severity, finding.title) == (severity, title)
    assert texts(finding) == [f"art/cat/0.png, {path}"]


def gray(white: int) -> np.ndarray:
    """A photo in gray of 16 bits, or more if its white needs them."""
    levels = np.asarray(photo(7).convert("L")).astype(float)
    return np.round(levels / levels.max() * white).astype(np.uint16 if white < 2**16 else np.int32)


@pytest.mark.parametrize(
    ("contents", "severity", "title", "example"),
    [
        ([np.asarray(photo(7)) // 16], "warning", "1 image is nearly black", "0.png"),
        ([255 - np.asarray(photo(7)) // 16] * 2, "warning", "2 images are nearly white", "1.png"),
        ([gray(4000)], "note", "1 gray image of more than 8 bits uses 12", "0.png: 12 bits"),
        (
            [gray(4000), gray(4000), gray(200)],
            "warning",
            "1 gray image of more than 8 bits uses other bits than the rest (1 use 8, 2 use 12)",
            "2.png: 8 bits",
        ),
        ([gray(2**31 - 1)], "note", "1 gray image of more than 8 bits uses 31", "0.png: 31 bits"),
    ],
)
def test_what_pixels_mean_is_looked_at(contents, severity, title, example):
    images = [
        checked(f"art/cat/x{number}.png", encoded(Image.fromarray(pixels), "TIFF"), f"{number}")
        for number, pixels in enumerate(contents)
    ]
    findings = [finding for finding in found(clean_set() + images) if "differ" not in finding.title]
    finding = next(finding for finding in findings if finding.title.startswith(title))
    assert finding.severity == severity and any(example in text for text in texts(finding)), finding
    whole = encoded(Image.fromarray(gray(65535)), "TIFF")
    assert found([*clean_set(), checked("art/cat/9.tif", whole)]) == []


def test_images_in_tables_have_no_suffix():
    image = clean_set()[0]
    assert image.stats.format == "PNG"
    for path, is_misnamed in (("data/t.parquet#00000001", False), ("a/b.PNG", False), ("a/b.parquet", True)):
        findings = found([replace(image, image=replace(image.image, path=path))], {}, shots=0)
        assert any("differs from its suffix" in finding.title for finding in findings) == is_misnamed


def test_transparent_images_are_told():
    image = photo(7).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    assert found([*clean_set(), checked("art/cat/9.png", encoded(image))]) == []
    image.paste((0, 0, 0, 0), (0, 0, 64, 96))
    finding = only(found([*clean_set(), checked("art/cat/9.png", encoded(image))]))
    assert finding.title == "1 image is partly transparent" and texts(finding) == ["art/cat/9.png: 50 % transparent"]
    assert "-background white" in finding.remedy


def test_shown_images_of_a_finding_are_bounded():
    image = checked("art/cat/0.png", encoded(photo(100)))
    blank = replace(image.stats, contrast=0.0)
    images = [CheckedImage(replace(image.image, path=f"{n}.png", sha256=str(n)), blank) for n in range(100)]
    finding = only([finding for finding in found(images, {}) if "blank" in finding.title])
    assert len(finding.examples) == 100 and len(shown_examples(finding)) == MAX_SHOWN


@pytest.mark.parametrize("number", [0, 1, 2, 1234])
def test_numbers_and_nouns_agree(number):
    assert pluralize(number, "image") == {1: "1 image", 1234: "1,234 images"}.get(number, f"{number} images")
    plurals = {"class": "classes", "category": "categories", "day": "days", "box": "boxes", "batch": "batches"}
    assert all(pluralize(2, word) == f"2 {plural}" for word, plural in plurals.items())


def test_no_title_of_one_has_a_verb_of_many():
    """All titles of the check, with one example and with two."""
    titles = [finding.title for count in (1, 2) for finding in every_finding(count)]
    assert len(titles) >= 30
    for title in titles:
        is_one, words = re.match("1 ", title), re.sub(r"\(.*\)| that \w+", "", title)
        assert not re.search(r" (have|are|use|differ)\b" if is_one else r" (has|is|uses|differs)\b", words), title


def every_finding(count: int) -> list[Finding]:
    """All findings, with this many examples each."""
    base = checked("art/cat/0.png", encoded(photo(100)))

    def image(path: str, sha256: str, **stats) -> CheckedImage:
        task, folder, _ = path.split("/")
        return CheckedImage(
            replace(base.image, path=path, task=task, class_folder=folder, sha256=sha256),
            replace(base.stats, phash=int(hashlib.sha256(sha256.encode()).hexdigest()[:16], 16), **stats),
        )

    images = []
    for n in range(count):
        images += [
            CheckedImage(replace(base.image, path=f"art/cat/{n}", error="?", sha256=f"e{n}"), None),
            *(image(f"art/{name}/several{n}", f"several{n}") for name in ("cat", "dog")),
            *(image(f"{task}/cat/tasks{n}", f"tasks{n}") for task in ("art", "photo")),
            *(image(f"art/cat/{copy}twice{n}", f"twice{n}") for copy in range(2)),
            image(f"art/cat/x{n}.jpg", f"small{n}", width=8, height=80, frames=2, orientation=6),
            image(f"art/cat/blank{n}", f"blank{n}", contrast=0.0, transparent=1.0),
            image(f"art/cat/dark{n}", f"dark{n}", dark=1.0),
            image(f"art/cat/bright{n}", f"bright{n}", bright=1.0),
            image(f"art/cat/deep{n}", f"deep{n}", mode="I;16", bits=12),
        ]
    images += [image(f"photo/dog/{n}", f"photo{n}") for n in range(1000)]
    for n, phash in enumerate([0b1 << 40, 0b111 << 50][:count]):
        for kind, folders in enumerate([("cat", "dog"), ("cat", "cat"), ("emu", "emu")]):
            for copy, name in enumerate(folders):
                near = image(f"art/{name}/near{n}{kind}{copy}", f"near{n}{kind}{copy}")
                images.append(replace(near, stats=replace(near.stats, phash=phash << (4 * kind) ^ copy)))
    trains = [checked.image.path for checked in images if re.search("near.10", checked.image.path)]
    classes = {"art": ("cat", "dog", "emu"), "photo": ("cat", "dog", "owl")[: 1 + count]}
    names = {"cat": "x", "dog": "x", "emu": "7", "owl": "8"}
    findings = find_issues(images, classes, names, {}, 5, trains)
    mixed = [image("art/cat/gray", "gray", mode="I;16", bits=10)] * count + images
    return [*findings, *(item for item in find_issues(mixed, classes, names, {}, 5) if "than the rest" in item.title)]


def test_near_duplicates_in_training_and_test_are_reported_training_image_first():
    images = [*clean_set(), checked("art/cat/9.jpg", encoded(photo(100), "JPEG", quality=60))]
    finding = only(found(images, training=["art/cat/9.jpg"]))
    assert finding.severity == "warning" and "would be in training and test" in finding.title
    assert texts(finding) == ["art/cat/9.jpg, art/cat/0.png"]
    assert "other group" in only(found(images, training=["art/cat/0.png", "art/cat/9.jpg"])).title


def test_classes_that_are_too_small_lacking_or_odd():
    images = clean_set()
    finding = only(found(images, shots=4))
    assert finding.severity == "error" and finding.title == "4 classes have no more than 4 distinct images"
    assert texts(finding)[0] == "art/cat: 4 distinct images"

    classes = CLASSES | {"photo": ("cat", "dog", "emu")}
    emus = [checked(f"photo/emu/{number}.png", encoded(photo(300 + number))) for number in range(40)]
    imbalance, lacking = found(images + emus, classes, WORDS | {"emu": "emu"})
    assert ["emu: not in art"] in (texts(lacking), texts(imbalance))
    rare = next(finding for finding in (imbalance, lacking) if "1/10" in finding.title)
    assert len(rare.examples) == 2 and "photo/cat: 4 images; the largest class has 40" in texts(rare)[0]

    ambiguous = only(found(images, words={"cat": "tabby | Big  cat", "dog": "big cat"}))
    assert ambiguous.severity == "warning" and texts(ambiguous) == [
        f"{task}: cat, dog are both 'big cat'" for task in CLASSES
    ]
    odd = only(found(images, words={"cat": "ToothBrush", "dog": "n02119789"}))
    assert texts(odd) == ["cat: a single word to CLIP; did you mean 'Tooth Brush'?", "dog: a number, not a name"]
    cut = only(found(images, words={"cat": "t-shirt", "dog": "Kanzelbrzze"}))
    assert len(cut.examples) == 1 and texts(cut)[0].startswith("dog: 'Kanzelbrzze' is split into ")
    assert "warning" not in {
        finding.severity for finding in found(images, words={"cat": "alarm clock", "dog": "aircraft carrier"})
    }


# --- its page -------------------------------------------------------------------------------------------


def test_files_that_are_not_read_are_findings_by_kind():
    skipped = [Skipped(f"art/cat/{number}.heic", skip_kind("0.heic")) for number in range(36)]
    skipped += [Skipped("art/cat/a", skip_kind("a")), Skipped("a.txt", skip_kind("a.txt")), Skipped("b/", JUNK_KIND)]
    findings = {finding.title: finding for finding in found(clean_set(), skipped=skipped)}
    heic = findings["36 files are not read: HEIC (.heic)"]
    assert heic.severity == "warning" and "Convert" in heic.remedy and len(heic.examples) == 36
    assert findings["1 file is not read: no suffix"].severity == "warning"
    note = findings[f"2 other files are not read: 1 .txt, 1 {JUNK_KIND}"]
    assert note.severity == "note" and len(note.examples) == 2
    error = found(clean_set(), shots=4, skipped=skipped)[0]
    assert error.severity == "error" and "36 HEIC (.heic)" in error.remedy and "convert" in error.remedy


def test_spellings_of_a_class_are_reported():
    classes = {
        "art": ("Alarm Clock", "cafe", "cat"),
        "photo": ("alarm_clock", "café", "dog"),
        "real": ("Alarm-Clock", "alarmclock", "cat"),
    }
    spellings = next(
        finding
        for finding in found([], classes, dict.fromkeys(sum(classes.values(), ()), "x"))
        if "spell" in finding.title
    )
    assert (spellings.severity, len(spellings.examples)) == ("warning", 2)
    assert all(name in texts(spellings)[0] for name in ("Alarm Clock", "alarm_clock", "Alarm-Clock", "alarmclock"))
    assert "'cafe' (in art), 'café' (in photo)" in texts(spellings)


def test_the_page_has_samples_of_each_class_and_nothing_of_a_name_runs():
    images = [*clean_set(), checked("art/cat/9.png", encoded(photo(7), "JPEG"))]
    findings = found(images)
    tasks = task_overviews(images, CLASSES)
    assert [(task.task, task.images, task.smallest_class, task.largest_class) for task in tasks] == [
        ("art", 9, 4, 5),
        ("photo", 8, 4, 4),
    ]
    assert (
        tasks[0].formats == "PNG 89 %, JPEG 11 %" and tasks[1].formats == "PNG" and tasks[0].median_size == "128 x 96"
    )
    samples = {(task, name): [thumbnail(photo(1))] * 2 for task, names in CLASSES.items() for name in names}
    class_names = {"cat": "<script>", "dog": "dog"}
    page = check_page("<b>demo</b>", tasks, findings, samples, class_names, {}, ["2 files not read: 2 <b>.txt"])
    assert page.count("<img") == 8 and "<script>" not in page and "<b>demo" not in page
    assert "1 file has a format that differs" in page and "art/cat/9.png: JPEG" in page
    assert "2 files not read: 2 &lt;b&gt;.txt" in page
    page = check_page("demo", tasks, findings, samples, class_names, {"art/cat/9.png": thumbnail(photo(7))})
    figure = re.search("<figure>.*?</figure>", page, re.DOTALL)[0]
    assert "<img" in figure and "art/cat/9.png" in figure and "art · &lt;script&gt;" in figure and "JPEG" in figure
    console = Console(record=True, width=120)
    console.print(check_tables("demo", tasks, findings))
    assert "17 images in 2 tasks" in console.export_text()


def test_long_groups_do_not_flood_the_page_nor_the_terminal():
    image = checked("art/cat/0.png", encoded(photo(100)))
    images = [replace(image, image=replace(image.image, path=f"art/cat/{number:04}.png")) for number in range(1000)]
    all_findings = find_issues(images, {"art": ("cat",)}, WORDS, {}, 0)
    findings = [finding for finding in all_findings if "more than once" in finding.title]
    assert len(texts(only(findings))[0]) > 10_000
    tasks = task_overviews(images, {"art": ("cat",)})
    thumbnails = {example.images[0].path: thumbnail(photo(1)) for example in findings[0].examples}
    page = check_page("demo", tasks, findings, {}, WORDS, thumbnails)
    assert len(re.search("<pre>(.*)</pre>", page, re.DOTALL)[1]) == MAX_PAGE_CHARACTERS
    assert page.count("<figure>") == MAX_SHOWN_OF_EXAMPLE
    console = Console(record=True, width=120)
    console.print(check_tables("demo", tasks, findings))
    assert len(console.export_text()) < 3000
    assert summary_line(findings) == "1 note" and summary_line([]) == "no findings"


# --- the stage and its job ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Two tasks with eight images of each of two classes, and issues."""
    root = tmp_path_factory.mktemp("planted") / "data"
    places = [
        f"{task}/{name}/{number}.png" for task in ("art", "photo") for name in CLASSES["art"] for number in range(8)
    ]
    contents = {path: encoded(photo(seed)) for seed, path in enumerate(places)}
    contents |= {
        "art/cat/broken.png": b"<html>",
        "art/cat/phone.heic": b"not read",
        "art/cat/cut.png": contents["art/cat/0.png"][:3000],
        "art/cat/same.png": contents["art/cat/1.png"],
        "art/dog/contradicts.png": contents["art/cat/2.png"],
        "photo/dog/flat.png": encoded(Image.new("RGB", (64, 64), "red")),
        "photo/dog/first.gif": encoded(photo(70).convert("P"), "GIF", save_all=True, append_images=[photo(71)]),
    }
    for path, data in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


@pytest.mark.parametrize("batch_rows", [5, checked_images.BATCH_ROWS])
def test_the_table_of_images_gives_back_what_was_seen(planted, tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(checked_images, "BATCH_ROWS", batch_rows)
    dataset = index_dataset(DataConfig(), planted)
    chosen = sample_paths(dataset.images)
    table = check_images(planted, dataset.images, chosen)
    checked_images.pq.write_table(table, tmp_path / "images.parquet")
    images = read_checked_images(tmp_path / "images.parquet", dataset.images)
    assert [checked.image.path for checked in images] == [record.path for record in dataset.images]
    for checked in images:
        data = (planted / checked.image.path).read_bytes()
        try:
            assert checked.stats == image_stats(data) and checked.image.error is None
        except BrokenImage as exception:
            assert checked.stats is None and checked.image.error == str(exception)
        assert checked.image.size == len(data)
    samples = read_samples(tmp_path / "images.parquet")
    broken = {checked.image.path for checked in images if not checked.stats}
    for key in ((task, name) for task, names in CLASSES.items() for name in names):
        records = [record for record in dataset.images if (record.task, record.class_folder) == key]
        paths = {record.path for record in records} & chosen
        assert len(paths) == 3 and len(samples[key]) == len(paths - broken)


def test_samples_are_few_where_classes_are_many(monkeypatch):
    monkeypatch.setattr(checked_images, "MAX_SAMPLES", 50)
    files = [
        ImageRecord(f"a/{name}/{number}.png", "a", str(name), 1, 1, 1) for name in range(40) for number in range(9)
    ]
    samples = sample_paths(files)
    num_by_class = [
        sum(file.class_folder == str(name) and file.path in samples for file in files) for name in range(40)
    ]
    assert len(samples) == 50 and sorted(num_by_class) == [1] * 30 + [2] * 10
    assert sample_paths(files[::-1]) == samples


def table_of(output: str) -> list[str]:
    """Return the table and the findings of a job's output."""
    return output.partition("┏")[2].partition("check.html")[0].split()


DEMO_CLIP = ("--clip.model", "builtin:digits", "--clip.pretrained", "builtin:digits")


def test_the_job_tells_shows_and_remembers(planted, run_job):
    storage = planted.parent / "storage"
    check = partial(
        run_job, "check_data", "--storage", storage, "--data.root", planted, *DEMO_CLIP, "--data.shots", "3"
    )

    checked = check()
    assert checked.status == 1 and "cached (computed in" not in checked.output
    printed = " ".join(checked.output.split())
    for text in (
        f"{planted.name}: 36 images in 2 tasks",
        "error 2 files are broken (5.3 %) Fix or remove what is broken",
        "art/cat/broken.png: not an image of a supported format",
        "warning 1 image is in several classes of one task At least one label is wrong",
        "art/cat/2.png, art/dog/contradicts.png",
        "warning 1 file is not read: HEIC (.heic) Convert",
        "layout folders <task>/<class>/: 2 tasks (art, photo), 2 classes, 38 images; 1 file not read: 1 HEIC (.heic)",
        "warning 1 image is blank (a single color)",
        "note 1 image is in its class more than once",
        "note 1 image has several frames",
    ):
        assert text in printed, checked.output
    folder = the_run(storage) / "data_check"
    assert f"1 error, 3 warnings, 2 notes: {folder / 'check.html'}" in printed
    written = json.loads((folder / "check.json").read_text())["findings"]
    assert [finding["severity"] for finding in written] == ["error", "warning", "warning", "warning", "note", "note"]
    assert len(written[0]["examples"]) == 2 and all(finding["remedy"] and finding["examples"] for finding in written)
    assert read_results(folder / "check.json", {"HEIC (.heic)": 1}) is not None
    assert read_results(folder / "check.json", {"HEIC (.heic)": 2}) is None, "the findings are not those of this folder"
    page = (folder / "check.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert 10 <= page.partition("<h2>Samples</h2>")[2].count("<img") <= 12
    captions = re.findall("<figure>.*?<b>(.*?)</b><br>(.*?)</figcaption>", page, re.DOTALL)
    assert ("art · dog", "art/dog/contradicts.png") in captions and ("photo · dog", "photo/dog/flat.png") in captions
    assert page.count('<div class="together">') == 2 and "art/cat/broken.png" in page
    assert not list(storage.glob("splits/*"))

    repeated = check()
    assert repeated.status == 1 and repeated.output.count("cached (computed in") == 1
    assert table_of(repeated.output) == table_of(checked.output)

    # Where broken files may be left out, nothing stops a run; no image is read for that again.
    (images,) = storage.glob("data_check/*/images.parquet")
    modified_ns = images.stat().st_mtime_ns
    tolerant = check("--data.max_broken_fraction", "0.1")
    assert tolerant.status == 0 and "4 warnings, 2 notes" in tolerant.output
    assert list(storage.glob("data_check/*/images.parquet")) == [images] and images.stat().st_mtime_ns == modified_ns
