"""Batch prediction with Ray Data: folders, Parquet and buckets as input, Parquet as output, broken images."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines import the_run
from servers import S3Server, free_ports

import pipeline
from pipeline.data.images import evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.adapter_file import load_adapter
from pipeline.prediction import batch
from pipeline.prediction.batch import OUTPUT, find_batch_input, predict_batch, progress_lines
from pipeline.prediction.decoding import decode_rows
from pipeline.prediction.options import ModelOptions
from pipeline.runtime.cluster import WorkerResources

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(shared_ray):
    return WorkerResources(1, 0.0)


def run_prediction(file: Path, resources: WorkerResources, inputs, output, task=None, options=None, **kwargs) -> tuple:
    """Return (number of images, number of broken images), and the rows."""
    batch_input = find_batch_input([str(source) for source in inputs])
    arguments = (load_adapter(file), options or ModelOptions(), task, batch_input, str(output), resources)
    counts = predict_batch(*arguments, Preprocessing(32), **kwargs)
    return counts, pq.read_table(output, schema=OUTPUT).to_pylist()


def test_a_folder_with_broken_images_and_odd_names_and_files_beyond_one_chunk(
    adapter_file, digits, cluster, tmp_path, monkeypatch
):
    for name in ("DECODE_BATCH_SIZE", "PREDICT_BATCH_SIZE", "MAX_FILES_PER_TASK", "ROWS_PER_FILE"):
        monkeypatch.setattr(batch, name, 5)
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    valid = sorted((digits / "ink_left").rglob("*.png"))[::4]
    for number, path in enumerate(valid):
        (folder / "deep" / f"{number:03d}.png").write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "cut.png").write_bytes(valid[0].read_bytes()[:200])
    (folder / "line\nfeed.png").write_bytes(valid[0].read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(valid[0].read_bytes())
    os.mkfifo(folder / "pipe.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not looked at")
    paths = list(map(str, sorted((digits / "ink_left").rglob("*.png"))[::20]))
    progress = []
    counts, all_rows = run_prediction(
        adapter_file,
        cluster,
        [folder, *paths],
        tmp_path / "out",
        "ink",
        on_progress=lambda *counts: progress.append(counts),
    )
    total = len(valid) + 6 + len(paths)
    assert counts == (total, 4) and progress[-1] == (total, total) and len(paths) == 20
    assert len(list((tmp_path / "out").iterdir())) > 2
    rows, file_rows = all_rows[: -len(paths)], all_rows[-len(paths) :]
    expected_paths = [f"{folder}/deep/{number:03d}.png" for number in range(len(valid))]
    assert [row["path"] for row in rows][-len(valid) :] == expected_paths
    errors = {row["path"].removeprefix(f"{folder}/"): row["error"] for row in rows if row["error"]}
    assert errors.keys() == {"broken.jpg", "cut.png", "empty.png", "pipe.png"} and errors["pipe.png"] == "no such file"
    assert all(row["label"] is None and row["probability"] is None for row in rows if row["error"])
    assert {"line\\nfeed.png", "\\udcff.png"} < {Path(row["path"]).name for row in rows if not row["error"]}
    expected = pipeline.load(adapter_file).predict(valid, "ink")
    for row, prediction in zip(rows[-len(valid) :], expected):
        assert (row["task"], row["label"], row["error"]) == ("ink", prediction.label, None)
        assert row["probability"] == pytest.approx(prediction.probability, abs=1e-5)
    encoded = [Path(path).read_bytes() for path in paths]
    images = torch.stack([torch.from_numpy(evaluation_pixels(image, Preprocessing(32))) for image in encoded])
    trained = load_adapter(adapter_file)
    probabilities, labels = trained.classifier().probabilities("ink", images).max(dim=1)
    assert [row["path"] for row in file_rows] == paths
    assert [row["label"] for row in file_rows] == [trained.class_names["ink"][label] for label in labels]
    assert [row["probability"] for row in file_rows] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_parquet_with_tasks_in_a_column(adapter_file, digits, cluster, tmp_path):
    images = sorted((digits / "ink_right").rglob("*.png"))[:150]
    tasks = ["ink", "neon", None, "pairs", "oil"] * 30
    table = {"image": [path.read_bytes() for path in images], "task": tasks, "more": range(150)}
    table["image"][7] = b"no image"
    table["image"][8] = None
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table).slice(0, 90), tmp_path / "in" / "a.parquet", row_group_size=40)
    pq.write_table(pa.table(table).slice(90), tmp_path / "in" / "b.parquet")
    options = ModelOptions(threshold=0.2, temperatures={"neon": 2.0})
    counts, rows = run_prediction(adapter_file, cluster, [tmp_path / "in"], tmp_path / "out", "neon", options)
    assert counts == (150, 32)
    model = pipeline.load(adapter_file, threshold=0.2, temperature={"neon": 2.0})
    valid_rows = [number for number, task in enumerate(tasks) if task != "oil" and number not in (7, 8)]
    expected = {}
    for task in ("ink", "neon", "pairs"):
        task_rows = [number for number in valid_rows if (tasks[number] or "neon") == task]
        expected |= zip(task_rows, model.predict([images[number] for number in task_rows], task), strict=True)
    for number, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        assert row["path"] is None and row["task"] == (task or "neon")
        if number in (7, 8) or task == "oil":
            assert row["label"] is None and row["error"]
        else:
            assert row["label"] == expected[number].label
            assert row["probability"] == pytest.approx(expected[number].probability, abs=1e-5)
    assert "unknown task 'oil'; the model has the tasks ink, neon, pairs" in rows[4]["error"]


def test_cells_of_parquet_are_taken_as_they_are():
    """Only an empty cell has the task of the job: 0 and "" are unknown tasks."""
    table = {"image": [b""] * 4, "task": ["", None, "oil", "ink"], "path": ["a", None, "c", "d"]}
    columns = decode_rows(pa.table(table), None, None, ["ink"], Preprocessing(32))
    assert list(columns["task"]) == ["", None, "oil", "ink"] and list(columns["path"]) == ["a", None, "c", "d"]
    assert [error[:8] for error in columns["error"]] == ["unknown ", "no bytes", "unknown ", "no bytes"]
    columns = decode_rows(
        pa.table({"image": [b""] * 2, "task": [0.0, float("nan")]}), None, "ink", ["ink"], Preprocessing(32)
    )
    assert list(columns["task"]) == ["0.0", "ink"] and "unknown task 0.0" in columns["error"][0]


def test_images_of_hugging_face_are_structs(tmp_path):
    """Any column of them; its paths name the rows, unless there is a column of paths."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, "PNG")
    structs = [{"bytes": stream.getvalue(), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    pq.write_table(pa.table({"picture": structs, "label": [0, 1, 2]}), tmp_path / "hub.parquet")
    batch_input = find_batch_input([str(tmp_path / "hub.parquet")])
    assert batch_input.image_column == "picture"
    table = pq.read_table(tmp_path / "hub.parquet")
    columns = decode_rows(table, None, "ink", ["ink"], Preprocessing(32), "picture")
    assert list(columns["path"]) == ["a.png", "b.png", None] and list(columns["error"]) == ["", "no bytes", "no bytes"]
    assert (columns["pixels"][0, 0] == 255).all() and not columns["pixels"][0, 1:].any()
    table = table.append_column("path", [["x", "y", "z"]])
    columns = decode_rows(table, None, "ink", ["ink"], Preprocessing(32), "picture")
    assert list(columns["path"]) == ["x", "y", "z"]
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match="images in different columns, .*picture .*hub.parquet"):
        find_batch_input([str(tmp_path)])
    for columns in ({"image": [{"path": "a.png"}]}, {"image": [[{"bytes": b""}]]}):
        pq.write_table(pa.table(columns), tmp_path / "bytes.parquet")
        with pytest.raises(UserError, match="bytes.parquet has no column of encoded images .*columns are image"):
            find_batch_input([str(tmp_path / "bytes.parquet")])


def test_no_images_make_an_empty_table(adapter_file, cluster, tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    assert run_prediction(adapter_file, cluster, [tmp_path / "none.parquet"], tmp_path / "out", "ink") == ((0, 0), [])


def test_from_a_bucket_to_a_bucket(adapter_file, digits, run_job, tmp_path):
    (port,) = free_ports(1, start=5700)
    server = S3Server(tmp_path, port)
    try:
        from pipeline.buckets import open_bucket

        uri, query = server.uri.split("?")
        filesystem, bucket = open_bucket(server.uri)
        images = sorted((digits / "ink_left").rglob("*.png"))[:5]
        files = {f"runs/x/adapters/{adapter_file.name}": adapter_file.read_bytes()}
        files |= {f"photos/deep/{number}.png": path.read_bytes() for number, path in enumerate(images)}
        files |= dict.fromkeys(
            ("photos/broken.png", "photos/@eaDir/0.png", "photos/._0.png", "photos/x.heic"), b"no image"
        )
        for name, content in files.items():
            filesystem.create_dir(f"{bucket}/{name.rsplit('/', 1)[0]}")
            with filesystem.open_output_stream(f"{bucket}/{name}") as stream:
                stream.write(content)
        expected = pipeline.load(adapter_file).predict(images, "ink")
        for name in ("runs/x", "runs/x/adapters/grouped.safetensors"):
            assert pipeline.load(f"{uri}/{name}?{query}").predict(images, "ink") == expected
        with pytest.raises(UserError, match="is neither an adapter file nor a run directory"):
            pipeline.load(f"{uri}/photos?{query}")
        command_line = (f"{uri}/runs/x?{query}", f"{uri}/photos?{query}", "--output", f"{uri}/out?{query}")
        finished = run_job("predict", *command_line)  # of all tasks
        assert "the most probable prediction of ink, neon, pairs" in finished.output
        assert finished.status == 1 and "1 of 6 images are broken" in finished.output
        assert "3 files not read: 2 hidden, system or temporary, 1 HEIC (.heic)" in finished.output
        rows = pq.read_table(f"{bucket}/out", filesystem=filesystem).to_pylist()
        assert [row["path"].rpartition("/")[2] for row in rows] == ["broken.png", *(f"{n}.png" for n in range(5))]
        best = pipeline.load(adapter_file).predict(images)
        assert [(row["task"], row["label"]) for row in rows] == [(None, None), *((p.task, p.label) for p in best)]
        assert run_job("predict", *command_line).status == 2  # the output exists
    finally:
        server.kill()


def test_user_errors_are_reported(adapter_file, digits, cluster, tmp_path):
    (tmp_path / "both").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "both" / "a.png")
    pq.write_table(pa.table({"picture": ["a.png"]}), tmp_path / "both" / "b.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    for inputs, message in [
        ([tmp_path / "nothing"], "nothing: no such file or folder"),
        ([tmp_path / "both"], "contain both images and .parquet files"),
        ([tmp_path / "both" / "b.parquet"], "has no column of encoded images"),
        ([tmp_path / "bad.parquet"], "as Parquet: "),
        ([tmp_path, "s3://bucket/x"], "are in several locations"),
    ]:
        with pytest.raises(UserError, match=message):
            find_batch_input([str(source) for source in inputs])
    inputs, output = [tmp_path / "both" / "a.png"], tmp_path / "out"
    with pytest.raises(UserError, match="clip.pretrained=/nowhere/clip.pt: no such file"):
        run_prediction(adapter_file, cluster, inputs, output, "ink", ModelOptions(pretrained="/nowhere/clip.pt"))
    damaged = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"image": [os.urandom(3000) for _ in range(100)]}), damaged)
    damaged.write_bytes(damaged.read_bytes()[:2000] + bytes(250_000) + damaged.read_bytes()[252_000:])
    with pytest.raises(UserError, match=r"damaged.parquet is damaged \(.*; copy it again"):
        run_prediction(adapter_file, cluster, [damaged], output, "ink")
    assert not output.exists() and not list(tmp_path.glob("*.partial"))
    output.mkdir()
    (output / "theirs.txt").write_text("")
    with pytest.raises(UserError, match="already exists"):
        run_prediction(adapter_file, cluster, inputs, output, "ink")


def test_progress_is_reported_at_intervals(cluster):
    lines: list[str] = []
    on_progress = progress_lines(lines.append, interval_s=3600)
    for num_done in range(1, 5):
        on_progress(num_done, 4)
    assert len(lines) == 1 and lines[0].startswith("4 of 4 images, ") and lines[0].endswith("2 CPUs on 1 machine")


def test_the_splits_of_a_run_give_its_own_predictions(quick_run, run_job, tmp_path):
    storage, _ = quick_run
    test_splits = (storage / "splits").glob("[!.]*/test")
    finished = run_job("predict", the_run(storage), *test_splits, "--output", tmp_path / "out.parquet")
    assert finished.status == 0, finished.output
    rows = {(row["task"], row["path"]): row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    assert len(rows) == 6 * 360 and "2,160 of 2,160 images" in finished.output
    model = load_adapter(the_run(storage) / "adapters" / "grouped.safetensors")
    groups = [set(group) for group in model.groups]
    compared = 0
    for folder in (storage / "group_trainings").glob("[!.]*"):
        inputs = pipeline_artifact(folder)
        if inputs["method"] == "mmap" and set(inputs["group"]) in groups:
            for expected in pq.read_table(folder / "predictions.parquet").to_pylist():
                row = rows[expected["task"], expected["path"]]
                compared += 1
                assert row["label"] == model.class_names[row["task"]][expected["predicted"]]
                assert row["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    assert compared == 6 * 360


def pipeline_artifact(folder: Path) -> dict:
    from pipeline.files import read_json

    return read_json(folder / "artifact.json")["inputs"]
