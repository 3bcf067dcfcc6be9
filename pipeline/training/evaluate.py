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

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.towers import ClipTowers
from pipeline.data.images import evaluation_pixels
from pipeline.data.parquet import SplitReader
from pipeline.training.loop import autocast

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


class Classifier:
    """CLIP with the prompts of some tasks, its text features computed once.

    Args:
        words: task → words of its classes, by label.
        prompts: text prompts (T, K, b, d_l) and vision prompts (T, K, b, d_v) in the order of `words`, or None for
            zero-shot CLIP.
    """

    @torch.inference_mode()
    def __init__(
        self,
        towers: ClipTowers,
        template: str,
        words: dict[str, Sequence[str]],
        prompts: tuple[torch.Tensor, torch.Tensor] | None = None,
        precision: str = "auto",
    ):
        self.towers = towers
        self.precision = precision
        tokens = class_tokens(towers.tokenizer, template, list(words.values())).to(towers.device)
        text_prompts, self._vision_prompts = prompts or (None, None)
        with autocast(towers.device, precision):
            z = towers.encode_text(tokens, text_prompts)
        self._text_features = dict(zip(words, z.split(tokens.classes_per_task)))
        self._index = {task: at for at, task in enumerate(words)}

    @torch.inference_mode()
    def probabilities(self, task: str, pixels: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C) of uint8 images (B, 3, S, S) by the prompts of `task`."""
        at = self._index[task]
        vision_prompts = None if self._vision_prompts is None else self._vision_prompts[at : at + 1]
        images = self.towers.normalize_pixels(pixels.to(self.towers.device))
        with autocast(self.towers.device, self.precision):
            x = self.towers.encode_image(images, vision_prompts, [len(images)])
        return self.towers.logits(x, self._text_features[task]).softmax(dim=1)


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
