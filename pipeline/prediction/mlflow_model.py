"""Trained prompts as an MLflow model (pyfunc): prompts and options as safetensors and JSON, this package as code.

MLflow loads it by `_load_pyfunc` here; no object is pickled. A request is a table with the columns `image` (an encoded
image, base64 in JSON) and, where a task is asked for, `task`. An answer has a row for each image: task, label,
probability, probabilities by class, error, and without a task, the best guess of each task in `by_task`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline.config import content_hash
from pipeline.prediction.load import IN_MLFLOW_MODEL, adapter_file, load_model, read_model
from pipeline.prediction.model import ImagePrediction, TrainedModel
from pipeline.prediction.options import write_options

if TYPE_CHECKING:
    import pandas as pd

PACKAGES: tuple[str, ...] = ("mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "pyarrow", "pydantic")
PACKAGES += ("pyyaml", "safetensors", "scipy", "torch", "torchvision")
"""What loading and using the model imports."""


@contextmanager
def saved_mlflow_model(
    place: str | Path,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> Iterator[Path]:
    """A folder with an MLflow model of the prompts at a place, for as long as the block, named by its content. Options
    are those of `pipeline.load`. The CLIP weights stay where they are, and must be there, or where `pretrained` says,
    on the machine that serves the model.

    Raises:
        UserError: as `pipeline.load`, but for the CLIP, which is not loaded.
    """
    import mlflow

    if pretrained and Path(pretrained).expanduser().is_file():
        pretrained = str(Path(pretrained).expanduser().absolute())
    with tempfile.TemporaryDirectory(prefix="mlflow-model-") as temporary:
        data = Path(temporary) / "data" / Path(IN_MLFLOW_MODEL).parent.name / Path(IN_MLFLOW_MODEL).name
        data.parent.mkdir(parents=True)
        with adapter_file(place) as file:
            _, options, _ = read_model(file, pretrained, temperature, threshold)
            shutil.copyfile(file, data)
        write_options(data, options)
        package = Path(__file__).resolve().parent.parent
        requirements = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES]
        content = [_digests(data.parent, "*"), _digests(package, "**/*.py"), requirements]
        folder = Path(temporary) / f"model-{content_hash(content)}"
        mlflow.pyfunc.save_model(
            path=str(folder),
            loader_module=__name__,
            data_path=str(data.parent),
            code_paths=[str(package)],
            signature=_signature(),
            input_example=_input_example(),
            pip_requirements=requirements,
        )
        yield folder


def _digests(folder: Path, pattern: str) -> dict[str, str]:
    files = sorted(folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Map, Object, Property

    best = [Property(name, kind) for name, kind in (("task", DataType.string), ("probability", DataType.double))]
    best.append(Property("label", DataType.string, required=False))
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "task", required=False)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "task", required=False),
                ColSpec(DataType.string, "label", required=False),
                ColSpec(DataType.double, "probability", required=False),
                ColSpec(Map(DataType.double), "probabilities"),
                ColSpec(DataType.string, "error"),
                ColSpec(Array(Object(best)), "by_task"),
            ]
        ),
    )


def _input_example() -> pd.DataFrame:
    import pandas as pd

    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(stream, "PNG")
    return pd.DataFrame({"image": [stream.getvalue()]})


def _load_pyfunc(data_path: str) -> _Pyfunc:
    return _Pyfunc(load_model(Path(data_path) / Path(IN_MLFLOW_MODEL).name))


class _Pyfunc:
    def __init__(self, model: TrainedModel):
        self._model = model

    def predict(self, table: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Raises: UserError: a task that the model does not have."""
        import pandas as pd

        tasks: list[str | None] = [None] * len(table)
        if "task" in table:
            tasks = [name if isinstance(name, str) and name else None for name in table["task"]]
        predictions = predict_by_task(list(table["image"]), tasks, self._model.predict)
        # As objects: a column of floats would make NaN, which JSON does not have, of what is None.
        return pd.DataFrame([prediction.record() for prediction in predictions], dtype=object)


def predict_by_task(
    images: list[Any], tasks: list[str | None], predict: Callable[[list[Any], str | None], list[ImagePrediction]]
) -> list[ImagePrediction]:
    """Of images of different tasks, a task's together, in order."""
    predictions: dict[int, ImagePrediction] = {}
    for task in dict.fromkeys(tasks):
        rows = [row for row, name in enumerate(tasks) if name == task]
        predictions.update(zip(rows, predict([images[row] for row in rows], task)))
    return [predictions[row] for row in range(len(images))]
