"""Image lists as Dassl's and DomainNet's authors publish them: `<task>_<split>.txt`, a line
`clipart/aircraft_carrier/x.jpg 0`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import read_text
from pipeline.data.names import escape_for_terminal
from pipeline.data.official_splits import DatasetEntry, OfficialSplit
from pipeline.data.symlinks import SymlinkChecker
from pipeline.errors import UserError

MAX_LINE_SHOWN = 1000


@dataclass(frozen=True)
class ListLayout:
    lists: tuple[str, ...]
    """Where lists may lie below the root; the first folder that has some counts."""
    images: tuple[str, ...]
    """Where the paths in them may begin; the first folder that is there counts."""
    splits: Mapping[str, OfficialSplit]
    """How a list's name ends → what it lists."""

    def files(self, root: Path) -> list[Path]:
        """The lists under a root; none: it has no such layout."""
        for place in self.lists:
            found = [file for file in (root / place).glob("*.txt") if self.split_of(file)]
            if found:
                return sorted(found)
        return []

    def images_root(self, root: Path) -> Path:
        return next((root / place for place in self.images if (root / place).is_dir()), root)

    def split_of(self, file: Path) -> OfficialSplit | None:
        """None: the name is no list's."""
        return next((split for ending, split in self.splits.items() if file.stem.endswith(ending)), None)


_TRAIN_AND_TEST: dict[str, OfficialSplit] = {"_train": "train", "_test": "test"}
LIST_LAYOUTS = {
    "mini_domainnet": ListLayout(("splits_mini",), ("",), _TRAIN_AND_TEST),
    "domainnet": ListLayout(("splits", ""), ("",), _TRAIN_AND_TEST),
    # Its test lists name all images of a domain, for tests on domains that did not train.
    "pacs": ListLayout(
        ("splits", ""),
        ("images", "kfold", ""),
        {"_train_kfold": "train", "_crossval_kfold": "test", "_test_kfold": "other"},
    ),
}


def read_lists(layout: str, root: Path, symlinks: SymlinkChecker) -> list[DatasetEntry]:
    """The union of the lists of LIST_LAYOUTS[layout], sorted by path.

    Raises:
        UserError: no lists; a line that is none, or names an image that another list has in another split; lists that
            are links out of the root.
    """
    of_layout = LIST_LAYOUTS[layout]
    files = of_layout.files(root)
    if not files:
        places = " or ".join(str(root / place) for place in of_layout.lists)
        endings = ", ".join(f"*{ending}.txt" for ending in of_layout.splits)
        raise UserError(
            f"data.layout={layout} needs image lists ({endings}) in {places}; for all images of plain folders: "
            "--data.layout folders"
        )
    splits: dict[str, OfficialSplit] = {}
    for file in files:
        if symlinks.escapes_root(file):
            symlinks.refuse(root)
        split = of_layout.split_of(file)
        assert split
        for number, line in enumerate(read_text(file, str(file), "surrogateescape").split("\n"), 1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            parts = path.split("/")
            if len(parts) < 3 or not label.isdigit() or not {"", ".", ".."}.isdisjoint(parts) or "\0" in path:
                raise UserError(f"{file}:{number}: expected `task/class/image label`, got {line[:MAX_LINE_SHOWN]!r}")
            before = splits.get(path, "other")
            if "other" not in (before, split) and before != split:
                raise UserError(f"{file}:{number}: {escape_for_terminal(path)} is in a list of {before} images too")
            splits[path] = split if before == "other" else before
    images_root = of_layout.images_root(root)
    for folder in {path.rpartition("/")[0] for path in splits}:
        symlinks.escapes_root(images_root / folder)
    found = []
    for path, split in sorted(splits.items()):
        task, class_folder = path.split("/")[:2]
        found.append(DatasetEntry(path, task, class_folder, split))
    return found
