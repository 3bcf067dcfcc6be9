"""The trained model as an object: inputs, predictions, temperature, threshold, and errors."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from itertools import count

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pipelines import REPOSITORY
from small_adapters import DIGITS, trained

import pipeline
from pipeline.clip.towers import ClipTowers
from pipeline.data.images import evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.adapter_file import load_adapter, save_adapter
from pipeline.prediction.calibration import fit_temperature, negative_log_likelihood
from pipeline.prediction.mlflow_model import saved_mlflow_model
from pipeline.prediction.model import BATCH_SIZE, PREFETCH_BATCHES
from pipeline.serving.mixed_batch import PredictRequest, predict_batch

PREPROCESSING = Preprocessing(32)


def test_importing_the_package_imports_no_torch():
    heavy = "[name for name in ('torch', 'mlflow', 'ray', 'pyarrow') if name in sys.modules]"
    command = [sys.executable, "-c", f"import sys, pipeline; print({heavy})"]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip() == "[]"


def test_probabilities_are_those_of_the_classifier_in_every_form_of_image(adapter_file, digits):
    model = pipeline.load(adapter_file)
    assert model.tasks == ["ink", "neon", "pairs"] and model.labels("pairs") == ["zero", "one"]
    paths = sorted((digits / "ink_left").rglob("*.png"))[: BATCH_SIZE + 3]
    pixels = torch.stack([torch.from_numpy(evaluation_pixels(path.read_bytes(), PREPROCESSING)) for path in paths])
    expected = load_adapter(adapter_file).classifier().probabilities("ink", pixels)
    decoded = [Image.open(path) for path in paths]
    for images in (
        paths,
        list(map(str, paths)),
        [path.read_bytes() for path in paths],
        decoded,
        [np.asarray(image) for image in decoded],
    ):
        predictions = model.predict(images, "ink")
        torch.testing.assert_close(
            torch.tensor([list(p.probabilities.values()) for p in predictions]),
            expected,
            atol=1e-6,
            rtol=1e-5,
        )
        assert [p.label for p in predictions] == [DIGITS[label] for label in expected.argmax(dim=1)]
        assert all(p.probability == max(p.probabilities.values()) and not p.predictions_by_task for p in predictions)
    assert model.predict_pixels(pixels, "ink")[0].label == predictions[0].label
    assert model.predict([], "ink") == []


def test_predictions_and_calibration_beyond_one_batch_are_those_of_one(adapter_file, digits, monkeypatch):
    images = [path.read_bytes() for path in sorted((digits / "ink_left").rglob("*.png"))[::31]]
    images[7:7] = [b"no image"]
    labels = [DIGITS[number % 10] for number in range(len(images))]
    calibration = {"images": [*images[:7], *images[8:]], "labels": [*labels[:7], *labels[8:]], "task": "neon"}
    reference_model = pipeline.load(adapter_file)
    expected, temperature = reference_model.predict(images, "ink"), reference_model.calibrate(**calibration)
    monkeypatch.setattr("pipeline.prediction.model.BATCH_SIZE", 5)
    model = pipeline.load(adapter_file)
    predictions = model.predict(images, "ink")
    assert len(predictions) == len(images) > 10 and predictions[7].error
    for prediction, reference in zip(predictions, expected):
        assert (prediction.label, prediction.error) == (reference.label, reference.error)
        assert prediction.probabilities == pytest.approx(reference.probabilities, abs=1e-6)
    assert model.calibrate(**calibration) == pytest.approx(temperature, rel=1e-4)


def test_an_endless_stream_is_answered_from_as_few_images_as_are_decoded_ahead(adapter_file, digits, monkeypatch):
    monkeypatch.setattr("pipeline.prediction.model.BATCH_SIZE", 5)
    image, taken = next((digits / "ink_left").rglob("*.png")).read_bytes(), count()
    answers = pipeline.load(adapter_file).predict_stream((image for _ in taken), "ink")
    assert all(next(answers).label for _ in range(10))
    assert next(taken) == 5 * (2 + PREFETCH_BATCHES)


def test_probabilities_by_class_do_not_depend_on_the_order_of_the_labels(tmp_path, digits):
    """Compare a task whose classes are in alphabetical order with one of the same classes in another order."""
    paths = [path for name in DIGITS for path in sorted((digits / "ink_left" / "test" / name).iterdir())[:2]]
    images, names = [path.read_bytes() for path in paths], [path.parent.name for path in paths]
    models = {}
    for order, labels in (("sorted", sorted(DIGITS)), ("given", DIGITS)):
        save_adapter(tmp_path / f"{order}.safetensors", trained("mmap", {"ink": labels}))
        models[order] = pipeline.load(tmp_path / f"{order}.safetensors")
    expected = models["sorted"].predict(images, "ink")
    assert models["given"].labels("ink") == DIGITS
    assert sum(prediction.label == name for prediction, name in zip(expected, names)) > 10
    with saved_mlflow_model(tmp_path / "given.safetensors") as folder:
        table = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"image": images, "task": "ink"}))
    pixels = torch.stack([torch.from_numpy(evaluation_pixels(image, PREPROCESSING)) for image in images])
    (served,) = predict_batch([PredictRequest(models["given"], "ink", pixels)], 7)
    records_by_interface = {
        "object": [prediction.to_dict() for prediction in models["given"].predict(images, "ink")],
        "MLflow": table.to_dict("records"),
        "service": [prediction.to_dict() for prediction in served],
    }
    for interface, records in records_by_interface.items():
        for record, reference in zip(records, expected, strict=True):
            assert list(record["probabilities"]) == DIGITS, interface
            assert record["probabilities"] == pytest.approx(reference.probabilities, abs=1e-6), interface
            assert (record["label"], record["probability"]) == (reference.label, pytest.approx(reference.probability))
    temperatures = [model.calibrate(images, [*names[:-1], "one"], "ink") for model in models.values()]
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-3)


def test_images_that_are_not_8_bit_rgb_are_read_as_their_files_are(adapter_file):
    model = pipeline.load(adapter_file)
    wide = Image.fromarray(np.linspace(0, 65535, 40 * 50, dtype=np.uint16).reshape(40, 50))
    for image in (wide, Image.new("P", (40, 50), 3), Image.new("RGBA", (40, 50), (9, 200, 30, 0))):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        (decoded, encoded) = model.predict([image, stream.getvalue()], "ink")
        assert decoded.probabilities == pytest.approx(encoded.probabilities, abs=1e-6)


def test_without_a_task_all_tasks_are_predicted(adapter_file, digits):
    model = pipeline.load(adapter_file)
    images = sorted((digits / "ink_right").rglob("*.png"))[:7]
    for prediction, *single_task in zip(model.predict(images), *(model.predict(images, task) for task in model.tasks)):
        assert list(prediction.predictions_by_task) == model.tasks
        for guess, expected in zip(prediction.predictions_by_task.values(), single_task):
            assert guess.label == expected.label
            assert guess.probability == pytest.approx(expected.probability, abs=1e-6)
        assert prediction.probability == max(guess.probability for guess in prediction.predictions_by_task.values())
        assert prediction.probabilities == prediction.predictions_by_task[prediction.task].probabilities


@pytest.mark.parametrize(
    "method, groups, passes",
    [
        ("mmap", [{"a": ["x", "y"], "b": ["x", "z"]}], 2),
        ("mmap_shared", [{"a": ["x", "y"], "b": ["x", "z"]}, {"c": ["x", "y"]}], 2),
        ("coop", [{"a": ["x", "y"], "b": ["x", "z"]}, {"c": ["x", "y"]}], 1),
        ("clip_adapter", [{"a": ["x", "y"]}, {"c": ["x", "y"]}], 1),
        ("full_finetune", [{"a": ["x", "y"], "b": ["x", "z"]}, {"c": ["x", "y"]}], 2),
    ],
)
def test_tasks_with_the_same_image_features_share_the_image_tower(tmp_path, monkeypatch, method, groups, passes):
    save_adapter(tmp_path / "x.safetensors", trained(method, *groups))
    model = pipeline.load(tmp_path / "x.safetensors")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    expected_by_task = {task: model.predict_pixels(pixels, task) for task in model.tasks}
    calls = []
    encode = ClipTowers.encode_image
    monkeypatch.setattr(ClipTowers, "encode_image", lambda *a, **k: calls.append(1) or encode(*a, **k))
    predictions = model.predict_pixels(pixels)
    assert len(calls) == passes
    for task, expected in expected_by_task.items():
        for prediction, reference in zip(predictions, expected):
            assert prediction.predictions_by_task[task].probabilities == pytest.approx(
                reference.probabilities, abs=1e-6
            )


def test_broken_images_get_an_error_and_the_others_a_prediction(adapter_file, tmp_path):
    model = pipeline.load(adapter_file)
    valid = Image.new("RGB", (40, 30), "white")
    images = [valid, b"no image", tmp_path / "absent.png", valid, None, 3, b"", {"bytes": b""}, "a\0b"]
    predictions = model.predict(images, "ink")
    assert [bool(p.error) for p in predictions] == [False, True, True, False, True, True, True, True, True]
    assert predictions[0].probabilities == pytest.approx(predictions[3].probabilities) and predictions[3].label
    assert (
        "supported format" in predictions[1].error
        and predictions[2].error == "no such file"
        and predictions[4].error.startswith("no image but NoneType; expected a path, a URL")
    )
    assert all(p.label is None and p.probability is None and p.probabilities == {} for p in predictions if p.error)
    assert model.predict([b"no image"])[0].error


def test_below_the_threshold_the_label_is_none(adapter_file, digits):
    images = sorted((digits / "ink_left").rglob("*.png"))[::16]
    references = pipeline.load(adapter_file).predict(images, "ink")
    threshold = sorted(p.probability for p in references)[len(references) // 2]
    predictions = pipeline.load(adapter_file, threshold=threshold).predict(images, "ink")
    assert [p.label for p in predictions] == [p.label if p.probability >= threshold else None for p in references]
    assert [p.probabilities for p in predictions] == [p.probabilities for p in references]


def test_temperature_divides_the_logits(adapter_file, digits):
    image = next((digits / "ink_left").rglob("*.png"))
    (reference,) = pipeline.load(adapter_file).predict([image], "ink")
    (warm,) = pipeline.load(adapter_file, temperature=4).predict([image], "ink")
    (other_task,) = pipeline.load(adapter_file, temperature={"neon": 4.0}).predict([image], "ink")
    expected = np.array(list(reference.probabilities.values())) ** 0.25
    assert list(warm.probabilities.values()) == pytest.approx(expected / expected.sum(), abs=1e-5)
    assert other_task == reference


def test_the_fitted_temperature_is_the_best_of_a_grid():
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (400,))
    logits = 8 * (torch.nn.functional.one_hot(labels, 5) + torch.randn(400, 5))
    fitted = fit_temperature(logits, labels, "ink")
    grid = [math.exp(x / 500) for x in range(-1900, 1900)]
    best = min(grid, key=lambda temperature: negative_log_likelihood(logits, labels, temperature))
    assert fitted == pytest.approx(best, rel=0.003)
    losses = [negative_log_likelihood(logits, labels, t) for t in (fitted, best, 1.0)]
    assert losses[0] <= losses[1] + 1e-9 < losses[2]
    for scaled, message in (
        (torch.nn.functional.one_hot(labels, 5), "all of them are classified"),
        (-logits, "no more probable than other"),
    ):
        with pytest.raises(UserError, match=message):
            fit_temperature(scaled.float(), labels, "ink")


def test_calibration_is_saved_with_the_adapter(adapter_file, digits, tmp_path):
    file = tmp_path / "grouped.safetensors"
    file.write_bytes(adapter_file.read_bytes())
    model = pipeline.load(file, threshold=0.3)
    images = sorted((digits / "ink_right").rglob("*.png"))[::5]
    labels = [path.parent.name for path in images]
    uncalibrated = model.predict(images, "neon")
    temperature = model.calibrate(images, labels, "neon")
    calibrated = model.predict(images, "neon")

    def loss(predictions) -> float:
        return -sum(math.log(prediction.probabilities[label]) for prediction, label in zip(predictions, labels))

    assert temperature != 1 and loss(calibrated) < loss(uncalibrated)
    assert model.save_options() == tmp_path / "grouped.options.json"
    reloaded = pipeline.load(file)
    assert reloaded.temperature("neon") == temperature and reloaded.temperature("ink") == 1
    assert reloaded.options.threshold == 0.3 and reloaded.predict(images, "neon") == calibrated
    assert pipeline.load(file, temperature=1, threshold=0).predict(images, "neon")[0].probability == pytest.approx(
        uncalibrated[0].probability
    )
    (tmp_path / "run" / "adapters").mkdir(parents=True)
    for name in ("grouped.safetensors", "grouped.options.json"):
        (tmp_path / "run" / "adapters" / name).write_bytes((tmp_path / name).read_bytes())
    assert pipeline.load(tmp_path / "run").temperature("neon") == temperature

    options = json.loads((tmp_path / "grouped.options.json").read_text())
    for change, message in [
        ({"adapter_sha256": "0" * 64}, "belongs to another adapter"),
        ({"temperatures": {"neon": 0}}, "is not a valid options file"),
        ({"temperatures": {"oil": 1}}, "'oil'"),
        ({"more": 1}, "is not a valid options file"),
    ]:
        (tmp_path / "grouped.options.json").write_text(json.dumps(options | change))
        with pytest.raises(UserError, match=message):
            pipeline.load(file)


def test_user_errors_are_reported(adapter_file, tmp_path):
    run = tmp_path / "run" / "adapters"
    run.mkdir(parents=True)
    (run / "coop.safetensors").write_bytes(b"")
    for arguments, message in [
        ({"source": tmp_path / "absent.safetensors"}, "does not exist"),
        ({"source": run / "cop.safetensors"}, "does not exist; its folder has coop.safetensors"),
        ({"source": run.parent}, "no adapter in .*run; expected one of its files adapters/coop.safetensors"),
        ({"source": tmp_path}, "no adapter in"),
        ({"source": "nowhere://bucket/x"}, "nowhere://bucket/x is not a storage URI"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": "0.5"}, "threshold='0.5': must be a number"),
        ({"threshold": True}, "threshold=True: must be a number"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "2"}, "temperature.ink='2': must be a number"),
        ({"temperature": {"oil": 2.0}}, "'oil'"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not available"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"pretrained": "/nowhere/clip.pt"}, "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            pipeline.load(**{"source": adapter_file, **arguments})
    model = pipeline.load(adapter_file)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="unknown task 'oil'; the model has the tasks ink, neon, pairs"):
        model.predict([image], "oil")
    with pytest.raises(UserError, match=r"unknown task \['ink'\]; the model has the tasks ink"):
        model.predict([image], ["ink"])
    for images, labels, message in [
        ([image], [], "1 images but 0 labels"),
        ([image], ["eleven"], "unknown label 'eleven'; task 'ink' has the classes"),
        ([b"no image"], ["one"], "calibration image 0 is broken"),
    ]:
        with pytest.raises(UserError, match=message):
            model.calibrate(images, labels, "ink")
