"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import REPOSITORY

from pipeline.errors import UserError
from pipeline.files import atomic_replace, read_json, write_file, write_json

KILLED = """
import os, sys
from pathlib import Path
from pipeline.files import atomic_replace, write_file
os.replace = lambda *_: os.kill(os.getpid(), 9)  # all is written, nothing renamed
write_file(Path(sys.argv[1]), "the new content")
"""


def test_a_process_killed_before_the_rename_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "values.json"
    write_file(file, "the old content")
    process = subprocess.run([sys.executable, "-c", KILLED, str(file)], cwd=REPOSITORY)
    assert process.returncode == -signal.SIGKILL
    assert file.read_text() == "the old content"
    (other,) = [path for path in tmp_path.iterdir() if path != file]
    assert other.suffix == ".partial" and other.read_text() == "the new content"
    write_file(file, "newer")  # in spite of what was left
    assert file.read_text() == "newer"


def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    done, (fsync, replace) = [], (os.fsync, os.replace)

    def traced_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", path.suffix or "folder", path.is_dir() or path.read_text()))
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        done.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr("os.fsync", traced_fsync)
    monkeypatch.setattr("os.replace", traced_replace)
    write_json(tmp_path / "values.json", [1])
    assert done == [("sync", ".partial", "[\n 1\n]\n"), ("rename", "values.json"), ("sync", "folder", True)]


def test_a_block_that_fails_changes_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyError), atomic_replace(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), atomic_replace(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "part").write_text("half")
        raise KeyError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with atomic_replace(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "part").write_text("a part")
        assert not (tmp_path / "folder").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "part"]


def test_two_that_write_the_same_file_do_not_meet(tmp_path):
    with atomic_replace(tmp_path / "file") as one, atomic_replace(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "one")]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "values.json"
    write_file(file, "1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="values.json: No space left"):
        write_file(file, "2")
    assert read_json(file) == 1 and list(tmp_path.iterdir()) == [file]


def test_nothing_else_renames():
    for file in (REPOSITORY / "pipeline").rglob("*.py"):
        if file != REPOSITORY / "pipeline" / "files.py":
            assert not re.search(r"\bos\.(replace|rename)\b|\.rename\(", file.read_text()), file
