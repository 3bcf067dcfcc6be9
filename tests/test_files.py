"""Atomic writes: a file is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import REPOSITORY

from pipeline.errors import UserError
from pipeline.files import (
    DamagedFile,
    atomic_replace,
    atomic_write,
    parse_record,
    read_json,
    read_record,
    write_file,
    write_json,
    write_record,
)

KILLED = """
import os, sys
from pathlib import Path
from pipeline.files import atomic_replace, write_file
os.replace = lambda *_: os.kill(os.getpid(), 9)  # written, but not renamed
write_file(Path(sys.argv[1]), "the new content")
"""


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (PermissionError(errno.EACCES, "Permission denied"), "let this user write"),
        (OSError(errno.EROFS, "Read-only file system"), "mounted read-only"),
        (OSError(errno.EIO, "Input/output error"), "dmesg"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "a shorter name"),
        (OSError(errno.ESTALE, "Stale file handle"), "mount it again"),
        (RuntimeError("I/O error: Permission denied (os error 13)"), "let this user write"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free some disk space"),
        (RuntimeError("[enforce fail] unexpected pos: No space left on device"), "free some disk space"),
    ],
    ids=str,
)
def test_each_reason_has_its_remedy(tmp_path, error, remedy):
    with pytest.raises(UserError) as caught:
        with atomic_write(tmp_path / "file"):
            raise error
    message = str(caught.value)
    assert remedy in message and message.endswith("then rerun the same command")
    assert ("free some" in message) == (remedy == "free some disk space") and list(tmp_path.iterdir()) == []


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path):
    file = tmp_path / "values.json"
    write_file(file, "the old content")
    process = subprocess.run([sys.executable, "-c", KILLED, str(file)], cwd=REPOSITORY)
    assert process.returncode == -signal.SIGKILL
    assert file.read_text() == "the old content"
    (partial,) = [path for path in tmp_path.iterdir() if path != file]
    assert partial.suffix == ".partial" and partial.read_text() == "the new content"
    write_file(file, "newer")  # despite the leftover file
    assert file.read_text() == "newer"


def test_content_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls, (fsync, replace) = [], (os.fsync, os.replace)

    def traced_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("sync", path.suffix or "folder", path.is_dir() or path.read_text()))
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        calls.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr("os.fsync", traced_fsync)
    monkeypatch.setattr("os.replace", traced_replace)
    write_json(tmp_path / "values.json", [1])
    assert calls == [("sync", ".partial", "[\n 1\n]\n"), ("rename", "values.json"), ("sync", "folder", True)]


def test_a_failed_block_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyError), atomic_replace(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), atomic_replace(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "part").write_text("half")
        raise KeyError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_replace(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "part").write_text("a part")
        assert not (tmp_path / "folder").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "part"]


def test_concurrent_writers_do_not_interfere(tmp_path):
    with atomic_replace(tmp_path / "file") as outer, atomic_replace(tmp_path / "file") as inner:
        outer.write_text("outer")
        inner.write_text("inner")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "outer")]


def test_a_full_disk_leaves_the_file_unchanged(tmp_path, monkeypatch):
    file = tmp_path / "values.json"
    write_file(file, "1")

    def raise_disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", raise_disk_full)
    with pytest.raises(UserError, match="values.json: No space left"):
        write_file(file, "2")
    assert read_json(file) == 1 and list(tmp_path.iterdir()) == [file]


def test_no_other_module_renames_files():
    for file in (REPOSITORY / "pipeline").rglob("*.py"):
        if file != REPOSITORY / "pipeline" / "files.py":
            assert not re.search(r"\bos\.(replace|rename)\b|\.rename\(", file.read_text()), file


def test_every_changed_bit_of_a_record_is_noticed(tmp_path):
    file, values = tmp_path / "summary.json", {"tasks": ["é", "b"], "average": 1e-05, "methods": {"a": [1, None]}}
    write_record(file, values)
    assert read_record(file) == values
    content = file.read_bytes()
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(DamagedFile, match="summary.json is damaged.*rerun the command"):
            parse_record(bytes(changed), file)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path, content):
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="summary.json is damaged"):
        read_record(file)
    if content not in (b"[1]", b"{}", b"null"):
        with pytest.raises(DamagedFile, match="summary.json is damaged.*remove it"):
            read_json(file)
