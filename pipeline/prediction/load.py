"""Finds the prompts that a path, a bucket's URI or an MLflow URI stands for, and loads them. What comes from elsewhere
is read as safetensors and JSON; no code that lies beside them is looked at."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import GROUPED, ModelOptions, options_file, read_options
from pipeline.runtime.storage import is_uri, open_bucket

IN_MLFLOW_MODEL = "data/model/adapter.safetensors"
_MLFLOW = ("models:/", "runs:/", "mlflow-artifacts:/")


def load_model(
    place: str | os.PathLike[str],
    device: str | None = None,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
    threads: int | None = None,
) -> TrainedModel:
    """See `pipeline.load`; `threads`: that decode images."""
    prompts, options, file = read_model(place, pretrained, temperature, threshold)
    return TrainedModel(prompts, options, device, threads, file)


def read_model(
    place: str | os.PathLike[str],
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> tuple[TrainedAdapter, ModelOptions, Path | None]:
    """The prompts, the options that were saved with them under those that are given, and, where they lie on this
    machine, their file. No CLIP is loaded."""
    with adapter_file(place) as file:
        prompts, saved = load_adapter(file), read_options(file)
        is_local = not _is_remote(os.fspath(place))
    if isinstance(temperature, int | float):
        temperature = dict.fromkeys(prompts.class_names, float(temperature))
    elif temperature is not None:
        temperature = {**saved.temperatures, **temperature}
    options = saved.changed(pretrained=pretrained, temperatures=temperature, threshold=threshold)
    options.check(prompts.class_names)
    return prompts, options, file if is_local else None


@contextmanager
def adapter_file(place: str | os.PathLike[str]) -> Iterator[Path]:
    """The prompts file of a place on this machine, for as long as the block; its options, if any, lie beside it.

    Raises:
        UserError: no such place, or none with prompts.
    """
    place = os.fspath(place)
    if not _is_remote(place):
        yield _file_at(Path(place).expanduser(), place)
        return
    with tempfile.TemporaryDirectory(prefix="prompts-") as folder:
        fetch = _from_mlflow if place.startswith(_MLFLOW) else _from_bucket
        yield _file_at(fetch(place, Path(folder)), place)


def _is_remote(place: str) -> bool:
    return is_uri(place) or place.startswith(_MLFLOW)


def _file_at(path: Path, place: str) -> Path:
    if not path.is_dir():
        return path  # load_prompts says what is wrong with it
    for name in (GROUPED, IN_MLFLOW_MODEL):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{place} holds no prompts: give a prompts file, a run's folder (with {GROUPED}), or an MLflow model "
        "that jobs/register_model.py made"
    )


def _from_bucket(uri: str, folder: Path) -> Path:
    filesystem, path = open_bucket(uri)
    try:
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            path = f"{path}/{GROUPED}"
        file = folder / Path(path).name
        for source, target in ((path, file), (options_file(Path(path)).as_posix(), options_file(file))):
            if filesystem.get_file_info(source).type == pafs.FileType.File:
                pafs.copy_files(source, str(target), filesystem, pafs.LocalFileSystem())
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{uri} cannot be read: {error}. Check the name, AWS_ENDPOINT_URL, and the credentials in the environment"
        ) from None
    if not file.is_file():
        raise UserError(f"{uri} is neither a prompts file nor a run's folder with {GROUPED}")
    return file


def _from_mlflow(uri: str, folder: Path) -> Path:
    import mlflow

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except Exception as error:  # of MLflow, or of any of the stores that it knows
        raise UserError(
            f"{uri} cannot be fetched from MLflow at {mlflow.get_tracking_uri()}: {error}. Check the name, and "
            "MLFLOW_TRACKING_URI"
        ) from None
