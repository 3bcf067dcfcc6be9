"""jobs/predict.py on folders of valid and broken images, with the demo's CLIP."""

from __future__ import annotations

import csv
import sys

import pytest
from PIL import Image

from jobs import predict
from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, MmapConfig
from pipeline.methods.adapter_file import TrainedAdapter, save_adapter
from pipeline.methods.mmap import GroupMmap, MmapShape


@pytest.fixture
def adapter_file(tmp_path):
    config = Config(
        clip=ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS),
        mmap=MmapConfig(prompt_length=2, source_rows=2),
    )
    towers = load_clip(config.clip)
    group = {"ink": ["one", "two"], "neon": ["one", "two"]}
    module = GroupMmap(MmapShape.of(config.mmap, towers), tuple(group), seed=1)
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, TrainedAdapter("mmap", config, weights_fingerprint(towers), (group,), (module.state_dict(),)))
    return file


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    try:
        return predict.main()
    except SystemExit as end:
        return end.code


def test_every_image_gets_a_row_and_broken_ones_an_error(adapter_file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images" / "deep"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 60), "white").save(folder / "a.png")
    Image.new("L", (10, 10)).save(folder / "b.jpg")
    (folder / "c.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not read")
    for name in ("._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png", "d.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    output = tmp_path / "out.csv"
    status = call(monkeypatch, adapter_file, tmp_path / "images", "--task", "ink", "--output", output)
    rows = list(csv.DictReader(output.open()))
    assert status == 1
    assert [row["path"].rsplit("/")[-1] for row in rows] == ["a.png", "b.jpg", "c.jpg"]
    assert all(row["class"] in ("one", "two") and 0.5 <= float(row["probability"]) <= 1 for row in rows[:2])
    assert rows[2]["class"] == "" and rows[2]["error"]
    messages = capsys.readouterr().err
    assert "1 of 3 images are broken" in messages and "1 HEIC (.heic)" in messages and "1 .txt" in messages

    assert call(monkeypatch, adapter_file, folder / "a.png", "--task", "neon") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_errors_are_reported(adapter_file, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, adapter_file, tmp_path) == 2
    assert "has the tasks ink, neon" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert call(monkeypatch, adapter_file, empty, "--task", "ink") == 2
    assert "no images in" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path / "absent.safetensors", tmp_path, "--task", "ink") == 2
    assert "does not exist" in capsys.readouterr().err


def test_options_of_the_other_output_are_rejected(adapter_file, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    image = (adapter_file, tmp_path / "a.png", "--task", "ink")
    for options, message in [
        (["--device", "cpu", "--output", tmp_path / "out.parquet"], "--device has no effect on Parquet output"),
        (["--cluster.address", "auto"], "--cluster.address has no effect on CSV output"),
        (["--cluster.gpus_per_worker", "0.5"], "--cluster.gpus_per_worker has no effect on CSV output"),
        (["--output", tmp_path / "nowhere" / "out.csv"], f"cannot write --output {tmp_path / 'nowhere' / 'out.csv'}"),
        (["--threshold", "2"], "threshold=2: Input"),
    ]:
        assert call(monkeypatch, *image, *options) == 2
        assert message in capsys.readouterr().err


def test_threshold_and_temperature(adapter_file, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    image = (adapter_file, tmp_path / "a.png", "--task", "ink")
    rows = []
    for options in ([], ["--threshold", "1"], ["--temperature", "1000"]):
        assert call(monkeypatch, *image, *options) == 0
        rows += csv.DictReader(capsys.readouterr().out.splitlines())
    assert rows[0]["class"] and rows[1] == {**rows[0], "class": ""}
    assert 0.5 <= float(rows[2]["probability"]) < 0.51
