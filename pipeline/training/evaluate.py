"""Accuracy on test sets that are streamed from Parquet and decoded on all cores while the model runs.

So the time is that of the slower of decoding and model, not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data.images import BrokenImage, evaluation_pixels
from pipeline.data.parquet import SplitReader
from pipeline.data.prefetch import prefetch, prefetch_in_thread
from pipeline.errors import UserError
from pipeline.methods.classifier import Classifier
from pipeline.training.batches import Features
from pipeline.training.distributed import DistributedShard
from pipeline.training.memory import explain_out_of_memory

BATCH_SIZE = 128
FEATURE_BATCH_SIZE = 4096
PREFETCH_BATCHES = 3
"""Batches that are read and decoded before they are asked for; they bound the memory."""

Row = dict[str, Any]
"""Of a split file: column → value."""
Top1 = Callable[[], tuple[list[float], list[int]]]
"""Waits for a batch's largest probabilities and their labels."""


@dataclass(frozen=True)
class Prediction:
    """Of one test image: `label` is the true class, `predicted` the most probable one, with its probability."""

    task: str
    path: str
    label: int
    predicted: int
    probability: float


def accuracy(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Task → share of its images that are classified correctly, 0 to 1."""
    hits: dict[str, list[bool]] = {}
    for prediction in predictions:
        hits.setdefault(prediction.task, []).append(prediction.label == prediction.predicted)
    return {task: sum(of_task) / len(of_task) for task, of_task in hits.items()}


def evaluate(
    classifier: Classifier,
    reader: SplitReader,
    tasks: Sequence[str],
    threads: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> list[Prediction]:
    """Predictions for the tasks' whole test sets, in stored order; `on_images` is told how many more are done.

    In a process group, workers take the batches in turn, and all get all predictions.

    Raises:
        UserError: a split folder that is damaged, by file or image; out of memory.
    """
    batches: list[list[Prediction]] = []
    towers, share = classifier.towers, DistributedShard.current()
    memory = explain_out_of_memory(towers.device, "evaluation: run fewer at once (a larger cluster.gpus_per_worker)")
    stream = decoded_batches(
        reader, tasks, towers.image_size, threads, pinned=towers.device.type == "cuda", share=share
    )
    with closing(stream), memory:
        running = (
            (task, rows, _copy_to_host_async(classifier.probabilities(task, pixels).max(dim=1)))
            for task, rows, pixels in stream
        )
        for task, rows, best in prefetch(running, 1):
            batches.append([Prediction(task, r["path"], r["label"], p, q) for r, q, p in zip(rows, *best())])
            on_images(len(rows))
    return [prediction for batch in share.gather_interleaved(batches) for prediction in batch]


def evaluate_decoded(
    classifier: Classifier, batches: Iterable[tuple[str, Sequence[Row], torch.Tensor]]
) -> list[Prediction]:
    """As `evaluate`, from what `decoded_batches` gave, for images that are looked at again and again."""
    predictions = []
    for task, rows, pixels in batches:
        best = classifier.probabilities(task, pixels).max(dim=1)
        values = zip(rows, *(tensor.tolist() for tensor in best))
        predictions += [Prediction(task, row["path"], row["label"], q, p) for row, p, q in values]
    return predictions


def evaluate_features(
    classifier: Classifier, reader: SplitReader, features: Mapping[str, Features]
) -> list[Prediction]:
    """As `evaluate`, from features (N, E) of each task's test set by the frozen image tower, in stored order."""
    predictions = []
    for task, of_task in features.items():
        rows = list(reader.rows("test", task, ("label", "path")))
        for start in range(0, len(rows), FEATURE_BATCH_SIZE):
            part = slice(start, min(start + FEATURE_BATCH_SIZE, len(rows)))
            best = classifier.probabilities_from_frozen_features(task, of_task[part]).max(dim=1)
            values = zip(rows[part], *(tensor.tolist() for tensor in best))
            predictions += [Prediction(task, row["path"], row["label"], q, p) for row, p, q in values]
    return predictions


def _copy_to_host_async(best: Sequence[torch.Tensor]) -> Top1:
    """Starts to copy tensors from their device at once, ahead of all work that is queued later; the function that
    is returned waits for that copy alone."""
    if best[0].device.type != "cuda":
        return lambda: _lists(best)
    copies = [values.to("cpu", non_blocking=True) for values in best]
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> tuple[list[float], list[int]]:
        copied.synchronize()
        return _lists(copies)

    return wait


def _lists(best: Sequence[torch.Tensor]) -> tuple[list[float], list[int]]:
    probabilities, labels = best
    return probabilities.tolist(), labels.tolist()


def decoded_batches(
    reader: SplitReader,
    tasks: Sequence[str],
    image_size: int,
    threads: int,
    batch_size: int | None = None,
    pinned: bool = False,
    share: DistributedShard | None = None,
) -> Generator[tuple[str, list[Row], torch.Tensor], None, None]:
    """The tasks' test sets in batches of one task: its name, rows (label, path), pixels uint8 (B, 3, S, S).

    One thread reads Parquet and `threads` decode (Pillow frees the GIL), AHEAD batches before the consumer, across
    the tasks' bounds. `batch_size`: BATCH_SIZE if None. `pinned`: pixels lie in memory from which a GPU copies while
    the program goes on. Of several workers, each decodes the batches of its `share` alone.
    """
    share = share or DistributedShard()
    batches = islice(_batches_of_rows(reader, tasks, batch_size or BATCH_SIZE), share.rank, None, share.world_size)
    decoding = ThreadPoolExecutor(threads, "decode")

    def started() -> Iterator[tuple[str, list[Row], torch.Tensor, list[Future[None]]]]:
        for task, rows in batches:
            pixels = torch.empty(len(rows), 3, image_size, image_size, dtype=torch.uint8, pin_memory=pinned)
            yield task, rows, pixels, [decoding.submit(_decode, task, *pair) for pair in zip(rows, pixels.numpy())]

    try:
        with closing(
            prefetch_in_thread(started(), PREFETCH_BATCHES)
        ) as drawn:  # ends first, since it hands images on to the other
            for task, rows, pixels, decoded in drawn:
                for image in decoded:
                    image.result()
                yield task, rows, pixels
    finally:
        decoding.shutdown(cancel_futures=True)


def _batches_of_rows(reader: SplitReader, tasks: Sequence[str], size: int) -> Iterator[tuple[str, list[Row]]]:
    for task in tasks:
        rows = reader.rows("test", task, ("image", "label", "path"))
        while batch := list(islice(rows, size)):
            yield task, batch


def _decode(task: str, row: Row, slot: np.ndarray) -> None:
    """Writes the row's pixels into `slot` (3, S, S) and drops its encoded image."""
    try:
        slot[:] = evaluation_pixels(row.pop("image"), slot.shape[-1])
    except BrokenImage as error:
        raise UserError(
            f"the test image {row['path']} of task {task!r} cannot be decoded any more ({error}): the split folder "
            "is damaged; remove it and build it again"
        ) from None


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    pq.write_table(pa.Table.from_pylist([vars(prediction) for prediction in predictions]), path, compression="zstd")
