"""Data without Ray: indexing, sampling, Parquet, decoding, augmentation."""

import hashlib
import io
import json
import os
import random
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import CONFIGS, AugmentationConfig, DataConfig, choices, parse_config
from pipeline.data import parquet
from pipeline.data.augment import augment, crop_boxes
from pipeline.data.contents import dataset_fingerprint
from pipeline.data.images import RESAMPLING, BrokenImage, decode_rgb, evaluation_pixels, training_pixels
from pipeline.data.index import index_dataset, read_class_names
from pipeline.data.layouts import FOLDER_LAYOUTS, OFFICE_HOME_FOLDER, OFFICE_HOME_TASKS
from pipeline.data.lists import LIST_LAYOUTS
from pipeline.data.parquet import COLUMNS, SplitDescription, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.splits import ScannedImage, content_fingerprint, sample_splits
from pipeline.data.walk import CIRCULAR_LINK, JUNK_KIND, LOOSE_IMAGE
from pipeline.errors import UserError

ensure_torchvision()

from open_clip.transform import image_transform  # noqa: E402
from torchvision.transforms import RandomResizedCrop  # noqa: E402


def png(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw an image with smooth and grainy parts and hard edges, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-20, 21, pixels.shape)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 120)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tree(root: Path, paths, content=None) -> Path:
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number) if content is None else content)
    return root


# --- sampling --------------------------------------------------------------------------------------------


def scanned(task: str, class_folder: str, name: str, content: str) -> ScannedImage:
    digest = hashlib.sha256(content.encode()).hexdigest()
    return ScannedImage(f"{task}/{class_folder}/{name}", task, class_folder, digest)


@st.composite
def image_sets(draw):
    """(images, classes, shots): a class has enough contents of its distinct, and some of a pool that all share."""
    shots = draw(st.integers(1, 3))
    images, classes = [], {}
    for task in [f"task{number}" for number in range(draw(st.integers(1, 3)))]:
        classes[task] = [f"class{number}" for number in range(draw(st.integers(1, 3)))]
        for name in classes[task]:
            distinct = [f"{task} {name} {number}" for number in range(draw(st.integers(shots + 1, shots + 3)))]
            duplicates = draw(st.lists(st.sampled_from([*distinct, "pool 1", "pool 2", "pool 3"]), max_size=4))
            contents = draw(st.permutations(distinct + duplicates))
            images += [scanned(task, name, f"{number}.png", text) for number, text in enumerate(contents)]
    return images, classes, shots


def contents(images) -> Counter:
    return Counter((image.task, image.class_folder, image.sha256) for image in images)


@given(image_sets(), st.integers(0, 5))
def test_splits_have_exact_shots_and_share_no_content(image_set, seed):
    images, classes, shots = image_set
    splits = sample_splits(images, classes, shots, seed)

    num_by_class = Counter((image.task, image.class_folder) for image in splits.train)
    assert num_by_class == {(task, name): shots for task, names in classes.items() for name in names}
    assert max(contents(splits.train).values()) == 1
    assert {(image.task, image.class_folder) for image in splits.test} == set(num_by_class)

    assert {image.sha256 for image in splits.train}.isdisjoint(image.sha256 for image in splits.test)
    placed = [image.path for image in (*splits.train, *splits.test)] + [path for path, _ in splits.duplicates]
    assert sorted(placed) == sorted(image.path for image in images)
    content_of = {image.path: image.sha256 for image in images}
    trains = {image.path for image in splits.train}
    assert all(content_of[path] == content_of[original] and original in trains for path, original in splits.duplicates)


@given(image_sets(), st.randoms(use_true_random=False))
def test_sample_does_not_depend_on_order_or_file_names(image_set, rng):
    images, classes, shots = image_set
    splits = sample_splits(images, classes, shots, seed=1)
    shuffled = rng.sample(images, len(images))
    assert sample_splits(shuffled, classes, shots, seed=1) == splits

    names = rng.sample(range(1000), len(images))
    renamed = [
        replace(image, path=f"{image.task}/{image.class_folder}/{name}.png") for image, name in zip(images, names)
    ]
    resampled = sample_splits(renamed, classes, shots, seed=1)
    assert contents(resampled.train) == contents(splits.train)
    assert contents(resampled.test) == contents(splits.test)


@given(image_sets(), st.sampled_from(["new content", "pool 1"]))
def test_an_added_image_leaves_the_other_classes_samples(image_set, content):
    images, classes, shots = image_set
    added = scanned("task0", "class0", "added.png", content)
    original = sample_splits(images, classes, shots, seed=1)
    extended = sample_splits([*images, added], classes, shots, seed=1)

    def unchanged_classes(splits):
        return [image for image in splits.train if (image.task, image.class_folder) != ("task0", "class0")]

    assert unchanged_classes(extended) == unchanged_classes(original)


@given(image_sets())
def test_a_tasks_sample_does_not_depend_on_the_other_tasks(image_set):
    images, classes, shots = image_set
    all_tasks = sample_splits(images, classes, shots, seed=1)
    for task, names in classes.items():
        single_task = sample_splits([i for i in images if i.task == task], {task: names}, shots, seed=1)
        assert list(single_task.train) == [image for image in all_tasks.train if image.task == task]


def test_every_image_is_drawn_equally_often_over_seeds():
    images = [scanned("task", "class", f"{number}.png", str(number)) for number in range(10)]
    drawn = Counter(
        image.path
        for seed in range(400)
        for image in sample_splits(images, {"task": ["class"]}, shots=3, seed=seed).train
    )
    assert set(drawn) == {image.path for image in images}
    assert all(abs(count - 120) < 40 for count in drawn.values())  # four standard deviations are 37


def test_the_sample_is_the_same_on_every_machine():
    """Pinned: another value here means that published splits would change."""
    images = [scanned("task", "class", f"{number}.png", str(number)) for number in range(10)]
    drawn = {
        seed: [Path(image.path).stem for image in sample_splits(images, {"task": ["class"]}, 3, seed).train]
        for seed in (1, 2)
    }
    assert drawn == {1: ["1", "6", "7"], 2: ["0", "1", "3"]}


def test_too_few_images_are_named_with_their_number():
    images = [scanned("art", "bed", f"{number}.png", f"bed {number}") for number in range(9)]
    images += [scanned("art", "bike", f"{number}.png", f"bike {min(number, 2)}") for number in range(5)]
    with pytest.raises(UserError) as error:
        sample_splits(images, {"art": ["bed", "bike", "mug"]}, shots=3, seed=1)
    message = str(error.value)
    assert "art/bike has 3 images and 2 exact duplicates" in message
    assert "art/mug has 0 images" in message
    assert "art/bed" not in message
    assert "at least 4" in message


def test_classes_that_have_only_copies_left_to_test_are_all_named():
    """Two classes, all of whose images train in another task."""
    images = [
        scanned(task, name, f"{number}.png", f"{name} {number}")
        for name in ("bed", "mug")
        for task, numbers in (("small", range(3)), ("all", range(3)))
        for number in numbers
    ]
    classes = {"small": ["bed", "mug"], "all": ["bed", "mug"]}
    seeds_with_two = 0
    for seed in range(20):
        try:
            sample_splits(images, classes, shots=2, seed=seed)
        except UserError as error:
            assert "has 3 images; each of 1 candidate is a duplicate of" in str(error)
            seeds_with_two += "bed has" in str(error) and "mug has" in str(error)
    assert seeds_with_two


# --- finding ---------------------------------------------------------------------------------------------


def test_plain_folders(tmp_path):
    root = write_tree(
        tmp_path / "data",
        [
            "b task/x_y/2.PNG",
            "b task/x_y/deep/er/1.jpg",
            "b task/z/1.jpeg",
            "a/only here/1.gif",
            "a/z/1.webp",
        ],
    )
    write_tree(root, ["readme.md", "a/1.png", "a/z/notes.txt", "a/z/._1.png", ".cache/z/1.png"], b"")
    (root / "a" / "empty").mkdir()
    dataset = index_dataset(DataConfig(), root)
    assert dataset.layout == "folders"
    assert dataset.classes == {"a": ("empty", "only here", "z"), "b task": ("x_y", "z")}
    assert dataset.class_names["x_y"] == "x y"
    assert [image.path for image in dataset.images] == [
        "a/only here/1.gif",
        "a/z/1.webp",
        "b task/x_y/2.PNG",
        "b task/x_y/deep/er/1.jpg",
        "b task/z/1.jpeg",
    ]
    assert dict(dataset.skipped) == {
        ".cache/": JUNK_KIND,
        "a/1.png": LOOSE_IMAGE,
        "a/z/._1.png": JUNK_KIND,
        "a/z/notes.txt": ".txt",
        "readme.md": ".md",
    }
    assert dataset.images[0].size == (root / "a/only here/1.gif").stat().st_size
    with pytest.raises(UserError, match="a/empty has 0 images"):
        images = [scan_image(root, image.path, image.task, image.class_folder) for image in dataset.images]
        sample_splits(images, dataset.classes, shots=1, seed=1)


def test_fingerprint_changes_with_files_names_and_classes(tmp_path):
    root = write_tree(tmp_path, [f"{task}/{name}/1.png" for task in "ab" for name in "xyz"])
    names = tmp_path / "names.txt"

    def fingerprint(**values):
        return dataset_fingerprint(index_dataset(DataConfig(**values), root))

    fingerprints = {fingerprint()}
    names.write_text("x\ny\n")
    fingerprints.add(fingerprint(class_names=str(names)))
    names.write_text("x\tcross\ny\n")
    fingerprints.add(fingerprint(class_names=str(names)))
    fingerprints.add(fingerprint(tasks=("a",)))
    os.utime(root / "a/x/1.png", ns=(0, 0))
    assert fingerprint() in fingerprints
    (root / "a/x/1.png").write_bytes(png(17))
    fingerprints.add(fingerprint())
    (root / "a/x/1.png").rename(root / "a/x/2.png")
    fingerprints.add(fingerprint())
    assert len(fingerprints) == 6
    assert fingerprint() in fingerprints


def test_no_layout_is_taken_for_another(tmp_path):
    layouts = {"auto", "manifest", "split_folders", *FOLDER_LAYOUTS, *LIST_LAYOUTS}
    assert set(choices(DataConfig.model_fields["layout"])) == layouts
    write_tree(tmp_path, ["a/z/1.png"])
    with pytest.raises(ValueError, match="layout 'nested' is unknown"):
        index_dataset(DataConfig.model_construct(layout="nested"), tmp_path)


@pytest.mark.parametrize("layout", ["auto", "office_home"])
@pytest.mark.parametrize("top_folder", [OFFICE_HOME_FOLDER, ""])
def test_office_home_archive(tmp_path, layout, top_folder):
    archive = tmp_path / top_folder
    write_tree(archive, [f"{task}/{name}/00001.jpg" for task in OFFICE_HOME_TASKS for name in ("Bed", "TV")])
    write_tree(archive, ["ImageInfo.csv", "imagelist.txt"], b"")
    dataset = index_dataset(DataConfig(layout=layout), tmp_path)
    assert (dataset.layout, dataset.root) == ("office_home", archive)
    assert tuple(dataset.classes) == OFFICE_HOME_TASKS
    assert len(dataset.images) == 8
    assert dict(dataset.skipped) == {"ImageInfo.csv": ".csv", "imagelist.txt": ".txt"}
    one_task = index_dataset(DataConfig(layout=layout, tasks=["Real World"]), tmp_path)
    assert tuple(one_task.classes) == ("Real World",)


def test_a_fifth_task_beside_office_homes_is_not_lost(tmp_path):
    tasks = (*OFFICE_HOME_TASKS, "Sketch")
    write_tree(tmp_path, [f"{task}/{name}/1.jpg" for task in tasks for name in ("Bed", "TV")])
    assert tuple(index_dataset(DataConfig(), tmp_path).classes) == tasks
    assert tuple(index_dataset(DataConfig(layout="office_home"), tmp_path).classes) == OFFICE_HOME_TASKS


def dassl_lists(root: Path, lines: dict[str, list[str]]) -> Path:
    for name, list_lines in lines.items():
        write_tree(root, [f"splits_mini/{name}.txt"], "\n".join(list_lines).encode() + b"\n")
    return root


@pytest.mark.parametrize("layout", ["auto", "mini_domainnet"])
def test_mini_domainnet_lists(tmp_path, layout):
    """Dassl's lists: DomainNet's folders hold more images, classes and domains than the lists."""
    tasks, names = ("clipart", "real", "quickdraw"), ("ant", "see_saw", "zoo")
    write_tree(tmp_path, [f"{task}/{name}/{n}.jpg" for task in tasks for name in names for n in range(3)])
    dassl_lists(
        tmp_path,
        {
            f"{task}_{split}": [f"{task}/{name}/{n}.jpg {label}" for label, name in enumerate(names[:2])]
            for task in tasks[:2]
            for n, split in enumerate(("train", "test"))
        },
    )
    dataset = index_dataset(DataConfig(layout=layout), tmp_path)
    assert dataset.layout == "mini_domainnet"
    assert dataset.classes == {"clipart": ("ant", "see_saw"), "real": ("ant", "see_saw")}
    assert [image.path for image in dataset.images if image.task == "real"] == [
        "real/ant/0.jpg",
        "real/ant/1.jpg",
        "real/see_saw/0.jpg",
        "real/see_saw/1.jpg",
    ]
    assert tuple(index_dataset(DataConfig(layout=layout, tasks=["real"]), tmp_path).classes) == ("real",)


def test_listed_images_that_are_missing_are_broken_not_a_stop(tmp_path):
    write_tree(tmp_path, ["real/ant/0.jpg"])
    dassl_lists(tmp_path, {"real_train": ["real/ant/0.jpg 0", "real/bee/0.jpg 1"]})
    present, missing = index_dataset(DataConfig(), tmp_path).images
    assert (missing.path, missing.size) == ("real/bee/0.jpg", 0)
    assert scan_image(tmp_path, missing.path, "real", "bee").error == "no such file"
    assert scan_image(tmp_path, present.path, "real", "ant").error is None


@pytest.mark.parametrize("line", ["real/ant/0.jpg", "0.jpg 0", "../../etc/x.jpg 0", "/real/ant/x.jpg 0", "a//x.jpg 0"])
def test_bad_list_lines_are_named(tmp_path, line):
    write_tree(tmp_path, ["real/ant/0.jpg"])
    dassl_lists(tmp_path, {"real_train": ["real/ant/0.jpg 0", line]})
    with pytest.raises(UserError, match="real_train.txt:2: expected"):
        index_dataset(DataConfig(), tmp_path)


def test_mini_domainnet_without_lists(tmp_path):
    with pytest.raises(UserError, match="needs image lists"):
        index_dataset(DataConfig(layout="mini_domainnet"), tmp_path)
    (tmp_path / "splits_mini").mkdir()
    with pytest.raises(UserError, match="needs image lists"):
        index_dataset(DataConfig(), tmp_path)


def test_tasks_are_selected_once_each_or_named(tmp_path):
    root = write_tree(tmp_path, [f"{task}/{name}/1.png" for task in "abc" for name in "xy"])
    dataset = index_dataset(DataConfig(tasks=["c", "a", "c"]), root)
    assert tuple(dataset.classes) == ("a", "c")
    assert [image.path for image in dataset.images] == ["a/x/1.png", "a/y/1.png", "c/x/1.png", "c/y/1.png"]
    with pytest.raises(UserError, match="data.tasks: d, e not found .* found: a, b, c"):
        index_dataset(DataConfig(tasks=["d", "e", "a"]), root)


def test_root_without_tasks(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        index_dataset(DataConfig(), tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no <task>/<class>/<image> folders; found: nothing"):
        index_dataset(DataConfig(), tmp_path)
    with pytest.raises(UserError, match=r"\(class\) have images directly in them: they are classes without a task"):
        index_dataset(DataConfig(), write_tree(tmp_path / "one", ["class/1.png"]))
    with pytest.raises(UserError, match="task 'task' has only 1 class"):
        index_dataset(DataConfig(), write_tree(tmp_path / "two", ["task/class/1.png"]))
    with pytest.raises(UserError, match="Art, Clipart, Product, Real World not found"):
        index_dataset(DataConfig(layout="office_home"), tmp_path / "two")


def test_class_names_file(tmp_path):
    names = ("TV", "Post_it", "Bed")
    root = write_tree(tmp_path / "data", [f"{task}/{name}/1.png" for task in "ab" for name in names])
    file = tmp_path / "names.txt"
    file.write_bytes(b"\xef\xbb\xbf# a comment\r\nTV\r\n\r\nPost_it\tpost-it notes\r\n")
    dataset = index_dataset(DataConfig(class_names=str(file)), root)
    assert dataset.classes == {task: ("Post_it", "TV") for task in "ab"}
    assert dataset.class_names == {"Post_it": "post-it notes", "TV": "TV"}
    assert dataset.excluded_classes == ("a/Bed", "b/Bed")
    assert len(dataset.images) == 4
    file.write_text("TV\tTV | television set\nBed\n")
    assert index_dataset(DataConfig(class_names=str(file)), root).class_names["TV"] == "TV | television set"

    file.write_text("TV\nMug\n")
    with pytest.raises(UserError, match="classes that task 'a' lacks: Mug"):
        index_dataset(DataConfig(class_names=str(file)), root)


@pytest.mark.parametrize("line", ["mug  a cup", "mug a cup", "mug, a cup", "mug: a cup"])
def test_spaces_for_a_tab_in_a_class_names_file_are_named(tmp_path, line):
    root = write_tree(tmp_path / "data", ["art/mug/1.png", "art/bed/1.png"])
    (tmp_path / "names.txt").write_text(f"bed\n{line}\n")
    with pytest.raises(UserError, match="a tab separates class and name"):
        index_dataset(DataConfig(class_names=str(tmp_path / "names.txt")), root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"TV\nTV\tset\n", ":2: class 'TV' is listed twice"),
        (b"TV\tTV | \n", r":1: 'TV \|' has an empty or repeated name"),
        (b"TV\tset|TV | set\n", ":1: .*empty or repeated"),
        (b"# nothing\n", "lists no classes"),
        (b"TV\n\twords\n", ":2: expected"),
        (b"caf\xe9\n", "is not UTF-8"),
    ],
)
def test_bad_class_names_files(tmp_path, content, message):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_class_names(file)
    with pytest.raises(UserError, match="is not a file"):
        read_class_names(tmp_path)


def write_bytes_path(root: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(root), name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(png(0))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")


def test_file_name_that_is_not_utf8_is_a_broken_image(tmp_path):
    root = write_tree(tmp_path, ["a/x/1.png", "a/y/1.png"])
    write_bytes_path(root, b"a/x/caf\xe9.png")
    write_bytes_path(root, b"a/x/caf\xe9.txt")
    dataset = index_dataset(DataConfig(), root)
    dataset_fingerprint(dataset)
    assert dict(dataset.skipped) == {r"a/x/caf\udce9.txt": ".txt"}
    images = [scan_image(root, image.path, image.task, image.class_folder) for image in dataset.images]
    assert [(i.path, i.error) for i in images if i.error] == [(r"a/x/caf\udce9.png", "the file name is not UTF-8")]


def test_folder_name_that_is_not_utf8_is_named(tmp_path):
    root = write_tree(tmp_path, ["a/x/1.png", "a/y/1.png"])
    write_bytes_path(root, b"a/caf\xe9/1.png")
    with pytest.raises(UserError, match=r"'caf\\udce9' is not UTF-8"):
        index_dataset(DataConfig(), root)


def test_names_are_the_same_in_both_forms_of_unicode(tmp_path):
    """HFS+ stores é as decomposed_index characters."""
    composed_index = index_dataset(DataConfig(), write_tree(tmp_path / "composed", ["café/thé/1.png", "café/x/1.png"]))
    decomposed = ["cafe\u0301/the\u0301/1.png", "cafe\u0301/x/1.png"]
    decomposed_index = index_dataset(DataConfig(tasks=["cafe\u0301"]), write_tree(tmp_path / "decomposed", decomposed))
    assert composed_index.classes == decomposed_index.classes == {"café": ("thé", "x")}


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = write_tree(tmp_path / "elsewhere", ["x/1.png", "y/1.png"])
    root = write_tree(tmp_path / "data", ["a/x/1.png", "a/y/1.png"])
    (root / "linked").symlink_to(elsewhere)
    (root / "a/x/to_data").symlink_to(root)
    (root / "a/x/to_itself").symlink_to(root / "a/x")
    (root / "a/y/to_everything").symlink_to("/")
    (elsewhere / "x/back").symlink_to(elsewhere)
    (root / "a/y/dangling.png").symlink_to(tmp_path / "nowhere.png")
    dataset = index_dataset(DataConfig(), root)
    assert [image.path for image in dataset.images] == [
        "a/x/1.png",
        "a/y/1.png",
        "a/y/dangling.png",
        "linked/x/1.png",
        "linked/y/1.png",
    ]
    circles = ("a/x/to_data/", "a/x/to_itself/", "a/y/to_everything/", "linked/x/back/")
    assert dict(dataset.skipped) == dict.fromkeys(circles, CIRCULAR_LINK)
    error = scan_image(root, "a/y/dangling.png", "a", "y").error
    assert error == f"no such file: a link to {tmp_path}/nowhere.png"


def test_a_pipe_among_the_images_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert scan_image(tmp_path, "pipe.png", "a", "x").error == "no such file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_named(tmp_path):
    root = write_tree(tmp_path, ["a/x/1.png", "a/y/1.png"])
    (root / "a/x").chmod(0)
    try:
        with pytest.raises(UserError, match="cannot read .*a/x"):
            index_dataset(DataConfig(), root)
    finally:
        (root / "a/x").chmod(0o755)


# --- Parquet ---------------------------------------------------------------------------------------------


CLASSES = {"a b": ["x", "y_z"], "ç[1]": ["x", "y_z"]}
WORDS = {"x": "cross", "y_z": "y z"}


def small_set(root: Path, per_class: int = 6) -> tuple[list[ScannedImage], dict[str, int]]:
    """Scanned images of CLASSES, and their bytes."""
    folders = [f"{task}/{name}" for task, names in CLASSES.items() for name in names]
    paths = [f"{folder}/{number}.png" for folder in folders for number in range(per_class)]
    write_tree(root, paths)
    images = [scan_image(root, path, *path.split("/")[:2]) for path in paths]
    return images, {path: (root / path).stat().st_size for path in paths}


def write_splits(root: Path, folder: Path, seed: int = 1, per_class: int = 6) -> SplitDescription:
    """Write the splits like the stage, part by part."""
    images, sizes = small_set(root, per_class)
    splits = sample_splits(images, CLASSES, shots=2, seed=seed)
    counts = {
        split: {task: sum(image.task == task for image in getattr(splits, split)) for task in CLASSES}
        for split in ("train", "test")
    }
    description = SplitDescription(CLASSES, WORDS, 2, seed, content_fingerprint(images), counts)
    for part in plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes):
        assert write_part(root, part, description, folder) == len(part.images)
    (folder / "splits.json").write_text(json.dumps(vars(description)), encoding="utf-8")
    return description


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_written_twice_is_the_same_bytes(tmp_path):
    write_splits(tmp_path / "data", tmp_path / "one")
    write_splits(tmp_path / "data", tmp_path / "two")
    write_splits(tmp_path / "data", tmp_path / "two")  # over a finished attempt
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert sorted(files_of(tmp_path / "one")) == [
        "splits.json",
        "test/%C3%A7%5B1%5D-00000.parquet",
        "test/a b-00000.parquet",
        "train/%C3%A7%5B1%5D-00000.parquet",
        "train/a b-00000.parquet",
    ]


def test_rows_hold_the_images_and_what_they_mean(tmp_path):
    description = write_splits(tmp_path / "data", tmp_path / "splits")
    reader = SplitReader(tmp_path / "splits")
    assert reader.description == description
    assert reader.description.tasks == ["a b", "ç[1]"]
    assert reader.description.class_names_for("a b") == ["cross", "y z"]
    for split, number in (("train", 4), ("test", 8)):
        for task in description.tasks:
            rows = list(reader.rows(split, task, COLUMNS.names))
            assert len(rows) == number
            assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
            for row in rows:
                assert row["image"] == (tmp_path / "data" / row["path"]).read_bytes()
                assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
                assert (row["task"], row["split"]) == (task, split)
                folder = row["path"].split("/")[1]
                assert (row["label"], row["class_name"]) == {"x": (0, "cross"), "y_z": (1, "y z")}[folder]


def test_every_file_carries_the_description(tmp_path):
    description = write_splits(tmp_path / "data", tmp_path / "splits")
    for path in (tmp_path / "splits").rglob("*.parquet"):
        metadata = json.loads(pq.read_schema(path).metadata[b"splits"])
        assert metadata == description.to_dict() and "multi_label" not in metadata
        assert metadata["seed"] == 1 and metadata["shots"] == 2 and len(metadata["source_fingerprint"]) == 64
        assert metadata["class_names"] == WORDS


def test_row_groups_and_parts_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 2000)
    monkeypatch.setattr(parquet, "PART_BYTES", 7000)
    write_splits(tmp_path / "data", tmp_path / "splits", per_class=40)
    files = sorted((tmp_path / "splits/test").glob("a b-*.parquet"))
    assert len(files) > 3
    for path in files:
        with pq.ParquetFile(path) as file:
            groups = [file.read_row_group(n)["image"].to_pylist() for n in range(file.num_row_groups)]
        assert len(groups) > 1
        for group in groups:
            assert sum(map(len, group[:-1])) < 2000
    rows = list(SplitReader(tmp_path / "splits").rows("test", "a b", ["path"]))
    assert [row["path"] for row in rows] == sorted({row["path"] for row in rows})
    assert len(rows) == 2 * 38


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_file_that_changes_after_the_scan_stops_the_run(tmp_path, change):
    images, sizes = small_set(tmp_path / "data")
    (part,) = plan_parts([i for i in images if i.task == "a b"], "test", sizes)
    victim = tmp_path / "data" / part.images[3].path
    if change == "changed":
        victim.write_bytes(png(999))
    else:
        victim.unlink()
    description = SplitDescription(CLASSES, WORDS, 2, 1, "", {})
    with pytest.raises(UserError, match=r"a b/x/3.png (changed while|can no longer be read)"):
        write_part(tmp_path / "data", part, description, tmp_path / "splits")
    assert not files_of(tmp_path / "splits")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    images, sizes = small_set(tmp_path / "data")
    part, _ = plan_parts(images, "test", sizes)
    (tmp_path / "splits").write_text("a file")
    with pytest.raises(UserError, match="cannot write .*splits/test/a b-00000.parquet"):
        description = SplitDescription(CLASSES, WORDS, 2, 1, "", {})
        write_part(tmp_path / "data", part, description, tmp_path / "splits")


def test_folders_that_are_no_splits_are_named(tmp_path):
    with pytest.raises(UserError, match="splits.json is missing"):
        SplitReader(tmp_path)
    for text, message in [
        ("{", "is not a valid description of splits"),
        ("[1]", "is not a valid description of splits"),
        ("{}", "is not a valid description of splits"),
        ('{"format": 99}', "has format 99"),
    ]:
        (tmp_path / "splits.json").write_text(text)
        with pytest.raises(UserError, match=message):
            SplitReader(tmp_path)


def test_foreign_damaged_and_missing_files_are_named(tmp_path):
    folder = tmp_path / "splits"
    write_splits(tmp_path / "data", folder)
    write_splits(tmp_path / "data", tmp_path / "other seed", seed=2)
    reader = SplitReader(folder)
    file = folder / "train/a b-00000.parquet"
    content = file.read_bytes()

    with pytest.raises(UserError, match="has no task 'c'; tasks: a b, ç"):
        next(reader.rows("train", "c"))
    file.write_bytes((tmp_path / "other seed/train/a b-00000.parquet").read_bytes())
    with pytest.raises(UserError, match="a b-00000.parquet belongs to other splits"):
        next(reader.rows("train", "a b"))
    pq.write_table(pa.table({"image": [b"1"]}), file)
    with pytest.raises(UserError, match=r"a b-00000.parquet is not a split file: columns \['image'\]"):
        next(reader.rows("train", "a b"))
    for damaged in (b"", b"no Parquet at all", content[:-100]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="a b-00000.parquet cannot be read as Parquet"):
            next(reader.rows("train", "a b"))
    file.write_bytes(content[:4] + bytes(200) + content[204:])  # the description at the end is intact
    with pytest.raises(UserError, match="a b-00000.parquet is corrupted"):
        next(reader.rows("train", "a b"))
    file.unlink()
    with pytest.raises(UserError, match="has 0 images of task 'a b', splits.json says 4"):
        next(reader.rows("train", "a b"))
    file.write_bytes(content)
    (folder / "train/a b-00001.parquet").write_bytes(content)
    with pytest.raises(UserError, match="has 8 images of task 'a b', splits.json says 4"):
        next(reader.rows("train", "a b"))


# --- decoding --------------------------------------------------------------------------------------------


SMALL = Preprocessing(32)
MODES = [
    Preprocessing(32, mode, interpolation, fill_color=77)
    for mode in ("shortest", "longest", "squash")
    for interpolation in ("bicubic", "bilinear")
]
NAMES = [f"{mode.resize_mode}-{mode.interpolation}" for mode in MODES]


def open_clip_pixels(image: Image.Image, preprocessing: Preprocessing = SMALL) -> np.ndarray:
    """open_clip's own preprocessing, (3, S, S) of 0 to 255."""
    preprocess = image_transform(
        preprocessing.image_size,
        is_train=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        resize_mode=preprocessing.resize_mode,
        interpolation=preprocessing.interpolation,
        fill_color=preprocessing.fill_color,
    )
    return preprocess(image).numpy() * 255


def assert_open_clips(pixels: np.ndarray, image: Image.Image, preprocessing: Preprocessing = SMALL) -> None:
    size = preprocessing.image_size
    assert pixels.dtype == np.uint8 and pixels.shape == (3, size, size)
    assert np.abs(pixels - open_clip_pixels(image, preprocessing)).max() <= 1e-3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_evaluation_pixels_are_open_clips_for_every_format(kind):
    data = encoded(photo(97, 61), kind)
    image = Image.open(io.BytesIO(data))
    if kind == "GIF":  # a palette image: see below
        image = image.convert("RGB")
    assert_open_clips(evaluation_pixels(data, SMALL), image)


@pytest.mark.parametrize("preprocessing", MODES, ids=NAMES)
@pytest.mark.parametrize("size", [(64, 64), (97, 61), (61, 97), (301, 47), (20, 33), (32, 32), (33, 32), (1203, 899)])
def test_evaluation_pixels_are_open_clips(size, preprocessing):
    for image_size in (32, 224):
        preprocessing, image = replace(preprocessing, image_size=image_size), photo(*size)
        assert_open_clips(evaluation_pixels(image, preprocessing), image, preprocessing)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(4, 60), st.sampled_from(MODES))
def test_evaluation_pixels_are_open_clips_for_every_size(width, height, image_size, mode):
    preprocessing = replace(mode, image_size=image_size)
    assume(mode.resize_mode != "longest" or round(min(width, height) * image_size / max(width, height)) > 0)
    image = photo(width, height)
    assert_open_clips(evaluation_pixels(encoded(image), preprocessing), image, preprocessing)


def test_grey_is_open_clips():
    gray = photo(90, 70).convert("L")
    assert_open_clips(evaluation_pixels(encoded(gray), SMALL), gray)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_other_modes_become_rgb_before_they_are_resized(mode):
    """open_clip resizes first, which takes a palette's and a bitmap's nearest pixels, weighs colors by their
    alpha and mixes inks instead of light; CoOp and its successors convert first, as here."""
    image = photo(90, 70).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    rgb = Image.open(io.BytesIO(data)).convert("RGB")
    assert_open_clips(evaluation_pixels(data, SMALL), rgb)


def test_palette_with_transparency_loses_only_that():
    image = photo(40, 40).quantize(16)
    with_alpha = encoded(image, transparency=bytes(range(16)))
    assert np.array_equal(evaluation_pixels(with_alpha, SMALL), evaluation_pixels(encoded(image), SMALL))


def test_16_bit_grey_keeps_its_shades():
    gray = np.arange(64 * 64).reshape(64, 64) * 16
    sixteen = encoded(Image.fromarray(gray.astype(np.uint16)))
    eight = encoded(Image.fromarray(np.round(gray / 257).astype(np.uint8)))
    assert np.array_equal(np.asarray(decode_rgb(sixteen)), np.asarray(decode_rgb(eight)))


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that claim to be this large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


JPEG = encoded(photo(64, 64), "JPEG")
BROKEN = {
    "empty": b"",
    "text": b"this is no image",
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "truncated PNG": png(0)[:-60],
    "header only": JPEG[:30],
    "no pixels": png_of_size(8, 8),
    "bomb": png_of_size(30_000, 30_000),
    "small bomb": png_of_size(10_000, 10_000),
    "fractions": encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"),
    "format that is not in FORMATS": encoded(photo(8, 8), "PCX"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(tmp_path, name):
    (tmp_path / "image.jpg").write_bytes(BROKEN[name])
    assert scan_image(tmp_path, "image.jpg", "a", "x").error
    with pytest.raises(BrokenImage):
        evaluation_pixels(BROKEN[name], SMALL)
    with pytest.raises(BrokenImage):
        training_pixels(BROKEN[name], SMALL, random_crop=True)


def test_a_thread_of_pixels_is_not_resized_whole():
    """Its whole width would be 1.3 GB. The middle is what open_clip shows of it."""
    image = photo(3, 40_000)
    thread = Image.new("RGB", (3, 40_000))
    thread.paste(image.crop((0, 19_000, 3, 21_000)), (0, 19_000))
    preprocessing = Preprocessing(96)
    pixels = evaluation_pixels(encoded(thread), preprocessing)
    assert_open_clips(pixels, image.crop((0, 19_850, 3, 20_150)), preprocessing)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_thread_of_pixels_is_squashed_whole_and_padded_at_both_sides(interpolation):
    image = photo(3, 20_000)
    squash = Preprocessing(32, "squash", interpolation)
    assert_open_clips(evaluation_pixels(encoded(image), squash), image, squash)
    pixels = evaluation_pixels(encoded(image), Preprocessing(32, "longest", interpolation, fill_color=77))
    expected = np.asarray(image.resize((1, 32), RESAMPLING[interpolation]))  # open_clip fails: its width is 0
    assert np.array_equal(pixels[:, :, 15], expected[:, 0].T)
    assert (np.delete(pixels, 15, axis=2) == 77).all()


@pytest.mark.parametrize("preprocessing", MODES, ids=NAMES)
@pytest.mark.parametrize("size", [(320, 240), (1001, 750), (259, 811), (403, 403)])
def test_jpeg_draft_changes_pixels_of_a_large_jpeg_slightly(size, preprocessing):
    data, draft = encoded(smooth_photo(*size), "JPEG"), replace(preprocessing, jpeg_draft=True)
    exact, drafted = (evaluation_pixels(data, p).astype(int) for p in (preprocessing, draft))
    difference = np.abs(exact - drafted)
    assert 0 < difference.mean() < 0.5 and difference.max() <= 10
    exact, drafted = (training_pixels(data, p, random_crop=True).astype(int) for p in (preprocessing, draft))
    assert np.abs(exact - drafted).mean() < 0.5


@pytest.mark.parametrize("preprocessing", MODES, ids=NAMES)
@pytest.mark.parametrize("size", [(127, 400), (400, 127), (64, 64), (20, 33)])
def test_jpeg_draft_keeps_sides_of_twice_the_input(size, preprocessing):
    """Below four times the input, half a JPEG would be less: nothing changes. Other formats are decoded whole."""
    draft = replace(preprocessing, jpeg_draft=True)
    for data in (encoded(photo(*size), "JPEG"), encoded(photo(1001, 750), "PNG")):
        assert np.array_equal(evaluation_pixels(data, draft), evaluation_pixels(data, preprocessing))
    data = encoded(photo(255, 300), "JPEG")  # training images are twice the input
    assert np.array_equal(training_pixels(data, draft, True), training_pixels(data, preprocessing, True))


def smooth_photo(width: int, height: int) -> Image.Image:
    """Draw an image without the finest details, as those of cameras are."""
    return photo(80, 60).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "expected_size"),
    [((30, 40), (30, 40)), ((64, 300), (64, 300)), ((200, 100), (128, 64)), ((500, 1500), (64, 192))],
)
def test_training_pixels_keep_the_whole_image_up_to_twice_the_input(size, expected_size):
    pixels = training_pixels(encoded(photo(*size)), SMALL, random_crop=True)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, expected_size[1], expected_size[0])


# --- augmentation ----------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*sizes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, h, w), generator=generator(seed), dtype=torch.uint8) for h, w in sizes]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_scale", [(0.08, 1.0), (0.5, 0.5)])
def test_augment_is_crop_resize_flip(crop_scale, interpolation):
    config = AugmentationConfig(crop_scale=crop_scale)
    images = random_images((40, 50), (90, 30), (16, 16), (25, 61), (33, 100), (64, 64), (8, 9), (120, 121))
    pixels = augment(images, Preprocessing(24, interpolation=interpolation), config, generator(3))
    draws = generator(3)
    heights, widths = (torch.tensor([image.shape[side] for image in images]) for side in (1, 2))
    boxes = crop_boxes(heights, widths, config, draws)
    flipped = torch.rand(len(images), generator=draws) < 0.5
    assert flipped.any() and not flipped.all()
    for image, (top, left, h, w), flip, result in zip(images, boxes.tolist(), flipped, pixels):
        crop = image[:, top : top + h, left : left + w].float().numpy()
        resized = [Image.fromarray(channel).resize((24, 24), RESAMPLING[interpolation]) for channel in crop]
        expected = torch.from_numpy(np.stack(resized)).clamp(0, 255)
        torch.testing.assert_close(result, expected.flip(-1) if flip else expected, rtol=0, atol=1e-4 * 255)


def test_flips_mirror_exactly():
    images, preprocessing = random_images(*[(24, 24)] * 16), Preprocessing(24)
    flipped = augment(images, preprocessing, AugmentationConfig(crop_scale=(1, 1)), generator())
    plain = augment(images, preprocessing, AugmentationConfig(crop_scale=(1, 1), flip=False), generator())
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain)]
    assert 0 < sum(mirrored) < 16
    assert all(is_mirrored or torch.equal(a, b) for is_mirrored, a, b in zip(mirrored, flipped, plain))


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=20),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(1, 3),
    st.integers(0, 1000),
)
def test_crops_lie_inside_the_image(sizes, low, high, ratio, seed):
    heights, widths = (torch.tensor(side) for side in zip(*sizes))
    config = AugmentationConfig(crop_scale=tuple(sorted((low, high))), crop_ratio=ratio)
    top, left, h, w = crop_boxes(heights, widths, config, generator(seed)).unbind(dim=1)
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= heights).all() and (left + w <= widths).all()


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(100, 140, (0.08, 1.0)), (200, 60, (0.08, 1.0)), (64, 64, (0.8, 1.0)), (20, 400, (0.3, 0.9))],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    count = 3000
    sides = torch.full((count,), height), torch.full((count,), width)
    ours = crop_boxes(*sides, AugmentationConfig(crop_scale=scale), generator(1)).numpy()
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)])
    measures = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
    }
    for name, measure in measures.items():
        assert scipy.stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize("preprocessing", MODES, ids=NAMES)
def test_without_random_crops_images_are_preprocessed_as_for_the_test(preprocessing):
    config = AugmentationConfig(crop_scale=(1, 1), flip=False)
    data = [encoded(photo(*size)) for size in [(64, 64), (96, 64), (64, 128), (20, 30), (500, 90)]]
    images = [torch.from_numpy(training_pixels(image, preprocessing, config.random_crop)) for image in data]
    expected = torch.stack([torch.from_numpy(evaluation_pixels(image, preprocessing)) for image in data])
    assert torch.equal(augment(images, preprocessing, config, generator()), expected.float())


def test_a_generator_decides_everything():
    images = random_images((40, 50), (90, 30), (16, 16))
    batch, repeated, other_seed = (
        augment(images, Preprocessing(24), AugmentationConfig(), generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(batch, repeated)
    assert not torch.equal(batch, other_seed)


def test_long_images_do_not_decide_the_memory_of_a_batch():
    """A canvas of both whole images would be 86 GB."""
    images = random_images((8, 60_000), (60_000, 8))
    assert augment(images, Preprocessing(16), AugmentationConfig(), generator()).shape == (2, 3, 16, 16)


# --- presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_are_valid(file):
    config = parse_config(yaml.safe_load(file.read_text()))
    if config.data.class_names:
        assert read_class_names(CONFIGS.parent / config.data.class_names)


@pytest.mark.parametrize(("name", "number"), [("office_home", 65), ("mini_domainnet", 126)])
def test_class_names_of_presets(name, number):
    words = read_class_names(CONFIGS / f"class_names/{name}.txt")
    assert len(words) == len(set(words.values())) == number
    assert list(words) == sorted(words)


def test_the_office_home_preset_finds_office_home(tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    names = list(read_class_names(Path("configs/class_names/office_home.txt")))
    random.Random(0).shuffle(names)
    archive = tmp_path / OFFICE_HOME_FOLDER
    write_tree(archive, [f"{task}/{name}/00001.jpg" for task in OFFICE_HOME_TASKS for name in names], b"")
    config = parse_config(yaml.safe_load(Path("configs/office_home.yaml").read_text()))
    dataset = index_dataset(config.data, tmp_path)
    assert {len(classes) for classes in dataset.classes.values()} == {65}
    assert dataset.excluded_classes == ()
    assert dataset.class_names["Postit_Notes"] == "post-it notes"
    assert dataset.class_names["Alarm_Clock"] == "Alarm Clock"
