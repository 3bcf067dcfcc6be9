"""Names of official splits, and the entries of a data set before they are indexed."""

from __future__ import annotations

from typing import Literal, NamedTuple

OfficialSplit = Literal["train", "test", "other"]
"""other: for validation or in no split; with official splits, such an image is in neither training nor test."""

SPLIT_NAMES: dict[str, OfficialSplit] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "other",
    "valid": "other",
    "validation": "other",
    "crossval": "other",
    "dev": "other",
}


class TableRow(NamedTuple):
    """Row of a Parquet file that holds an image: size and modification time of the file, and the row group."""

    size: int
    modified_ns: int
    row_group: int


class DatasetEntry(NamedTuple):
    """An image below data.root; with an empty path, a class folder itself."""

    path: str
    """Relative to the root, with forward slashes; absolute for a manifest's image outside of the root."""
    task: str
    class_folder: str
    split: OfficialSplit | None = None
    """None: the data has no split for it."""
    table_row: TableRow | None = None
