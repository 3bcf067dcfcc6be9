"""Exported models: equal to `pipeline.load` for batches of any size, and usable without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import CLASS_NAMES, PREPROCESSING, small_towers, tokenizer
from small_families import FAMILIES, black_box, small_model
from small_methods import SMALL, build_method

import pipeline
from jobs import export
from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.files.source import import_open_clip
from pipeline.clip.load import load_clip
from pipeline.clip.towers import ClipTowers
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.adapter_file import TrainedAdapter, save_adapter
from pipeline.methods.classifier import Classifier
from pipeline.methods.registry import METHODS
from pipeline.prediction import export as exporting
from pipeline.prediction.export import TaskClassifier, trace

TASKS = {"ink": ["one | uno", "two", "three"], "neon": ["four", "five"]}
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
IN_ANOTHER_PROGRAM = """
import json, sys
sys.modules["pipeline"] = sys.modules["open_clip"] = None
import numpy, torch
extra_files = {"metadata.json": ""}
model = torch.export.load(sys.argv[1], extra_files=extra_files).module()
parts = torch.from_numpy(numpy.load(sys.argv[2])).split([1, 4])
outputs = {len(pixels): [output.tolist() for output in model(pixels)] for pixels in parts}
print(json.dumps([json.loads(extra_files["metadata.json"]), outputs]))
"""


def random_pixels(count, size=32):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def small_adapter(method, logit_biases=None, towers=None) -> TrainedAdapter:
    """Return an adapter of two tasks with random parameters, by default for the demo's CLIP."""
    towers = towers or load_clip(SMALL.clip)
    state = build_method(method, towers, TASKS).state_dict()
    return TrainedAdapter.on_towers(towers, method, SMALL, (TASKS,), (state,), logit_biases)


@pytest.fixture
def adapter_file(tmp_path):
    """MmAP, calibrated, with a threshold."""
    file = tmp_path / "mmap.safetensors"
    save_adapter(file, small_adapter("mmap"))
    pipeline.load(file, temperature={"neon": 2.5}, threshold=0.25).save_options()
    return file


@pytest.fixture
def run_export(monkeypatch, capsys):
    """Run the job: (*arguments) → exit status, output on stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        status = 0
        try:
            export.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def assert_equal_outputs(outputs, model, task, pixels):
    """Compare logits and probabilities with those of `pipeline.load`."""
    logits, probabilities = map(torch.as_tensor, outputs)
    torch.testing.assert_close(
        logits, model.classifier.logits([task], pixels)[task] / model.temperature(task), **TOLERANCE
    )
    expected = [list(prediction.probabilities.values()) for prediction in model.predict_pixels(pixels, task)]
    torch.testing.assert_close(probabilities, torch.tensor(expected), **TOLERANCE)


@pytest.fixture(scope="module")
def traced_kinds():
    """Kinds of image towers that were traced: tracing one takes ten times as long as all else in its test."""
    return set()


def kind_of(classifier: TaskClassifier) -> tuple[object, ...]:
    """Return what a trace depends on: prompts, modules and trained parameters of the tower, functions of the method."""
    adaptation = classifier.adaptation
    functions = [adaptation.image_features, *(adaptation.task_logits or ())]
    functions = [function.func if isinstance(function, partial) else function for function in functions]
    return (
        adaptation.vision_prompts is None or adaptation.vision_prompts_propagate,
        adaptation.vision_prompts is None,
        tuple(getattr(function, "__qualname__", repr(function)) for function in functions),
        str(classifier.towers),
        *(name for name, _ in classifier.towers.named_parameters()),
        classifier.logit_bias is None,
    )


@pytest.mark.parametrize(
    "method, logit_biases", [*((method, None) for method in METHODS), ("mmap", {"ink": -1.0, "neon": 2.0})]
)
def test_the_graph_of_every_method_gives_its_logits_for_any_batch(method, logit_biases, traced_kinds):
    towers, _ = small_towers(vision_layers=2, dtype=torch.float32)
    classifier = small_adapter(method, logit_biases, towers).classifier(towers=towers)
    module = TaskClassifier(classifier, "neon", 2.5)
    if (kind := kind_of(module)) not in traced_kinds:
        traced_kinds.add(kind)
        program = trace(module, random_pixels(2, 16))
        assert not [name for name in program.state_dict if "text." in name or "token_embedding" in name]
        module = program.module()
    for count in (1, 5):
        pixels = random_pixels(count, 16)
        logits, probabilities = module(pixels)
        expected = classifier.logits(["neon"], pixels)["neon"] / 2.5
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        expected = expected.sigmoid() if logit_biases else expected.softmax(dim=1)
        torch.testing.assert_close(probabilities, expected, **TOLERANCE)


@pytest.mark.parametrize("family", [*FAMILIES, "black box"])
def test_towers_of_every_family_are_traced_for_any_batch(family):
    torch.manual_seed(0)
    towers = ClipTowers(black_box() if family == "black box" else small_model(family), tokenizer(), PREPROCESSING)
    prompts = torch.randn(1, 2, 3, towers.vision_width, dtype=torch.float64) if towers.takes_image_prompts else None
    tokens = class_tokens(towers.tokenizer, ["a photo of a {}."], [CLASS_NAMES])
    classifier = Classifier(towers, [(["a"], tokens, Adaptation(vision_prompts=prompts))], "float32")
    size = towers.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    program = trace(TaskClassifier(classifier, "a", 1.0), random_pixels(2, size))
    module = program.module()
    for count in (1, 5):
        pixels = random_pixels(count, size)
        torch.testing.assert_close(module(pixels)[0], classifier.logits(["a"], pixels)["a"])


def test_onnx_runtime_gives_the_probabilities_of_the_model(adapter_file, run_export, tmp_path):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    file = tmp_path / "new folder" / "neon.onnx"
    status, output, messages = run_export(adapter_file, "--task", "neon", "--output", file)
    assert (status, output) == (0, f"{file}\n"), messages
    assert [path.name for path in file.parent.iterdir()] == ["neon.onnx"]
    onnx.checker.check_model(file, full_check=True)
    session, model = onnxruntime.InferenceSession(file), pipeline.load(adapter_file, precision="float32")
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("pixels", "tensor(uint8)", ["batch", 3, 32, 32])
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        (name, ["batch", 2]) for name in ("logits", "probabilities")
    ]
    for count in (1, 2, 7):
        pixels = random_pixels(count)
        assert_equal_outputs(session.run(None, {"pixels": pixels.numpy()}), model, "neon", pixels)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["task"] == "neon" and metadata["clip"] == SMALL.clip.model and metadata["method"] == "mmap"
    assert json.loads(metadata["classes"]) == ["four", "five"]
    assert json.loads(metadata["preprocessing"])["image_size"] == 32
    assert (json.loads(metadata["temperature"]), json.loads(metadata["threshold"])) == (2.5, 0.25)
    assert b"torch/" not in file.read_bytes(), "names files of the machine"


def test_a_torch_export_is_used_without_this_package(adapter_file, run_export, tmp_path):
    file, pixels = tmp_path / "ink.pt2", random_pixels(5)
    assert run_export(adapter_file, "--task", "ink", "--temperature", "3", "--output", file)[0] == 0
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    command = [sys.executable, "-c", IN_ANOTHER_PROGRAM, str(file), str(tmp_path / "pixels.npy")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    metadata, outputs = json.loads(process.stdout)
    assert (metadata["classes"], metadata["temperature"]) == (["one", "two", "three"], 3.0)
    model = pipeline.load(adapter_file, temperature=3, precision="float32")
    for part in pixels.split([1, 4]):
        assert_equal_outputs(outputs[str(len(part))], model, "ink", part)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.exports_weights])
def test_open_clip_alone_loads_merged_weights(method, run_export, tmp_path, monkeypatch):
    open_clip = import_open_clip()
    save_adapter(tmp_path / "adapter.safetensors", small_adapter(method))
    folder = tmp_path / "merged"
    status, _, messages = run_export(tmp_path / "adapter.safetensors", "--output", f"{folder}/")
    assert status == 0, messages
    values = json.loads((folder / "open_clip_config.json").read_text())
    assert values["tasks"]["neon"] == {"classes": TASKS["neon"], "template": SMALL.clip.template}
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    # As by the name of a model and a file.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.json").write_text(json.dumps(values["model_cfg"]))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path / "configs")
    same_model = open_clip.create_model("digits", pretrained=str(folder / "open_clip_model.safetensors"))
    assert all(torch.equal(value, same_model.state_dict()[name]) for name, value in model.state_dict().items())

    loaded = pipeline.load(tmp_path / "adapter.safetensors", precision="float32")
    photo = Image.fromarray(random_pixels(1, 50)[0].permute(1, 2, 0).numpy())
    unit = partial(torch.nn.functional.normalize, dim=-1)
    with torch.no_grad():
        texts = [[SMALL.clip.template.format(name) for name in names.split(" | ")] for names in TASKS["ink"]]
        z = torch.stack([unit(model.encode_text(open_clip.tokenize(text))).mean(0) for text in texts])
        image = model.encode_image(preprocess(photo)[None], normalize=True)
        logits = model.logit_scale.exp() * image @ unit(z).T
    expected = list(loaded.predict(photo, "ink").probabilities.values())
    torch.testing.assert_close(logits.softmax(dim=1)[0], torch.tensor(expected), **TOLERANCE)


def test_files_of_tasks_with_several_labels_have_their_threshold_and_bias(run_export, tmp_path):
    for method in ("mmap", "clip_lora"):
        save_adapter(tmp_path / f"{method}.safetensors", small_adapter(method, {"ink": -1.0, "neon": 2.0}))
    file, folder = tmp_path / "neon.pt2", tmp_path / "merged"
    assert run_export(tmp_path / "mmap.safetensors", "--task", "neon", "--output", file)[0] == 0
    extra_files = {exporting.METADATA_FILE: ""}
    torch.export.load(file, extra_files=extra_files)
    metadata = json.loads(extra_files[exporting.METADATA_FILE])
    assert metadata["multi_label"] and metadata["threshold"] == 0.5
    assert run_export(tmp_path / "clip_lora.safetensors", "--output", folder)[0] == 0
    tasks = json.loads((folder / "open_clip_config.json").read_text())["tasks"]
    assert {name: task["logit_bias"] for name, task in tasks.items()} == {"ink": -1.0, "neon": 2.0}


def test_weights_of_more_than_2_gb_are_a_second_file(adapter_file, run_export, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    file = tmp_path / "exported" / "ink.onnx"
    assert run_export(adapter_file, "--task", "ink", "--output", file)[0] == 0
    assert sorted(path.name for path in file.parent.iterdir()) == ["ink.onnx", "ink.onnx.data"]
    pixels = random_pixels(3)
    outputs = onnxruntime.InferenceSession(file).run(None, {"pixels": pixels.numpy()})
    assert_equal_outputs(outputs, pipeline.load(adapter_file, precision="float32"), "ink", pixels)


def test_a_file_with_other_probabilities_is_not_written(adapter_file, run_export, tmp_path, monkeypatch):
    read = exporting.run_torch
    monkeypatch.setattr(exporting, "run_torch", lambda *arguments: [output + 1e-3 for output in read(*arguments)])
    status, _, messages = run_export(adapter_file, "--task", "ink", "--output", tmp_path / "ink.pt2")
    assert status == 2 and "differ from the model's by up to 0.001" in messages
    assert not [path for path in tmp_path.iterdir() if "ink" in path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.tflite"], "unknown suffix .tflite; use .onnx, .pt2, or a folder"),
        (["--output", "s3://bucket/x.onnx"], "give a local path"),
        (["--output", "folder", "--temperature", "2"], "--temperature has no effect"),
        (["--output", "folder"], "cannot be merged into the weights of CLIP (only BitFit, full fine-tuning, CLIP-LoRA"),
        (["--output", "existing.pt2", "--task", "ink"], "existing.pt2 already exists"),
        (["--output", "x.pt2"], "has the tasks ink, neon"),
        (["--output", "x.pt2", "--task", "inc"], "unknown --task inc; did you mean ink?"),
        (
            ["--output", "x.onnx", "--task", "ink"],
            "needs onnxscript, which is not installed:\npip install 'mmap-clip[export]'",
        ),
    ],
    ids=["suffix", "bucket", "no effect", "not mergeable", "exists", "no task", "unknown task", "no package"],
)
def test_errors_are_reported_before_clip_is_loaded(adapter_file, run_export, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing.pt2").touch()
    monkeypatch.setattr(exporting, "TrainedModel", None)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    status, _, messages = run_export(adapter_file, *arguments)
    assert status == 2 and message in messages
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "existing.pt2",
        "mmap.options.json",
        "mmap.safetensors",
    ]
