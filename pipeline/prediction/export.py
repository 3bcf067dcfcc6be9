"""Export of one task of a trained model to a file that runs without this package: ONNX, or torch.export.

The graph takes preprocessed pixels and has the rest of the prediction: standardization, the image tower with its
prompts or trained weights, the text features of the task's classes as constants, logits over the task's temperature,
and softmax, or sigmoid where images may have several labels. Its batch has any size, its precision is float32.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pipeline.clip.files.source import OPEN_CLIP_CONFIG
from pipeline.clip.load import load_open_clip
from pipeline.clip.towers import ClipTowers
from pipeline.errors import UserError
from pipeline.files import PARTIAL_SUFFIX, atomic_write, rename_durably, sync, write_errors
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.methods.classifier import Classifier
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import ModelOptions

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUTS = "pixels", ("logits", "probabilities")
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
METADATA_FILE = "metadata.json"
"""Extra file of a `.pt2` file."""
MAX_DIFFERENCE = 1e-4
"""Of the probabilities, or normalized features, of what is written from the model's. Rounding gives a hundredth."""
_SAMPLE_SIZE = 2
"""Of the batch that is traced; torch.export would take a batch of 1 for a constant."""


class TaskClassifier(nn.Module):
    """One task of a classifier, with its text features as a constant.

    Args:
        temperature: softmax temperature of the task.
    """

    text_features: torch.Tensor

    def __init__(self, classifier: Classifier, task: str, temperature: float):
        super().__init__()
        adaptation = classifier.adaptation(task)
        self.towers: ClipTowers = (adaptation.towers or classifier.towers).without_text()
        self.adaptation = replace(adaptation, towers=self.towers)
        self.temperature, self.logit_bias = temperature, classifier.logit_biases.get(task)
        self.register_buffer("text_features", classifier.text_features(task).clone())
        self.eval()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits over the temperature and probabilities, both (N, C), of uint8 pixels (N, 3, S, S)."""
        images = self.towers.normalize_pixels(pixels)
        features = self.adaptation.encode_image(self.towers, images, [images.shape[0]])
        logits = self.adaptation.logits(self.towers, features, self.text_features)
        if self.logit_bias is None:
            logits = logits / self.temperature
            return logits, logits.softmax(dim=1)
        logits = (logits + self.logit_bias) / self.temperature
        return logits, logits.sigmoid()


def check_onnx_packages() -> None:
    """Raises: UserError: a package that the export to ONNX needs is not installed."""
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"the export to ONNX needs {', '.join(missing)}, which is not installed:\npip install 'mmap-clip[export]'"
        )


def export_task(adapter: TrainedAdapter, options: ModelOptions, task: str, file: Path) -> float:
    """Write one task of a model as a new file; it appears when it gives the model's probabilities.

    Args:
        options: as of `TrainedModel`; the precision is float32 in any case.
        file: with the suffix .onnx or .pt2.

    Returns:
        The largest difference between probabilities of the file and of the model, for random images.

    Raises:
        UserError: as `TrainedModel`; the file cannot be written, or its probabilities are others.
    """
    model = TrainedModel(adapter, options.updated(precision="float32"), "cpu")
    pixels = _random_pixels(model.preprocessing.image_size)
    logits = model.classifier.logits([task], pixels)[task] / model.temperature(task)
    expected = model.classifier.to_probabilities(task, logits)
    program = trace(TaskClassifier(model.classifier, task, model.temperature(task)), pixels[:_SAMPLE_SIZE])
    write, run = (write_onnx, run_onnx) if file.suffix == ".onnx" else (write_torch, run_torch)
    # In a folder of its own: the weights of an ONNX file of more than 2 GB are a second file, which the first names.
    with write_errors(file), TemporaryDirectory(PARTIAL_SUFFIX, f".{file.name}.", file.parent) as temporary:
        folder = Path(temporary)
        write(program, _metadata(adapter, model, task), folder / file.name)
        difference = (run(folder / file.name, pixels)[1] - expected).abs().max().item()
        _check_difference(file.name, "probabilities", difference)
        for part in sorted(folder.iterdir(), reverse=True):  # model.onnx.data before model.onnx
            sync(part)
            rename_durably(part, file.parent / part.name)
    return difference


def export_open_clip(adapter: TrainedAdapter, options: ModelOptions, task: str, folder: Path) -> float:
    """Write the CLIP of a task with the trained weights merged, as a new folder for open_clip: `local-dir:FOLDER`.

    Args:
        adapter: of a method that is `Method.exports_weights`.

    Returns:
        The largest difference between normalized image features of open_clip's model and of the adapted one, for
        random images.

    Raises:
        UserError: as `TrainedModel`; the folder cannot be written, or its features are others.
    """
    group = adapter.select_group(task)
    classifier = group.classifier("cpu", options.pretrained, precision="float32")
    adaptation = classifier.adaptation(task)
    assert adaptation.towers
    model, model_config = load_open_clip(adapter.config.clip.with_weights(options.pretrained))
    state = model.state_dict()
    for name, value in adaptation.towers.merged_state().items():
        name = name if name in state else name.removeprefix("text.")  # CLIP has no module of its own for the text tower
        if name in state:
            state[name] = value.detach().float().contiguous()
    model.load_state_dict(state)
    model.eval()
    images = classifier.towers.normalize_pixels(_random_pixels(classifier.towers.preprocessing.image_size))
    with torch.no_grad():
        features = adaptation.encode_image(classifier.towers, images, [len(images)])
        merged_features = cast(Any, model).encode_image(images)
    difference = float((F.normalize(features, dim=-1) - F.normalize(merged_features, dim=-1)).abs().max())
    _check_difference(folder.name, "image features", difference)
    preprocessing = asdict(classifier.towers.preprocessing)
    preprocess_config = {"size": preprocessing.pop("image_size"), **preprocessing}
    del preprocess_config["jpeg_draft"]  # unknown to open_clip
    with atomic_write(folder) as partial:
        partial.mkdir()
        save_file({name: value.clone() for name, value in model.state_dict().items()}, partial / OPEN_CLIP_WEIGHTS)
        tasks: dict[str, dict[str, Any]] = {
            name: {"classes": class_names, "template": group.config.clip.template_for(name)}
            for name, class_names in group.class_names.items()
        }
        for name, bias in group.logit_biases.items():
            tasks[name]["logit_bias"] = bias  # open_clip's own is one for all tasks
        config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config, "tasks": tasks}
        (partial / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2))
    return difference


def trace(module: nn.Module, sample: torch.Tensor) -> torch.export.ExportedProgram:
    """Trace a module for batches of any size."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants that require a gradient
        module(sample)  # towers of unknown layers measure their activations once
        program = torch.export.export(module, (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_onnx(program: torch.export.ExportedProgram, metadata: dict[str, Any], file: Path) -> None:
    """Write an ONNX file, and one of its weights if they exceed 2 GB; metadata that is not text is JSON."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of each constant that it leaves as it is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(program, input_names=[INPUT], output_names=OUTPUTS, verbose=False)
    assert onnx_program
    graph: Any = onnx_program.model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.shape = type(value.shape)(["batch", *value.shape.dims[1:]])
    for node in graph:
        for item in (node, *node.outputs):
            item.metadata_props.clear()  # how torch came to them
    for name, value in metadata.items():
        onnx_program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    onnx_program.save(file)


def run_onnx(file: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return tuple(torch.from_numpy(output) for output in session.run(list(OUTPUTS), {INPUT: pixels.numpy()}))


def write_torch(program: torch.export.ExportedProgram, metadata: dict[str, Any], file: Path) -> None:
    """Write a file for `torch.export.load`, with the metadata as its extra file METADATA_FILE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights of which the graph has a part
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def run_torch(file: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    outputs: tuple[torch.Tensor, ...] = torch.export.load(file).module()(pixels)
    return outputs


def _check_difference(name: str, values: str, difference: float) -> None:
    """Raises: UserError: the values of an exported model are not the model's."""
    if not difference <= MAX_DIFFERENCE:
        raise UserError(
            f"{name} was not written: its {values} differ from the model's by up to {difference:.2g}; export another "
            f"format, and report it with the versions of torch, open_clip and {', '.join(ONNX_PACKAGES)}"
        )


def _metadata(adapter: TrainedAdapter, model: TrainedModel, task: str) -> dict[str, Any]:
    # Mean and standard deviation are in the graph.
    preprocessing = {k: v for k, v in asdict(model.preprocessing).items() if k not in ("mean", "std")}
    metadata = {
        "task": task,
        "classes": model.labels(task),
        "preprocessing": preprocessing,
        "temperature": model.temperature(task),
        "multi_label": task in model.classifier.logit_biases,
        "method": adapter.method,
        "clip": adapter.config.clip.model,
        "adapter_sha256": adapter.digest,
    }
    return metadata if (threshold := model.threshold(task)) is None else {**metadata, "threshold": threshold}


def _random_pixels(image_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (_SAMPLE_SIZE + 1, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
