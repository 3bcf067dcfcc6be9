"""Names of the metrics of results, and which one a result has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACCURACY, MAP = "accuracy", "mAP"
"""Of tasks with one label per image, and where images may have several: mean average precision over classes."""


def metric_of(result: Mapping[str, Any]) -> str:
    """Return ACCURACY or MAP: the metric that a result.json, or a method's entry of summary.json, has."""
    return MAP if MAP in result else ACCURACY
