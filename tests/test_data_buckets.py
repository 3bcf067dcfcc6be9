"""Images in a bucket: the same data set as in a folder, and what can be wrong with buckets, on moto's server of S3."""

from __future__ import annotations

import csv
import io
import json
import logging
import pickle
import signal
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image
from servers import S3Server, free_ports

from pipeline import buckets
from pipeline.buckets import BucketPath, open_bucket
from pipeline.config import DataConfig, parse_config
from pipeline.data.checked_images import check_images
from pipeline.data.contents import UNREADABLE, dataset_fingerprint, read_content, read_contents
from pipeline.data.index import index_dataset, open_root
from pipeline.data.parquet import SplitDescription, plan_parts, write_part
from pipeline.data.splits import ScannedImage, sample_splits
from pipeline.errors import UserError
from pipeline.runtime.cluster import _missing_paths
from pipeline.runtime.storage import Storage
from pipeline.stages import plan
from pipeline.stages.flow import NAMES
from pipeline.stages.paths import check_paths

ODD = "a b#1%20é+&?=.png"
"""Name of an image with all that a URI must quote."""
SMALL = (
    *("--clip.model", "builtin:digits", "--clip.pretrained", "builtin:digits", "--global_prompt.epochs", "1"),
    *("--mmap.prompt_length", "4", "--mmap.source_rows", "4"),
)
AWAY_S = 25


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"), *free_ports(1, start=9300))
    yield server
    server.kill()


@pytest.fixture
def options(s3):
    return s3.uri.partition("?")[2]


@pytest.fixture
def upload(s3, options, request):
    """Return a function that copies a folder into the bucket, below the test's name, and returns its URI."""

    def upload(folder: Path, name: str = "data") -> str:
        filesystem, bucket = open_bucket(s3.uri)
        key = f"{request.node.originalname}/{name}"
        pafs.copy_files(str(folder), f"{bucket}/{key}", pafs.LocalFileSystem(), filesystem)
        return f"s3://bucket/{key}?{options}"

    return upload


def put(s3: S3Server, key: str, content: bytes = b"") -> None:
    filesystem, _ = open_bucket(s3.uri)
    with filesystem.open_output_stream(f"bucket/{key}") as stream:
        stream.write(content)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_images(root: Path, *patterns: str, number: int = 2) -> list[Path]:
    """Write images `<root>/<pattern>/<number>.png` of different contents."""
    files = [root / pattern / f"{i}.png" for pattern in patterns for i in range(number)]
    for seed, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(seed))
    return files


def rows_of(root: Path) -> list[dict[str, str]]:
    files = sorted(file.relative_to(root) for file in root.rglob("*.png"))
    splits = ("train", "test")
    return [
        {"path": str(file), "task": file.parts[-3], "label": file.parts[-2], "split": splits[i % 2]}
        for i, file in enumerate(files)
    ]


TASKS = ("ink/bed", "ink/mug", "neon/bed", "neon/mug")


def write_folders(root: Path) -> str:
    files = write_images(root, *TASKS, "neon/lamp/a/b")
    files[0].rename(files[0].with_name(ODD))
    for name in (".DS_Store", "neon/mug/notes.txt", "neon/mug/x.heic", "ink/mug/Thumbs.db"):
        (root / name).write_text("no image")
    (root / "ink/bed/broken.jpg").write_bytes(b"no image")
    (root / "ink/bed/empty.jpg").write_bytes(b"")
    return ""


def write_csv(root: Path) -> str:
    write_images(root / "images", *TASKS)
    with open(root / "all.csv", "w", newline="") as stream:
        table = csv.DictWriter(stream, ["path", "task", "label", "split"])
        table.writeheader()
        table.writerows(rows_of(root))
    return "all.csv"


def write_json_lines(root: Path) -> str:
    write_images(root / "images", *TASKS)
    (root / "tables").mkdir()
    rows = [{**row, "path": f"../{row['path']}"} for row in rows_of(root)]
    (root / "tables/all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "tables/all.jsonl"


def write_parquet_paths(root: Path) -> str:
    write_images(root / "images", *TASKS)
    pq.write_table(pa.Table.from_pylist(rows_of(root)), root / "all.parquet")
    return "all.parquet"


def write_parquet_images(root: Path) -> str:
    """Write a folder as a repository of the Hugging Face Hub."""
    write_images(root / "images", *TASKS)
    (root / "hub/data").mkdir(parents=True)
    rows = [{**row, "image": (root / row.pop("path")).read_bytes()} for row in rows_of(root)]
    for split in ("train", "test"):
        table = pa.Table.from_pylist([row for row in rows if row["split"] == split])
        pq.write_table(table, root / f"hub/data/{split}-00000.parquet", row_group_size=2)
    return "hub"


def write_lists(root: Path) -> str:
    write_images(root, *TASKS)
    (root / "splits_mini").mkdir()
    for row in rows_of(root):
        with open(root / f"splits_mini/{row['task']}_{row['split']}.txt", "a") as stream:
            stream.write(f"{row['path']} 0\n")
    return ""


def write_split_folders(root: Path) -> str:
    write_images(root, *(f"{split}/{task}" for split in ("train", "val", "test") for task in TASKS))
    return ""


def write_office_home(root: Path) -> str:
    folder = root / "OfficeHomeDataset_10072016"
    write_images(folder, "Art/Bed", "Art/Mug", "Real World/Bed", "Real World/Mug")
    return ""


LAYOUTS = {
    "folders": (write_folders, "folders", {}),
    "split folders": (write_split_folders, "split_folders", {"use_official_splits": True}),
    "office_home": (write_office_home, "office_home", {"tasks": ("Art", "Real World")}),
    "lists": (write_lists, "mini_domainnet", {"use_official_splits": True}),
    "CSV": (write_csv, "manifest", {"use_official_splits": True}),
    "JSON lines beside the images": (write_json_lines, "manifest", {}),
    "Parquet with paths": (write_parquet_paths, "manifest", {}),
    "Parquet with images": (write_parquet_images, "manifest", {"use_official_splits": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_in_a_bucket_is_that_of_the_folder(layout, upload, tmp_path):
    """Also its scan and its splits."""
    write, name, config = LAYOUTS[layout]
    file = write(tmp_path)
    location, _, options = upload(tmp_path, layout.replace(" ", "")).partition("?")
    local = index_dataset(DataConfig(**config), open_root(str(tmp_path / file)))
    remote = index_dataset(DataConfig(**config), open_root(f"{location}/{file}?{options}"))
    assert (local.layout, len(local.images) >= 8) == (name, True)
    for field in ("layout", "classes", "class_names", "skipped", "unused_images", "roles"):
        assert getattr(remote, field) == getattr(local, field)
    assert [image.size for image in remote.images if image.row_group is None] == [
        image.size for image in local.images if image.row_group is None
    ]
    assert dataset_fingerprint(remote) == dataset_fingerprint(local), "the same keys: moved to a bucket, all is cached"

    local_scan, remote_scan = (check_images(index.root, index.images, ()) for index in (local, remote))
    assert remote_scan == local_scan
    scanned = [
        ScannedImage(row["path"], row["task"], row["class_folder"], row["sha256"], None, row["size"], split)
        for row, split in zip(remote_scan.to_pylist(), (image.official_split for image in remote.images))
        if row["error"] is None
    ]
    splits = sample_splits(scanned, remote.classes, 1, 1)
    counts = {split: dict.fromkeys(remote.classes, 0) for split in ("train", "test")}
    classes = {task: list(names) for task, names in remote.classes.items()}
    description = SplitDescription(classes, remote.class_names, 1, 1, "", counts)
    sizes = {image.path: image.size for image in scanned}
    for part in plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes):
        for folder, index in (("local", local), ("remote", remote)):
            write_part(pickle.loads(pickle.dumps(index.root)), part, description, tmp_path / folder)
        assert (tmp_path / "remote" / part.file).read_bytes() == (tmp_path / "local" / part.file).read_bytes()


def test_the_listing_of_a_bucket_asks_for_no_file(upload, tmp_path, monkeypatch):
    write_folders(tmp_path)
    root, requests = BucketPath(upload(tmp_path)), []
    filesystem = root._open()[0]

    class Counting:
        def get_file_info(self, files: str | pafs.FileSelector) -> object:
            requests.append(files)
            return filesystem.get_file_info(files)

    monkeypatch.setattr(buckets, "open_bucket", lambda uri: (Counting(), "bucket"))
    images = index_dataset(DataConfig(), root).images
    assert len(images) == 12 and {image.size for image in images} > {0}
    assert sum(isinstance(request, str) for request in requests) == 1 and len(requests) < 2 * 10, (
        "at most two for a folder"
    )
    assert root._listings == {}, "what was listed is not kept"


def test_objects_that_are_no_files_of_a_folder_are_counted(s3, upload, options, tmp_path):
    write_images(tmp_path, *TASKS)
    location = upload(tmp_path).partition("?")[0]
    key = location.removeprefix("s3://bucket/")
    expected = dataset_fingerprint(index_dataset(DataConfig(), BucketPath(f"{location}?{options}")))
    filesystem, _ = open_bucket(s3.uri)
    filesystem.create_dir(f"bucket/{key}/ink/bed")  # the marker of a folder, of 0 bytes
    filesystem.create_dir(f"bucket/{key}/ink/empty")
    address = f"http://{options.partition('endpoint_override=')[2].partition('&')[0].replace('%3A', ':')}/bucket"
    for name in ("ink/bed//9.png", "ink/../9.png"):  # which pyarrow does not write
        request = urllib.request.Request(f"{address}/{key}/{name}", b"x", {"Content-Type": "image/png"}, method="PUT")
        assert urllib.request.urlopen(request).status == 200
    put(s3, f"{key}/ink/bed/line\x7fbreak.png", png(99))
    dataset = index_dataset(DataConfig(), BucketPath(f"{location}?{options}"))
    assert ("ink/bed//", "folder without a name") in dataset.skipped and "two slashes" in dataset.describe()
    assert "empty" not in dataset.class_names or dataset.classes["ink"] == ("bed", "empty", "mug")
    assert dataset_fingerprint(dataset) != expected
    (odd,) = [image for image in dataset.images if "line" in image.path]
    assert "control characters" in str(read_content(dataset.root, odd.path).error)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/", "one level too high: try --data.root 's3://bucket/test_a_root.*/data?endpoint"),
        ("/data/ink", "one level too deep: try --data.root 's3://bucket/test_a_root.*/data?endpoint"),
        ("/data/ink/bed", "2 levels too deep: try --data.root 's3://bucket/test_a_root.*/data?endpoint"),
        ("/date", "date.* is not a folder or file of this bucket; did you mean: --data.root 's3://bucket/.*/data?"),
        ("/data/ink/bed/0.png", "is neither a folder nor a manifest"),
    ],
)
def test_a_root_that_does_not_fit_is_refused_with_one_that_does(upload, options, tmp_path, path, message):
    write_images(tmp_path, *TASKS)
    folder = upload(tmp_path).partition("?")[0].removesuffix("/data")
    with pytest.raises(UserError, match=message.replace("?", "[?]")):
        index_dataset(DataConfig(), BucketPath(f"{folder}{path}?{options}"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://absent/data?", "there is no bucket absent. Check the name of the bucket, .*credentials"),
        (
            "s3://bucket/data?endpoint_override=127.0.0.1%3A9&scheme=http&",
            "cannot be read: .*NETWORK_CONNECTION.* Check",
        ),
        ("s3://user:se/cret@bucket/data?", "must not contain credentials"),
        ("s3://user:secret@bucket/data?", "must not contain credentials"),
        ("s3://bucket/data?anon=true&", "Unexpected query parameter .*'anon'"),
        ("nothing://bucket/data?", "is not a storage URI that pyarrow can open"),
        ("file:///data?", "data.root=file:///data.* is a path on this machine: give it without file://"),
    ],
)
def test_a_bucket_that_cannot_be_read_is_named_at_the_start(s3, options, uri, message, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is not waited for"))
    uri += "region=us-east-1" if "%3A9&" in uri else options
    with pytest.raises(UserError, match=message) as error:
        check_paths(parse_config({"data": {"root": uri}}))
        index_dataset(DataConfig(), open_root(uri))
    assert "secret" not in str(error.value) and "se/cret" not in str(error.value)


def test_a_bucket_without_permission_is_named_at_the_start(monkeypatch):
    errors = [OSError("AWS Error ACCESS_DENIED during HeadObject operation")]
    monkeypatch.setattr(buckets, "open_bucket", lambda uri: (Failing(None, errors), "bucket"))
    with pytest.raises(UserError, match="data.root=s3://bucket/d cannot be read: AWS Error ACCESS_DENIED .*anonymous"):
        index_dataset(DataConfig(), BucketPath("s3://bucket/d"))


def test_a_public_bucket_is_read_without_credentials(upload, tmp_path, monkeypatch):
    write_images(tmp_path, *TASKS)
    uri, created = upload(tmp_path), []
    s3_filesystem = pafs.S3FileSystem
    monkeypatch.setattr(pafs, "S3FileSystem", lambda **values: created.append(values) or s3_filesystem(**values))
    assert len(index_dataset(DataConfig(), BucketPath(f"{uri}&anonymous=true")).images) == 8
    assert [values["anonymous"] for values in created] == [True]


class Failing:
    """A file system whose next requests raise errors."""

    def __init__(self, filesystem: pafs.FileSystem, errors: list[OSError]):
        self._filesystem, self._errors = filesystem, errors

    def __getattr__(self, name: str) -> object:
        def request(*arguments: object) -> object:
            if self._errors:
                raise self._errors.pop(0)
            return getattr(self._filesystem, name)(*arguments)

        return request


@pytest.mark.parametrize("write", [write_folders, write_parquet_images])
def test_a_bucket_that_is_away_is_waited_for_with_one_line(write, upload, tmp_path, monkeypatch, caplog):
    root = BucketPath(upload(tmp_path / write(tmp_path), write.__name__))
    dataset, (filesystem, _) = index_dataset(DataConfig(), root), open_bucket(str(root))
    expected, errors = dataset_fingerprint(dataset), [OSError("AWS Error NETWORK_CONNECTION during GetObject")] * 15
    monkeypatch.setattr(buckets, "open_bucket", lambda uri: (Failing(filesystem, errors), "bucket"))
    monkeypatch.setattr(buckets, "RETRY_DELAYS_S", (0.1,) * 20)
    monkeypatch.setattr(buckets, "_last_warning", {})
    with caplog.at_level(logging.WARNING):
        assert dataset_fingerprint(replace(dataset, root=BucketPath(str(root)))) == expected
    message = "s3://bucket: AWS Error NETWORK_CONNECTION during GetObject; retrying in"
    assert not errors and caplog.text.count(message) == 1


def test_a_bucket_that_stays_away_ends_the_run(upload, tmp_path, monkeypatch):
    write_images(tmp_path, *TASKS)
    root = BucketPath(upload(tmp_path))
    errors = [OSError("AWS Error INTERNAL_FAILURE")] * 100
    monkeypatch.setattr(buckets, "RETRY_DELAYS_S", (0, 0))
    monkeypatch.setattr(buckets, "open_bucket", lambda uri: (Failing(None, errors), "bucket"))
    with pytest.raises(UserError, match="s3://bucket cannot be reached: AWS .* Rerun the same command to resume"):
        list(read_contents(root, ["ink/bed/0.png"]))


def test_an_object_that_is_gone_or_refused_is_a_broken_image(s3, upload, tmp_path, monkeypatch):
    write_images(tmp_path, *TASKS)
    dataset = index_dataset(DataConfig(), BucketPath(upload(tmp_path)))
    filesystem, key = (dataset.root / "ink/bed/0.png")._open()
    filesystem.delete_file(key)
    (broken,) = [row for row in check_images(dataset.root, dataset.images, ()).to_pylist() if row["error"]]
    assert (broken["path"], broken["error"]) == ("ink/bed/0.png", "no such file")
    errors = [OSError("AWS Error ACCESS_DENIED during GetObject operation: no (Request ID: 3)")]
    monkeypatch.setattr(buckets, "open_bucket", lambda uri: (Failing(filesystem, errors), "bucket"))
    content = read_content(dataset.root, "ink/bed/1.png")
    assert content.error == f"{UNREADABLE}AWS Error ACCESS_DENIED during GetObject operation: no"


def test_a_changed_object_of_the_same_size_is_another_data_set(upload, tmp_path):
    files = write_images(tmp_path, *TASKS)
    root = upload(tmp_path)
    dataset = index_dataset(DataConfig(), BucketPath(root))
    original, content = dataset_fingerprint(dataset), bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    assert upload(tmp_path) == root
    changed = index_dataset(DataConfig(), BucketPath(root))
    assert [image.size for image in changed.images] == [image.size for image in dataset.images]
    assert dataset_fingerprint(changed) != original


def test_files_of_class_names_may_be_in_a_bucket(upload, tmp_path):
    write_images(tmp_path / "images", *TASKS)
    (tmp_path / "names.txt").write_text("bed\ta bed\nmug\n")
    location, _, options = upload(tmp_path).partition("?")
    config = DataConfig(class_names=f"{location}/names.txt?{options}")
    assert index_dataset(config, BucketPath(f"{location}/images?{options}")).class_names == {
        "bed": "a bed",
        "mug": "mug",
    }
    with pytest.raises(UserError, match="no.txt.* is not a file"):
        index_dataset(
            DataConfig(class_names=f"{location}/no.txt?{options}"), BucketPath(f"{location}/images?{options}")
        )


def test_each_machine_must_be_able_to_read_the_bucket(upload, tmp_path, monkeypatch):
    write_images(tmp_path / "data", *TASKS)
    storage, root = Storage.from_folder(tmp_path / "storage"), BucketPath(upload(tmp_path / "data"))
    storage.write_marker()
    assert _missing_paths(storage, [root, root / "ink/bed/0.png"]) == ""
    assert "does not see" in _missing_paths(storage, [root / "no"]) and "bucket" in _missing_paths(
        storage, [root / "no"]
    )
    errors = [OSError("AWS Error ACCESS_DENIED during HeadObject operation")]
    monkeypatch.setattr(buckets, "open_bucket", lambda uri: (Failing(None, errors), "bucket"))
    assert "ACCESS_DENIED" in _missing_paths(storage, [BucketPath(str(root))])


def test_a_run_is_named_after_the_folder_in_the_bucket():
    names = [
        parse_config({"data": {"root": f"s3://b.c/d/{name}?x=y/z"}}).name for name in ("shops", "shops/", "all.csv")
    ]
    assert names == ["shops", "shops", "all"]


@pytest.mark.fault_injection
def test_a_run_with_images_in_a_bucket_that_is_away_while_they_are_checked(s3, upload, tmp_path, run_job, monkeypatch):
    """And the same images in a folder are the same run."""
    write_images(tmp_path / "shops", *TASKS, number=5)
    arguments = ["--storage", tmp_path / "storage", "--data.shots", "2", "--training.epochs", "1", *SMALL]
    fingerprint = plan.dataset_fingerprint

    def stop_server(*values: object) -> str:
        images = fingerprint(*values)
        s3.process.send_signal(signal.SIGSTOP)
        threading.Timer(AWAY_S, s3.process.send_signal, [signal.SIGCONT]).start()
        return images

    monkeypatch.setattr(plan, "dataset_fingerprint", stop_server)
    run = run_job("full_pipeline", "--data.root", upload(tmp_path / "shops", "shops"), *arguments)
    assert run.status == 0, run.output
    monkeypatch.undo()
    again = run_job("full_pipeline", "--data.root", tmp_path / "shops", *arguments)
    assert again.status == 0 and again.output.count("cached (computed in") == len(NAMES) - 1, (
        again.output
    )  # the report is
