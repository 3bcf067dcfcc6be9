"""Artefacts: whole or not there, found by what they were made from."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.storage import Artefact, read_json, write_atomically


def make(artefact: Artefact, text: str = "content") -> None:
    folder = artefact.start()
    (folder / "part").mkdir(exist_ok=True)
    (folder / "part" / "file.txt").write_text(text)
    artefact.checkpoints.mkdir()
    (artefact.checkpoints / "checkpoint.pt").write_text("scratch")
    (folder / "part" / "file.txt.partial").write_text("half of it")
    artefact.finish(1.5)


def test_an_artefact_appears_whole(tmp_path):
    artefact = Artefact(tmp_path, "splits", {"seed": 1, "task": "Real World"})
    assert not artefact.finished()
    make(artefact)
    assert artefact.finished() and not artefact.building.exists()
    manifest = artefact.manifest()
    assert manifest["files"] == {"part/file.txt": 7}
    assert manifest["seconds"] == 1.5 and manifest["made_from"] == {"seed": 1, "task": "Real World"}
    assert not Artefact(tmp_path, "splits", {"seed": 2, "task": "Real World"}).finished()
    assert Artefact(tmp_path, "splits", {"task": "Real World", "seed": 1}).key == artefact.key


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_damaged_artefact_is_moved_aside_and_told_of(tmp_path, caplog, damage):
    artefact = Artefact(tmp_path, "splits", {"seed": 1})
    make(artefact)
    file = artefact.folder / "part" / "file.txt"
    file.unlink() if damage == "lost" else file.write_text("cut")
    assert not artefact.finished()
    assert "part/file.txt" in caplog.text
    assert len(list((tmp_path / "splits").glob(".damaged-*"))) == 1
    make(artefact)
    assert artefact.finished()


def test_the_slower_of_two_makers_gives_way(tmp_path):
    artefact = Artefact(tmp_path, "splits", {"seed": 1})
    make(artefact, "first")
    make(artefact, "other")
    assert (artefact.folder / "part" / "file.txt").read_text() == "first"
    assert not artefact.building.exists()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "values.json"
    write_atomically(file, "1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="values.json: No space left"):
        write_atomically(file, "2")
    assert read_json(file) == 1 and list(tmp_path.iterdir()) == [file]
