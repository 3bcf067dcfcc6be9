"""Inputs: tables, image lists, split folders, published data sets, and image formats."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import summary, the_run

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.tokenizer import describe_tokenizer
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import CONFIGS, DataConfig, load_yaml, parse_config
from pipeline.data import manifest as manifest_module
from pipeline.data.contents import dataset_fingerprint, split_into_chunks
from pipeline.data.images import BrokenImage, decode_rgb, evaluation_pixels
from pipeline.data.index import DatasetIndex, index_dataset, read_class_names, unexpected_counts
from pipeline.data.parquet import SplitDescription, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.splits import ScannedImage, content_fingerprint, sample_splits
from pipeline.data.table_images import read_image_bytes
from pipeline.errors import UserError
from pipeline.grouping.search.constraints import check_constraints
from pipeline.methods.adapter_file import load_adapter
from pipeline.report.grouping_stability_figures import affinity_over_training

ensure_torchvision()

from open_clip import SimpleTokenizer  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402

TASKS, CLASSES, PER_CLASS = ("art", "real world"), ("bed", "post_it"), 4


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


@pytest.fixture
def tree(tmp_path) -> Path:
    """data/<task>/<class>/<number>.png"""
    seed = 0
    for task in TASKS:
        for name in CLASSES:
            folder = tmp_path / "data" / task / name
            folder.mkdir(parents=True)
            for number in range(PER_CLASS):
                (folder / f"{number}.png").write_bytes(png(seed))
                seed += 1
    return tmp_path / "data"


def rows_of(tree: Path) -> list[dict[str, str]]:
    files = sorted(file.relative_to(tree) for file in tree.rglob("*.png"))
    return [{"path": str(file), "task": file.parts[0], "label": file.parts[1]} for file in files]


def write_csv(file: Path, rows: list[dict[str, str]], separator: str = ",", **names: str) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=separator)
        writer.writerow([names.get(name, name) for name in rows[0]])
        writer.writerows(row.values() for row in rows)
    return file


def listed(dataset: DatasetIndex) -> list[tuple[str, str, str]]:
    return [(image.path, image.task, image.class_folder) for image in dataset.images]


def scanned(dataset: DatasetIndex) -> list[ScannedImage]:
    return [scan_image(dataset.root, *image) for image in listed(dataset)]


def fault(file: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        index_dataset(DataConfig(**options), file)
    assert all(character >= " " or character == "\n" for character in str(error.value))
    return str(error.value)


# --- CSV -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "separator"), [("all.csv", ","), ("all.TSV", "\t")])
def test_a_text_table_is_the_folders(tree, name, separator):
    folders = index_dataset(DataConfig(), tree)
    table = index_dataset(DataConfig(), write_csv(tree / name, rows_of(tree)[::-1], separator))
    assert table.layout == "manifest" and table.root == tree
    assert listed(table) == listed(folders) and table.classes == folders.classes
    assert table.class_names == folders.class_names == {"bed": "bed", "post_it": "post it"}
    assert [image.size for image in table.images] == [image.size for image in folders.images]


def test_labels_of_a_table_need_not_be_folders(tree):
    rows = [{**row, "task": "domain " + row["task"], "label": row["label"] + "?"} for row in rows_of(tree)]
    dataset = index_dataset(DataConfig(), write_csv(tree / "all.csv", rows))
    assert dataset.classes == {"domain art": ("bed?", "post_it?"), "domain real world": ("bed?", "post_it?")}
    single_task = index_dataset(DataConfig(tasks=["domain art"]), tree / "all.csv")
    assert {image.task for image in single_task.images} == {"domain art"} and len(single_task.images) == len(
        dataset.images
    ) / 2


def test_a_table_of_tasks_with_different_classes(tree):
    rows = [{**row, "label": f"{row['label']} of {row['task']}"} for row in rows_of(tree)]
    assert index_dataset(DataConfig(), write_csv(tree / "all.csv", rows)).classes == {
        "art": ("bed of art", "post_it of art"),
        "real world": ("bed of real world", "post_it of real world"),
    }


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"PK\3\4\x14\0", "save it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1", "save it as CSV"),
        (b"PAR1\x15\4", "rename it to .parquet"),
        (b"\x1f\x8b\x08", "unpack it"),
    ],
)
def test_other_content_under_the_name_of_a_table_is_named(tree, content, remedy):
    for name in ("all.csv", "all.jsonl"):
        (tree / name).write_bytes(content)
        assert remedy in fault(tree / name)
    (tree / "all.csv").write_text("PK,path,task,label\n1,art/bed/0.png,art,bed\n2,art/bed/1.png,art,bed 2\n")
    assert len(index_dataset(DataConfig(), tree / "all.csv").images) == 2


def test_a_table_that_is_too_large_as_text_is_told_what_to_do(tree, monkeypatch):
    file = write_csv(tree / "all.csv", rows_of(tree))
    monkeypatch.setattr(manifest_module, "MAX_TEXT_BYTES", 100)
    assert "save it as Parquet" in fault(file)


def test_a_table_with_one_class_is_refused_in_words_of_tables(tree):
    rows = [{**row, "label": "bed"} for row in rows_of(tree)]
    assert "task 'art' has only 1 class in" in fault(write_csv(tree / "all.csv", rows))


def test_numeric_labels_beside_their_names_are_told(tree):
    rows = [{**row, "label": str(CLASSES.index(row["label"])), "class_name": row["label"]} for row in rows_of(tree)]
    file = write_csv(tree / "all.csv", rows)
    assert "or use --data.columns '{label: class_name}'" in fault(file)
    assert index_dataset(DataConfig(columns={"label": "class_name"}), file).classes["art"] == CLASSES


def test_other_names_of_columns(tree):
    file = write_csv(tree / "all.csv", [{"id": "7", **row} for row in rows_of(tree)], task="shop", path="photo")
    message = fault(file)
    assert "no column 'path'" in message and "'photo', 'shop'" in message and "--data.columns" in message
    assert len(index_dataset(DataConfig(columns={"task": "shop", "path": "photo"}), file).images) == 16


@pytest.mark.parametrize(
    "names",
    [
        {"path": "image_path", "task": "Domain", "label": "class"},
        {"path": "file_name", "task": "TASK", "label": "category"},
        {"path": "Filename", "label": "y"},
        {"path": "image", "label": "className", "split": "Subset"},
    ],
)
def test_other_common_names_of_columns_are_taken_and_told(tree, names):
    rows = [{**row, "split": "train"} for row in rows_of(tree)]
    file = write_csv(tree / "all.csv", rows, **names)
    dataset = index_dataset(DataConfig(use_official_splits="split" in names), file)
    assert listed(dataset) == listed(index_dataset(DataConfig(), tree))
    assert len(dataset.notes) == len(names)
    assert all(
        any(repr(name) in note and repr(column) in note for note in dataset.notes) for column, name in names.items()
    )


def test_columns_that_may_both_be_meant_are_named(tree):
    rows = [{**row, "y": row["label"]} for row in rows_of(tree)]
    file = write_csv(tree / "all.csv", rows, label="class")
    message = fault(file)
    assert "2 that may be meant (class, y)" in message and "--data.columns '{label: class}'" in message
    assert len(index_dataset(DataConfig(columns={"label": "class"}), file).images) == 16


def test_tasks_that_a_table_lacks_are_told_with_those_it_has(tree):
    file = write_csv(tree / "all.csv", rows_of(tree))
    message = fault(file, tasks=["arts"])
    assert f"arts not found in {file}; did you mean art? Found: art, real world" in message


def test_a_table_of_one_task_needs_no_such_column(tree):
    rows = [{"path": row["path"], "label": row["label"]} for row in rows_of(tree)]
    file = write_csv(tree / "all.csv", rows)
    assert "no column 'task'" in fault(file) and "--data.tasks <its name>" in fault(file)
    assert "no column 'task'" in fault(file, tasks=["shop", "street"])
    dataset = index_dataset(DataConfig(tasks=["shop"]), file)
    assert dataset.classes == {"shop": CLASSES} and len(dataset.images) == 16 and "'shop'" in dataset.notes[0]
    images = tree / "images.parquet"
    pq.write_table(pa.table({"image": [png(0), png(1)], "label": ["x", "y"]}), images)
    assert index_dataset(DataConfig(tasks=["shop"]), images).classes == {"shop": ("x", "y")}


@pytest.mark.parametrize(
    ("edit", "note"),
    [
        (lambda text: text.replace(",", ";"), "separated by ';'"),
        (lambda text: text.replace(",", "\t"), r"separated by '\t'"),
        (lambda text: text.replace(",", "|"), r"separated by '|'"),
        (lambda text: "sep=;\n" + text.replace(",", ";"), "1 line"),
        (lambda text: "# drawn by hand\n\n" + text + "\n# the end\n,,\n\n", "3 lines"),
        (lambda text: "\n".join(f"{number},{line}" for number, line in enumerate(text.split("\n")) if line), None),
        (lambda text: ("\ufeff" + text).replace("\n", ",,\r\n"), None),
        (lambda text: text.replace("\n", ",\n").replace("label,", "label", 1), None),
        (lambda text: re.sub("[^,\n]+", r' "\g<0>"', text).replace(' "', '"', 1), None),
        (lambda text: text.replace("/", "\\"), "in 16 paths is read as /"),
        (lambda text: text.replace("path", " path "), None),
    ],
)
def test_tables_are_read_however_they_were_exported(tree, edit, note):
    file = write_csv(tree / "all.csv", rows_of(tree))
    text = file.read_text().replace("\r\n", "\n")
    file.write_text(edit(text), newline="")
    dataset = index_dataset(DataConfig(), file)
    assert listed(dataset) == listed(index_dataset(DataConfig(), tree))
    assert len(dataset.notes) == (note is not None) and (note or "") in "".join(dataset.notes)


def test_json_lines_are_the_folders(tree):
    lines = [json.dumps({"file_name": row["path"], "objects": [1], **row, "path": None}) for row in rows_of(tree)]
    (tree / "all.jsonl").write_text("\n".join(lines))
    assert listed(index_dataset(DataConfig(columns={"path": "file_name"}), tree / "all.jsonl")) == listed(
        index_dataset(DataConfig(), tree)
    )
    for line, message in (
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"path": "art/bed/1.png", "task": "art", "label": ["bed"]}', "line 2: the label is a list"),
        ('{"path": "art/bed/1.png", "task": "art"}', "line 2: the label is empty"),
    ):
        (tree / "all.jsonl").write_text('{"path": "art/bed/0.png", "task": "art", "label": "bed"}\n' + line)
        assert message in fault(tree / "all.jsonl")


def test_tables_that_lack_what_they_need_are_named(tree):
    (tree / "colons.csv").write_text("path:task:label\n")
    assert "no column 'path'; columns: 'path:task:label'" in fault(tree / "colons.csv")
    (tree / "empty.csv").write_text("\n")
    assert "empty.csv is empty" in fault(tree / "empty.csv")
    (tree / "bare.csv").write_text("art/bed/0.png,art,bed\nart/bed/1.png,art,bed\n")
    assert "has no header: its first line is 'art/bed/0.png', 'art', 'bed'" in fault(tree / "bare.csv")
    (tree / "only names.csv").write_text("path,task,label\n")
    assert "has no rows" in fault(tree / "only names.csv")
    (tree / "twice.csv").write_text("path,task,label,task\n")
    assert "more than one column 'task'" in fault(tree / "twice.csv") and "rename all but one" in fault(
        tree / "twice.csv"
    )
    assert "no column 'labels'" in fault(tree / "only names.csv", columns={"label": "labels"})
    assert "did you mean label?" in fault(tree / "only names.csv", columns={"label": "labels"})
    for name, remedy in {
        "all.xlsx": "save it as CSV",
        "all.json": "pandas.read_json(",
        "all.arrow": "pyarrow.parquet.write_table(",
        "all.csv.gz": "unpack it",
        "all.zip": "unpack it",
        "all.txt": "rename it to .csv",
        "all.pkl": "may run code",
    }.items():
        (tree / name).write_bytes(b"PK")
        message = fault(tree / name)
        assert "nor a manifest (.csv, .tsv, .jsonl, .parquet)" in message and remedy in message
    assert "is a file, but data.layout=folders needs a folder" in fault(tree / "empty.csv", layout="folders")
    os.mkfifo(tree / "pipe.csv")
    assert "is not a folder or file" in fault(tree / "pipe.csv")
    assert f"--data.root {tree}/empty.csv" in fault(tree, layout="manifest")
    assert "contains no .parquet files" in fault(tree / "art", layout="manifest")


def test_rows_that_cannot_be_used_are_named_by_line_all_at_once(tree):
    file = tree / "all.csv"
    lines = [
        ("art/bed/0.png,art,bed", None),
        ("art/bed/1.png,art,", "the label is empty"),
        (",art,bed", "the path is empty"),
        ("art/bed/2.png,,bed", "the task is empty"),
        ("art/bed/0.png,art,post_it", "art/bed/0.png is also in line 2, as art/bed"),
        ("art/bed/0.png,art,bed", "art/bed/0.png is also in line 2"),
        ("art/./bed//0.png,art,bed", "art/bed/0.png is also in line 2"),
        ("art/bed/3.png,a/b,bed", "the task 'a/b' contains a slash"),
        ("art/bed/3.png,art,\x1b[31m", "the label '\\x1b[31m' contains control characters"),
        ("art\\bed\\0.png,art,bed", "art/bed/0.png is also in line 2"),
        ("C:\\data\\0.png,art,bed", "the path is one of Windows: C:\\\\data"),
        ("d:/data/0.png,art,bed", "give it relative to the table's folder"),
        ("file:///data/0.png,art,bed", "remove file://"),
        ("https://example.org/0.png,art,bed", "download the images"),
        ("../elsewhere.png,art,bed", "../elsewhere.png is outside of"),
        ("/etc/hostname,art,bed", "/etc/hostname is outside of"),
        ("x.parquet#00000001,art,bed", "has the form of a row of a Parquet file"),
        (f"art/bed/3.png,art,{'x' * 1001}", "the label has more than 1000 characters"),
        ("real world/bed/0.png,real world,bed", None),
    ]
    file.write_text("path,task,label\n" + "\n".join(line for line, _ in lines), encoding="utf-8")
    message = fault(file, follow_external_symlinks=False).split("\n")
    errors = {int(line.split()[1].rstrip(":")): line for line in message[1:]}
    assert errors.keys() == {number for number, (_, message) in enumerate(lines, 2) if message}
    for number, (_, message) in enumerate(lines, 2):
        assert message is None or message in errors[number]


def test_many_rows_that_cannot_be_used_are_counted(tree):
    (tree / "all.csv").write_text("path,task,label\n" + "art/bed/0.png,art,\n" * 5000)
    message = fault(tree / "all.csv")
    assert message.count("\n") == 21 and "and at least 980 more" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,task,label\nart/bed/0.png,art\n", "line 2: 2 fields, the header has 3"),
        ('path,task,label\n"art/bed/0.png,art,bed\nart/bed/1.png,art,bed\n', "line 3: unexpected end of data"),
        ('path,task,label\n"art"x,art,bed\n', "line 2: ',' expected after '\"'"),
        (f"path,task,label\n{'x' * 200_000},art,bed\n", "line 2: the path is too long"),
        (b"path,task,label\ncaf\xe9.png,art,bed\n", "is not UTF-8: line 2"),
    ],
)
def test_text_that_is_no_table_is_named(tree, text, message):
    (tree / "all.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in fault(tree / "all.csv")


def test_missing_files_of_a_table_are_named_by_line_unless_they_may_be_dropped(tree):
    rows = rows_of(tree)
    rows[3]["path"] = "art/bed/gone.png"
    file = write_csv(tree / "all.csv", rows)
    assert "1 of 16 images" in fault(file) and "line 5: art/bed/gone.png" in fault(file)
    dataset = index_dataset(DataConfig(max_broken_fraction=1 / 16), file)
    assert [image.error for image in scanned(dataset) if image.error] == ["no such file"]


def test_numbers_as_labels_need_names(tree):
    rows = [{**row, "label": str(CLASSES.index(row["label"]))} for row in rows_of(tree)]
    file = write_csv(tree / "all.csv", rows)
    assert "only numeric labels" in fault(file) and "--data.class_names" in fault(file)
    names = tree / "names.txt"
    names.write_text("zebra\nhouse\tmy house\n")  # by place
    dataset = index_dataset(DataConfig(class_names=str(names)), file)
    assert dataset.classes["art"] == ("house", "zebra")
    assert {image.class_folder for image in dataset.images if "/bed/" in image.path} == {"zebra"}
    names.write_text("1\tpost-it\n0\tbed\n")  # by name
    dataset = index_dataset(DataConfig(class_names=str(names)), file)
    assert dataset.class_names == {"0": "bed", "1": "post-it"}
    assert {image.class_folder for image in dataset.images if "/bed/" in image.path} == {"0"}
    names.write_text("zebra\n")
    assert "line 6: the label is empty, or a number without a name" in fault(file, class_names=str(names))


def test_paths_of_a_table_may_lead_out_where_links_may(tree, tmp_path):
    (tmp_path / "tables").mkdir()
    rows = [{**row, "path": os.path.join("../data", row["path"])} for row in rows_of(tree)]
    file = write_csv(tmp_path / "tables/all.csv", rows)
    assert "line 2: ../data/art/bed/0.png is outside of" in fault(file, follow_external_symlinks=False)
    dataset = index_dataset(DataConfig(), file)
    assert dataset.images[0].path == "../data/art/bed/0.png", "a copy of both folders is the same data set"
    folders = index_dataset(DataConfig(), tree)
    assert [image.sha256 for image in scanned(dataset)] == [image.sha256 for image in scanned(folders)]
    manifest = write_csv(tree / "all.csv", [{**row, "path": str(tree / row["path"])} for row in rows_of(tree)])
    assert listed(index_dataset(DataConfig(), manifest)) == listed(folders)


def test_links_of_a_table_are_refused(tree, tmp_path):
    file = write_csv(tree / "all.csv", rows_of(tree))
    (tmp_path / "secret.png").write_bytes(png(99))
    (tree / "art/bed/0.png").unlink()
    (tree / "art/bed/0.png").symlink_to(tmp_path / "secret.png")
    assert len(index_dataset(DataConfig(), file).images) == 16
    message = fault(file, follow_external_symlinks=False)
    assert "links point outside of" in message and "art/bed/0.png → " in message
    (tree / "art/bed").rename(tmp_path / "bed")
    (tree / "art/bed").symlink_to(tmp_path / "bed")
    assert "art/bed → " in fault(file, follow_external_symlinks=False)


def test_a_table_is_another_data_set_when_a_label_changes(tree):
    rows = rows_of(tree)
    original = dataset_fingerprint(index_dataset(DataConfig(), write_csv(tree / "all.csv", rows)))
    assert dataset_fingerprint(index_dataset(DataConfig(), write_csv(tree / "all.csv", rows[::-1]))) == original
    rows[0]["label"], rows[-1]["label"] = rows[-1]["label"], rows[0]["label"]
    assert dataset_fingerprint(index_dataset(DataConfig(), write_csv(tree / "all.csv", rows))) != original


# --- the fingerprint -----------------------------------------------------------------------------------------


def change_a_byte(tree: Path) -> None:
    """Change an image, whose size and time stay the same."""
    file = tree / "art/bed/0.png"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def add_image(tree: Path) -> None:
    (tree / "art/bed/9.png").write_bytes(png(9))


CHANGES_OF_FOLDERS = {
    "a byte": change_a_byte,
    "name": lambda tree: (tree / "art/bed/0.png").rename(tree / "art/bed/7.png"),
    "class of an image": lambda tree: (tree / "art/bed/0.png").rename(tree / "art/post_it/9.png"),
    "task of an image": lambda tree: (tree / "art/bed/0.png").rename(tree / "real world/bed/9.png"),
    "name of a class": lambda tree: [(tree / task / "bed").rename(tree / task / "cot") for task in TASKS],
    "name of a task": lambda tree: (tree / "art").rename(tree / "painting"),
    "one image more": add_image,
    "one image less": lambda tree: (tree / "art/bed/0.png").unlink(),
    "a class more": lambda tree: (tree / "art/chair").mkdir(),
}


@pytest.mark.parametrize("change", CHANGES_OF_FOLDERS)
def test_the_fingerprint_changes_with_each_thing_about_folders(tree, change):
    original = dataset_fingerprint(index_dataset(DataConfig(), tree))
    CHANGES_OF_FOLDERS[change](tree)
    assert dataset_fingerprint(index_dataset(DataConfig(), tree)) != original


def fingerprint_of_table(tree: Path, rows: list[dict[str, str]], **options) -> str:
    file = write_csv(tree / "all.csv", rows)
    return dataset_fingerprint(index_dataset(DataConfig(**options), file))


@pytest.mark.parametrize("use_official_splits", [False, True])
@pytest.mark.parametrize("column", ["path", "task", "label", "split"])
def test_the_fingerprint_changes_with_each_column_of_a_table(tree, column, use_official_splits):
    """Two rows swap their values: what there is stays the same, but not of which image."""
    rows = [{**row, "split": "train" if i % 2 else "test"} for i, row in enumerate(rows_of(tree))]
    original = fingerprint_of_table(tree, rows, use_official_splits=use_official_splits)
    a, b = rows[0], rows[-1]
    assert all(a[name] != b[name] for name in rows[0])
    a[column], b[column] = b[column], a[column]
    changed = fingerprint_of_table(tree, rows, use_official_splits=use_official_splits) != original
    assert changed == (
        use_official_splits or column != "split"
    )  # splits that are not respected are nothing to the results


def test_the_fingerprint_changes_when_official_splits_are_respected(tree):
    rows = [{**row, "split": "train" if i % 2 else "test"} for i, row in enumerate(rows_of(tree))]
    assert fingerprint_of_table(tree, rows, use_official_splits=True) != fingerprint_of_table(tree, rows)


def test_the_fingerprint_changes_with_tasks_classes_and_names(tree, tmp_path):
    names = tmp_path / "names.txt"

    def fingerprint(lines: str, **options) -> str:
        names.write_text(lines)
        return dataset_fingerprint(index_dataset(DataConfig(class_names=str(names), **options), tree))

    (tree / "art/chair").mkdir()
    (tree / "real world/chair").mkdir()
    fingerprints = [
        fingerprint("bed\npost_it\n"),
        fingerprint("bed\npost_it\n", tasks=("art",)),
        fingerprint("bed\npost_it\tsticky note\n"),
        fingerprint("bed\npost_it\tsticky note | memo\n"),
        fingerprint("bed\npost_it\nchair\n"),  # a class without images
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint("# in another order\npost_it\tpost it\nbed\n") == fingerprints[0]


def test_the_fingerprint_changes_with_which_task_has_a_class(tree):
    """A class without images exists only as a folder."""
    (tree / "art/chair").mkdir()
    original = dataset_fingerprint(index_dataset(DataConfig(), tree))
    (tree / "real world/chair").mkdir()
    assert dataset_fingerprint(index_dataset(DataConfig(), tree)) != original


def test_the_fingerprint_does_not_change_with_what_cannot_matter(tree, tmp_path, monkeypatch):
    original = dataset_fingerprint(index_dataset(DataConfig(), tree))
    walk = os.walk

    def backwards(*arguments, **options):
        for folder, subfolders, names in walk(*arguments, **options):
            subfolders.sort(reverse=True)
            names.sort(reverse=True)
            yield folder, subfolders, names

    monkeypatch.setattr(os, "walk", backwards)
    assert dataset_fingerprint(index_dataset(DataConfig(), tree)) == original
    (tree / "readme.txt").write_text("no image")
    for file in (tree / "art", *tree.rglob("*.png")):
        os.utime(file, ns=(0, 0))
    assert dataset_fingerprint(index_dataset(DataConfig(), tree)) == original
    shutil.copytree(tree, tmp_path / "elsewhere")
    assert dataset_fingerprint(index_dataset(DataConfig(), tmp_path / "elsewhere")) == original
    rows = rows_of(tree)
    original = fingerprint_of_table(tree, rows)
    assert fingerprint_of_table(tree, rows[::-1]) == original
    assert fingerprint_of_table(tree, [{**row, "notes": str(i)} for i, row in enumerate(rows)]) == original


def test_the_fingerprint_changes_with_the_images_of_a_parquet_file_not_with_how_they_are_stored(tree):
    file = tree / "all.parquet"
    write_images(tree, file, rows_of(tree), "bytes")
    original = dataset_fingerprint(index_dataset(DataConfig(), file))
    pq.write_table(pq.read_table(file), file, compression="zstd")
    assert dataset_fingerprint(index_dataset(DataConfig(), file)) == original
    change_a_byte(tree)
    write_images(tree, file, rows_of(tree), "bytes")
    assert dataset_fingerprint(index_dataset(DataConfig(), file)) != original


CHANGES_OF_AN_IMAGE = {
    "path": "art/bed/1.png",
    "task": "photo",
    "class_folder": "cot",
    "sha256": "f" * 64,
    "official_split": "train",
}


@pytest.mark.parametrize("field", CHANGES_OF_AN_IMAGE)
def test_the_content_fingerprint_changes_with_each_thing_that_decides_the_splits(field):
    """Cached trainings and features are keyed by it: a corrected label must not reuse the previous ones."""
    image = ScannedImage("art/bed/0.png", "art", "bed", "0" * 64)
    unchanged = ScannedImage("art/bed/2.png", "art", "bed", "1" * 64)
    changed = replace(image, **{field: CHANGES_OF_AN_IMAGE[field]})
    assert content_fingerprint([changed, unchanged]) != content_fingerprint([image, unchanged])


def test_the_content_fingerprint_does_not_change_with_the_order():
    images = [ScannedImage(f"art/bed/{number}.png", "art", "bed", str(number) * 64) for number in range(4)]
    assert content_fingerprint(images[::-1]) == content_fingerprint(images)


# --- Parquet -------------------------------------------------------------------------------------------------


def hugging_face(**names: list[str]) -> dict[str, str]:
    features = {column: {"names": class_names, "_type": "ClassLabel"} for column, class_names in names.items()}
    return {"huggingface": json.dumps({"info": {"features": {**features, "image": {"_type": "Image"}}}})}


def write_images(tree: Path, file: Path, rows: list[dict[str, str]], kind: str, group: int = 3) -> Path:
    """Write images as plain bytes, or like the datasets library."""
    content = [(tree / row["path"]).read_bytes() for row in rows]
    columns = {"task": [row["task"] for row in rows], "label": [row["label"] for row in rows]}
    if kind == "bytes":
        table = pa.table({"image": pa.array(content, pa.binary()), **columns})
    else:
        images = pa.array(
            [{"bytes": data, "path": None} for data in content],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        labels = [CLASSES.index(name) for name in columns["label"]]
        table = pa.table({"image": images, "task": columns["task"], "label": pa.array(labels, pa.int64())})
        table = table.replace_schema_metadata(hugging_face(label=list(CLASSES)))
    pq.write_table(table, file, row_group_size=group)
    return file


@pytest.mark.parametrize("kind", ["bytes", "hugging face"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_images_in_parquet_are_those_of_the_folders(tree, tmp_path, kind, as_folder):
    rows = rows_of(tree)
    tables = tmp_path / "tables"
    tables.mkdir()
    write_images(tree, tables / "one.parquet", rows[::2], kind)
    write_images(tree, tables / "two.parquet", rows[1::2], kind)
    data_root = tables if as_folder else tables / "one.parquet"
    dataset = index_dataset(DataConfig(), data_root)
    assert dataset.layout == "manifest" and dataset.classes == {task: CLASSES for task in TASKS}
    assert len(dataset.images) == (16 if as_folder else 8)
    assert dataset.images[7].path == "one.parquet#00000007" and dataset.images[7].row_group == 2
    images = scanned(dataset)
    expected = {hashlib.sha256((tree / row["path"]).read_bytes()).hexdigest(): row for row in rows}
    for image in images:
        row = expected[image.sha256]
        assert image.error is None and (image.task, image.class_folder) == (row["task"], row["label"])
        assert image.size == (tree / row["path"]).stat().st_size
    assert len({image.sha256 for image in images}) == len(images)


def test_a_table_of_several_batches_is_the_folders(tree, tmp_path, monkeypatch):
    """Each image under its own path, with its own bytes and label."""
    monkeypatch.setattr(manifest_module, "BATCH_ROWS", 5)
    rows = rows_of(tree)[::-1]
    table = {name: [row[name] for row in rows] for name in ("task", "label")}
    table["image"] = [(tree / row["path"]).read_bytes() for row in rows]
    pq.write_table(pa.table(table), tmp_path / "all.parquet", row_group_size=13)  # batches of 5, 5, 3 and 3
    dataset = index_dataset(DataConfig(), tmp_path / "all.parquet")
    expected = {(row["task"], row["label"], (tree / row["path"]).read_bytes()) for row in rows}
    assert len(dataset.images) == len(rows)
    assert {
        (image.task, image.class_folder, read_image_bytes(dataset.root, image.path)) for image in dataset.images
    } == expected


def test_rows_are_read_in_any_order(tree):
    """By order they cost one pass; any other order gives the same bytes."""
    file = write_images(tree, tree / "all.parquet", rows_of(tree), "bytes", group=5)
    expected = pq.read_table(file)["image"].to_pylist()
    order = np.random.default_rng(0).permutation(16)
    for row in (*range(16), *range(15, -1, -1), *order):
        assert read_image_bytes(tree, f"all.parquet#{row:08d}") == expected[row]
    for path in ("all.parquet#00000016", "gone.parquet#00000000"):
        with pytest.raises(BrokenImage, match="no such"):
            read_image_bytes(tree, path)
    write_images(tree, tree / "all.parquet", rows_of(tree)[::-1], "bytes")  # while the file is still open
    assert read_image_bytes(tree, "all.parquet#00000000") == expected[15]


def test_a_pass_over_a_table_reads_each_row_group_once(tree, monkeypatch):
    write_images(tree, tree / "all.parquet", rows_of(tree), "hugging face", group=4)
    read_groups = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *args, **kwargs: read_groups.append(kwargs["row_groups"]) or real(*args, **kwargs),
    )
    for row in range(0, 16, 2):
        read_image_bytes(tree, f"all.parquet#{row:08d}")
    assert read_groups == [[0], [1], [2], [3]]


def test_workers_get_whole_row_groups(tree):
    write_images(tree, tree / "all.parquet", rows_of(tree), "bytes", group=5)
    write_images(tree, tree / "b.parquet", rows_of(tree)[:4], "bytes", group=5)
    (tree / "tables").mkdir()
    for name in ("all", "b"):
        (tree / f"{name}.parquet").rename(tree / f"tables/{name}.parquet")
    images = index_dataset(DataConfig(), tree / "tables").images
    assert [len(chunk) for chunk in split_into_chunks(images, 6)] == [10, 6, 4]
    folders = index_dataset(DataConfig(), tree).images
    assert [len(chunk) for chunk in split_into_chunks(folders, 6)] == [6, 6, 4]
    assert [image for chunk in split_into_chunks(folders, 6) for image in chunk] == list(folders)


def test_splits_of_a_table_hold_its_images(tree, tmp_path):
    file = write_images(tree, tmp_path / "all.parquet", rows_of(tree), "hugging face")
    dataset = index_dataset(DataConfig(), file)
    images = scanned(dataset)
    splits = sample_splits(images, dataset.classes, shots=2, seed=1)
    counts = {split: dict.fromkeys(TASKS, 4) for split in ("train", "test")}
    description = SplitDescription({task: list(CLASSES) for task in TASKS}, dataset.class_names, 2, 1, "", counts)
    sizes = {image.path: image.size for image in images}
    for split, split_images in (("train", splits.train), ("test", splits.test)):
        for part in plan_parts(split_images, split, sizes):
            write_part(dataset.root, part, description, tmp_path / "splits")
    (tmp_path / "splits/splits.json").write_text(json.dumps(vars(description)))
    reader = SplitReader(tmp_path / "splits")
    source = pq.read_table(file)
    for split in ("train", "test"):
        for task in TASKS:
            for row in reader.rows(split, task, ("image", "label", "path")):
                number = int(row["path"].rpartition("#")[2])
                assert row["image"] == source["image"][number].as_py()["bytes"]
                assert row["label"] == source["label"][number].as_py() and source["task"][number].as_py() == task
    victim = plan_parts(splits.test, "test", sizes)[0]
    write_images(tree, file, rows_of(tree)[::-1], "hugging face")
    with pytest.raises(UserError, match=r"all.parquet#\d{8} changed while"):
        write_part(dataset.root, victim, description, tmp_path / "other")


def test_parquet_may_name_files(tree):
    rows = rows_of(tree)
    pq.write_table(pa.Table.from_pylist(rows), tree / "all.parquet", row_group_size=3)
    assert listed(index_dataset(DataConfig(), tree / "all.parquet")) == listed(index_dataset(DataConfig(), tree))
    categories = pa.Table.from_pylist(rows)
    for name in ("task", "label"):  # as pandas writes categories
        index = categories.schema.get_field_index(name)
        categories = categories.set_column(index, name, categories[name].dictionary_encode())
    pq.write_table(categories, tree / "all.parquet")
    assert listed(index_dataset(DataConfig(), tree / "all.parquet")) == listed(index_dataset(DataConfig(), tree))


def table_of(tree: Path, **columns) -> Path:
    """A Parquet file of four images with other columns."""
    images = [png(seed) for seed in range(4)]
    values = {"image": images, "task": ["a"] * 4, "label": ["x", "y"] * 2} | columns
    pq.write_table(
        pa.table({name: column for name, column in values.items() if column is not None}), tree / "t.parquet"
    )
    return tree / "t.parquet"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["x", "y", None, "x"]}, "t.parquet, row 2: the label is empty"),
        ({"label": ["x", "y", "", "x"]}, "t.parquet, row 2: the label is empty"),
        ({"task": ["a", "a\n", "a", "a"]}, r"t.parquet, row 1: the task 'a\n' contains control characters"),
        ({"task": [b"a", b"a", b"a", b"a"], "image": None}, "'task' of .* has type binary"),
        ({"image": [["x"], ["y"], ["x"], ["y"]]}, "'image' of .* has type list"),
        ({"images": [[b"1"]] * 4, "image": None}, "'images' of .* has a list of images in each row"),
        ({"images": [[{"bytes": b"1"}]] * 4, "image": None}, "'images' of .* has a list of images in each row"),
        ({"mask": [b"1"] * 4, "photo": [b"1"] * 4, "image": None}, "columns mask, photo have images"),
        ({"label": [["x"], ["y"], ["x"], ["y"]]}, "'label' of .* has type list"),
        ({"label": None}, "no column 'label'"),
        ({"image": None}, "no column 'path'"),
        ({"image": [1, 2, 3, 4]}, "'image' of .* has type int64; it must be text"),
        ({"label": ["x" * 20_000, "y", "x", "y"]}, "a value of 'label' has more than 4096 characters"),
    ],
)
def test_parquet_that_cannot_be_used_is_named(tmp_path, columns, message):
    assert re.search(
        message if "'" in message and ".*" in message else re.escape(message), fault(table_of(tmp_path, **columns))
    )


def test_numbers_in_parquet_have_names_of_the_file_or_of_the_config(tmp_path):
    table_of(tmp_path, label=[0, 1, 2, 1])
    (tmp_path / "names.txt").write_text("zebra\nhouse\nbed\n")
    named = index_dataset(DataConfig(class_names=str(tmp_path / "names.txt")), tmp_path / "t.parquet")
    assert [image.class_folder for image in named.images] == ["zebra", "house", "bed", "house"]
    table = pq.read_table(tmp_path / "t.parquet")
    table = table.set_column(1, "task", pa.array([1, 1, 0, 0])).replace_schema_metadata(
        hugging_face(label=["a", "b", "c"], task=["sketch", "photo"])
    )
    pq.write_table(table, tmp_path / "t.parquet")
    dataset = index_dataset(DataConfig(), tmp_path / "t.parquet")
    assert dataset.classes == {"photo": ("a", "b"), "sketch": ("b", "c")}
    pq.write_table(table.set_column(2, "label", pa.array([0, 1, -1, 3])), tmp_path / "t.parquet")
    assert "row 2: the label is empty, or a number without a name" in fault(tmp_path / "t.parquet")
    assert "row 3: the label is empty, or a number without a name" in fault(tmp_path / "t.parquet")


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": {}}}}}'])
def test_metadata_that_is_none_gives_no_names(tmp_path, metadata):
    table = pq.read_table(table_of(tmp_path, label=[0, 1, 0, 1])).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "t.parquet")
    assert "only numeric labels" in fault(tmp_path / "t.parquet")


LABELS_WITHOUT_NAMES = {
    "integers": [0, 1, 0, 1],
    "fractions": [0.0, 1.0, 0.0, 1.0],
    "other fractions": [0.5, 1.5, 0.5, 1.5],
    "truth values": [False, True, False, True],
    "text": ["0", "1", "0", "1"],
    "text of fractions": ["0.0", "1.0", "0,0", "1,0"],
    "categories": pa.array([0, 1, 0, 1]).dictionary_encode(),
}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", LABELS_WITHOUT_NAMES)
def test_numbers_mean_the_same_in_every_type_and_format(tmp_path, kind, form):
    values = LABELS_WITHOUT_NAMES[kind]
    plain = values.to_pylist() if isinstance(values, pa.Array) else values
    rows = [{"path": f"{number}.png", "task": 2019, "label": label} for number, label in enumerate(plain)]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    file = tmp_path / f"t.{form}"
    if form == "csv":
        write_csv(file, rows)
    elif form == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        columns = {name: [row[name] for row in rows] for name in ("path", "task")}
        pq.write_table(pa.table({**columns, "label": values}), file)
    assert "only numeric labels (task 2019)" in fault(file)
    (tmp_path / "names.txt").write_text("zebra\nhouse\n")
    for class_names in (str(tmp_path / "names.txt"), {"2019": str(tmp_path / "names.txt")}):
        if kind == "other fractions":
            assert "the label 0.5 is not a whole number" in fault(file, class_names=class_names)
        else:
            dataset = index_dataset(DataConfig(class_names=class_names), file)
            assert [image.class_folder for image in dataset.images] == ["zebra", "house"] * 2
            assert list(dataset.classes) == ["2019"]


def test_tasks_of_a_column_of_fractions_are_whole_numbers(tmp_path):
    dataset = index_dataset(DataConfig(), table_of(tmp_path, task=[2019.0, 2019.0, 2020.0, 2020.0]))
    assert list(dataset.classes) == ["2019", "2020"]


def test_numbers_as_names_of_hugging_face_are_names(tmp_path):
    table = pq.read_table(table_of(tmp_path, label=[0, 1, 0, 1])).replace_schema_metadata(
        hugging_face(label=["3", "7"])
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert index_dataset(DataConfig(), tmp_path / "t.parquet").classes == {"a": ("3", "7")}


@pytest.mark.parametrize("fields", [["path"], ["bytes", "path"]])
def test_structs_of_paths_name_files(tree, fields):
    rows = rows_of(tree)
    dtypes = {"bytes": pa.binary(), "path": pa.string()}
    images = [{"bytes": None, "path": row["path"]} for row in rows]
    struct = pa.array(
        [{name: image[name] for name in fields} for image in images],
        pa.struct([(name, dtypes[name]) for name in fields]),
    )
    columns = {name: [row[name] for row in rows] for name in ("task", "label")}
    pq.write_table(pa.table({"photo": struct, **columns}), tree / "all.parquet", row_group_size=5)
    assert listed(index_dataset(DataConfig(), tree / "all.parquet")) == listed(index_dataset(DataConfig(), tree))


@pytest.mark.parametrize(
    "names", ["data/{}-00000-of-00001.parquet", "default/{}/0000.parquet", "{}-00000-of-00001.parquet"]
)
def test_the_root_of_a_repository_of_the_hub_is_a_table(tree, tmp_path, names):
    rows = rows_of(tree)
    root = tmp_path / "hub"
    for split, split_rows in {"train": rows[::2], "test": rows[1::2]}.items():
        file = root / names.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_images(tree, file, split_rows, "hugging face")
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    dataset = index_dataset(DataConfig(use_official_splits=True), root)
    assert (
        dataset.layout == "manifest" and len(dataset.images) == 16 and dataset.classes == dict.fromkeys(TASKS, CLASSES)
    )
    expected = {hashlib.sha256((tree / row["path"]).read_bytes()).hexdigest(): row["label"] for row in rows}
    assert {image.sha256: image.class_folder for image in scanned(dataset)} == expected
    assert {image.official_split for image in dataset.images if "train" in image.path} == {"train"}
    assert {image.official_split for image in dataset.images if "test" in image.path} == {"test"}


def test_rows_without_an_image_are_broken_images(tmp_path):
    dataset = index_dataset(DataConfig(), table_of(tmp_path, image=[png(0), None, b"text", png(1)]))
    assert [image.error and image.error[:28] for image in scanned(dataset)] == [
        None,
        "the row has no image bytes",
        "not an image of a supported ",
        None,
    ]


def test_many_rows_without_an_image_are_no_bomb(tmp_path):
    """As of a download of which most failed."""
    images = [png(0), png(1), *[None] * 5000]
    file = table_of(tmp_path, image=images, task=["a"] * 5002, label=["x", "y"] * 2501)
    assert len(index_dataset(DataConfig(), file).images) == 5002


def test_a_table_that_is_damaged_inside_has_broken_images(tmp_path):
    images = [os.urandom(3000) for _ in range(40)]
    file = tmp_path / "t.parquet"
    table = pa.table({"image": images, "task": ["a"] * 40, "label": ["x", "y"] * 20})
    pq.write_table(table, file, row_group_size=20, compression="zstd", use_dictionary=False, data_page_size=5000)
    dataset = index_dataset(DataConfig(), file)
    offset = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:offset] + b"\xff" * 40 + content[offset + 40 :])
    errors = [image.error for image in scanned(dataset)]
    assert all("not an image of a supported format" in error for error in errors[:20])  # random bytes, but read
    assert all("the table cannot be read" in error for error in errors[20:])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all", b"PAR1" + bytes(100) + b"PAR1"])
def test_files_that_are_no_parquet_are_named(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    assert "t.parquet cannot be read as Parquet" in fault(tmp_path / "t.parquet")


def test_tables_that_are_links_out_of_the_root_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/t.parquet").symlink_to(table_of(tmp_path))
    assert "t.parquet → " in fault(tmp_path / "data", follow_external_symlinks=False)
    assert len(index_dataset(DataConfig(), tmp_path / "data").images) == 4


def test_small_tables_that_decompress_into_large_ones_are_refused(tmp_path, monkeypatch):
    constant = pa.array(["a"]).take(pa.array(np.zeros(3_000_000, dtype=np.int64)))
    images = pa.array([b"1"]).take(pa.array(np.zeros(3_000_000, dtype=np.int64)))
    pq.write_table(pa.table({"image": images, "task": constant, "label": constant}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    assert "3,000,000 rows in only" in fault(tmp_path / "t.parquet")
    # Without images each row must name a file of its own.
    pq.write_table(pa.table({"path": constant, "task": constant, "label": constant}), tmp_path / "t.parquet")
    assert "at least" in fault(tmp_path / "t.parquet")
    # One long label for all rows, which is in the file once.
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4000, dtype=np.int32)), ["x" * (20 << 20)])
    rows = {"image": [os.urandom(40) for _ in range(4000)], "task": ["a"] * 4000, "label": long}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 20
    assert "a value of 'label' has more than 4096 characters" in fault(tmp_path / "t.parquet")
    zeros = pa.table({"image": [bytes(100 << 20)], "task": ["a"], "label": ["x"]})
    pq.write_table(zeros, tmp_path / "t.parquet", compression="zstd")
    assert "1 rows in only" in fault(tmp_path / "t.parquet")
    monkeypatch.setattr(manifest_module, "MAX_ROWS", 3)
    assert "4 rows with" in fault(table_of(tmp_path)) and "several .parquet files" in fault(table_of(tmp_path))
    monkeypatch.setattr(manifest_module, "MAX_ROWS", 10)
    rows = {"image": [png(seed) for seed in range(4)], "task": ["a"] * 4, "label": ["x", "y"] * 2}
    pq.write_table(pa.table({**rows, "caption": ["long " * 1000] * 4}), tmp_path / "t.parquet")
    monkeypatch.setattr(manifest_module, "MAX_TEXT_BYTES", 1000)  # of the columns that are read
    assert len(index_dataset(DataConfig(), tmp_path / "t.parquet").images) == 4
    monkeypatch.setattr(manifest_module, "MAX_TEXT_BYTES", 50)
    assert "bytes of task, label" in fault(tmp_path / "t.parquet")


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_parquet_is_a_listing_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(table_of(folder).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    (folder / "t.parquet").write_bytes(content)
    try:
        dataset = index_dataset(DataConfig(), folder / "t.parquet")
    except UserError as error:
        assert "t.parquet" in str(error)
    else:
        assert all(image.error is None or len(image.error) < 400 for image in scanned(dataset))


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_is_a_listing_or_refused(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "t.csv").write_text("path,task,label\n" + text, encoding="utf-8", newline="")
    with pytest.raises(UserError, match="t.csv|has no <task>"):
        index_dataset(DataConfig(), folder / "t.csv")


# --- lists and folders of splits -----------------------------------------------------------------------------


def write_lists(root: Path, folder: str, lines: dict[str, list[str]]) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, list_lines in lines.items():
        (root / folder / f"{name}.txt").write_text("\n".join(list_lines) + "\n")


def lists_of(tree: Path, splits: tuple[str, ...], first_label: int = 0) -> dict[str, list[str]]:
    """A class's images, dealt out to the splits."""
    lists: dict[str, list[str]] = {f"{task}_{split}": [] for task in TASKS for split in splits}
    for row in rows_of(tree):
        split = splits[int(Path(row["path"]).stem) % len(splits)]
        lists[f"{row['task']}_{split}"].append(f"{row['path']} {CLASSES.index(row['label']) + first_label}")
    return lists


def splits_of(dataset: DatasetIndex) -> dict[str, str | None]:
    return {image.path: image.official_split for image in dataset.images}


def dealt(tree: Path, *splits: str) -> dict[str, str]:
    return {row["path"]: splits[int(Path(row["path"]).stem) % len(splits)] for row in rows_of(tree)}


@pytest.mark.parametrize("folder", ["", "splits"])
@pytest.mark.parametrize("layout", ["auto", "domainnet"])
def test_domainnet_lists(tree, folder, layout):
    """Lists next to the folders, as published, or in Dassl's folder."""
    write_lists(tree, folder, lists_of(tree, ("train", "test")))
    expected = dealt(tree, "train", "test")
    (tree / "readme.txt").write_text("no list")
    (tree / "art/bed/not listed.png").write_bytes(png(99))
    dataset = index_dataset(DataConfig(layout=layout), tree)
    assert dataset.layout == "domainnet" and len(dataset.images) == 16 and set(splits_of(dataset).values()) == {None}
    dataset = index_dataset(DataConfig(layout=layout, use_official_splits=True), tree)
    assert splits_of(dataset) == expected


@pytest.mark.parametrize(("images", "list_folder"), [("", ""), ("images", "splits"), ("kfold", "")])
def test_pacs_lists(tree, tmp_path, images, list_folder):
    """Published folders, or Dassl's; labels begin at 1, and the test lists are those of all images."""
    root = tmp_path / "pacs"
    lists = lists_of(tree, ("train_kfold", "crossval_kfold"), first_label=1)
    lists |= {f"{task}_test_kfold": [] for task in TASKS}
    for row in rows_of(tree):
        lists[f"{row['task']}_test_kfold"].append(f"{row['path']} 1")
    expected = dealt(tree, "train", "test")
    if images:
        root.mkdir()
        tree.rename(root / images)
    else:
        tree.rename(root)
    write_lists(root, list_folder, lists)
    dataset = index_dataset(DataConfig(), root)
    assert dataset.layout == "pacs" and dataset.root == root / images and len(dataset.images) == 16
    assert all(image.size for image in dataset.images)
    dataset = index_dataset(DataConfig(layout="pacs", use_official_splits=True), root)
    assert splits_of(dataset) == expected and dataset.unused_images == {}


def test_an_image_in_two_splits_is_named(tree):
    lists = lists_of(tree, ("train", "test"))
    lists["art_train"].append(lists["art_test"][0])
    write_lists(tree, "splits_mini", lists)
    with pytest.raises(UserError, match=r"art_train.txt:\d: art/bed/1.png is also listed as a test image"):
        index_dataset(DataConfig(), tree)


@pytest.mark.parametrize("layout", ["mini_domainnet", "domainnet", "pacs"])
def test_layouts_lists_without_lists_are_named(tree, layout):
    assert f"data.layout={layout} needs image lists" in fault(tree, layout=layout)


def in_splits(tree: Path, target: Path, order: str, splits: tuple[str, ...]) -> Path:
    """The tree with a folder for each split, in `order` of task, split and class."""
    for row in rows_of(tree):
        number = int(Path(row["path"]).stem)
        parts = {"task": row["task"], "class": row["label"], "split": splits[number % len(splits)]}
        file = target.joinpath(*(parts[part] for part in order.split("/")), f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((tree / row["path"]).read_bytes())
    return target


@pytest.mark.parametrize("layout", ["auto", "split_folders"])
@pytest.mark.parametrize("order", ["task/split/class", "split/task/class"])
def test_folders_of_splits(tree, tmp_path, order, layout):
    root = in_splits(tree, tmp_path / "splits", order, ("train", "Test", "val", "train"))
    pool = index_dataset(DataConfig(layout=layout), root)
    assert pool.layout == "split_folders" and pool.classes == {task: CLASSES for task in TASKS}
    assert len(pool.images) == 16 and set(splits_of(pool).values()) == {None}
    dataset = index_dataset(DataConfig(layout=layout, use_official_splits=True), root)
    split_numbers = [(split, int(Path(path).stem)) for path, split in splits_of(dataset).items()]
    assert sorted(split_numbers) == sorted([("train", 0), ("test", 1), ("train", 3)] * 4)
    assert dataset.unused_images == {"art": 2, "real world": 2}
    single_task = index_dataset(DataConfig(layout=layout, use_official_splits=True, tasks=["art"]), root)
    assert len(single_task.images) == 6 and single_task.unused_images == {"art": 2}


def test_the_folder_of_all_images_beside_splits_is_not_read_twice(tree, tmp_path):
    """VLCS as Dassl has it."""
    root = in_splits(tree, tmp_path / "vlcs", "task/split/class", ("train", "crossval", "test", "train"))
    in_splits(tree, root, "task/split/class", ("full",))
    dataset = index_dataset(DataConfig(), root)
    assert len(dataset.images) == 16 and [path for path, _ in dataset.skipped] == ["art/full/", "real world/full/"]


def test_splits_without_a_task_are_named(tmp_path):
    root = tmp_path / "one"
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.png").write_bytes(png(1))
    assert "split folders (test, train) but no tasks" in fault(root)
    assert tuple(index_dataset(DataConfig(layout="folders"), root).classes) == ("test", "train")
    (tmp_path / "parent").mkdir()
    root.rename(tmp_path / "parent/flowers")
    assert tuple(index_dataset(DataConfig(), tmp_path / "parent").classes) == ("flowers",)


def test_classes_may_be_called_like_splits(tmp_path):
    """DomainNet has trains."""
    for name in ("train", "test", "van"):
        (tmp_path / "photo" / name).mkdir(parents=True)
        (tmp_path / "photo" / name / "1.png").write_bytes(png(1))
    dataset = index_dataset(DataConfig(), tmp_path)
    assert dataset.layout == "folders" and dataset.classes == {"photo": ("test", "train", "van")}
    assert "data.layout=split_folders needs" in fault(tmp_path, layout="split_folders")


@pytest.mark.parametrize("kind", ["csv", "parquet", "names of parquet files"])
def test_splits_of_a_table(tree, tmp_path, kind):
    splits = ("train", "test", "validation", "train")
    rows = [{**row, "split": splits[int(Path(row["path"]).stem) % 4]} for row in rows_of(tree)]
    if kind == "csv":
        root = write_csv(tree / "all.csv", rows)
    elif kind == "parquet":
        root = tree / "all.parquet"
        pq.write_table(pa.Table.from_pylist(rows), root)
    else:
        root = tmp_path / "tables"
        root.mkdir()
        for split in set(splits):
            write_images(tree, root / f"{split}-00000.parquet", [row for row in rows if row["split"] == split], "bytes")
    assert len(index_dataset(DataConfig(), root).images) == 16
    dataset = index_dataset(DataConfig(use_official_splits=True), root)
    split_by_sha256 = {image.sha256: image.official_split for image in scanned_with_splits(dataset)}
    expected = {hashlib.sha256((tree / row["path"]).read_bytes()).hexdigest(): row["split"] for row in rows}
    assert split_by_sha256 == {content: split for content, split in expected.items() if split != "validation"}
    assert dataset.unused_images == {"art": 2, "real world": 2}
    assert dataset_fingerprint(dataset) != dataset_fingerprint(index_dataset(DataConfig(), root))


def scanned_with_splits(dataset: DatasetIndex) -> list[ScannedImage]:
    return [
        replace(image, official_split=record.official_split) for image, record in zip(scanned(dataset), dataset.images)
    ]


def test_splits_that_are_asked_for_must_be_there(tree):
    assert "data.use_official_splits=true, but" in fault(tree, use_official_splits=True)
    assert "no column 'split'" in fault(write_csv(tree / "all.csv", rows_of(tree)), use_official_splits=True)
    rows = [{**row, "split": "fold 1"} for row in rows_of(tree)]
    write_csv(tree / "all.csv", rows)
    assert "line 2: the split 'fold 1' is not one of train, " in fault(tree / "all.csv", use_official_splits=True)
    assert len(index_dataset(DataConfig(), tree / "all.csv").images) == 16


@st.composite
def given_sets(draw):
    """(images, classes, shots) with enough of each class in both splits, and copies of some in others."""
    shots = draw(st.integers(1, 3))
    images, classes = [], {}
    for task in [f"task{number}" for number in range(draw(st.integers(1, 3)))]:
        classes[task] = ["x", "y"]
        for name in classes[task]:
            for split, minimum in (("train", shots), ("test", 1)):
                distinct = [
                    f"{task} {name} {split} {number}" for number in range(draw(st.integers(minimum, minimum + 3)))
                ]
                duplicates = draw(st.lists(st.sampled_from(["pool 1", "pool 2", *distinct]), max_size=3))
                for number, content in enumerate(distinct + duplicates):
                    digest = hashlib.sha256(content.encode()).hexdigest()
                    path = f"{task}/{split}/{name}/{number}"
                    images.append(ScannedImage(path, task, name, digest, official_split=split))
    return images, classes, shots


@given(given_sets(), st.integers(0, 3))
def test_official_splits_are_respected_and_share_no_content(given_set, seed):
    images, classes, shots = given_set
    splits = sample_splits(images, classes, shots, seed)
    assert {image.official_split for image in splits.train} == {"train"}
    assert {image.official_split for image in splits.test} == {"test"}
    for task, names in classes.items():
        for name in names:
            assert sum((image.task, image.class_folder) == (task, name) for image in splits.train) == shots
    trained = {image.sha256 for image in splits.train}
    assert trained.isdisjoint(image.sha256 for image in splits.test)
    given_test = {image.path for image in images if image.official_split == "test"}
    assert {image.path for image in splits.test} | {path for path, _ in splits.duplicates} == given_test
    # The draw is that of the training images alone.
    train_pool = [ScannedImage(i.path, i.task, i.class_folder, i.sha256) for i in images if i.official_split == "train"]
    extra = [
        ScannedImage(f"more/{task}/{name}", task, name, hashlib.sha256(f"more {task} {name}".encode()).hexdigest())
        for task, names in classes.items()
        for name in names
    ]
    pool = sample_splits(train_pool + extra, classes, shots, seed)
    for task in classes:
        drawn = {image.sha256 for image in splits.train if image.task == task}
        pool_train = {image.sha256 for image in pool.train if image.task == task}
        assert pool_train - {image.sha256 for image in extra} <= drawn


def test_official_splits_with_too_few_images_are_named():
    images = [
        ScannedImage(f"a/{name}/{split}{number}", "a", name, f"{name} {split} {number}", official_split=split)
        for name, train, test in (("bed", 3, 1), ("mug", 2, 5), ("pen", 3, 0))
        for split, count in (("train", train), ("test", test))
        for number in range(count)
    ]
    with pytest.raises(UserError) as error:
        sample_splits(images, {"a": ["bed", "mug", "pen"]}, shots=3, seed=1)
    assert "a/mug has 2 images (2 train, 5 test)" in str(error.value)
    assert "a/pen has 3 images (3 train, 0 test)" in str(error.value)
    assert "a/bed" not in str(error.value)


# --- presets -------------------------------------------------------------------------------------------------


PUBLISHED = {  # preset → tasks, classes, images
    "office_home": (4, 65, 15_588),
    "mini_domainnet": (4, 126, 140_006),
    "pacs": (4, 7, 9_991),
    "office_caltech10": (4, None, 2_533),
    "domainnet": (6, 345, 586_575),
    "vlcs": (4, 5, 10_729),
}


def preset(name: str) -> DataConfig:
    data = parse_config(load_yaml(CONFIGS / f"{name}.yaml")).data
    if data.class_names:
        data = data.model_copy(update={"class_names": str(CONFIGS.parent / data.class_names)})
    return data


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_numbers(name):
    data = preset(name)
    num_tasks, num_classes, num_images = PUBLISHED[name]
    assert sum(data.expected_images.values()) == num_images
    tasks = [task for names in data.expected_images for task in names.split(" + ")]
    assert len(tasks) == num_tasks and (data.tasks is None or set(data.tasks) == set(tasks))
    if num_classes:
        words = read_class_names(Path(data.class_names))
        assert len(words) == len(set(words.values())) == num_classes
        assert list(words) == sorted(words)
        assert not any("_" in text or text != text.strip() for text in words.values())


def test_mini_domainnets_classes_are_domainnets_with_the_same_names():
    mini, full = (read_class_names(CONFIGS / f"class_names/{name}.txt") for name in ("mini_domainnet", "domainnet"))
    assert mini.items() <= full.items()


def published_tree(root: Path, data: DataConfig, tasks: list[str], lists: str | None = None) -> Path:
    """The folders of a preset with one image a class; `lists`: how the lists of images are called."""
    for task in tasks:
        lines = []
        for label, name in enumerate(read_class_names(Path(data.class_names))):
            (root / task / name).mkdir(parents=True)
            (root / task / name / "1.png").write_bytes(b"")
            lines.append(f"{task}/{name}/1.png {label}\n")
        if lists:
            (root / lists.format(task)).write_text("".join(lines))
    return root


@pytest.mark.parametrize(
    ("name", "lists", "layout"),
    [
        ("pacs", None, "folders"),
        ("pacs", "{}_train_kfold.txt", "pacs"),
        ("vlcs", None, "folders"),
        ("domainnet", "{}_train.txt", "domainnet"),
        ("mini_domainnet", None, "folders"),
    ],
)
def test_presets_find_what_is_published_and_tell_what_is_missing(tmp_path, name, lists, layout):
    data = preset(name)
    root = published_tree(tmp_path, data, [*data.tasks, "another"], lists)
    dataset = index_dataset(data, root)
    assert dataset.layout == layout and set(dataset.classes) == set(data.tasks)
    assert {len(names) for names in dataset.classes.values()} == {PUBLISHED[name][1]}
    notes = unexpected_counts(data, dataset)
    assert len(notes) == len(data.expected_images)
    task, expected = next(iter(data.expected_images.items()))
    assert notes[0].startswith(task) and f"{expected:,} are published" in notes[0]
    count = PUBLISHED[name][1] * len(task.split(" + "))
    complete = data.model_copy(update={"expected_images": {task: count, "not here": 3}})
    assert unexpected_counts(complete, dataset) == []


def test_images_of_neither_split_count_as_there(tree, tmp_path):
    root = in_splits(tree, tmp_path / "splits", "task/split/class", ("train", "test", "val", "train"))
    data = DataConfig(use_official_splits=True, expected_images={"art": 8, "real world": 9})
    assert unexpected_counts(data, index_dataset(data, root)) == [
        "real world has 8 images, 9 are published: is the copy complete?"
    ]


# --- kinds of images -----------------------------------------------------------------------------------------


def picture() -> Image.Image:
    """Colors that change slowly, 48 x 32: what a kind of image loses by its compression is little."""
    x, y = np.meshgrid(np.arange(48), np.arange(32))
    return Image.fromarray(np.stack([5 * x, 7 * y, 250 - 5 * x], axis=2).astype(np.uint8))


def png_of(width: int, height: int, bits: int, color_type: int, samples: np.ndarray) -> bytes:
    """PNG's 16-bit colors, which Pillow reads and cannot write; `samples`: (height, width, channels)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = samples.astype(">u2" if bits == 16 else "u1").reshape(height, -1)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", quality=95, exif=exif)


def kinds() -> dict[str, bytes]:
    image = picture()
    other = Image.new("RGB", image.size, "white")
    see_through = image.copy()
    see_through.putalpha(Image.linear_gradient("L").resize(image.size))
    wide = np.asarray(image).astype(np.uint32) * 257
    alpha = np.full((*wide.shape[:2], 1), 30_000)
    return {
        "JPEG": encoded(image, "JPEG", quality=95),
        "JPEG, progressive": encoded(image, "JPEG", quality=95, progressive=True),
        "JPEG, CMYK": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "JPEG, turned by EXIF": turned(6),
        "JPEG, mirrored by EXIF": turned(2),
        "PNG": encoded(image),
        "PNG, palette": encoded(image.quantize(200)),
        "PNG, palette, one color seen through": encoded(image.quantize(200), transparency=3),
        "PNG, palette with alpha": encoded(image.quantize(200), transparency=bytes(range(200))),
        "PNG, alpha": encoded(see_through),
        "PNG, 16 bits": png_of(48, 32, 16, 2, wide),
        "PNG, 16 bits, alpha": png_of(48, 32, 16, 6, np.concatenate([wide, alpha], axis=2)),
        "WebP": encoded(image, "WEBP", quality=95),
        "WebP, lossless, alpha": encoded(see_through, "WEBP", lossless=True, exact=True),
        "WebP, moving": encoded(image, "WEBP", save_all=True, append_images=[other], quality=95),
        "GIF": encoded(image, "GIF"),
        "GIF, moving": encoded(image, "GIF", save_all=True, append_images=[other, image]),
        "TIFF, CMYK": encoded(image.convert("CMYK"), "TIFF"),
        "TIFF, pages": encoded(image, "TIFF", save_all=True, append_images=[other]),
        "AVIF": encoded(image, "AVIF", quality=95),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", kinds())
def test_kinds_of_images_show_what_the_field_sees(kind):
    """Image.open(file).convert("RGB"), as CoOp, Dassl and their successors: the first frame, without what makes it
    transparent, as it is stored. And that is the picture."""
    data = kinds()[kind]
    decoded = decode_rgb(data)
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert decoded.size == (48, 32)
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(picture())).mean() < 6


def greys() -> dict[str, bytes]:
    gray = np.asarray(picture().convert("L"))
    wide = gray.astype(np.uint32) * 257
    alpha = np.full(wide.shape, 100)
    return {
        "PNG": encoded(Image.fromarray(gray)),
        "PNG, 16 bits": png_of(48, 32, 16, 0, wide),
        "PNG, 16 bits, alpha": png_of(48, 32, 16, 4, np.stack([wide, alpha], axis=2)),
        "TIFF, 16 bits": encoded(Image.fromarray(wide.astype(np.uint16)), "TIFF"),
        "TIFF, 32 bits": encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        "PNG, alpha": encoded(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(gray)])),
    }


@pytest.mark.parametrize("kind", greys())
def test_greys_of_any_depth_show_the_same(kind):
    """Pillow alone clips 16 bits of gray to white: there the field sees nothing, and here the picture is seen."""
    decoded = np.asarray(decode_rgb(greys()[kind]))
    assert np.array_equal(decoded, np.asarray(picture().convert("L").convert("RGB")))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16, 24, 31])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<u4"])
def test_grey_is_scaled_by_the_bits_that_it_uses(bits, dtype):
    """12 bits in 16 are nearly black, and 32 bits white, if they are taken for 16."""
    if bits > 8 * np.dtype(dtype).itemsize:
        pytest.skip("more bits than the type has")
    gray = np.asarray(picture().convert("L")).astype(float)
    wide = np.round(gray / gray.max() * (2**bits - 1))
    data = encoded(Image.fromarray(wide.astype(dtype if dtype[1:] == "u2" else "<i4")), "TIFF")
    if dtype == "<u4":
        data = data.replace(b"\x53\x01\x03\0\x01\0\0\0\x02\0", b"\x53\x01\x03\0\x01\0\0\0\x01\0")
    decoded = np.asarray(decode_rgb(data))[..., 0]
    assert np.abs(decoded - wide / (2**bits - 1) * 255).max() <= 0.5 + 1e-6


def test_unsigned_grey_of_32_bits_is_not_black():
    wide = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    data = encoded(Image.fromarray(wide.view(np.int32)), "TIFF")
    data = data.replace(b"\x53\x01\x03\0\x01\0\0\0\x02\0", b"\x53\x01\x03\0\x01\0\0\0\x01\0")
    assert np.asarray(decode_rgb(data))[0, :, 0].tolist() == [0, 128, 255]


def test_only_grey_of_more_than_8_bits_is_read_otherwise_than_by_the_field():
    data = greys()["PNG, 16 bits"]
    field = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert not np.array_equal(np.asarray(decode_rgb(data)), field)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_nothing(orientation):
    """open_clip's preprocessing ignores EXIF, too."""
    data = turned(orientation)
    ours = evaluation_pixels(data, Preprocessing(24))
    assert np.abs(ours - open_clip_pixels(Image.open(io.BytesIO(data)), 24)).max() <= 1e-3
    assert np.array_equal(ours, evaluation_pixels(turned(1), Preprocessing(24)))


def open_clip_pixels(image: Image.Image, size: int) -> np.ndarray:
    """open_clip's own preprocessing, (3, size, size) of 0 to 255."""
    preprocess = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    return preprocess(image).numpy() * 255


# --- one task, and hundreds ----------------------------------------------------------------------------------


def test_hundreds_of_tasks_are_checked_and_drawn_in_seconds(tmp_path):
    content = [png(seed) for seed in range(6)]
    num_tasks, rows = 200, []
    for task in range(num_tasks):
        for name in ("yes", "no"):
            folder = tmp_path / f"task {task:03d}" / name
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.png").write_bytes(content[number + 3 * (name == "no")] + f"{task}".encode())
                rows.append({"path": f"{folder.name}/{number}.png", "task": folder.parent.name, "label": name})
    began = time.process_time()
    dataset = index_dataset(DataConfig(), tmp_path)
    check_constraints(list(dataset.classes))
    images = scanned(dataset)
    splits = sample_splits(images, dataset.classes, shots=2, seed=1)
    parts = plan_parts(splits.train, "train", {image.path: image.size for image in images})
    assert time.process_time() - began < 10
    assert len(dataset.classes) == num_tasks == len(parts) and not any(image.error for image in images)
    assert (len(splits.train), len(splits.test)) == (num_tasks * 4, num_tasks * 2)
    assert len({part.file for part in parts}) == num_tasks


# --- class names and texts -------------------------------------------------------------------------------------


def test_class_names_of_tasks_with_different_classes(tree):
    (tree / "art.txt").write_text("bed\ta large bed, with cushions\n" + "post_it\tpost-it notes\n")
    (tree / "real world/lamp").mkdir()
    (tree / "real world/lamp/1.png").write_bytes(png(50))
    (tree / "real.txt").write_text("lamp\ndesk\n")
    (tree / "real world/post_it").rename(tree / "real world/desk")
    names = {"art": str(tree / "art.txt"), "real world": str(tree / "real.txt")}
    dataset = index_dataset(DataConfig(class_names=names), tree)
    assert dataset.classes == {"art": ("bed", "post_it"), "real world": ("desk", "lamp")}
    assert dataset.class_names["bed"] == "a large bed, with cushions" and dataset.class_names["lamp"] == "lamp"
    assert dataset.excluded_classes == ("real world/bed",)
    # A task without a file has all its folders.
    message = fault(tree, class_names={"art": names["art"]})
    assert "the class 'bed' is 'a large bed, with cushions' in task 'art' and 'bed' in task 'real world'" in message
    (tree / "art.txt").write_text("bed\npost_it\tpost-it notes\n")
    dataset = index_dataset(DataConfig(class_names={"art": names["art"]}), tree)
    assert dataset.classes["real world"] == ("bed", "desk", "lamp")
    assert dataset.class_names == {"bed": "bed", "desk": "desk", "lamp": "lamp", "post_it": "post-it notes"}
    assert "data.class_names: there is no task oil; found: art, real world" in fault(
        tree, class_names={"oil": names["art"]}
    )
    single_task = index_dataset(DataConfig(class_names=names | {"oil": names["art"]}, tasks=["art"]), tree)
    assert single_task.classes == {"art": ("bed", "post_it")}


def test_a_description_that_is_too_long_for_clip_is_named():
    tokenizer = describe_tokenizer(SimpleTokenizer())
    words = ["cat", "a cat " + "with stripes and " * 10 + "a tail", "dog " * 80]
    class_tokens(tokenizer, "a photo of a {}.", [words[:2]])
    with pytest.raises(UserError, match="class 'dog dog .* has 8. tokens.* shorten .* --data.class_names"):
        class_tokens(tokenizer, "a photo of a {}.", [words])


def test_one_task_has_pictures_of_its_grouping():
    """Without a pair to show."""
    figure = affinity_over_training(np.ones((4, 1, 1)), [1, 2, 3, 4], ["ink"], [[0]])
    figure.savefig(io.BytesIO())


@pytest.mark.slow
def test_one_task_in_a_table_goes_through_the_whole_pipeline(run_job, digits, tmp_path):
    files = sorted((digits / "ink_left").rglob("*.png"))
    table = pa.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "domain": ["ink_left"] * len(files),
            "label": [file.parent.name for file in files],
            "split": [file.parent.parent.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "ink_left.parquet", row_group_size=50)
    finished = run_job(
        "full_pipeline",
        *("--storage", tmp_path / "storage", "--config", "configs/demo.yaml"),
        *("--data.root", str(tmp_path / "ink_left.parquet"), "--data.columns", "{task: domain}"),
        *(
            "--data.use_official_splits",
            "true",
            "--clip.task_templates",
            '{ink_left: "the digit {}, turned to the left."}',
        ),
        *("--training.epochs", "2", "--global_prompt.epochs", "2"),
    )
    assert finished.status == 0, finished.output
    assert "40 training and 360 test images" in finished.output
    assert (
        "for other images leave out clip.model, clip.pretrained and configs/demo.yaml, to get ViT-B-16-quickgelu"
        in finished.output
    )
    methods = summary(tmp_path / "storage")["methods"]
    assert all(set(result["accuracy"]) == {"ink_left"} for result in methods.values()) and "grouped" in methods
    prompts = load_adapter(the_run(tmp_path / "storage") / "adapters/grouped.safetensors")
    assert prompts.config.clip.task_templates == {"ink_left": "the digit {}, turned to the left."}
