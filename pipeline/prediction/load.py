"""Loading of a trained adapter from a path, a bucket, the Hugging Face Hub or MLflow. Only safetensors and JSON are
read; code that is stored with the adapter is ignored."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.buckets import open_bucket
from pipeline.clip.files.model_files import HubRepository
from pipeline.config import HUB_PREFIX, Precision
from pipeline.data.names import truncated_list
from pipeline.errors import UserError
from pipeline.files import is_uri
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import GROUPED_ADAPTER, HUB_ADAPTER, ModelOptions, options_file, read_options
from pipeline.runtime.tracking.database import is_sqlite, prepare_database, sqlite_file

MLFLOW_ADAPTER = "data/model/adapter.safetensors"
"""The adapter in an MLflow model."""
_MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")


def load_model(
    source: str | os.PathLike[str],
    device: str | None = None,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
) -> TrainedModel:
    """Load a model as `pipeline.load` does; `threads`: number of decoding threads."""
    adapter, options, file = read_model(source, pretrained, temperature, threshold, precision)
    return TrainedModel(adapter, options, device, threads, file)


def read_model(
    source: str | os.PathLike[str],
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
    precision: Precision | None = None,
) -> tuple[TrainedAdapter, ModelOptions, Path | None]:
    """Return the adapter, its saved options updated with the arguments, and its file if it is local. Loads no CLIP."""
    with local_adapter_file(source) as file:
        adapter, saved_options = load_adapter(file), read_options(file)
        is_local = not _is_remote(os.fspath(source))
    if isinstance(temperature, Mapping):
        temperature = {**saved_options.temperatures, **temperature}
    elif temperature is not None:
        temperature = dict.fromkeys(adapter.class_names, temperature)
    options = saved_options.updated(
        pretrained=pretrained, temperatures=temperature, threshold=threshold, precision=precision
    )
    options.check_tasks(adapter.class_names)
    return adapter, options, file if is_local else None


@contextmanager
def local_adapter_file(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide a local adapter file, with its options in the same folder; a download is removed at the end, but for
    that of the Hub, which stays in its cache.

    Raises:
        UserError: the source does not exist or has no adapter.
    """
    source = os.fspath(source)
    if source.startswith(HUB_PREFIX):
        yield _fetch_from_hub(source)
        return
    if not _is_remote(source):
        yield _find_adapter(Path(source).expanduser(), source)
        return
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        download = _download_from_mlflow if source.startswith(_MLFLOW_SCHEMES) else _download_from_bucket
        yield _find_adapter(download(source, Path(folder)), source)


def _is_remote(source: str) -> bool:
    return is_uri(source) or source.startswith((HUB_PREFIX, *_MLFLOW_SCHEMES))


def _find_adapter(path: Path, source: str) -> Path:
    if not path.is_dir():
        if not path.exists() and (files := sorted(file.name for file in path.parent.glob("*.safetensors"))):
            raise UserError(f"adapter file {source} does not exist; its folder has {truncated_list(files)}")
        return path  # load_adapter reports a missing file
    for name in (GROUPED_ADAPTER, MLFLOW_ADAPTER, HUB_ADAPTER):
        if (path / name).is_file():
            return path / name
    adapters = sorted(file.relative_to(path).as_posix() for file in path.glob("adapters/*.safetensors"))
    expected = (
        f"a .safetensors file, a run directory (with {GROUPED_ADAPTER}), an MLflow model, or a repository of the Hub"
    )
    if adapters:
        expected = f"one of its files {truncated_list(adapters)}"
    raise UserError(f"no adapter in {source}; expected {expected}")


def _fetch_from_hub(source: str) -> Path:
    repository = HubRepository(source, source.removeprefix(HUB_PREFIX))
    file = repository.find(HUB_ADAPTER)
    if file is None and not repository.unreachable:
        raise UserError(f"{source} has no {HUB_ADAPTER}: give a repository that `mmap-clip push` wrote")
    options = options_file(Path(HUB_ADAPTER)).name
    # Whether options that cannot be asked for exist is not known.
    if file is None or (repository.find(options) is None and repository.unreachable):
        raise repository.missing(options if file else HUB_ADAPTER)
    return file


def _download_from_bucket(uri: str, folder: Path) -> Path:
    filesystem, path = open_bucket(uri)
    try:
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            path = f"{path}/{GROUPED_ADAPTER}"
        file = folder / Path(path).name
        for remote, local in ((path, file), (options_file(Path(path)).as_posix(), options_file(file))):
            if filesystem.get_file_info(remote).type == pafs.FileType.File:
                pafs.copy_files(remote, str(local), filesystem, pafs.LocalFileSystem())
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {uri}: {error}; check the name, AWS_ENDPOINT_URL and the credentials in the environment"
        ) from None
    if not file.is_file():
        raise UserError(f"{uri} is neither an adapter file nor a run directory (with {GROUPED_ADAPTER})")
    return file


def _download_from_mlflow(uri: str, folder: Path) -> Path:
    import mlflow

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    tracking_uri = mlflow.get_tracking_uri()
    if is_sqlite(tracking_uri) and sqlite_file(tracking_uri).exists():
        prepare_database(tracking_uri)
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except Exception as error:  # MLflow's, or of any artifact store
        raise UserError(
            f"cannot download {uri} from MLflow at {mlflow.get_tracking_uri()}: {error}; check the name and "
            "MLFLOW_TRACKING_URI"
        ) from None
