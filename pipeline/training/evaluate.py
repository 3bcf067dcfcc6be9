"""Evaluation on test sets that are streamed from Parquet and decoded on all cores while the model runs.

The time is that of the slower of decoding and model, not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data.decoding_pool import decode_images, decoding_pool
from pipeline.data.images import BrokenImage
from pipeline.data.parquet import Split, SplitReader
from pipeline.data.prefetch import prefetch, prefetch_in_thread
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.classifier import Classifier
from pipeline.training.batches import Features
from pipeline.training.distributed import DistributedShard
from pipeline.training.memory import explain_out_of_memory
from pipeline.training.multi_label import image_losses, label_tensor

BATCH_SIZE = 128
FEATURE_BATCH_SIZE = 4096
PREFETCH_BATCHES = 3
"""Batches read and decoded in advance; they bound the memory."""
IMAGES_PER_CALL = 8
"""Images that a thread or process decodes at a time."""

Row = dict[str, Any]
"""Row of a split file: column → value."""


@dataclass(frozen=True)
class Prediction:
    """Prediction of one test image: true class `label`, most probable class `predicted` with its probability,
    cross-entropy `loss` of the true class in nats."""

    task: str
    path: str
    label: int
    predicted: int
    probability: float
    loss: float


@dataclass(frozen=True)
class MultiLabelPrediction:
    """Prediction of one test image that may have several labels: its true classes `label`, ascending, the probability
    of each class, and the loss in nats (multi_label.py)."""

    task: str
    path: str
    label: tuple[int, ...]
    probabilities: tuple[float, ...]
    loss: float


AnyPrediction = Prediction | MultiLabelPrediction


def accuracy(predictions: Sequence[AnyPrediction]) -> dict[str, float]:
    """Return task → fraction of its images that are classified correctly, of images with one label each."""
    return _mean_by_task(predictions, lambda p: isinstance(p, Prediction) and p.label == p.predicted)


def mean_loss(predictions: Sequence[AnyPrediction]) -> dict[str, float]:
    """Return task → mean loss over its images, in nats: cross-entropy, or of several labels its sum over classes."""
    return _mean_by_task(predictions, lambda prediction: prediction.loss)


def _mean_by_task(predictions: Sequence[AnyPrediction], value: Callable[[AnyPrediction], float]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for prediction in predictions:
        values.setdefault(prediction.task, []).append(value(prediction))
    return {task: fmean(task_values) for task, task_values in values.items()}


def evaluate(
    classifier: Classifier,
    reader: SplitReader,
    tasks: Sequence[str],
    threads: int,
    on_images: Callable[[int], None] = lambda count: None,
    split: Split = "test",
) -> list[AnyPrediction]:
    """Predict the tasks' images of a split, in stored order; `on_images` is called with the number of images of each
    batch.

    In a process group, workers take the batches in turn, and each gets all predictions.

    Raises:
        UserError: the split folder is damaged (with the file or image); out of memory.
    """
    batches: list[list[AnyPrediction]] = []
    towers, shard = classifier.towers, DistributedShard.current()
    memory = explain_out_of_memory(
        towers.device, "evaluation: run fewer at a time with a larger cluster.gpus_per_worker"
    )
    stream = decoded_batches(
        reader, tasks, towers.preprocessing, threads, pinned=towers.device.type == "cuda", shard=shard, split=split
    )
    with closing(stream), memory:
        running = (
            (task, rows, _copy_to_host_async(_scores(classifier.logits([task], pixels)[task], rows)))
            for task, rows, pixels in stream
        )
        for task, rows, scores in prefetch(running, 1):
            batches.append(_predictions(task, rows, scores()))
            on_images(len(rows))
    return [prediction for batch in shard.gather_interleaved(batches) for prediction in batch]


def evaluate_decoded(
    classifier: Classifier, batches: Iterable[tuple[str, Sequence[Row], torch.Tensor]]
) -> list[AnyPrediction]:
    """Evaluate on batches of `decoded_batches`, for images that are evaluated repeatedly."""
    predictions: list[AnyPrediction] = []
    for task, rows, pixels in batches:
        predictions += _predictions(task, rows, _scores(classifier.logits([task], pixels)[task], rows))
    return predictions


def evaluate_features(
    classifier: Classifier, reader: SplitReader, features: Mapping[str, Features], split: Split = "test"
) -> list[AnyPrediction]:
    """Evaluate on features (N, E) of each task's images of a split by the frozen image tower, in stored order."""
    predictions: list[AnyPrediction] = []
    for task, task_features in features.items():
        rows = list(reader.rows(split, task, ("label", "path")))
        for start in range(0, len(rows), FEATURE_BATCH_SIZE):
            batch = slice(start, min(start + FEATURE_BATCH_SIZE, len(rows)))
            logits = classifier.logits_from_frozen_features(task, task_features[batch])
            predictions += _predictions(task, rows[batch], _scores(logits, rows[batch]))
    return predictions


def _scores(logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, ...]:
    """Return the most probable classes (B,), their probabilities, and the losses in float64, where that of a sure
    prediction is not rounded to 0; of images with several labels, the probabilities (B, C) in float64 and the losses.
    """
    on_gpu = logits.device.type == "cuda"
    labels = label_tensor([row["label"] for row in rows], logits.shape[1])
    labels = (labels.pin_memory() if on_gpu else labels).to(logits.device, non_blocking=on_gpu)
    losses = image_losses(logits.double(), labels)
    if labels.dim() > 1:
        return logits.double().sigmoid(), losses
    probabilities, predicted = logits.softmax(dim=1).max(dim=1)
    return predicted, probabilities, losses


def _predictions(task: str, rows: Sequence[Row], scores: Sequence[torch.Tensor]) -> list[AnyPrediction]:
    values = zip(rows, *(tensor.tolist() for tensor in scores), strict=True)
    if isinstance(rows[0]["label"], list):
        return [
            MultiLabelPrediction(task, row["path"], tuple(row["label"]), tuple(probabilities), loss)
            for row, probabilities, loss in values
        ]
    return [Prediction(task, row["path"], row["label"], *row_scores) for row, *row_scores in values]


def _copy_to_host_async(tensors: Sequence[torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]]:
    """Start to copy tensors from their device, before work that is queued later; the returned function waits only for
    that copy."""
    if tensors[0].device.type != "cuda":
        return lambda: tensors
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Sequence[torch.Tensor]:
        copied.synchronize()
        return copies

    return wait


def decoded_batches(
    reader: SplitReader,
    tasks: Sequence[str],
    preprocessing: Preprocessing,
    threads: int,
    batch_size: int | None = None,
    pinned: bool = False,
    shard: DistributedShard | None = None,
    split: Split = "test",
) -> Generator[tuple[str, list[Row], torch.Tensor], None, None]:
    """Yield the tasks' images of a split in batches of one task: its name, rows (label, path), pixels uint8
    (B, 3, S, S).

    One thread reads Parquet, and a `decoding_pool` of `threads` decodes, PREFETCH_BATCHES batches before the consumer,
    across task boundaries. `batch_size`: BATCH_SIZE if None. `pinned`: pixels lie in pinned memory, for asynchronous
    copies to a GPU. Of several workers, each decodes only the batches of its `shard`.
    """
    shard, size = shard or DistributedShard(), preprocessing.image_size
    batches = islice(
        _batches_of_rows(reader, split, tasks, batch_size or BATCH_SIZE), shard.rank, None, shard.world_size
    )
    num_images = sum(reader.description.counts[split][task] for task in tasks) // shard.world_size
    pool = decoding_pool(threads, num_images)

    def submitted() -> Iterator[tuple[str, list[Row], list[Future[list[np.ndarray | BrokenImage]]]]]:
        for task, rows in batches:
            images = [row.pop("image") for row in rows]
            starts = range(0, len(images), IMAGES_PER_CALL)
            calls = [pool.submit(decode_images, images[i : i + IMAGES_PER_CALL], preprocessing) for i in starts]
            yield task, rows, calls

    try:
        with closing(
            prefetch_in_thread(submitted(), PREFETCH_BATCHES)
        ) as drawn:  # closed first, since it submits to the pool
            for task, rows, calls in drawn:
                pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8, pin_memory=pinned)
                images = (image for call in calls for image in call.result())
                for row, slot, image in zip(rows, pixels.numpy(), images, strict=True):
                    if isinstance(image, BrokenImage):
                        raise UserError(
                            f"the {'training' if split == 'train' else split} image {row['path']} of task {task!r} "
                            f"cannot be decoded ({image}): the split folder is damaged; remove it and rebuild it"
                        )
                    slot[:] = image
                yield task, rows, pixels
    except BrokenProcessPool:
        raise UserError(
            "a process that decodes images died, usually since the memory is exhausted: lower cluster.cpus_per_worker"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches_of_rows(
    reader: SplitReader, split: Split, tasks: Sequence[str], size: int
) -> Iterator[tuple[str, list[Row]]]:
    for task in tasks:
        rows = reader.rows(split, task, ("image", "label", "path"))
        while batch := list(islice(rows, size)):
            yield task, batch


def write_predictions(path: Path, predictions: Sequence[AnyPrediction]) -> None:
    pq.write_table(pa.Table.from_pylist([vars(prediction) for prediction in predictions]), path, compression="zstd")
