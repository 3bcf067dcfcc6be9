"""mmap-clip verify: what is damaged, missing or not needed in a whole storage."""

from __future__ import annotations

import hashlib
import os
import sys

import pytest
from servers import S3Server, free_ports

from jobs.__main__ import run_script
from pipeline.files import write_record
from pipeline.runtime.storage import Artifact, Storage


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path):
    """Two artifacts, a run that refers to one of them, and what interrupted jobs leave."""
    server = None
    if request.param == "bucket":
        server = S3Server(tmp_path, *free_ports(1, start=9400))
        path, options = server.uri.split("?")
        storage = Storage(f"{path}/storage?{options}", tmp_path / "copy")
    else:
        storage = Storage.from_folder(tmp_path / "storage")
    storage.write_marker()
    for seed in (1, 2):
        with artifact(storage, seed).writer() as writer:
            (writer.folder / "part").mkdir()
            (writer.folder / "part" / "file.bin").write_bytes(bytes(3 << 20))
            (writer.folder / "grouping.json").write_text("{}")
    run = storage.folder / "runs" / "demo-0123"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1")
    snapshots = [{"stage": "grouping", "inputs": {"seed": 2}}]
    digests = {"config.yaml": hashlib.sha256(b"seed: 1").hexdigest()}
    write_record(run / "artifacts.json", {"snapshots": snapshots, "sha256_of_files": digests})
    write_record(run / "grouping.json", {"groups": [["a", "b"]]})
    storage.upload(run)
    yield storage
    if server:
        server.kill()


def artifact(storage, seed):
    return Artifact(storage, "grouping", {"seed": seed})


def write(storage, path, content):
    filesystem, name = storage.filesystem(path)
    if not storage.is_bucket:
        path.parent.mkdir(parents=True, exist_ok=True)
    with filesystem.open_output_stream(name) as stream:
        stream.write(content)


def delete(storage, path):
    filesystem, name = storage.filesystem(path)
    filesystem.delete_file(name)


@pytest.fixture
def verify(monkeypatch, capsys):
    def run(location):
        monkeypatch.setattr(sys, "argv", ["mmap-clip verify", str(location)])
        with pytest.raises(SystemExit) as exited:
            run_script("verify")
        return exited.value.code, *capsys.readouterr()

    return run


def test_a_storage_is_verified(storage, verify):
    status, output, _ = verify(storage.uri)
    assert status == 0 and "2 artifacts, 4 files, 6.3 MB verified" in output and "nothing damaged" in output
    content = bytearray(3 << 20)
    content[2 << 20] ^= 4
    damaged, incomplete = artifact(storage, 1).folder, artifact(storage, 2).folder
    write(storage, damaged / "part" / "file.bin", content)
    delete(storage, damaged / "grouping.json")
    write(storage, damaged / "notes.txt", b"mine")
    write(storage, damaged.parent / "copy.txt", b"mine, too")
    delete(storage, incomplete / "artifact.json")
    write(storage, storage.folder / "splits" / ".staging-0123456789abcdef" / "checkpoint.pt", bytes(1_500_000))
    write(storage, storage.folder / "runs" / "demo-0123" / "config.yaml.0a.partial", b"half")
    write(storage, storage.folder / "runs" / "demo-0123" / "config.yaml", b"seed: 3")
    write(storage, storage.folder / "runs" / "demo-0123" / "grouping.json", b'{"groups": [["a", "c"]]}')
    status, output, _ = verify(storage.uri)
    assert status == 1
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in output.splitlines() if "/" in line.split()[0]}
    name, incomplete_name = f"grouping/{damaged.name}", f"grouping/{incomplete.name}"
    assert lines[f"{name}/part/file.bin"].startswith("changed")
    assert lines[f"{name}/grouping.json"].startswith("missing")
    assert lines[f"{name}/notes.txt"].startswith("not in artifact.json")
    assert lines["grouping/copy.txt"].startswith("not an artifact")
    assert lines[incomplete_name].startswith("artifact.json is missing")
    assert lines["splits/.staging-0123456789abcdef"].startswith("an unfinished attempt 1.5")
    assert lines["runs/demo-0123"].startswith(f"{incomplete_name} is missing")
    assert "runs/demo-0123/config.yaml.0a.partial" in lines and len(lines) == 10
    assert "changed" in lines["runs/demo-0123/config.yaml"] and "damaged" in lines["runs/demo-0123/grouping.json"]
    contents = {path: path.read_bytes() for path in storage.folder.rglob("*") if path.is_file()}
    assert verify(storage.uri)[0] == 1 and contents == {
        path: path.read_bytes() for path in storage.folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_any_spelling_of_a_folder_is_verified(storage, verify, monkeypatch, tmp_path):
    (storage.folder / "runs" / ".DS_Store").touch()  # no run
    (tmp_path / "link").symlink_to(storage.folder)
    monkeypatch.chdir(storage.folder)
    for location in (f"{storage.folder}/", "../storage", f"{storage.folder}/runs/..", tmp_path / "link", "."):
        status, output, _ = verify(location)
        assert status == 0 and "2 artifacts, 4 files" in output, location


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_damaged_records_and_unreadable_files_are_listed(storage, verify, monkeypatch):
    write(storage, artifact(storage, 1).folder / "artifact.json", b'{"stage"')
    write(storage, storage.folder / "runs" / "demo-0123" / "artifacts.json", b"")
    unreadable = artifact(storage, 2).folder / "grouping.json"
    digest = Storage.digest

    def refuse(self, path):
        if path == unreadable:
            raise PermissionError(13, os.strerror(13))
        return digest(self, path)

    monkeypatch.setattr(Storage, "digest", refuse)
    status, output, _ = verify(storage.folder)
    assert status == 1 and "Traceback" not in output
    for text in ("artifact.json cannot be read", "runs/demo-0123/artifacts.json", "Permission denied"):
        assert text in output


def test_what_is_no_storage_is_refused(tmp_path, verify):
    for location, text in ((tmp_path / "absent", "does not exist"), (tmp_path, "is not a storage")):
        status, _, error = verify(location)
        assert status == 2 and text in error and "--storage" in error
