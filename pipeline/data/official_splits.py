"""Names of official splits, and the entries of a data set before they are indexed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

OfficialSplit = Literal["train", "test", "other"]
"""other: for validation or in no split; with official splits, such an image is in neither training nor test."""

SPLIT_NAMES: dict[str, OfficialSplit] = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
    "val": "other",
    "valid": "other",
    "validation": "other",
    "crossval": "other",
    "dev": "other",
}
_NOUNS = r"(?:sets?|split|data|dataset|images?|imgs?|folder)"


@lru_cache(maxsize=1 << 14)
def parse_split_name(name: str) -> OfficialSplit | None:
    """Return the split that a folder or a value names, in any case and with numbers or words such as set
    (`Training_Set`, `testset`, `train images`, `val2017`); None: it names none."""
    words = re.sub(r"[\W\d_]+", " ", name.casefold()).strip().replace("hold out", "holdout")
    return SPLIT_NAMES.get(words) or SPLIT_NAMES.get(re.sub(rf" ?{_NOUNS}$", "", words))


def similar_split_names(names: Iterable[str]) -> list[str]:
    """Return names that differ from each other only in the name of a split: seg_train and seg_test."""
    names_by_rest: dict[str, dict[str, str]] = {}
    for name in names:
        for word in re.findall(r"[a-z]+", name.lower()):
            if word in SPLIT_NAMES:
                names_by_rest.setdefault(name.lower().replace(word, "*", 1), {})[word] = name
    return sorted({name for group in names_by_rest.values() if len(group) > 1 for name in group.values()})


class TableRow(NamedTuple):
    """Row of a Parquet file that holds an image: size and times of the file, and the row group."""

    size: int
    modified_ns: int
    changed_ns: int
    row_group: int


class DatasetEntry(NamedTuple):
    """An image below data.root; with an empty path, a class folder itself."""

    path: str
    """Relative to the root, with forward slashes; absolute for a manifest's image outside of the root, if the manifest
    has it so."""
    task: str
    class_folder: str
    split: OfficialSplit | None = None
    """None: the data has no split for it."""
    table_row: TableRow | None = None
    other_classes: tuple[str, ...] = ()
    """Further classes of the image, with data.multi_label."""

    @property
    def class_folders(self) -> tuple[str, ...]:
        """All classes of the image."""
        return (self.class_folder, *self.other_classes)
