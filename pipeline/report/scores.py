"""Scores of a method's predictions on test sets: accuracy with standard errors, per class, confusions, mistakes; where
images may have several labels, mean average precision.

The average precision of a class is that of scikit-learn's `average_precision_score`: the mean over the images that have
the class of the precision at their rank by probability; equally probable images share the rank of the last. Its plain
mean over the classes is the mAP, and its standard error is by the jackknife over images (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, section 11.2), which is exact arithmetic, without drawing.
"""

from __future__ import annotations

import math
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

from pipeline.data.names import LABEL_THRESHOLD
from pipeline.files import atomic_write, read_parquet

PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in ("path", "task", "method", "true_label", "label")]
    + [("probability", pa.float32()), ("loss", pa.float32())]
)
"""Rows of a run's predictions.parquet: columns of the output of mmap-clip predict, the truth, and its cross-entropy in
nats."""
_LABELS = pa.list_(pa.string())
MULTI_LABEL_PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in ("path", "task", "method")]
    + [("true_labels", _LABELS), ("labels", _LABELS), ("probabilities", pa.map_(pa.string(), pa.float64()))]
    + [("loss", pa.float32())]
)
"""The same where images may have several labels; `labels` are those of LABEL_THRESHOLD."""


class Confusion(NamedTuple):
    """Number of test images of class `label` that were predicted as class `predicted`."""

    label: int
    predicted: int
    images: int


class Estimate(NamedTuple):
    """A value of a metric, or a difference of values, with its standard error."""

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
    def value(self) -> float:
        """The accuracy."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        return binomial_standard_error(self.value, self.num_images)

    @property
    def is_at_chance(self) -> bool:
        """Whether the accuracy is not above guessing one of the C classes by more than two standard errors."""
        chance = 1 / len(self.class_names)
        return self.value <= chance + 2 * binomial_standard_error(chance, self.num_images)

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


@dataclass(frozen=True)
class MultiLabelScores:
    """Predictions of one method for the N test images of a task in which an image may have several labels.

    Args:
        class_names: labels of the C classes, as predictions show them.
        has_label: (N, C) bool, the truth.
        probabilities: (N, C).
    """

    class_names: tuple[str, ...]
    has_label: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def from_lists(
        cls, class_names: Sequence[str], labels: Sequence[Sequence[int]], probabilities: Sequence[Sequence[float]]
    ) -> MultiLabelScores:
        """Return the scores of N images with the classes `labels` each."""
        has_label = np.zeros((len(labels), len(class_names)), bool)
        for row, image_labels in zip(has_label, labels, strict=True):
            row[list(image_labels)] = True
        return cls(tuple(class_names), has_label, np.array(probabilities, np.float64))

    @property
    def num_images(self) -> int:
        return len(self.has_label)

    @cached_property
    def _precisions(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = [_average_precision(*columns) for columns in zip(self.has_label.T, self.probabilities.T, strict=True)]
        values, without_image = map(np.array, zip(*pairs))
        return values, without_image.T

    @property
    def average_precisions(self) -> np.ndarray:
        """(C,): average precision of each class; NaN without an image of it."""
        return self._precisions[0]

    @property
    def value(self) -> float:
        """The mAP: mean over the classes with an image."""
        return float(np.nanmean(self.average_precisions))

    @cached_property
    def without_image(self) -> np.ndarray:
        """(N,): the mAP without each image; a class of that image alone does not count then."""
        values = self._precisions[1]
        counts = np.count_nonzero(~np.isnan(values), axis=1)
        return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), self.value)

    @property
    def standard_error(self) -> float:
        return jackknife_standard_error(self.without_image)

    @property
    def is_at_chance(self) -> bool:
        """Whether the mAP is not above that of a random order, the mean frequency of the classes, by more than two
        standard errors."""
        return self.value <= float(self.has_label.mean()) + 2 * self.standard_error

    @property
    def only_predicted_class(self) -> None:
        """None: every class is a prediction of its own."""


AnyScores = TaskScores | MultiLabelScores
ScoresByTask = dict[str, AnyScores]


def _average_precision(has_label: np.ndarray, probabilities: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the average precision of a class, and (N,) that without each image; NaN without an image of the class.

    Equally probable images are a group: R of N images are as probable or more, of which T have the class, n of them in
    the group. The average precision is the sum over groups of n T / R over the number of images of the class. Without
    an image, R and, if it has the class, T are one less in its group and all less probable ones.
    """
    num_labeled = int(has_label.sum())
    if not num_labeled:
        return math.nan, np.full(len(has_label), math.nan)
    order = np.argsort(-probabilities, kind="stable")
    is_last = np.append(np.diff(probabilities[order]) != 0, True)
    group = np.cumsum(is_last) - is_last
    ranks = np.flatnonzero(is_last) + 1
    hits = np.cumsum(has_label[order])[is_last]
    group_hits = np.diff(hits, prepend=0)
    terms = group_hits * hits / ranks
    reduced_ranks = np.maximum(ranks - 1, 1)  # where the first image is a group, no term is left without it
    lower_terms = np.cumsum(terms) - terms
    reduced_terms = np.cumsum((group_hits * hits / reduced_ranks)[::-1])[::-1]
    lost_hits = np.cumsum((group_hits / reduced_ranks)[::-1])[::-1] + (hits - 1) / reduced_ranks
    without_image = np.empty(len(has_label))
    labeled = has_label[order]
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = (lower_terms + reduced_terms)[group] - np.where(labeled, lost_hits[group], 0.0)
        without_image[order] = np.where(
            labeled, sums / (num_labeled - 1) if num_labeled > 1 else math.nan, sums / num_labeled
        )
    return float(terms.sum() / num_labeled), without_image


def jackknife_standard_error(without_image: np.ndarray) -> float:
    """Return the standard error of an estimate from its values without each of N images (N,); 0 for a single image."""
    num_images = len(without_image)
    return float(sqrt((num_images - 1) * without_image.var()))


def binomial_standard_error(accuracy: float, num_images: int) -> float:
    return sqrt(accuracy * (1 - accuracy) / num_images)


def average_standard_error(standard_errors: Sequence[float]) -> float:
    """Return the standard error of the plain mean of independent estimates."""
    return sqrt(sum(error**2 for error in standard_errors)) / len(standard_errors)


def paired_difference(scores: AnyScores, baseline: AnyScores) -> Estimate:
    """Return the accuracy minus the baseline's, with the standard error of the difference on the same images, whose
    variance is that of the images on which only one of both is correct; of mAPs, by the jackknife of the difference."""
    if isinstance(scores, MultiLabelScores) and isinstance(baseline, MultiLabelScores):
        error = jackknife_standard_error(scores.without_image - baseline.without_image)
        return Estimate(scores.value - baseline.value, error)
    assert isinstance(scores, TaskScores) and isinstance(baseline, TaskScores)  # a run has tasks of one kind
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
        if _is_multi_label(file):
            for task, table in _tables_by_task(file, ("label", "probabilities")):
                scores[task] = MultiLabelScores.from_lists(class_names[task], *(c.to_pylist() for c in table.columns))
            continue
        for task, table in _tables_by_task(file, ("label", "predicted", "probability")):
            labels, predicted, probabilities = (table[name].to_numpy() for name in table.column_names)
            scores[task] = TaskScores(
                tuple(class_names[task]),
                labels.astype(np.int32),
                predicted.astype(np.int32),
                probabilities.astype(np.float32),
            )
    return {task: scores[task] for task in class_names}


def _is_multi_label(file: Path) -> bool:
    return "probabilities" in pq.read_schema(file).names


def _tables_by_task(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    table = read_parquet(file, ["task", *columns])
    for task in pc.unique(table["task"]).to_pylist():
        yield task, table.filter(pc.equal(table["task"], task)).select(columns)


def write_run_predictions(
    target: Path, files_by_method: Mapping[str, Sequence[Path]], class_names: Mapping[str, Sequence[str]]
) -> None:
    """Write the predictions of all methods as one file with the columns PREDICTIONS or MULTI_LABEL_PREDICTIONS, one
    task of a method in memory at a time; arguments as of `read_scores`."""
    is_multi_label = _is_multi_label(next(file for files in files_by_method.values() for file in files))
    schema = MULTI_LABEL_PREDICTIONS if is_multi_label else PREDICTIONS
    with atomic_write(target) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for method, files in files_by_method.items():
            for file in files:
                if is_multi_label:
                    for task, table in _tables_by_task(file, ("path", "label", "probabilities", "loss")):
                        names = class_names[task]
                        rows = [_multi_label_row(task, method, names, *row.values()) for row in table.to_pylist()]
                        writer.write_table(pa.Table.from_pylist(rows, MULTI_LABEL_PREDICTIONS))
                    continue
                for task, table in _tables_by_task(file, ("path", "label", "predicted", "probability", "loss")):
                    labels = pa.array(class_names[task])
                    columns = [
                        table["path"],
                        pa.repeat(task, len(table)),
                        pa.repeat(method, len(table)),
                        labels.take(table["label"].combine_chunks()),
                        labels.take(table["predicted"].combine_chunks()),
                        table["probability"],
                        table["loss"],
                    ]
                    writer.write_table(pa.table(columns, names=PREDICTIONS.names).cast(PREDICTIONS))


def _multi_label_row(
    task: str,
    method: str,
    class_names: Sequence[str],
    path: str,
    labels: Sequence[int],
    probabilities: Sequence[float],
    loss: float,
) -> dict[str, object]:
    return {
        "path": path,
        "task": task,
        "method": method,
        "true_labels": [class_names[label] for label in labels],
        "labels": [name for name, value in zip(class_names, probabilities, strict=True) if value >= LABEL_THRESHOLD],
        "probabilities": list(zip(class_names, probabilities, strict=True)),
        "loss": loss,
    }


def write_class_precision(target: Path, scores: Mapping[str, ScoresByTask]) -> None:
    """Write a row per method, task and class: its test images, and its average precision."""
    rows = [
        {"method": method, "task": task, "label": name, "images": int(images), "average_precision": float(value)}
        for method, method_scores in scores.items()
        for task, task_scores in method_scores.items()
        if isinstance(task_scores, MultiLabelScores)
        for name, images, value in zip(
            task_scores.class_names, task_scores.has_label.sum(axis=0), task_scores.average_precisions
        )
    ]
    _write_rows(target, rows)


def write_class_accuracy(target: Path, scores: Mapping[str, ScoresByTask]) -> None:
    """Write a row per method, task and class: its test images, and how many of them were classified correctly."""
    rows = [
        {"method": method, "task": task, "label": name, "images": int(images), "correct": int(hits)}
        for method, method_scores in scores.items()
        for task, task_scores in method_scores.items()
        if isinstance(task_scores, TaskScores)
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
        if isinstance(task_scores, TaskScores)
        for confusion in task_scores.confusions()
    ]
    _write_rows(target, rows)


def _write_rows(target: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with atomic_write(target) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
