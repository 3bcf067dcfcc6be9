"""Scores of a method's predictions on test sets: accuracy with standard errors, per class, confusions, mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.files import atomic_write, read_parquet

PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in ("path", "task", "method", "true_label", "label")]
    + [("probability", pa.float32()), ("loss", pa.float32())]
)
"""Rows of a run's predictions.parquet: columns of the output of mmap-clip predict, the truth, and its cross-entropy in
nats."""


class Confusion(NamedTuple):
    """Number of test images of class `label` that were predicted as class `predicted`."""

    label: int
    predicted: int
    images: int


class Estimate(NamedTuple):
    """A fraction, or a difference of fractions, with its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class TaskScores:
    """Predictions of one method for the N test images of a task, in stored order.

    Args:
        class_names: labels of the C classes, as predictions show them.
        labels: (N,) true class.
        predicted: (N,) most probable class.
        probabilities: (N,) its probability.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @cached_property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        correct: np.ndarray = self.labels == self.predicted
        return correct

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        return binomial_standard_error(self.accuracy, self.num_images)

    @property
    def is_at_chance(self) -> bool:
        """Whether the accuracy is not above guessing one of the C classes by more than two standard errors."""
        chance = 1 / len(self.class_names)
        return self.accuracy <= chance + 2 * binomial_standard_error(chance, self.num_images)

    @property
    def only_predicted_class(self) -> str | None:
        """The class that is predicted for every image, if there is one and the test set has others."""
        if self.correct.all() or not (self.predicted == self.predicted[0]).all() or self.num_images == 1:
            return None
        return self.class_names[int(self.predicted[0])]

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of test images of each class (C,), and of those that were classified correctly (C,)."""
        num_classes = len(self.class_names)
        hits = np.bincount(self.labels[self.correct], minlength=num_classes)
        return np.bincount(self.labels, minlength=num_classes), hits

    def confusions(self) -> list[Confusion]:
        """Return the pairs of a true and a predicted class that occur, equal ones included, most frequent first."""
        num_classes = len(self.class_names)
        codes, counts = np.unique(self.labels * num_classes + self.predicted, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [
            Confusion(int(code) // num_classes, int(code) % num_classes, int(count))
            for code, count in zip(codes[order], counts[order])
        ]

    def worst_mistakes(self, limit: int) -> list[int]:
        """Return the positions of the wrong predictions with the highest probabilities, highest first."""
        wrong = np.flatnonzero(~self.correct)
        order = np.argsort(-self.probabilities[wrong], kind="stable")[:limit]
        return [int(position) for position in wrong[order]]


ScoresByTask = dict[str, TaskScores]


def binomial_standard_error(accuracy: float, num_images: int) -> float:
    return sqrt(accuracy * (1 - accuracy) / num_images)


def average_standard_error(standard_errors: Sequence[float]) -> float:
    """Return the standard error of the plain mean of independent estimates."""
    return sqrt(sum(error**2 for error in standard_errors)) / len(standard_errors)


def paired_difference(scores: TaskScores, baseline: TaskScores) -> Estimate:
    """Return the accuracy minus the baseline's, with the standard error of the difference on the same images, whose
    variance is that of the images on which only one of both is correct."""
    difference = scores.correct.astype(np.int8) - baseline.correct.astype(np.int8)
    return Estimate(float(difference.mean()), float(difference.std() / sqrt(len(difference))))


def average_difference(scores: ScoresByTask, baseline: ScoresByTask) -> Estimate:
    """Return the mean over tasks of `paired_difference`."""
    estimates = [paired_difference(scores[task], baseline[task]) for task in scores]
    return Estimate(
        sum(estimate.value for estimate in estimates) / len(estimates),
        average_standard_error([estimate.standard_error for estimate in estimates]),
    )


def read_scores(files: Sequence[Path], class_names: Mapping[str, Sequence[str]]) -> ScoresByTask:
    """Read the predictions.parquet of each group of a method; return task → scores, in the order of `class_names`.

    Args:
        class_names: task → labels of its classes.
    """
    scores: ScoresByTask = {}
    for file in files:
        for task, table in _tables_by_task(file, ("label", "predicted", "probability")):
            labels, predicted, probabilities = (table[name].to_numpy() for name in table.column_names)
            scores[task] = TaskScores(
                tuple(class_names[task]),
                labels.astype(np.int32),
                predicted.astype(np.int32),
                probabilities.astype(np.float32),
            )
    return {task: scores[task] for task in class_names}


def _tables_by_task(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    table = read_parquet(file, ["task", *columns])
    for task in pc.unique(table["task"]).to_pylist():
        yield task, table.filter(pc.equal(table["task"], task)).select(columns)


def write_run_predictions(
    target: Path, files_by_method: Mapping[str, Sequence[Path]], class_names: Mapping[str, Sequence[str]]
) -> None:
    """Write the predictions of all methods as one file with the columns PREDICTIONS, one task of a method in memory at
    a time; arguments as of `read_scores`."""
    with atomic_write(target) as partial, pq.ParquetWriter(partial, PREDICTIONS, compression="zstd") as writer:
        for method, files in files_by_method.items():
            for file in files:
                for task, table in _tables_by_task(file, ("path", "label", "predicted", "probability", "loss")):
                    names = pa.array(class_names[task])
                    columns = [
                        table["path"],
                        pa.repeat(task, len(table)),
                        pa.repeat(method, len(table)),
                        names.take(table["label"].combine_chunks()),
                        names.take(table["predicted"].combine_chunks()),
                        table["probability"],
                        table["loss"],
                    ]
                    writer.write_table(pa.table(columns, names=PREDICTIONS.names).cast(PREDICTIONS))


def write_class_accuracy(target: Path, scores: Mapping[str, ScoresByTask]) -> None:
    """Write a row per method, task and class: its test images, and how many of them were classified correctly."""
    rows = [
        {"method": method, "task": task, "label": name, "images": int(images), "correct": int(hits)}
        for method, method_scores in scores.items()
        for task, task_scores in method_scores.items()
        for name, images, hits in zip(task_scores.class_names, *task_scores.class_counts())
    ]
    _write_rows(target, rows)


def write_confusions(target: Path, scores: Mapping[str, ScoresByTask]) -> None:
    """Write a row per method, task, true class and predicted class that occur together."""
    rows = [
        {
            "method": method,
            "task": task,
            "true_label": task_scores.class_names[confusion.label],
            "label": task_scores.class_names[confusion.predicted],
            "images": confusion.images,
        }
        for method, method_scores in scores.items()
        for task, task_scores in method_scores.items()
        for confusion in task_scores.confusions()
    ]
    _write_rows(target, rows)


def _write_rows(target: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with atomic_write(target) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
