"""Artifacts: whole or not there, found by what they were made from; in a folder and in a bucket alike."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
import time
from itertools import product
from unittest.mock import Mock

import pyarrow.fs as pafs
import pytest
from rich.console import Console
from servers import S3Server, free_ports

from pipeline.buckets import open_bucket
from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.files import is_uri, write_file
from pipeline.runtime import session, stage
from pipeline.runtime.storage import Artifact, ArtifactWriter, Storage, upload_part
from pipeline.stages.plan import make_plan
from pipeline.training.checkpoint import Checkpoints


def make(artifact: Artifact, text: str = "content") -> None:
    with artifact.writer() as writer:
        (writer.folder / "part").mkdir()
        (writer.folder / "part" / "file.txt").write_text(text)
        artifact.checkpoints.mkdir(exist_ok=True)
        (artifact.checkpoints / "checkpoint.pt").write_text("scratch")
        (writer.folder / "part" / "file.txt.partial").write_text("half of it")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"), *free_ports(1, start=9100))
    yield server
    server.kill()


def bucket_storage(s3, tmp_path, machine="here"):
    path, options = s3.uri.split("?")
    return Storage(f"{path}/{tmp_path.name}?{options}", tmp_path / machine)


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path):
    if request.param == "folder":
        storage = Storage.from_folder(tmp_path / "storage")
    else:
        storage = bucket_storage(request.getfixturevalue("s3"), tmp_path)
    storage.write_marker()
    return storage


def test_an_artifact_appears_whole(storage):
    artifact = Artifact(storage, "splits", {"seed": 1, "task": "Real World"})
    assert not artifact.is_complete()
    make(artifact)
    assert artifact.is_complete() and not artifact.staging_dir.exists()
    manifest = json.loads(storage.read(artifact.folder / "artifact.json"))
    assert manifest["files"] == {"part/file.txt": 7}
    assert manifest["inputs"] == {"seed": 1, "task": "Real World"}
    assert not Artifact(storage, "splits", {"seed": 2, "task": "Real World"}).is_complete()
    assert Artifact(storage, "splits", {"task": "Real World", "seed": 1}).key == artifact.key
    assert (artifact.download() / "part" / "file.txt").read_text() == "content"


def test_a_worker_killed_just_after_publishing_leaves_nothing(storage, monkeypatch):
    make(artifact := Artifact(storage, "splits", {"seed": 1}))
    artifact.checkpoints.mkdir(parents=True)  # as if it had been killed before it removed them
    monkeypatch.setattr(stage, "ray", Mock())
    assert stage._run_item(storage, stage.WorkItem("splits", make, (artifact,), artifact), Mock()) is None
    assert artifact.is_complete() and not artifact.staging_dir.exists()


def test_a_damaged_artifact_is_set_aside_with_a_warning(storage, caplog):
    contents = [None, b"{"] if storage.is_bucket else [None, b"", b"{", b"[]", b'{"files": {}}', b"\xff"]
    for number, (file, content) in enumerate(product(("part/file.txt", "artifact.json"), contents)):
        artifact = Artifact(storage, "splits", {"seed": number})
        make(artifact)
        caplog.clear()
        filesystem, path = storage.filesystem(artifact.folder / file)
        filesystem.delete_file(path)
        if content is not None:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
        assert not artifact.is_complete()
        if not storage.is_bucket:
            assert len(list((storage.folder / "splits").glob(".damaged-*"))) == number + 1
        is_unfinished = storage.is_bucket and (file, content) == ("artifact.json", None)
        assert is_unfinished or file in caplog.text
        make(artifact)
        assert artifact.is_complete() and (artifact.download() / "part" / "file.txt").read_text() == "content"


def test_every_changed_bit_of_an_artifact_is_noticed(tmp_path):
    storage = Storage.from_folder(tmp_path)
    artifact = Artifact(storage, "splits", {"seed": 1, "rate": 1e-05, "tasks": ["é", None]})
    make(artifact)
    for file in ("part/file.txt", "artifact.json"):
        content = (artifact.folder / file).read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (artifact.folder / file).write_bytes(changed)
            assert artifact._find_damage(), (file, position, bytes(changed))
        (artifact.folder / file).write_bytes(content)
    assert artifact.is_complete()


def test_a_change_is_noticed_after_the_file_was_read(tmp_path, monkeypatch):
    """Also with its size and modification time as before."""
    monkeypatch.setattr("pipeline.files.SETTLED_NS", 0)  # as of a file that was not written in this moment
    artifact = Artifact(Storage.from_folder(tmp_path), "splits", {})
    make(artifact)
    file = artifact.folder / "part" / "file.txt"
    assert artifact.is_complete()
    times = file.stat()
    time.sleep(0.02)  # more than the clock's tick in a file system
    file.write_text("CONTENT")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="part/file.txt.*rerun the command"):
        artifact.download()
    assert not artifact.is_complete()


def test_a_file_is_read_once_per_process(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.files.SETTLED_NS", 0)
    artifact, hashed = Artifact(Storage.from_folder(tmp_path), "splits", {}), []
    make(artifact)
    digest = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda stream, name: hashed.append(stream.name) or digest(stream, name))
    for _ in range(3):
        assert artifact.is_complete() and artifact.download() == artifact.folder
    assert len(hashed) <= 1


def test_a_folder_without_its_artifact_json_is_replaced(tmp_path):
    """Such as a copy of a storage that was interrupted; renaming onto it would fail forever."""
    artifact = Artifact(Storage.from_folder(tmp_path), "splits", {})
    artifact.folder.mkdir(parents=True)
    (artifact.folder / "file.txt").write_text("part of a copy")
    assert not artifact.is_complete()
    make(artifact)
    assert artifact.is_complete()


def test_a_damaged_artifact_that_cannot_be_moved_is_named(tmp_path, monkeypatch):
    artifact = Artifact(Storage.from_folder(tmp_path), "splits", {})
    make(artifact)
    (artifact.folder / "part" / "file.txt").write_text("CONTENT")

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match="part/file.txt.*Read-only file system; its file system is mounted read-only"):
        artifact.is_complete()


def test_files_of_another_user_are_named(tmp_path, monkeypatch):
    artifact = Artifact(Storage.from_folder(tmp_path), "splits", {})
    make(artifact)

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("pipeline.runtime.storage.file_digest", refuse)
    with pytest.raises(UserError, match="part/file.txt cannot be read: Permission denied; ask its owner"):
        artifact.is_complete()


def test_a_bucket_that_is_away_is_not_taken_for_damage(tmp_path, monkeypatch):
    artifact = Artifact(Storage("s3://bucket/storage", tmp_path), "splits", {})

    def fail(*_):
        raise UserError("storage=s3://bucket/storage cannot be reached")

    monkeypatch.setattr(Storage, "read", fail)
    monkeypatch.setattr(Storage, "remove", lambda *_: pytest.fail("a whole artifact is removed"))
    with pytest.raises(UserError, match="cannot be reached"):
        artifact.is_complete()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_a_storage_of_another_user_is_named(tmp_path):
    """Written under umask 077; tests run as root read it all the same."""
    artifact = Artifact(Storage.from_folder(tmp_path), "splits", {})
    make(artifact)
    (tmp_path / "splits").chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="cannot be read: Permission denied; ask its owner"):
            artifact.is_complete()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("storage", "failing"),
    [("folder", "rename_durably"), ("folder", "write_json"), ("bucket", "write_json"), ("bucket", "copy_files")],
    indirect=["storage"],
)
def test_a_disk_that_is_full_while_publishing_leaves_nothing_half(storage, monkeypatch, failing):
    artifact = Artifact(storage, "splits", {"seed": 1})
    copy_files = pafs.copy_files

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "copy_files":  # artifact.json could be sent
        monkeypatch.setattr("pipeline.buckets.RETRY_DELAYS_S", ())
        monkeypatch.setattr(
            pafs, failing, lambda file, *args: fail() if "file.txt" in file else copy_files(file, *args)
        )
    else:
        monkeypatch.setattr(f"pipeline.runtime.storage.{failing}", fail)
    with pytest.raises(UserError, match="disk space|cannot be reached"):
        make(artifact)
    monkeypatch.undo()
    assert not artifact.is_complete()
    make(artifact)
    assert (artifact.download() / "part" / "file.txt").read_text() == "content"


@pytest.mark.parametrize("location", ["{folder}/", "{folder}/a/..", "{folder}/a/../link", "link", "link/a/../"])
def test_any_spelling_of_a_folder_is_one_storage(location, tmp_path, monkeypatch):
    (tmp_path / "storage" / "a").mkdir(parents=True)
    (tmp_path / "storage" / "link").symlink_to(".")
    monkeypatch.chdir(tmp_path / "storage")
    storage = session.open_storage(location.format(folder=tmp_path / "storage"), "cache")
    assert storage == Storage.from_folder(tmp_path / "storage")


def test_the_slower_of_two_makers_gives_way(storage):
    artifact = Artifact(storage, "splits", {"seed": 1})
    with artifact.writer() as slower:
        make(artifact, "first")
        assert not slower.folder.exists()
        (slower.folder / "file.txt").write_text("cannot be written any more, which does not matter")
    assert (artifact.folder / "part" / "file.txt").read_text() == "first"
    assert not artifact.staging_dir.exists()


def test_other_machines_get_what_lies_in_a_bucket(s3, tmp_path):
    local, remote = bucket_storage(s3, tmp_path, "here"), bucket_storage(s3, tmp_path, "there")
    local.write_marker()
    remote.verify_access()
    with pytest.raises(UserError, match="does not see storage=s3://bucket/.*with credentials"):
        bucket_storage(s3, tmp_path / "elsewhere").verify_access()
    artifact, copy = Artifact(local, "splits", {"seed": 1}), Artifact(remote, "splits", {"seed": 1})
    assert not copy.is_complete()
    with artifact.writer() as writer:
        (writer.folder / "splits.json").write_text("{}")
        part = ArtifactWriter(copy, copy.staging_dir / writer.folder.name)  # of a worker on the other machine
        part.folder.mkdir(parents=True)
        (part.folder / "images.parquet").write_text("images")
        writer.uploaded |= upload_part(copy, part.folder, "images.parquet")
        assert not copy.is_complete()
    files = json.loads(remote.read(copy.folder / "artifact.json"))["files"]
    assert copy.is_complete() and set(files) == {"splits.json", "images.parquet"}
    for machine in (artifact, copy):
        assert (machine.download() / "images.parquet").read_text() == "images"
        assert (machine.download() / "splits.json").read_text() == "{}"
        assert machine.folder.is_relative_to(machine.storage.folder)
        assert not list((machine.storage.folder / "splits").glob(".[!s]*"))


def test_a_folder_is_sent_while_others_write_in_it(s3, tmp_path):
    local, remote = bucket_storage(s3, tmp_path, "here"), bucket_storage(s3, tmp_path, "there")
    folder, ended = local.folder / "runs" / "demo", threading.Event()
    (folder / "tracking").mkdir(parents=True)
    (folder / "report.md").write_text("report")

    def write() -> None:
        while not ended.is_set():
            write_file(folder / "tracking" / "state.json", "state")
            write_file(folder / "tracking" / "more.json", "more")

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for _ in range(20):
            local.upload(folder)
    finally:
        ended.set()
        writing.join()
    remote.download(remote.folder / "runs" / "demo")
    arrived = {file.name: file.read_text() for file in remote.folder.rglob("*") if file.is_file()}
    assert arrived == {"report.md": "report", "state.json": "state", "more.json": "more"}


def test_checkpoints_of_a_machine_that_is_lost_are_in_the_bucket(s3, tmp_path):
    artifacts = [Artifact(bucket_storage(s3, tmp_path, machine), "training", {}) for machine in ("lost", "other")]
    lost, recovered = [Checkpoints(artifact.checkpoints, artifact.storage.upload) for artifact in artifacts]
    lost.save({"step": 1})
    lost.save({"step": 2})
    artifacts[1].storage.download(artifacts[1].checkpoints)
    assert recovered.load() == {"step": 2}
    (artifacts[1].checkpoints / "checkpoint.pt").unlink()
    assert recovered.load() == {"step": 1}
    with artifacts[1].writer():
        pass
    assert artifacts[0].is_complete()
    filesystem, path = artifacts[0].storage.filesystem(artifacts[0].staging_dir)
    assert filesystem.get_file_info(path).type == pafs.FileType.NotFound


def test_changed_bytes_in_a_bucket_are_noticed(s3, tmp_path):
    local, remote = bucket_storage(s3, tmp_path, "here"), bucket_storage(s3, tmp_path, "there")
    make(Artifact(local, "splits", {}))
    copy = Artifact(remote, "splits", {})
    filesystem, path = remote.filesystem(copy.folder / "part" / "file.txt")
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"CONTENT")
    with pytest.raises(UserError, match="s3://bucket/.* is damaged .*part/file.txt.*: rerun the command"):
        copy.download()
    assert not copy.folder.exists() and not copy.is_complete()  # so that it is made again
    make(copy)
    assert (Artifact(local, "splits", {}).download() / "part" / "file.txt").read_text() == "content"


def test_a_damaged_copy_of_a_bucket_is_fetched_again(s3, tmp_path, caplog):
    storage = bucket_storage(s3, tmp_path)
    artifact = Artifact(storage, "splits", {})
    make(artifact)
    (artifact.folder / "part" / "file.txt").write_text("CONTENT")
    assert (artifact.download() / "part" / "file.txt").read_text() == "content"
    assert "downloading it again" in caplog.text


def test_a_bucket_that_is_away_for_a_while_ends_nothing(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.buckets.RETRY_DELAYS_S", (0.01,) * 3)
    storage, tries = bucket_storage(s3, tmp_path), []

    def away_twice():
        tries.append(1)
        if len(tries) <= 2:
            raise OSError("When reading information: AWS Error NETWORK_CONNECTION")
        return "here"

    assert storage._with_retries(away_twice) == "here"
    tries.clear()
    monkeypatch.setattr("pipeline.buckets.RETRY_DELAYS_S", (0.01,))
    with pytest.raises(UserError, match="cannot be reached: .*NETWORK.*Rerun the same command to resume"):
        storage._with_retries(away_twice)


@pytest.mark.parametrize(
    "uri, message",
    [
        ("s3://absent-bucket/x", "storage=s3://absent-bucket/x.* cannot be used"),
        ("s3://user:secret@bucket/x", "must not contain credentials"),
        ("nfs://bucket/x", "nfs://bucket/x.* is not a storage URI that pyarrow can open"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_named(s3, tmp_path, uri, message):
    options = s3.uri.partition("?")[2]
    with pytest.raises(UserError, match=message) as error_info:
        Storage(f"{uri}?{options}", tmp_path).write_marker()
    assert "secret@" not in str(error_info.value)


def test_what_fails_is_not_published(storage):
    artifact = Artifact(storage, "splits", {"seed": 1})
    with pytest.raises(ZeroDivisionError):
        with artifact.writer() as writer:
            (writer.folder / "file.txt").write_text("whole")
            raise ZeroDivisionError
    assert not artifact.is_complete() and not writer.folder.exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("IO Error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_named(storage, error):
    artifact = Artifact(storage, "splits", {"seed": 1})
    with pytest.raises(UserError, match="cannot write .*free some disk space"):
        with artifact.writer():
            raise error
    assert not artifact.is_complete()


@pytest.mark.parametrize(("location", "is_told"), [("runs", True), ("{folder}/runs", False), ("~/runs", False)])
def test_a_submitted_job_says_where_a_relative_storage_is(location, is_told, tmp_path, monkeypatch):
    """Before the data is read: its working directory is temporary, and results are below the home folder."""
    monkeypatch.setattr(session, "IN_SUBMITTED_JOB", True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO(), width=400)
    values = {"storage": location.format(folder=tmp_path), "data": {"root": str(tmp_path / "nothing")}}
    with pytest.raises(UserError, match="nothing"):
        make_plan(parse_config(values), console)
    text = console.file.getvalue()
    assert (f"results are in {tmp_path}/home/runs" in text) == is_told
    assert ("--storage" in text) == is_told
    assert (tmp_path / "runs").exists() == location.startswith("{folder}")


def test_the_folder_of_a_bucket_is_the_text_of_its_uri():
    """What is no part of a URI belongs to the name; pyarrow itself refuses a space and cuts at `#`."""
    for name in ("try #2", "é", "[a]", "a+b&c"):
        uri = f"s3://bucket/{name}?endpoint_override=127.0.0.1%3A9&scheme=http&region=us-east-1"
        assert open_bucket(uri)[1] == f"bucket/{name}"
    assert is_uri("s3://bucket") and is_uri("gs://bucket/x") and not is_uri("/data/a: //b") and not is_uri("/a://b")
