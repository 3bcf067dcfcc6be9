"""Recognizing layouts of image folders; files that are not read; symbolic links."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex, index_dataset
from pipeline.data.lists import LIST_LAYOUTS
from pipeline.data.walk import JUNK_KIND, NO_IMAGES, describe_skipped, find_images, skipped_note
from pipeline.errors import UserError

JUNK_FOLDERS = (
    *("__MACOSX", "@eaDir", "#recycle", "#snapshot", ".snapshot", "@Recycle", "@tmp", "$RECYCLE.BIN", "lost+found"),
    *("System Volume Information", ".Trash-1000", ".ipynb_checkpoints", ".git", ".thumbnails", ".picasaoriginals"),
    *(".AppleDouble", ".Spotlight-V100", ".fseventsd", ".stfolder", ".sync", ".dropbox.cache", "__pycache__"),
)
JUNK_FILES = (
    *("._a.png", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "~$x.png", ".nfs0001", ".hidden.jpg"),
    *("a.png.part", "a.jpg.crdownload", "a.tmp", "a.png~"),
)
PHOTOS = tuple(f"photo/{name}/{number}.png" for name in ("cat", "dog") for number in (1, 2))
SKETCHES = tuple(f"sketch/{name}/{number}.png" for name in ("cat", "dog") for number in (1, 2))
PLAIN = (*PHOTOS, *SKETCHES)


def write_files(root: Path, paths: Sequence[str], content: bytes = b"an image") -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def image_paths(dataset: DatasetIndex) -> list[str]:
    return [image.path for image in dataset.images]


# --- files that are not read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["", "photo/", "photo/cat/"])
def test_junk_is_left_out_at_every_level_and_counted(tmp_path, level):
    """The same of a run and of a prediction."""
    root = write_files(tmp_path / "data", PLAIN)
    write_files(root, [f"{level}{name}" for name in JUNK_FILES])
    write_files(root, [f"{level}{name}/cat/1.png" for name in JUNK_FOLDERS])
    dataset = index_dataset(DataConfig(), root)
    assert dataset.classes == {"photo": ("cat", "dog"), "sketch": ("cat", "dog")}
    assert image_paths(dataset) == list(PLAIN)
    expected = {f"{level}{name}" for name in JUNK_FILES} | {f"{level}{name}/" for name in JUNK_FOLDERS}
    assert dict(dataset.skipped) == dict.fromkeys(expected, JUNK_KIND)
    files, skipped = find_images(str(root))
    assert files == [f"{root}/{path}" for path in PLAIN] and set(skipped) == set(dataset.skipped)


@pytest.mark.parametrize("name", ["Recycled", "snapshot", "tmp", "trash", "icon", "found", "git"])
def test_words_for_classes_are_no_junk(tmp_path, name):
    root = write_files(tmp_path, [*PLAIN, f"photo/{name}/1.png", f"sketch/{name}/1.png"])
    assert name in index_dataset(DataConfig(), root).classes["photo"]


def test_files_that_are_not_read_are_counted_by_kind(tmp_path):
    suffixes = "heic HEIF jp2 tga svg pdf psd cr2 nef arw dng mp4 npy txt json xml".split()
    root = write_files(tmp_path, [*PLAIN, *(f"photo/cat/x.{suffix}" for suffix in suffixes), "photo/cat/noname"])
    write_files(root, [f"photo/cat/x{number}.heic" for number in range(3)])
    dataset = index_dataset(DataConfig(), root)
    text = describe_skipped(dataset.skipped)
    assert text.startswith("4 HEIC (.heic), 1 ") and len(dataset.skipped) == len(suffixes) + 4
    kinds = ("1 .txt", "1 .json", "1 .xml", "1 no suffix", "1 HEIC (.heif)", "1 video (.mp4)", "1 camera raw (.cr2)")
    assert all(kind in text for kind in kinds)
    note = skipped_note(dataset.skipped)
    assert "20 files not read" in note and "convert" in note and "rename" in note
    assert "convert" not in skipped_note([file for file in dataset.skipped if file.kind == ".txt"])


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "pgm", "ppm", "pbm", "pnm", "tif", "TIFF", "JPG", "dib"])
def test_common_suffixes_of_readable_formats_are_taken(tmp_path, suffix):
    kind = {"j": "JPEG", "p": "PPM", "t": "TIFF", "d": "BMP"}[suffix[0].lower()]
    root = write_files(tmp_path, PLAIN)
    Image.new("1" if suffix == "pbm" else "L", (4, 4)).save(root / f"photo/cat/3.{suffix}", kind)
    assert f"photo/cat/3.{suffix}" in image_paths(index_dataset(DataConfig(), root))


def test_prediction_follows_links_and_reports_broken_ones(tmp_path):
    write_files(tmp_path, ["elsewhere/1.png", "images/2.png"])
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    (tmp_path / "images/gone").symlink_to(tmp_path / "nowhere")
    files, skipped = find_images(str(tmp_path / "images"))
    assert [Path(file).name for file in files] == ["2.png", "1.png"]
    assert describe_skipped(skipped) == "1 link to a folder that contains it, 1 link without a target"
    with pytest.raises(UserError, match="no such file or folder"):
        find_images(str(tmp_path / "images/gone"))


# --- layouts ---------------------------------------------------------------------------------------------------


def refusal(root: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        index_dataset(DataConfig(**options), root)
    return str(error.value)


def suggestions(message: str) -> list[dict]:
    """The options of each remedy in a message."""
    remedies = []
    for line in message.splitlines():
        if "--data." in line:
            words = shlex.split(line[line.index("--data.") :])
            options: dict = {}
            for word in words:
                if word.startswith("--data."):
                    values = options.setdefault(word.removeprefix("--data."), [])
                else:
                    values.append(word)
            remedies.append({name: values if name == "tasks" else values[0] for name, values in options.items()})
    return remedies


def follow(message: str, root: Path, **options) -> list[DatasetIndex]:
    """What each remedy of a message leads to."""
    datasets = []
    for suggested in suggestions(message):
        values = options | suggested
        datasets.append(
            index_dataset(
                DataConfig(**{k: v for k, v in values.items() if k != "root"}), Path(values.get("root", root))
            )
        )
    return datasets


def classes_of(*tasks: str, prefix: str = "", extra: Sequence[str] = ()) -> list[str]:
    """Paths of two images in each of two classes of each task."""
    return [
        *extra,
        *(f"{prefix}{task}/{name}/{number}.png" for task in tasks for name in ("cat", "dog") for number in (1, 2)),
    ]


SPLIT_TASKS = classes_of("photo/train", "photo/test", "sketch/train", "sketch/test")


@pytest.mark.parametrize(
    ("root", "options"),
    [
        ("", {}),
        ("", {"layout": "folders", "tasks": ["photo"]}),
        ("", {"tasks": ["photo"]}),
        ("pets/photo", {}),
        ("pets/photo", {"tasks": ["photo", "sketch"]}),
        ("pets/photo", {"layout": "folders"}),
        ("pets/photo/cat", {}),
    ],
)
@pytest.mark.parametrize("name", ["pets", "my pets"])
def test_a_root_at_another_level_is_named(tmp_path, root, options, name):
    home = tmp_path / "home"
    write_files(home / "data" / name, PLAIN)
    message = refusal(home / "data" / root.replace("pets", name), **options)
    assert ("too deep" if root else "too high") in message
    assert suggestions(message)[0] == {"root": f"{home}/data/{name}"}
    datasets = follow(message, home / "data", **options)
    assert {image_paths(dataset)[0].split("/")[-1] for dataset in datasets} == {"1.png"}
    assert datasets[0].classes.keys() == {*options.get("tasks", ("photo", "sketch"))}


@pytest.mark.parametrize("layout", ["office_home", "mini_domainnet", "domainnet", "pacs", "split_folders"])
@pytest.mark.parametrize("explicit", [False, True])
def test_published_data_at_another_level_is_named(tmp_path, layout, explicit):
    root = tmp_path / "data" / "set"
    tasks = ("Art", "Clipart", "Product", "Real World") if layout == "office_home" else ("photo", "sketch")
    write_files(root, SPLIT_TASKS if layout == "split_folders" else classes_of(*tasks))
    if layout in LIST_LAYOUTS:
        folder, ending = LIST_LAYOUTS[layout].list_folders[0], next(iter(LIST_LAYOUTS[layout].splits))
        for task in tasks:
            lines = "".join(f"{path} 0\n" for path in classes_of(task))
            write_files(root, [f"{folder}/{task}{ending}.txt"], lines.encode())
    assert index_dataset(DataConfig(), root).layout == layout
    options = {"layout": layout} if explicit else {}
    for wrong_root in (tmp_path / "data", root / tasks[0]):
        message = refusal(wrong_root, **options)
        assert suggestions(message)[0] == {"root": str(root)}
        assert [dataset.layout for dataset in follow(message, wrong_root, **options)][0] == layout


@pytest.mark.parametrize("parent", ["mixed", "plain"])
def test_classes_without_a_task_have_a_remedy(tmp_path, parent):
    """As torchvision's ImageFolder has them: the parent is the root, with one task."""
    root = write_files(tmp_path / parent / "flowers", ["rose/1.png", "tulip/1.png"])
    write_files(tmp_path / parent, ["letters/1.txt"] if parent == "plain" else ["letters/1.png"])
    for layout, splits in (("folders", False), ("split_folders", True)):
        if splits:
            root = write_files(tmp_path / parent / "trees", ["train/oak/1.png", "train/fir/1.png", "test/oak/1.png"])
        message = refusal(root)
        assert f"--data.root {tmp_path / parent} --data.tasks {root.name}" in message
        alone = [dataset for dataset in follow(message, root) if list(dataset.classes) == [root.name]]
        assert {dataset.layout for dataset in alone} == {layout}


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("training_set", "test_set", "validation_set"),
        ("Train", "Test", "Val"),
        ("TRAIN", "EVAL", "VALID"),
        ("train_images", "test_images", "val_images"),
        ("trainset", "testset", "valset"),
        ("Training Data", "holdout", "dev"),
        ("train2017", "test2017", "val2017"),
    ],
)
@pytest.mark.parametrize("order", ["task/split", "split/task"])
def test_other_names_of_splits(tmp_path, train, test, val, order):
    tasks = [
        order.replace("task", task).replace("split", split)
        for task in ("photo", "sketch")
        for split in (train, test, val)
    ]
    root = write_files(tmp_path, classes_of(*tasks))
    dataset = index_dataset(DataConfig(use_official_splits=True), root)
    assert dataset.layout == "split_folders" and dataset.classes.keys() == {"photo", "sketch"}
    assert {split: sum(image.official_split == split for image in dataset.images) for split in ("train", "test")} == {
        "train": 8,
        "test": 8,
    }
    one = index_dataset(DataConfig(tasks=["sketch"]), root)
    assert list(one.classes) == ["sketch"] and len(one.images) == 12


@pytest.mark.parametrize(
    ("paths", "named", "layouts"),
    [
        # Folders beside those of splits.
        ([*SPLIT_TASKS, "photo/unlabeled/1.png"], "photo/unlabeled", ["split_folders", "folders"]),
        ([*SPLIT_TASKS, "photo/unseen/cat/1.png"], "photo/unseen", ["split_folders", "folders"]),
        ([*SPLIT_TASKS, "sketch/images/1.png", "photo/extra/1.png"], "sketch/images", ["split_folders", "folders"]),
        (classes_of("train/a", "test/a", "unlabeled/a"), "unlabeled", ["split_folders"]),
        (classes_of("train", "test", "photo"), "photo", ["folders", "folders"]),
        # Splits without tasks, or tasks with the names of splits.
        (classes_of("train", "test"), "train", ["split_folders", "split_folders", "folders"]),
        (classes_of("train"), "train", ["split_folders", "split_folders", "folders"]),
        (classes_of("train/a", "train/b"), "train", ["folders", "split_folders", "folders"]),
        (classes_of("seg_train", "seg_test"), "seg_train", ["folders"]),
        # Some tasks with splits, some without.
        ([*SPLIT_TASKS, *classes_of("clipart")], "class folders: clipart; with split", ["folders", "split_folders"]),
        ([*PLAIN, "loose/1.png"], "no class folders: loose", ["folders"]),
        ([*PLAIN, *classes_of("site/camera")], "folders of folders: site", ["folders"]),
        ([*PLAIN, "phone/cat/1.heic", "phone/dog/1.txt"], "phone has no images that are read", ["folders"]),
        (["VOC2012/JPEGImages/1.png", "VOC2012/Annotations/1.xml"], "object detection", []),
        ([f"site{n}/{name}/1.png" for n in (1, 2) for name in ("images", "masks")], "segmentation", ["folders"]),
        (["DCIM/100CANON/1.JPG", "DCIM/101CANON/2.JPG"], "numbered by a camera", ["folders"]),
        # Deeper than task/class.
        (classes_of("north/a", "north/b", "south/a", "south/b"), "deeper than", ["folders"] * 3),
        (classes_of("photo/seg_train", "photo/seg_test"), "rename photo/seg_test, photo/seg_train", ["folders"]),
        # No classes.
        (["train/1.png", "test/1.png", "labels/1.txt"], "test, train", []),
        (["photo/train/1.png", "photo/test/1.png"], "photo/test, photo/train", ["folders"]),
        (["images/train/1.png", "images/val/1.png", "labels/train/1.txt"], "object detection", ["folders"]),
        (["train2017/1.png", "val2017/1.png", "annotations/instances.json"], "object detection", []),
        (["JPEGImages/1.png", "Annotations/1.xml", "ImageSets/Main/train.txt"], "object detection", []),
        (["train/images/1.png", "train/labels/1.txt", "test/images/1.png", "data.yaml"], "object detection", []),
        (["1.png", "2.png"], "images directly in it", []),
        ([], "nothing", []),
        (["a.zip", "b.tar.gz"], "unpack", []),
        (["photo/cat/1.heic", "photo/dog/2.HEIC"], "2 HEIC (.heic)", []),
    ],
)  # fmt: skip
def test_folders_that_fit_no_layout_are_refused_with_remedies_that_work(tmp_path, paths, named, layouts):
    root = tmp_path / "home" / "data"
    root.mkdir(parents=True)
    write_files(root, paths)
    message = refusal(root)
    assert named in message
    assert [dataset.layout for dataset in follow(message, root)] == layouts


@pytest.mark.parametrize(
    "paths",
    [
        [*PLAIN, "annotations/1.xml", "labels/deep/1.txt", "photo/annotations/1.xml"],
        [*PLAIN, "photo/1.png", "backup/all.zip"],
        [*PLAIN, "photo/cat/deep/er/1.png"],
        [*PLAIN, "photo/train/1.png", "photo/test/1.png", "sketch/train/1.png"],  # classes
        [*PLAIN, "notes_train.txt", "train.txt", "x_train_kfold.txt", "photo_test.txt"],
        [*PLAIN, "photo.zip", "a.csv", "b.csv", "train-00000.parquet"],
    ],
)
def test_files_and_folders_that_change_no_layout(tmp_path, paths):
    root = write_files(tmp_path, paths)
    (root / "empty").mkdir()
    dataset = index_dataset(DataConfig(), root)
    assert ("empty/", NO_IMAGES) in dataset.skipped and "annotations" not in dataset.classes["photo"]
    assert dataset.layout == "folders" and dataset.classes.keys() == {"photo", "sketch"}
    assert set(PLAIN) <= set(image_paths(dataset))
    notes = "\n".join(dataset.notes)
    assert all(f"--data.root {root}/{path}" in notes for path in paths if path.endswith((".csv", ".parquet")))
    assert {path for path, _ in dataset.skipped} >= {path for path in paths if path not in image_paths(dataset)}


def test_explicit_layouts_that_do_not_fit_are_refused_with_what_was_found(tmp_path):
    root = write_files(tmp_path / "home" / "data", PLAIN)
    assert "without them: photo, sketch" in refusal(root, layout="split_folders")
    assert "found: photo, sketch" in refusal(root, layout="office_home")
    message = refusal(root, layout="domainnet")
    assert "needs image lists" in message and [d.layout for d in follow(message, root, layout="domainnet")] == [
        "folders"
    ]
    message = refusal(root, layout="manifest")
    assert "contains no .parquet files" in message and "found: folders photo, sketch" in message
    assert [d.layout for d in follow(message, root, layout="manifest")] == ["folders"]
    assert "found: folders cat, dog" in refusal(
        write_files(tmp_path / "flat", ["cat/a.png", "dog/a.png"]), layout="folders"
    )


def test_a_list_is_recognized_by_its_lines_and_images(tmp_path):
    root = write_files(tmp_path / "home" / "data", PLAIN)
    lines = "".join(f"{path} 0\n" for path in PHOTOS)
    write_files(root, ["photo_train.txt"], lines.encode())
    write_files(root, ["notes_train.txt", "._x_test.txt"], b"learning rate 3\n")
    dataset = index_dataset(DataConfig(), root)
    assert (dataset.layout, image_paths(dataset)) == ("domainnet", list(PHOTOS))
    assert [path for path, _ in dataset.skipped] == ["notes_train.txt"]
    write_files(root, ["photo_train.txt"], lines.replace("photo", "clipart").encode())
    write_files(root, ["clipart.zip"])
    message = refusal(root)
    assert "unpack clipart.zip" in message
    assert "lists images that do not exist, such as" in message
    assert [dataset.layout for dataset in follow(message, root)] == ["folders"]


# --- tables ----------------------------------------------------------------------------------------------------


def write_table(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [bytes([number]) * 40 for number in range(4)]
    pq.write_table(pa.table({"image": images, "task": ["a"] * 4, "label": ["cat", "dog"] * 2}), file)
    return file


@pytest.mark.parametrize("folder", ["", "data", "data/default", "main"])
def test_a_repository_of_tables_is_taken(tmp_path, folder):
    write_files(tmp_path, ["README.md", ".gitattributes", "._x.parquet"])
    for split in ("train", "test"):
        write_table(tmp_path / folder / f"{split}-00000-of-00001.parquet")
    write_files(tmp_path / folder, ["._train.parquet"])
    dataset = index_dataset(DataConfig(), tmp_path)
    assert (dataset.layout, dataset.root, len(dataset.images)) == ("manifest", tmp_path, 8)
    assert index_dataset(DataConfig(layout="manifest", tasks=["a"]), tmp_path).classes == {"a": ("cat", "dog")}


def test_several_tables_are_named(tmp_path):
    root = tmp_path / "data"
    for name in ("cats/train.parquet", "dogs/train.parquet"):
        write_table(root / name)
    message = refusal(root)
    assert suggestions(message) == [{"root": f"{root}/cats"}, {"root": f"{root}/dogs"}]
    assert [dataset.layout for dataset in follow(message, root)] == ["manifest"] * 2
    files = write_files(tmp_path / "files", ["images/1.png", "images/2.png"])
    rows = "path,task,label\nimages/1.png,a,cat\nimages/2.png,a,dog\n"
    write_files(files, ["a.csv", "b.csv"], rows.encode())
    assert [len(dataset.images) for dataset in follow(refusal(files), files)][-2:] == [2, 2]
    nested = write_files(tmp_path / "nested", ["train/1.png", "train/2.png"])
    write_files(nested, ["train/metadata.csv"], rows.replace("images/", "").encode())
    assert [len(dataset.images) for dataset in follow(refusal(nested), nested)] == [2]


# --- symbolic links --------------------------------------------------------------------------------------------


def test_links_to_data_elsewhere_are_followed(tmp_path):
    write_files(tmp_path / "disk1", PHOTOS)
    write_files(tmp_path / "disk2", SKETCHES)
    write_files(tmp_path / "disk3", ["9.png"])
    root = tmp_path / "data"
    root.mkdir()
    (root / "photo").symlink_to(tmp_path / "disk1/photo")
    (root / "sketch").symlink_to("../disk2/sketch")
    (tmp_path / "disk1/photo/cat/9.png").symlink_to(tmp_path / "disk3/9.png")
    (tmp_path / "disk1/photo/cat/back").symlink_to(root)
    (tmp_path / "disk1/photo/cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    dataset = index_dataset(DataConfig(), root)
    assert image_paths(dataset) == sorted([*PLAIN, "photo/cat/9.png", "photo/cat/gone.png"])
    assert describe_skipped(dataset.skipped) == "1 link to a folder that contains it"
    write_files(
        root,
        ["a.csv"],
        b"path,task,label\n../disk1/photo/cat/1.png,a,cat\n" + f"{tmp_path}/disk2/sketch/dog/1.png,a,dog\n".encode(),
    )
    assert len(index_dataset(DataConfig(), root / "a.csv").images) == 2
    for file in (root, root / "a.csv"):
        message = refusal(file, follow_external_symlinks=False)
        assert suggestions(message) and [len(d.images) for d in follow(message, file)]


def test_tasks_are_suggested_by_similar_names(tmp_path):
    root = write_files(tmp_path, PLAIN)
    (dataset,) = follow(refusal(root, tasks=["Photo", "sketches"]), root)
    assert list(dataset.classes) == ["photo", "sketch"]


def test_a_root_that_does_not_exist_is_suggested_by_its_name(tmp_path):
    root = write_files(tmp_path / "OfficeHome", PLAIN)
    assert suggestions(refusal(tmp_path / "officehome")) == [{"root": str(root)}]
    assert suggestions(refusal(tmp_path / "nothing/like/it")) == []


def test_links_without_a_target_are_named(tmp_path):
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/photo").symlink_to("/mnt/away/photo")
    assert "photo → /mnt/away/photo" in refusal(tmp_path / "gone")
    root = write_files(tmp_path / "data", PLAIN)
    (root / "clipart").symlink_to("/mnt/away/clipart")
    assert "clipart → /mnt/away/clipart" in refusal(root)
    assert list(index_dataset(DataConfig(tasks=["photo"]), root).classes) == ["photo"]
    (root / "clipart").unlink()
    (root / "photo/cow").symlink_to("cow elsewhere")
    assert "photo/cow → cow elsewhere" in refusal(root)
