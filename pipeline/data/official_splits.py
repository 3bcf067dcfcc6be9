"""What data sets call their splits, and what that means here."""

from __future__ import annotations

from typing import Literal, NamedTuple

OfficialSplit = Literal["train", "test", "other"]
"""other: for validation, or for no split; such an image neither trains nor tests where given splits are respected."""

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
    """Of an image that lies in a Parquet file: the file's bytes and time, and the row group."""

    size: int
    modified_ns: int
    row_group: int


class DatasetEntry(NamedTuple):
    """An image of a data root; with an empty path, a class folder itself."""

    path: str
    """Relative to the root, with forward slashes; absolute for one that a manifest has from elsewhere."""
    task: str
    class_folder: str
    split: OfficialSplit | None = None
    """None: the data does not say."""
    table: TableRow | None = None
