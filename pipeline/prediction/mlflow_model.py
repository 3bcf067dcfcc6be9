"""Trained adapter as an MLflow model (pyfunc): adapter and options as safetensors and JSON, this package as code.

MLflow loads it with `_load_pyfunc`; no object is pickled. The input is a table with the columns `image` (an encoded
image, base64 in JSON) and optionally `task`. The output has a row for each image: task, label, probability,
probabilities of the classes, error, and without a task the prediction of each task in `predictions_by_task`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline.clip.files.model_files import folder_path
from pipeline.clip.files.source import resolve_model
from pipeline.clip.files.text_files import needs_transformers
from pipeline.config import ClipConfig, content_hash
from pipeline.errors import UserError
from pipeline.prediction.load import MLFLOW_ADAPTER, load_model, local_adapter_file, read_model
from pipeline.prediction.model import ImagePrediction, TrainedModel
from pipeline.prediction.options import write_options

if TYPE_CHECKING:
    import pandas as pd

PACKAGES: tuple[str, ...] = ("mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "pyarrow", "pydantic")
PACKAGES += ("pyyaml", "safetensors", "scipy", "torch", "torchvision")
"""Packages that loading and using the model imports."""


@contextmanager
def saved_mlflow_model(
    source: str | Path,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> Iterator[Path]:
    """Provide a temporary folder with an MLflow model of an adapter, named by its content hash. The arguments are those
    of `pipeline.load`. The CLIP weights are not included: the serving machine needs them at the same path, or at
    `pretrained`.

    Raises:
        UserError: as `pipeline.load`, except for errors of the CLIP, which is not loaded.
    """
    import mlflow

    if pretrained and folder_path(pretrained).exists():
        pretrained = str(folder_path(pretrained).absolute())
    with tempfile.TemporaryDirectory(prefix="mlflow-model-") as temporary:
        adapter_copy = Path(temporary) / "data" / Path(MLFLOW_ADAPTER).parent.name / Path(MLFLOW_ADAPTER).name
        adapter_copy.parent.mkdir(parents=True)
        with local_adapter_file(source) as file:
            adapter, options, _ = read_model(file, pretrained, temperature, threshold)
            shutil.copyfile(file, adapter_copy)
        write_options(adapter_copy, options)
        package = Path(__file__).resolve().parent.parent
        pip_requirements = requirements(adapter.config.clip)
        content = [_digests(adapter_copy.parent, "*"), _digests(package, "**/*.py"), pip_requirements]
        folder = Path(temporary) / f"model-{content_hash(content)}"
        mlflow.pyfunc.save_model(
            path=str(folder),
            loader_module=__name__,
            data_path=str(adapter_copy.parent),
            code_paths=[str(package)],
            signature=_signature(),
            input_example=_input_example(),
            pip_requirements=pip_requirements,
        )
        yield folder


def requirements(config: ClipConfig) -> list[str]:
    """Return the packages that a model with this CLIP imports, in the versions that are installed. `transformers` is
    one of them also if it is not known whether the CLIP needs it, since it is not on this machine."""
    is_needed = True
    with suppress(UserError):
        is_needed = needs_transformers(resolve_model(config.model).model_config["text_cfg"])
    return [_pinned(name) for name in (PACKAGES + ("transformers",) if is_needed else PACKAGES)]


def _pinned(package: str) -> str:
    try:
        return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _digests(folder: Path, pattern: str) -> dict[str, str]:
    files = sorted(folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Map, Object, Property

    properties = [Property("task", DataType.string), Property("probability", DataType.double)]
    properties.append(Property("label", DataType.string, required=False))
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "task", required=False)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "task", required=False),
                ColSpec(DataType.string, "label", required=False),
                ColSpec(DataType.double, "probability", required=False),
                ColSpec(Map(DataType.double), "probabilities"),
                ColSpec(DataType.string, "error"),
                ColSpec(Array(Object(properties)), "predictions_by_task"),
            ]
        ),
    )


def _input_example() -> pd.DataFrame:
    import pandas as pd

    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(stream, "PNG")
    return pd.DataFrame({"image": [stream.getvalue()]})


def _load_pyfunc(data_path: str) -> _Pyfunc:
    return _Pyfunc(load_model(Path(data_path) / Path(MLFLOW_ADAPTER).name))


class _Pyfunc:
    def __init__(self, model: TrainedModel):
        self._model = model

    def predict(self, table: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return the predictions for a table of images. Raises: UserError: unknown task."""
        import pandas as pd

        tasks: list[str | None] = [None] * len(table)
        if "task" in table:
            tasks = [name if isinstance(name, str) and name else None for name in table["task"]]
        predictions = predict_mixed_tasks(list(table["image"]), tasks, self._model.predict)
        # A float column would turn None into NaN, which JSON does not have.
        return pd.DataFrame([prediction.record() for prediction in predictions], dtype=object)


def predict_mixed_tasks(
    images: list[Any], tasks: list[str | None], predict: Callable[[list[Any], str | None], list[ImagePrediction]]
) -> list[ImagePrediction]:
    """Return the predictions for images of several tasks, in order; each task is predicted in one call."""
    prediction_by_row: dict[int, ImagePrediction] = {}
    for task in dict.fromkeys(tasks):
        rows = [row for row, name in enumerate(tasks) if name == task]
        prediction_by_row.update(zip(rows, predict([images[row] for row in rows], task)))
    return [prediction_by_row[row] for row in range(len(images))]
