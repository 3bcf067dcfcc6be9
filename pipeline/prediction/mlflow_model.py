"""Trained adapter as an MLflow model (pyfunc): adapter and options as safetensors and JSON, this package as code.

MLflow loads it with `_load_pyfunc`; no object is pickled. The input is a table with the columns `image` (bytes of an
encoded image, or base64 text) and optionally `task`. The output has a row for each image, `ImagePrediction.to_dict()`.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline.clip.files.model_files import folder_path
from pipeline.clip.files.source import resolve_model
from pipeline.clip.files.text_files import needs_transformers
from pipeline.config import ClipConfig, Precision, content_hash
from pipeline.data.images import BrokenImage
from pipeline.errors import UserError, escape_controls
from pipeline.files import file_digests
from pipeline.prediction.encoded_images import decode_sent_image, is_missing, num_pixels_to_decode
from pipeline.prediction.image_prediction import COLUMNS, ImagePrediction
from pipeline.prediction.load import MLFLOW_ADAPTER, load_model, local_adapter_file, read_model
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import write_options

if TYPE_CHECKING:
    import pandas as pd

PACKAGES: tuple[str, ...] = ("mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "pyarrow", "pydantic")
PACKAGES += ("pyyaml", "safetensors", "scipy", "torch", "torchvision")
"""Packages that loading and using the model imports."""
MAX_SERVED_IMAGES, MAX_SERVED_PIXELS = 64, 256_000_000
"""Limits of a request to MLflow's server, as by default those of `mmap-clip serve`."""
_SERVED_MODEL = "__pyfunc_model_path__"
"""Variable by which MLflow tells the processes of its server which model they serve."""
_LOGGER = logging.getLogger(__name__)


@contextmanager
def saved_mlflow_model(
    source: str | Path,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
    precision: Precision | None = None,
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
            adapter, options, _ = read_model(file, pretrained, temperature, threshold, precision)
            shutil.copyfile(file, adapter_copy)
        write_options(adapter_copy, options)
        package = Path(__file__).resolve().parent.parent
        pip_requirements = requirements(adapter.config.clip)
        content = [file_digests(adapter_copy.parent), file_digests(package, "**/*.py"), pip_requirements]
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


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array, Map, Object, Property

    any_type = AnyType()  # type: ignore[no-untyped-call]
    properties = [Property("task", DataType.string), Property("probability", DataType.double)]
    properties.append(Property("label", DataType.string, required=False))
    return ModelSignature(
        # Of any type: MLflow would refuse a whole table for one value, and decode base64 in two of its four formats.
        inputs=Schema([ColSpec(any_type, "image"), ColSpec(any_type, "task", required=False)]),
        outputs=Schema(
            [
                *(
                    ColSpec(DataType.double if name == "probability" else DataType.string, name, required=False)
                    for name in COLUMNS
                ),
                ColSpec(Map(DataType.double), "probabilities"),
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
    return _Pyfunc(load_model(Path(data_path) / Path(MLFLOW_ADAPTER).name), _SERVED_MODEL in os.environ)


class _Pyfunc:
    """
    Args:
        is_served: MLflow's HTTP server calls it: the images of a call are limited, and an error tells nothing of the
            server.
    """

    def __init__(self, model: TrainedModel, is_served: bool = False):
        self._model, self._is_served = model, is_served

    def predict(self, table: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return the predictions for a table of images; a row with a bad image or task gets an error.

        Raises:
            MlflowException: lists of different lengths, or, from MLflow's server, too many images or any error.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._predict_table(table)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except Exception:
            if not self._is_served:
                raise
            _LOGGER.exception("prediction failed")  # MLflow's server would answer with the traceback and its paths
            raise MlflowException("the prediction failed; see the log of the server") from None

    def _predict_table(self, table: pd.DataFrame) -> pd.DataFrame:
        import pandas as pd

        if len(table) == 1 and isinstance(table["image"].iloc[0], list):  # so MLflow reads {"inputs": {"image": [...]}}
            lists = [name for name in table if isinstance(table[name].iloc[0], list)]
            if len({len(table[name].iloc[0]) for name in lists}) > 1:
                raise UserError("image and task are lists of different lengths; give a task per image, or none")
            table = table.explode(lists)
        tasks: list[Any] = list(table["task"]) if "task" in table else [None] * len(table)
        if self._is_served and len(table) > MAX_SERVED_IMAGES:
            raise UserError(f"{len(table):,} images exceed the limit of {MAX_SERVED_IMAGES}; send several requests")
        predictions = self._predict_rows(list(table["image"]), tasks)
        # A float column would turn None into NaN, which JSON does not have.
        return pd.DataFrame([prediction.to_dict() for prediction in predictions], dtype=object)

    def _predict_rows(self, images: list[Any], tasks: list[Any]) -> list[ImagePrediction]:
        """Return the predictions in order; each task is predicted in one call."""
        prediction_by_row: dict[int, ImagePrediction] = {}
        rows_by_task: dict[str | None, list[int]] = {}
        data_by_row: dict[int, bytes] = {}
        for row, (image, value) in enumerate(zip(images, tasks)):
            task = None if is_missing(value) else value
            name = task if isinstance(task, str) else None
            try:
                tasks_of_row = self._model.resolve_tasks(task)
                name = tasks_of_row[0] if len(tasks_of_row) == 1 else None
                data_by_row[row] = decode_sent_image(image)
                rows_by_task.setdefault(task, []).append(row)
            except (UserError, BrokenImage) as error:
                prediction_by_row[row] = ImagePrediction(task=name, error=escape_controls(str(error)))
        if self._is_served and (total := sum(map(num_pixels_to_decode, data_by_row.values()))) > MAX_SERVED_PIXELS:
            raise UserError(
                f"the images have {total / 1e6:,.0f} megapixels in all, the limit is {MAX_SERVED_PIXELS / 1e6:,.0f}; "
                "send fewer or smaller images"
            )
        for task, rows in rows_by_task.items():
            predictions = self._model.predict([data_by_row[row] for row in rows], task)
            prediction_by_row.update(zip(rows, predictions, strict=True))
        return [prediction_by_row[row] for row in range(len(images))]
