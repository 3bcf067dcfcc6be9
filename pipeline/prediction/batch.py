"""Classifies any number of images by Ray Data, on one machine or a cluster: tasks read and decode, actors that hold the
model predict, the driver writes Parquet. At no time is more than a few batches in memory."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError

from pipeline.data.index import IMAGE_SUFFIXES
from pipeline.errors import UserError
from pipeline.files import FREE_SPACE_ADVICE, atomic_replace
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.prediction.decoding import decoded
from pipeline.prediction.model import ImagePrediction, TrainedModel
from pipeline.prediction.options import ModelOptions
from pipeline.runtime.cluster import WorkerResources, cluster_summary, num_slots
from pipeline.runtime.storage import is_uri, open_bucket

DECODED_AT_ONCE = 64
PREDICTED_AT_ONCE = 128
MAX_FILES_PER_TASK = 512
ROWS_PER_FILE = 1_000_000
OUTPUT = pa.schema(
    [("path", pa.string()), ("task", pa.string()), ("label", pa.string())]
    + [("probability", pa.float32()), ("error", pa.string())]
)
"""`label` is null for a broken image and below the threshold; `probability` is that of the most probable class; `error`
is null unless the image is broken."""

_WITH_FAULT = OUTPUT.append(pa.field("fault", pa.string()))
"""What an actor gives: `fault` ends it all."""


@dataclass(frozen=True)
class BatchInput:
    """Image files, or Parquet files with a column `image` of encoded images, and perhaps `path` and `task`."""

    files: tuple[str, ...]
    is_parquet: bool
    uri: str | None
    """Of the bucket that the files are in; None: they are files of this machine's file system."""

    @property
    def filesystem(self) -> pafs.FileSystem:
        return open_bucket(self.uri)[0] if self.uri else pafs.LocalFileSystem()


def find_batch_input(inputs: Sequence[str]) -> BatchInput:
    """What is in folders, at all depths, and files; in buckets too.

    Raises:
        UserError: nothing, images and Parquet together, several buckets, Parquet without the column `image`.
    """
    buckets = [place for place in inputs if is_uri(place)]
    if buckets and (len(buckets) < len(inputs) or len({place.split("/")[2] for place in buckets}) > 1):
        raise UserError(f"inputs {', '.join(inputs)} lie in several places: give one bucket, or files of this machine")
    files = [file for place in inputs for file in (_in_bucket(place) if buckets else _in_folder(place))]
    kinds = {file.lower().endswith(".parquet") for file in files}
    if not files:
        raise UserError(f"no images and no .parquet files in {', '.join(inputs)}")
    if len(kinds) > 1:
        raise UserError(f"{', '.join(inputs)} hold images and .parquet files: give one kind")
    found = BatchInput(tuple(files), kinds == {True}, buckets[0] if buckets else None)
    if found.is_parquet:
        for file in files:
            columns = _parquet_schema(found, file)
            kind = columns.field("image").type if "image" in columns.names else None
            if kind not in (pa.binary(), pa.large_binary()):
                raise UserError(f"{file} must have a column `image` of bytes: it has {', '.join(columns.names)}")
    return found


def predict_batch(
    prompts: TrainedAdapter,
    options: ModelOptions,
    task: str | None,
    found: BatchInput,
    output: str,
    worker_resources: WorkerResources,
    image_size: int,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Writes a new folder of Parquet files with the columns of OUTPUT, in the order of the input; the cluster must be
    connected. In a folder they appear together, at the end; in a bucket one by one.

    Args:
        task: of images that have none in a column of their own.
        needs: of each actor that holds the model.
        on_rows: is told how many rows are done, and of how many.

    Returns:
        How many images there were, and how many of them broken.

    Raises:
        UserError: the output is there or cannot be written, a worker has no CLIP weights, a damaged Parquet file.
    """
    total = len(found.files)
    if found.is_parquet:
        total = sum(pq.read_metadata(file, filesystem=found.filesystem).num_rows for file in found.files)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells each step
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # on_rows tells
    context.execution_options.preserve_order = True
    in_store = ray.put(prompts)  # once for all actors; the driver keeps it, for those that are started again
    dataset = _dataset(found, task, prompts.class_names, image_size, worker_resources)
    dataset = dataset.map_batches(
        _Predictor,
        fn_constructor_args=([in_store], options, worker_resources),
        batch_size=PREDICTED_AT_ONCE,
        batch_format="numpy",
        # One that has not a batch for itself takes longer to start than the others to do its work.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=max(1, min(num_slots(worker_resources), total // PREDICTED_AT_ONCE))
        ),
        num_cpus=_half(worker_resources),
        num_gpus=worker_resources.gpus or None,
    )
    done = broken = 0
    table: pa.Table
    try:
        with _Writer(output) as writer:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow") if total else []:
                if faults := pc.drop_null(table["fault"]).to_pylist():
                    raise UserError(faults[0])
                table = table.select(OUTPUT.names).cast(OUTPUT)
                writer.write(table)
                done += len(table)
                broken += len(table) - table["error"].null_count
                on_rows(done, total)
    except RayTaskError as error:
        if damaged := re.search(r"(\w+: [^\n]*)\nFailed to read fragment (.+) after", str(error)):
            raise UserError(
                f"{damaged[2]} cannot be read to its end ({damaged[1]}): copy it again, or leave it out"
            ) from None
        raise
    return done, broken


def _half(worker_resources: WorkerResources) -> float:
    """CPUs that an actor asks for: the rest is for the tasks that decode, which would never run if actors took all."""
    return worker_resources.cpus / 2


def _dataset(
    found: BatchInput, task: str | None, tasks: dict[str, list[str]], image_size: int, worker_resources: WorkerResources
) -> ray.data.Dataset:
    """Rows of path, task, pixels, error."""
    if found.is_parquet:
        columns = set(_parquet_schema(found, found.files[0]).names)
        dataset = ray.data.read_parquet(
            list(found.files),
            filesystem=found.filesystem if found.uri else None,
            columns=[name for name in ("image", "path", "task") if name in columns],
            partitioning=None,
            num_cpus=0.5,
        )
    else:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        size = min(max(len(found.files) // (4 * cpus), DECODED_AT_ONCE), MAX_FILES_PER_TASK)
        names = [os.fsencode(file) for file in found.files]  # which need not be text
        blocks = [pa.table({"file": names[at : at + size]}) for at in range(0, len(names), size)]
        dataset = ray.data.from_arrow(blocks)
    return dataset.map_batches(
        cast(Any, decoded),  # Ray's types know functions without fn_args alone
        fn_args=(found.uri, task, list(tasks), image_size),
        batch_size=DECODED_AT_ONCE,
        batch_format="pyarrow",
        num_cpus=0.5,
    )


class _Predictor:
    """An actor that holds the model."""

    def __init__(self, prompts: list[ray.ObjectRef[Any]], options: ModelOptions, worker_resources: WorkerResources):
        if not worker_resources.gpus:
            torch.set_num_threads(worker_resources.cpus)
        self._model, self._fault = None, None
        try:
            self._model = TrainedModel(ray.get(prompts[0]), options, "cuda" if worker_resources.gpus else "cpu")
        except UserError as error:  # Ray would tell it as the death of an actor
            self._fault = f"{os.uname().nodename}: {error}"

    def __call__(self, rows: dict[str, np.ndarray]) -> pa.Table:
        if self._model is None:
            return pa.table({"fault": [self._fault]} | {name: [None] for name in OUTPUT.names}, schema=_WITH_FAULT)
        paths, tasks, errors = (_texts(rows[name]) for name in ("path", "task", "error"))
        predictions: dict[int, ImagePrediction] = {}
        for task in dict.fromkeys(tasks):
            at = [row for row, name in enumerate(tasks) if name == task and not errors[row]]
            if at:
                pixels = torch.from_numpy(np.ascontiguousarray(rows["pixels"][at]))
                predictions.update(zip(at, self._model.predict_pixels(pixels, task)))
        found = [predictions.get(row) for row in range(len(tasks))]
        columns = {
            "path": paths,
            "task": tasks,
            "label": [prediction and prediction.label for prediction in found],
            "probability": [prediction and prediction.probability for prediction in found],
            "error": [error or None for error in errors],
            "fault": [None] * len(tasks),
        }
        return pa.table(columns, schema=_WITH_FAULT)


def _texts(values: np.ndarray) -> list[str | None]:
    """Of a column in which Ray Data may have made NaN of nulls."""
    return [value if isinstance(value, str) else None for value in values.tolist()]


class _Writer:
    """A new folder of Parquet files, which appears under its name when the block ends well."""

    def __init__(self, output: str):
        self._output = output
        if is_uri(output):
            self._filesystem, self._folder = open_bucket(output)
        else:
            self._filesystem, self._folder = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(output))
        self._building = self._folder
        self._publishing = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._parts = self._rows = 0

    def __enter__(self) -> _Writer:
        with self._faults_named():
            selector = pafs.FileSelector(self._folder, allow_not_found=True)
            if self._filesystem.get_file_info(
                self._folder
            ).type == pafs.FileType.File or self._filesystem.get_file_info(selector):
                raise UserError(f"--output {self._output} is there already: give another name, or remove it")
            if not is_uri(self._output):
                self._building = str(self._publishing.enter_context(atomic_replace(Path(self._folder))))
            self._filesystem.create_dir(self._building)
        return self

    def write(self, table: pa.Table) -> None:
        with self._faults_named():
            if self._writer is None:
                name = f"{self._building}/part-{self._parts:05d}.parquet"
                self._writer = pq.ParquetWriter(name, OUTPUT, filesystem=self._filesystem, compression="zstd")
                self._parts, self._rows = self._parts + 1, 0
            self._writer.write_table(table)
            self._rows += len(table)
            if self._rows >= ROWS_PER_FILE:
                self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self._publishing.__exit__(kind, error, trace)
            return
        with self._faults_named(), self._publishing:
            if not self._parts:
                self.write(OUTPUT.empty_table())  # so that there is something to read
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _faults_named(self) -> _WriteErrors:
        return _WriteErrors(self._output)


class _WriteErrors:
    def __init__(self, output: str):
        self._output = output

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise UserError(f"cannot write --output {self._output}: {error}; {FREE_SPACE_ADVICE}") from None


def progress_lines(say: Callable[[str], None], every_s: float) -> Callable[[int, int], None]:
    """For `on_rows`: a line at most every few seconds, with the time that is left."""
    began = last = time.monotonic()

    def on_rows(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s or done == total:
            last, rate = now, done / max(now - began, 1e-9)
            left = f", {(total - done) / rate:.0f} s left" if done < total else ""
            say(f"{done:,} of {total:,} images, {rate:,.0f} a second on {cluster_summary()}{left}")

    return on_rows


def _in_folder(place: str) -> Iterator[str]:
    if os.path.isfile(place):
        yield place
        return
    for parent, folders, names in os.walk(place):
        folders.sort()
        yield from (os.path.join(parent, name) for name in sorted(names) if _is_input(name))


def _in_bucket(uri: str) -> list[str]:
    filesystem, path = open_bucket(uri)
    try:
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            return [path]
        found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri} cannot be listed: {error}. Check AWS_ENDPOINT_URL and the credentials") from None
    return sorted(info.path for info in found if info.type == pafs.FileType.File and _is_input(info.path))


def _is_input(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix == ".parquet" or suffix in IMAGE_SUFFIXES


def _parquet_schema(found: BatchInput, file: str) -> pa.Schema:
    try:
        return pq.read_schema(file, filesystem=found.filesystem)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None
