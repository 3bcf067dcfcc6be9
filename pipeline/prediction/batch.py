"""Batch prediction for any number of images with Ray Data, on one machine or a cluster: tasks read and decode, actors
hold the model and predict, the driver writes Parquet. Only a few batches are in memory at any time."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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

from pipeline.buckets import BucketPath, open_bucket
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.table_images import find_image_column
from pipeline.data.walk import Skipped, find_images, skipped_note
from pipeline.errors import UserError
from pipeline.files import atomic_replace, is_uri
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.prediction.decoding import decode_rows
from pipeline.prediction.encoded_images import is_url
from pipeline.prediction.image_prediction import COLUMNS, ImagePrediction
from pipeline.prediction.model import TrainedModel
from pipeline.prediction.options import ModelOptions
from pipeline.prediction.output_files import check_new_output, write_errors
from pipeline.runtime.cluster import WorkerResources, cluster_summary, num_slots

DECODE_BATCH_SIZE = 64
PREDICT_BATCH_SIZE = 128
MAX_FILES_PER_TASK = 512
ROWS_PER_FILE = 1_000_000
OUTPUT = pa.schema([(name, pa.float32() if name == "probability" else pa.string()) for name in COLUMNS])
"""`label` is null for a broken image and below the threshold; `probability` is that of the most probable class; `error`
is null unless the image is broken."""

_ACTOR_OUTPUT = OUTPUT.append(pa.field("fatal_error", pa.string()))
"""Output of an actor; a `fatal_error` ends the job."""


@dataclass(frozen=True)
class BatchInput:
    """Images, or Parquet files with a column of encoded images and optionally `path` and `task`."""

    files: tuple[str, ...]
    is_parquet: bool
    uri: str | None
    """URI of the bucket of the files; None: local files."""
    skipped: tuple[Skipped, ...] = ()
    """Other files of the folders."""
    image_column: str = "image"
    """Column of Parquet files with the images: bytes, or structs with `bytes` and `path`."""

    @property
    def filesystem(self) -> pafs.FileSystem:
        return open_bucket(self.uri)[0] if self.uri else pafs.LocalFileSystem()


def find_batch_input(inputs: Sequence[str]) -> BatchInput:
    """Return the images or Parquet files among files, folders (recursive) and URLs, or in one bucket.

    Raises:
        UserError: no such file, no images, images mixed with Parquet, several buckets, Parquet without images.
    """
    uris = [source for source in inputs if is_uri(source) and not is_url(source)]
    if uris and (len(uris) < len(inputs) or len({uri.split("/")[2] for uri in uris}) > 1):
        raise UserError(f"inputs {', '.join(inputs)} are in several locations; use one bucket, or local files only")
    files: list[str] = []
    skipped: list[Skipped] = []
    for source in inputs:
        if is_url(source):
            files.append(source)
            continue
        source_files, source_skipped = find_images(_bucket_path(source) if uris else source, (".parquet",))
        files += source_files
        skipped += source_skipped
    suffixes = {file.lower().endswith(".parquet") for file in files}
    if not files:
        hint = f"; {skipped_note(skipped)}" if skipped else ""
        raise UserError(f"no images or .parquet files in {', '.join(inputs)}{hint}")
    if len(suffixes) > 1:
        raise UserError(f"{', '.join(inputs)} contain both images and .parquet files; use one kind")
    batch_input = BatchInput(tuple(files), suffixes == {True}, uris[0] if uris else None, tuple(skipped))
    if batch_input.is_parquet:
        columns = {_image_column(batch_input, file): file for file in files}
        if len(columns) > 1:
            listed = " and ".join(f"{column} ({file})" for column, file in columns.items())
            raise UserError(f"the Parquet files have their images in different columns, {listed}: predict each alone")
        return replace(batch_input, image_column=next(iter(columns)))
    return batch_input


def predict_batch(
    adapter: TrainedAdapter,
    options: ModelOptions,
    task: str | None,
    batch_input: BatchInput,
    output: str,
    worker_resources: WorkerResources,
    preprocessing: Preprocessing,
    on_progress: Callable[[int, int], None] = lambda num_done, total: None,
) -> tuple[int, int]:
    """Write a new folder of Parquet files with the columns of OUTPUT, in the order of the input; Ray must be connected.
    A local folder appears when it is complete; in a bucket the files appear one by one.

    Args:
        task: task of images without one in their own column; None: all tasks, of which the most probable prediction is
            written.
        worker_resources: resources of each actor.
        on_progress: called with the number of finished rows and the total.

    Returns:
        The numbers of images and of broken images.

    Raises:
        UserError: the output exists or cannot be written, a worker has no CLIP weights, a damaged Parquet file.
    """
    total = len(batch_input.files)
    if batch_input.is_parquet:
        total = sum(pq.read_metadata(file, filesystem=batch_input.filesystem).num_rows for file in batch_input.files)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs each step
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # on_progress reports
    context.execution_options.preserve_order = True
    adapter_ref = ray.put(adapter)  # once for all actors; owned by the driver, for actors that restart
    dataset = _decoded_dataset(batch_input, task, adapter.class_names, preprocessing, worker_resources)
    dataset = dataset.map_batches(
        _Predictor,
        fn_constructor_args=([adapter_ref], options, worker_resources),
        batch_size=PREDICT_BATCH_SIZE,
        batch_format="numpy",
        # No actor without a full batch: its start would take longer than its share of the work.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=max(1, min(num_slots(worker_resources), total // PREDICT_BATCH_SIZE))
        ),
        num_cpus=_actor_cpus(worker_resources),
        num_gpus=worker_resources.gpus or None,
    )
    num_done = num_broken = 0
    table: pa.Table
    try:
        with _OutputWriter(output) as writer:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow") if total else []:
                if fatal_errors := pc.drop_null(table["fatal_error"]).to_pylist():
                    raise UserError(fatal_errors[0])
                table = table.select(OUTPUT.names).cast(OUTPUT)
                writer.write(table)
                num_done += len(table)
                num_broken += len(table) - table["error"].null_count
                on_progress(num_done, total)
    except RayTaskError as error:
        if match := re.search(r"(\w+: [^\n]*)\nFailed to read fragment (.+) after", str(error)):
            raise UserError(f"{match[2]} is damaged ({match[1]}); copy it again, or exclude it") from None
        raise
    return num_done, num_broken


def _actor_cpus(worker_resources: WorkerResources) -> float:
    """Return the CPUs of an actor: half, since decoding tasks would never run if the actors took all."""
    return worker_resources.cpus / 2


def _decoded_dataset(
    batch_input: BatchInput,
    task: str | None,
    tasks: dict[str, list[str]],
    preprocessing: Preprocessing,
    worker_resources: WorkerResources,
) -> ray.data.Dataset:
    """Rows of path, task, pixels, error."""
    if batch_input.is_parquet:
        columns = set(_parquet_schema(batch_input, batch_input.files[0]).names)
        dataset = ray.data.read_parquet(
            list(batch_input.files),
            filesystem=batch_input.filesystem if batch_input.uri else None,
            columns=[name for name in (batch_input.image_column, "path", "task") if name in columns],
            partitioning=None,
            num_cpus=0.5,
        )
    else:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        block_size = min(max(len(batch_input.files) // (4 * cpus), DECODE_BATCH_SIZE), MAX_FILES_PER_TASK)
        names = [os.fsencode(file) for file in batch_input.files]  # need not be UTF-8
        blocks = [pa.table({"file": names[i : i + block_size]}) for i in range(0, len(names), block_size)]
        dataset = ray.data.from_arrow(blocks)
    return dataset.map_batches(
        cast(Any, decode_rows),  # Ray's types do not know functions with fn_args
        fn_args=(batch_input.uri, task, list(tasks), preprocessing, batch_input.image_column),
        batch_size=DECODE_BATCH_SIZE,
        batch_format="pyarrow",
        num_cpus=0.5,
    )


class _Predictor:
    """Actor that holds the model."""

    def __init__(self, adapter_ref: list[ray.ObjectRef[Any]], options: ModelOptions, worker_resources: WorkerResources):
        if not worker_resources.gpus:
            torch.set_num_threads(worker_resources.cpus)
        self._model, self._fatal_error = None, None
        try:
            self._model = TrainedModel(ray.get(adapter_ref[0]), options, "cuda" if worker_resources.gpus else "cpu")
        except UserError as error:  # Ray would report it as a dead actor
            self._fatal_error = f"{os.uname().nodename}: {error}"

    def __call__(self, rows: dict[str, np.ndarray]) -> pa.Table:
        if self._model is None:
            empty = {name: [None] for name in OUTPUT.names}
            return pa.table(empty | {"fatal_error": [self._fatal_error]}, schema=_ACTOR_OUTPUT)
        paths, tasks, errors = (_strings(rows[name]) for name in ("path", "task", "error"))
        prediction_by_row: dict[int, ImagePrediction] = {}
        for task in dict.fromkeys(tasks):
            task_rows = [row for row, name in enumerate(tasks) if name == task and not errors[row]]
            if task_rows:
                pixels = torch.from_numpy(np.ascontiguousarray(rows["pixels"][task_rows]))
                prediction_by_row.update(zip(task_rows, self._model.predict_pixels(pixels, task)))
        predictions = [
            prediction_by_row.get(row) or ImagePrediction(task=tasks[row], error=errors[row])
            for row in range(len(tasks))
        ]
        columns = {name: [getattr(prediction, name) for prediction in predictions] for name in COLUMNS}
        return pa.table(columns | {"path": paths, "fatal_error": [None] * len(tasks)}, schema=_ACTOR_OUTPUT)


def _strings(values: np.ndarray) -> list[str | None]:
    """Return a column as strings; Ray Data may have turned nulls into NaN."""
    return [value if isinstance(value, str) else None for value in values.tolist()]


class _OutputWriter:
    """Writer of a new folder of Parquet files; a local one appears under its name when the block succeeds."""

    def __init__(self, output: str):
        self._output = output
        if is_uri(output):
            self._filesystem, self._folder = open_bucket(output)
        else:
            self._filesystem, self._folder = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(output))
        self._staging_dir = self._folder
        self._exit_stack = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._num_parts = self._num_rows = 0

    def __enter__(self) -> _OutputWriter:
        with write_errors(self._output):
            check_new_output(self._output)
            if not is_uri(self._output):
                self._staging_dir = str(self._exit_stack.enter_context(atomic_replace(Path(self._folder))))
            self._filesystem.create_dir(self._staging_dir)
        return self

    def write(self, table: pa.Table) -> None:
        with write_errors(self._output):
            if self._writer is None:
                name = f"{self._staging_dir}/part-{self._num_parts:05d}.parquet"
                self._writer = pq.ParquetWriter(name, OUTPUT, filesystem=self._filesystem, compression="zstd")
                self._num_parts, self._num_rows = self._num_parts + 1, 0
            self._writer.write_table(table)
            self._num_rows += len(table)
            if self._num_rows >= ROWS_PER_FILE:
                self._close()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self._exit_stack.__exit__(error_type, error, trace)
            return
        with write_errors(self._output), self._exit_stack:
            if not self._num_parts:
                self.write(OUTPUT.empty_table())  # readers need a schema
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def progress_lines(report: Callable[[str], None], interval_s: float) -> Callable[[int, int], None]:
    """Return an `on_progress` that reports at most one line per interval, with the remaining time."""
    start = last_report = time.monotonic()

    def on_progress(num_done: int, total: int) -> None:
        nonlocal last_report
        time_s = time.monotonic()
        if time_s - last_report >= interval_s or num_done == total:
            last_report, throughput = time_s, num_done / max(time_s - start, 1e-9)
            remaining = f", {(total - num_done) / throughput:.0f} s left" if num_done < total else ""
            report(f"{num_done:,} of {total:,} images, {throughput:,.0f} images/s on {cluster_summary()}{remaining}")

    return on_progress


def _bucket_path(uri: str) -> BucketPath:
    path = BucketPath(uri)
    path.check_access(uri)
    return path


def _image_column(batch_input: BatchInput, file: str) -> str:
    """Return the column of encoded images, by the rule of tables. Raises UserError if a file has none."""
    schema = _parquet_schema(batch_input, file)
    try:
        image = find_image_column(schema)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if image is None or not image.is_embedded:
        raise UserError(
            f"{file} has no column of encoded images (`image`: bytes, or structs with `bytes` and `path`); its columns "
            f"are {', '.join(schema.names)}"
        )
    return image.column


def _parquet_schema(batch_input: BatchInput, file: str) -> pa.Schema:
    try:
        return pq.read_schema(file, filesystem=batch_input.filesystem)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file} as Parquet: {error}") from None
