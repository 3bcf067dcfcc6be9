"""Stage 1 on a local Ray: broken images, caching, reproducible files."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from pipeline.config import Config, DataConfig, parse_config
from pipeline.data.index import index_dataset
from pipeline.data.parquet import COLUMNS, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.splits import sample_splits
from pipeline.errors import UserError
from pipeline.stages import data_check
from pipeline.stages import splits as stage
from pipeline.stages.flow import run_stages
from pipeline.stages.run import open_run

TASKS, CLASSES, PER_CLASS, SHOTS = ("art", "real world"), ("bed", "post_it"), 6, 2
NUM_IMAGES = len(TASKS) * len(CLASSES) * PER_CLASS
BROKEN = {"art/bed/empty.png": b"", "real world/bed/text.jpg": b"no image"}
TINY_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with data/, which has two broken images, a copy and a text file, and tiny.json, the model."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
    rng = np.random.default_rng(0)
    for task in TASKS:
        for name in CLASSES:
            (folder / "data" / task / name).mkdir(parents=True)
            for number in range(PER_CLASS):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / task / name / f"{number}.png")
    for path, content in BROKEN.items():
        (folder / "data" / path).write_bytes(content)
    (folder / "data/readme.txt").write_text("pictures")
    return folder


def config_of(folder: Path, storage: str, data: dict[str, Any]) -> Config:
    return parse_config(
        {
            "storage": str(folder / storage),
            "data": {"root": str(folder / "data"), "shots": SHOTS, **data},
            "clip": {"model": str(folder / "tiny.json"), "pretrained": None},
        }
    )


@pytest.fixture
def build(folder, shared_ray, monkeypatch):
    """Return a function that builds splits in a storage and returns their reader and the output."""
    # A few images in each scan: several workers take part.
    monkeypatch.setattr(data_check, "IMAGES_PER_CHUNK", 5)

    def build(storage: str, max_broken_fraction: float = 0.0, **data: Any) -> tuple[SplitReader, str]:
        printed = io.StringIO()
        config = config_of(folder, storage, {"max_broken_fraction": max_broken_fraction, **data})
        with open_run(config, Console(file=printed, width=300)) as (plan, session):
            return run_stages(plan, session, "splits")["splits"], printed.getvalue()

    return build


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.parquet")}


def test_too_few_images_are_told_with_the_files_that_are_not_read(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    for number in range(36):
        (tmp_path / "data" / TASKS[0] / CLASSES[0] / f"{number}.heic").write_bytes(b"not read")
    data = DataConfig(shots=PER_CLASS)
    plan = SimpleNamespace(
        dataset_index=index_dataset(data, tmp_path / "data"), config=SimpleNamespace(data=data, seed=1)
    )
    with pytest.raises(UserError, match=r"36 HEIC \(.heic\).* convert"):
        stage.draw_splits(plan, [])


def test_broken_images_stop_the_run_with_their_paths_and_number(build, folder):
    with pytest.raises(UserError) as error:
        build("strict", max_broken_fraction=1 / NUM_IMAGES)
    message = str(error.value)
    assert f"2 of {NUM_IMAGES + 2} images are broken" in message
    (listed,) = (folder / "strict/runs").glob("*/broken_images.txt")
    assert str(listed) in message
    for path in BROKEN:
        assert f"{path}: not an image of a supported format" in message
        assert f"{path}: not an image of a supported format" in listed.read_text()
    # The share that it names is enough.
    share = float(message.rsplit("--data.max_broken_fraction ", 1)[1])
    assert 2 / (NUM_IMAGES + 2) <= share < 3 / (NUM_IMAGES + 2)
    assert not list((folder / "strict/splits").glob("*/artifact.json"))


def test_builds_drop_what_they_may_record_it_and_agree(build, folder):
    share = 2 / (NUM_IMAGES + 2)  # exactly what is broken
    reader, printed = build("one", share)
    assert "2 broken images dropped: listed in" in printed
    values = json.loads((reader.folder / "splits.json").read_text())
    assert [dropped["path"] for dropped in values["dropped"]] == sorted(BROKEN)
    assert all("not an image" in dropped["error"] for dropped in values["dropped"])
    assert reader.description.counts == {
        "train": dict.fromkeys(TASKS, len(CLASSES) * SHOTS),
        "test": dict.fromkeys(TASKS, len(CLASSES) * (PER_CLASS - SHOTS)),
    }
    rows = [
        row for split in ("train", "test") for task in TASKS for row in reader.rows(split, task, ["path", "sha256"])
    ]
    assert len({row["path"] for row in rows}) == len({row["sha256"] for row in rows}) == NUM_IMAGES
    assert not {row["path"] for row in rows} & set(BROKEN)

    files = bytes_of(reader.folder)
    times = {file: (reader.folder / file).stat().st_mtime_ns for file in files}
    cached, printed = build("one", share)
    assert "cached (computed in" in printed
    assert cached.folder == reader.folder
    assert {file: (reader.folder / file).stat().st_mtime_ns for file in files} == times

    rebuilt, printed = build("two", share)
    assert "cached (computed in" not in printed
    assert rebuilt.folder != reader.folder and rebuilt.folder.name == reader.folder.name
    assert bytes_of(rebuilt.folder) == files and len(files) == 2 * len(TASKS)
    assert (rebuilt.folder / "splits.json").read_bytes() == (reader.folder / "splits.json").read_bytes()


def test_splits_are_those_of_reading_the_images_without_a_check(build, folder, tmp_path):
    reader, _ = build("one", 2 / (NUM_IMAGES + 2))
    dataset = index_dataset(DataConfig(), folder / "data")
    scanned = [scan_image(dataset.root, record.path, record.task, record.class_folder) for record in dataset.images]
    splits = sample_splits([image for image in scanned if not image.error], dataset.classes, SHOTS, seed=1)
    sizes = {image.path: image.size for image in scanned}
    for part in plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes):
        write_part(dataset.root, part, reader.description, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(reader.folder)


def drawn(reader: SplitReader, split: str) -> set[tuple[str, str, str]]:
    """Return (task, class, content) of a split's images."""
    description = reader.description
    return {
        (task, description.classes[task][row["label"]], row["sha256"])
        for task in description.tasks
        for row in reader.rows(split, task, ["label", "sha256"])
    }


def test_a_table_of_images_gives_the_splits_of_the_folders(build, folder):
    files = sorted((folder / "data").glob("*/*/?.png"))
    assert len(files) == NUM_IMAGES
    table = pa.table(
        {
            "image": [file.read_bytes() for file in files],
            "domain": [file.parts[-3] for file in files],
            "label": [file.parts[-2] for file in files],
        }
    )
    pq.write_table(table, folder / "all.parquet", row_group_size=7)
    table_splits, printed = build("table", root=str(folder / "all.parquet"), columns={"task": "domain"})
    assert f"{len(TASKS)} tasks, {NUM_IMAGES} images" in printed
    folder_splits, _ = build("one", 2 / (NUM_IMAGES + 2))
    for split in ("train", "test"):
        assert drawn(table_splits, split) == drawn(folder_splits, split)
    row = next(table_splits.rows("test", "art", COLUMNS.names))
    number = int(row["path"].removeprefix("all.parquet#"))
    assert row["image"] == files[number].read_bytes()


def test_official_splits_are_respected_and_reported(build, folder):
    lines = ["path,task,label,split"]
    for file in sorted((folder / "data").glob("*/*/?.png")):
        split = ("train", "train", "train", "test", "test", "val")[int(file.stem)]
        lines.append(f"{file.relative_to(folder / 'data')},{file.parts[-3]},{file.parts[-2]},{split}")
    (folder / "data/all.csv").write_text("\n".join(lines))
    expected = {"expected_images": {"art": 12, "real world": 99}}
    reader, printed = build("given", root=str(folder / "data/all.csv"), use_official_splits=True, **expected)
    (folder / "data/all.csv").unlink()
    assert "real world has 12 images, 99 are published: is the copy complete?" in printed
    for split, numbers in (("train", {"0", "1", "2"}), ("test", {"3", "4"})):
        paths = {row["path"] for task in TASKS for row in reader.rows(split, task, ["path"])}
        assert len(paths) == 2 * len(TASKS) * len(CLASSES) and {Path(path).stem for path in paths} <= numbers
    values = json.loads((reader.folder / "splits.json").read_text())
    assert values["use_official_splits"] == {"training_images_not_drawn": 4, "images_in_neither_split": 4}
    assert "4 training images not drawn, 4 images in neither split" in printed


def test_hundreds_of_tasks(build, folder, monkeypatch):
    monkeypatch.setattr(data_check, "IMAGES_PER_CHUNK", 600)  # the splits are hundreds of pieces of work already
    rng = np.random.default_rng(1)
    lines = ["path,task,label"]
    for task in range(200):
        for name in CLASSES:
            for number in range(3):
                file = folder / f"many/{task}-{name}-{number}.png"
                file.parent.mkdir(exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
                lines.append(f"{file.name},task {task},{name}")
    (folder / "many/all.csv").write_text("\n".join(lines))
    reader, printed = build("many", root=str(folder / "many/all.csv"))
    assert "200 tasks, 1,200 images" in printed and "800 training and 400 test images" in printed
    assert len(drawn(reader, "train")) == 800 and len(drawn(reader, "test")) == 400


@pytest.mark.parametrize(("broken", "total"), [(1, 3), (29, 100), (1, 40_000), (2, 3), (7, 7)])
def test_the_share_named_in_the_error_is_enough(tmp_path, broken, total):
    image = stage.ScannedImage("a/x/1.png", "a", "x", "", "broken")
    with pytest.raises(UserError) as error:
        stage._check_broken_fraction([image] * broken, total, 0.0, tmp_path / "broken.txt")
    share = float(str(error.value).rsplit(" ", 1)[1])
    stage._check_broken_fraction([image] * broken, total, share, tmp_path / "broken.txt")
    stage._check_broken_fraction([image] * broken, total, broken / total, tmp_path / "broken.txt")
