"""The forms of images that `TrainedModel.predict` takes, and those that services take: bytes and base64 text only."""

from __future__ import annotations

import base64
import io
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from PIL import Image

import pipeline
from pipeline.data.images import BrokenImage
from pipeline.errors import UserError
from pipeline.prediction import encoded_images
from pipeline.prediction.encoded_images import decode_base64, decode_sent_image
from pipeline.prediction.image_prediction import COLUMNS
from pipeline.prediction.mlflow_model import _load_pyfunc, saved_mlflow_model

RGB = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


def png(array: np.ndarray = RGB) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def model(adapter_file):
    return pipeline.load(adapter_file)


def test_one_image_of_any_form_gives_one_prediction(model, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    expected = model.predict([path], "ink")[0]
    assert expected.path == str(path)
    alpha = np.dstack([RGB, GRAY])
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in (RGB, RGB / 255, alpha)]
    arrays = [RGB, alpha, RGB / 255, (RGB / 255).astype(np.float32), np.asfortranarray(RGB)]
    encoded = [png(), bytearray(png()), memoryview(png()), io.BytesIO(png()), open(path, "rb")]
    data_url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for image in (path, str(path), np.str_(path), *encoded, data_url, Image.open(path), *arrays, *tensors):
        prediction = model.predict(image, "ink")
        assert prediction.label == expected.label and prediction.error is None, type(image)
        assert prediction.probabilities == pytest.approx(expected.probabilities, abs=1e-6), type(image)
        assert prediction.path == (str(path) if str(image) == str(path) else None)
    gray = model.predict(png(GRAY), "ink").probabilities
    for image in (GRAY, GRAY[..., None], GRAY / 255, torch.tensor(GRAY), torch.tensor(GRAY)[None]):
        assert model.predict(image, "ink").probabilities == pytest.approx(gray, abs=1e-6)


def test_lists_and_folders_give_lists(model, tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.jpg", "._a.png"):
        (tmp_path / name).write_bytes(png())
    paths = [str(tmp_path / "a.png"), str(tmp_path / "deep" / "b.jpg")]
    for images in (paths, tuple(paths), iter(paths), pd.Series(paths), np.array(paths)):
        assert [prediction.path for prediction in model.predict(images, "ink")] == paths
    assert [prediction.path for prediction in model.predict(tmp_path, "ink")] == paths
    assert f"{tmp_path}: 1 file not read: 1 hidden" in caplog.text
    for images in (None, 3, {"a.png": 1}, pd.DataFrame({"path": paths})):
        with pytest.raises(TypeError, match="must be an image or a list of images, not"):
            model.predict(images)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no images in .*none"):
        model.predict([tmp_path / "none"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            RGB.transpose(2, 0, 1),
            r"ndarray of shape \(3, 40, 30\) has its channels first: use array.transpose\(1, 2, 0\)",
        ),
        (torch.tensor(RGB), r"Tensor of shape \(40, 30, 3\) has its channels last: use tensor.permute\(2, 0, 1\)"),
        (RGB[None], r"\(1, 40, 30, 3\) is a batch of images: use list\(images\)"),
        (np.zeros((0, 3, 3), np.uint8), r"\(0, 3, 3\) is no image; expected \(H, W\)"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\) is no image"),
        (np.zeros(8, np.uint8), r"\(8,\) is no image"),
        (RGB.astype(float), "floats from 0 to 255; expected 0 to 1"),
        (RGB / 255 - 0.5, "floats from -0.5"),
        (np.full((4, 4), np.nan), "floats from nan"),
        (RGB.astype(np.int64), "ndarray of int64; expected uint8, or floats"),
        (RGB > 9, "ndarray of bool; expected uint8"),
        (torch.tensor(RGB).permute(2, 0, 1).int(), "Tensor of int32; expected uint8"),
        (io.StringIO("x"), "opened as text; open it in binary mode"),
        (Image.new("RGB", (0, 5)), "image of 0 x 5 pixels"),
        ("s3://bucket/a.png", "an address with s3://; expected a path, http:// or https://"),
        ("data:image/svg+xml,<svg/>", "a data URL that is not base64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_arrays_and_addresses_are_refused_by_name(model, image, message):
    assert re.search(message, model.predict([image], "ink")[0].error)


def test_predictions_are_shown_in_short_and_make_tables(model, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    valid, broken = model.predict([tmp_path / "a.png", b"no image"])
    assert repr(valid).startswith(
        f"ImagePrediction(path='{tmp_path}/a.png', task='{valid.task}', label='{valid.label}', "
    )
    assert len(repr(valid)) < len(str(tmp_path)) + 120 and repr(broken).startswith(
        "ImagePrediction(label=None, error='not"
    )
    for table in (pd.DataFrame([valid, broken]), pd.DataFrame([valid.to_dict(), broken.to_dict()])):
        assert list(table)[:5] == list(COLUMNS) and list(table["label"].isna()) == [False, True]


# URLs


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        pages = {
            "/a.png": (200, {}, png()),
            "/a%20%C3%BC.png?x=1": (200, {}, png()),
            "/moved": (302, {"Location": "/a.png"}, b""),
            "/file": (302, {"Location": "file:///etc/hostname"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/page": (200, {"Content-Type": "text/html"}, b"<html>"),
            "/large": (200, {}, bytes(3000)),
        }
        status, headers, body = pages.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in {"Content-Type": "image/png", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_read_within_limits(model, server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    expected = model.predict(png(), "ink")
    for url in ("/a.png", "/moved", "/a \u00fc.png?x=1"):
        prediction = model.predict(server + url, "ink")
        assert (prediction.path, prediction.label, prediction.error) == (server + url, expected.label, None)
    monkeypatch.setattr(encoded_images, "MAX_URL_BYTES", 2999)
    errors = {
        "/absent": "HTTP status 404",
        "/page": "a web page (text/html), no image",
        "/large": "more than 2,999 bytes",
        "/file": "not allowed",
        "/loop": "infinite loop",
    }
    predictions = model.predict(
        [server + url for url in errors] + ["http://127.0.0.1:1/x.png", "http://[x/y.png"], "ink"
    )
    for prediction, error in zip(predictions, [*errors.values(), "cannot be downloaded", "cannot be downloaded"]):
        assert prediction.label is None and error in prediction.error


# Services


def test_every_common_spelling_of_base64_is_decoded():
    data = bytes(range(256)) * 3 + b"x"
    plain = base64.b64encode(data).decode()
    for text in (
        *(plain, plain.rstrip("="), base64.urlsafe_b64encode(data).decode(), base64.encodebytes(data).decode()),
        *(f"data:image/png;base64,{plain}", f"data:;base64,{plain.replace('+', '%2B')}", f" {plain}\r\n"),
    ):
        assert decode_base64(text) == data
    for text in ("a", "a.png", "AA=A", "data:image/png,AAAA", "\u00fc"):
        with pytest.raises(BrokenImage):
            decode_base64(text)


NO_IMAGES = [
    "photos/a.png",
    "/etc/passwd",
    "C:\\a.png",
    "file:///etc/passwd",
    "s3://bucket/a",
    "http://127.0.0.1/a.png",
]
NO_IMAGES += [None, 7, ["a"], {"b64": "AAAA"}, "", float("nan"), pd.NA]


def test_requests_never_name_files_or_addresses(tmp_path):
    for value in ("file:///etc/passwd", "s3://bucket/a", "HTTP://127.0.0.1/a.png"):
        with pytest.raises(BrokenImage, match="a service reads no addresses: send the image itself as base64 text"):
            decode_sent_image(value)
    with pytest.raises(BrokenImage, match="not base64: .*; a service reads no files or addresses"):
        decode_sent_image("photos/a.png")
    for value in (None, float("nan"), pd.NA, np.float32("nan")):
        with pytest.raises(BrokenImage, match="no image but null; expected base64 text"):
            decode_sent_image(value)


@pytest.fixture(scope="module")
def mlflow_model(adapter_file):
    with saved_mlflow_model(adapter_file) as folder:
        yield mlflow.pyfunc.load_model(str(folder))


def test_a_bad_row_of_an_mlflow_table_gets_an_error_and_the_others_a_prediction(model, mlflow_model, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    images = [png(), *NO_IMAGES, str(tmp_path / "a.png"), base64.b64encode(png()).decode()]
    table = mlflow_model.predict(pd.DataFrame({"image": images, "task": "ink"}))
    assert [error is None for error in table["error"]] == [True, *[False] * (len(images) - 2), True]
    assert list(table)[:5] == list(COLUMNS) and set(table["task"]) == {"ink"}
    expected = model.predict(png(), "ink")
    assert table["label"][0] == expected.label and table["label"][len(images) - 1] == expected.label
    assert table["error"][7] == "no image but null; expected base64 text" and table["label"][7] is None

    tasks = ["ink", None, float("nan"), pd.NA, np.str_("neon"), 7, ["ink"], "", "oil", True]
    table = mlflow_model.predict(pd.DataFrame({"image": [png()] * len(tasks), "task": pd.Series(tasks, dtype=object)}))
    assert [bool(error) for error in table["error"]] == [False] * 5 + [True] * 5
    assert "unknown task 7; the model has the tasks ink, neon, pairs" in table["error"][5]
    assert [len(by_task) for by_task in table["predictions_by_task"]] == [0, 3, 3, 3] + [0] * 6
    for column in (pd.Categorical(["ink"]), pd.array(["ink"], dtype="string"), np.array(["ink"])):
        assert mlflow_model.predict(pd.DataFrame({"image": [png()], "task": column}))["task"][0] == "ink"


def test_a_request_to_mlflow_server_is_limited_and_its_errors_tell_nothing_of_the_server(
    mlflow_model, monkeypatch, adapter_file, tmp_path
):
    with pytest.raises(MlflowException, match="lists of different lengths"):
        mlflow_model.predict(pd.DataFrame({"image": [[png(), png()]], "task": [["ink"]]}))
    assert len(mlflow_model.predict(pd.DataFrame({"image": [b"no image"] * 65}))) == 65  # a program of the user's own
    monkeypatch.setenv("__pyfunc_model_path__", "as MLflow's server does")
    shutil.copyfile(adapter_file, tmp_path / "adapter.safetensors")
    served = _load_pyfunc(str(tmp_path))
    with pytest.raises(MlflowException, match="65 images exceed the limit of 64"):
        served.predict(pd.DataFrame({"image": [b"no image"] * 65}))
    monkeypatch.setattr("pipeline.prediction.mlflow_model.MAX_SERVED_PIXELS", 100)
    with pytest.raises(MlflowException, match="send fewer or smaller images"):
        served.predict(pd.DataFrame({"image": [png()]}))
    monkeypatch.setattr(served, "_predict_table", lambda table: Path("/srv/models/secret").read_bytes())
    with pytest.raises(MlflowException) as error:
        served.predict(pd.DataFrame({"image": [png()]}))
    assert "/srv" not in error.value.serialize_as_json() and error.value.get_http_status_code() == 500


def test_mlflow_server_decodes_base64_in_every_format(model, mlflow_model):
    text, schema = base64.b64encode(png()).decode().rstrip("="), mlflow_model.metadata.get_input_schema()
    label = model.predict(png(), "ink").label
    for request in (
        {"dataframe_records": [{"image": text, "task": "ink"}, {"image": None, "task": "ink"}]},
        {"dataframe_split": {"columns": ["image", "task"], "data": [[f"data:image/png;base64,{text}", "ink"]]}},
        {"inputs": {"image": [text, text], "task": ["ink", "ink"]}},
        {"inputs": [{"image": text, "task": "ink"}]},
        {"instances": [{"image": text, "task": "ink"}]},
    ):
        table = mlflow_model.predict(_enforce_schema(infer_and_parse_data(request, schema), schema))
        assert (table["label"][0], table["error"][0]) == (label, None), request
