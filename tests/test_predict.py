"""jobs/predict.py on folders of valid and broken images, with the demo's CLIP."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from PIL import Image

import pipeline
from jobs import predict
from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, MmapConfig
from pipeline.methods.adapter_file import TrainedAdapter, save_adapter
from pipeline.methods.mmap import GroupMmap, MmapShape
from pipeline.prediction.image_prediction import COLUMNS
from pipeline.prediction.output_files import output_format


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
    assert all(row["label"] in ("one", "two") and 0.5 <= float(row["probability"]) <= 1 for row in rows[:2])
    assert {row["task"] for row in rows} == {"ink"}
    assert rows[2]["label"] == "" and rows[2]["error"]
    messages = capsys.readouterr().err
    assert "1 of 3 images are broken" in messages and "1 HEIC (.heic)" in messages and "1 .txt" in messages

    assert call(monkeypatch, adapter_file, folder / "a.png", "--task", "neon") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_errors_are_reported(adapter_file, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert call(monkeypatch, adapter_file, tmp_path, "--task", "inc") == 2
    assert "unknown --task inc; did you mean ink?" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path / "absent.safetensors", tmp_path / "absent.png") == 2
    assert f"{tmp_path / 'absent.png'}: no such file" in capsys.readouterr().err
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
        (["--cluster.address", "auto"], "--cluster.address has an effect on Parquet output only"),
        (["--cluster.gpus_per_worker", "0.5"], "--cluster.gpus_per_worker has an effect on Parquet output only"),
        (["--threshold", "2"], "threshold=2: must be"),
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
    assert rows[0]["label"] and rows[1] == {**rows[0], "label": ""}
    assert 0.5 <= float(rows[2]["probability"]) < 0.51


def read_rows(file, suffix: str) -> list[dict]:
    if suffix == "jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if suffix == "json":
        return json.loads(file.read_text())
    return list(csv.DictReader(file.open(newline=""), delimiter="\t" if suffix == "tsv" else ","))


def test_all_outputs_have_the_same_form_and_are_never_overwritten(adapter_file, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    job = (adapter_file, tmp_path / "a.png", tmp_path / "b.jpg")  # of all tasks
    expected = pipeline.load(adapter_file).predict([tmp_path / "a.png", tmp_path / "b.jpg"])
    assert call(monkeypatch, *job, "--output", "-") == 1
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines()[0] == "path,task,label,probability,error" and "prediction of ink, neon" in stderr
    for suffix in ("csv", "TSV", "json", "jsonl"):
        file = tmp_path / "new" / "folder" / f"x.{suffix}"
        assert call(monkeypatch, *job, "--output", file) == 1
        content, (row, broken) = file.read_bytes(), read_rows(file, suffix.lower())
        assert list(row)[:5] == list(COLUMNS) and (row["path"], row["label"]) == (expected[0].path, expected[0].label)
        assert row["task"] == expected[0].task and not broken["label"] and broken["error"] == expected[1].error
        assert float(row["probability"]) == pytest.approx(expected[0].probability, abs=1e-4)
        if "json" in suffix:
            assert row == expected[0].to_dict() and broken == expected[1].to_dict()
        capsys.readouterr()
        assert call(monkeypatch, *job, "--output", file) == 2 and file.read_bytes() == content
        assert f"--output {file} already exists; use another name, or remove it" in capsys.readouterr().err
    assert [path.name for path in file.parent.iterdir() if "partial" in path.name] == []


def test_outputs_that_cannot_be_are_refused_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    for output, message in [
        ("x.xlsx", "unknown suffix .xlsx; use .csv, .tsv, .json, .jsonl or .parquet"),
        ("s3://bucket/x.csv", "a bucket takes Parquet only; leave out the suffix .csv"),
        (tmp_path / "full", "already exists"),
        (tmp_path / "full" / "a.txt" / "x.csv", "cannot write --output"),
        (tmp_path / "full" / "a.txt" / "x.parquet", "cannot write --output"),
    ]:
        assert call(monkeypatch, tmp_path / "absent.safetensors", "a.png", "--output", output) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "output", ["out", "a.b/out", "x.csv/", "x.PARQUET", "s3://my.bucket", "s3://bucket/a.b/out?region=x.y"]
)
def test_outputs_without_a_suffix_are_folders_of_parquet(output):
    assert output_format(output) == "parquet"


def test_inputs_of_parquet_output_are_named(adapter_file, monkeypatch, capsys):
    for name in ("s3://bucket/a.png", "photos.parquet"):
        assert call(monkeypatch, adapter_file, name) == 2
        assert f"{name} is an input for Parquet output only: add --output" in capsys.readouterr().err
