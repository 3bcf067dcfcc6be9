"""The prediction for one image, in the form that Python, files and services share; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("path", "task", "label", "probability", "error")
"""Columns of the tables of predictions: CSV, TSV, Parquet."""


@dataclass(frozen=True, repr=False)
class ImagePrediction:
    """Prediction for one image among the classes of one task; for a broken image only path, task and error are set."""

    path: str | None = None
    """Path or URL of the image; None if it has none."""
    task: str | None = None
    label: str | None = None
    """The most probable class; None if its probability is below the threshold or the image is broken. Where images may
    have several labels: all classes with a probability of 0.5 or another threshold, joined with `;`."""
    probability: float | None = None
    """Probability of the most probable class, 0 to 1."""
    error: str | None = None
    """Why the image is broken."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Class → probability, in the order of `TrainedModel.labels`; where images may have several labels, each class's
    own, from 0 to 1."""
    predictions_by_task: dict[str, ImagePrediction] = field(default_factory=dict)
    """Without a requested task: the prediction of each task, of which this is the most probable; else empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as a JSON object; services return it."""
        return {
            **{name: getattr(self, name) for name in COLUMNS},
            "probabilities": self.probabilities,
            "predictions_by_task": [
                {"task": task, "label": prediction.label, "probability": prediction.probability}
                for task, prediction in self.predictions_by_task.items()
            ],
        }

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in COLUMNS}
        if self.probability is not None:
            values["probability"] = round(self.probability, 4)
        texts = (f"{name}={value!r}" for name, value in values.items() if value is not None or name == "label")
        return f"{type(self).__name__}({', '.join(texts)})"
