"""Accuracy on test sets that are streamed from Parquet and decoded on all cores while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.clip.classifier import Classifier
from pipeline.data.images import evaluation_pixels
from pipeline.data.parquet import SplitReader

BATCH_SIZE = 128


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
    """Predictions for the tasks' whole test sets, in stored order; `on_images` is told how many more are done."""
    predictions: list[Prediction] = []
    for task in tasks:
        rows = reader.rows("test", task, ("image", "label", "path"))
        for batch, pixels in decoded_batches(rows, classifier.towers.image_size, threads):
            probability, predicted = classifier.probabilities(task, pixels).max(dim=1)
            predictions += [
                Prediction(task, row["path"], row["label"], int(p), float(q))
                for row, p, q in zip(batch, predicted, probability)
            ]
            on_images(len(batch))
    return predictions


def decoded_batches(
    rows: Iterable[dict], image_size: int, threads: int, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[list[dict], torch.Tensor]]:
    """Batches of rows with their pixels, uint8 (B, 3, S, S), decoded ahead by threads: Pillow frees the GIL."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[list[dict], list[Future]]] = deque()
        rows = iter(rows)
        pending = iter(lambda: list(islice(rows, batch_size)), [])
        while True:
            for batch in islice(pending, 2 - len(ahead)):
                ahead.append((batch, [pool.submit(evaluation_pixels, row["image"], image_size) for row in batch]))
            if not ahead:
                return
            batch, futures = ahead.popleft()
            yield batch, torch.from_numpy(np.stack([future.result() for future in futures]))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    pq.write_table(pa.Table.from_pylist([vars(prediction) for prediction in predictions]), path, compression="zstd")
