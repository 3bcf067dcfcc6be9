"""Image lists as published with Dassl and DomainNet: `<task>_<split>.txt` with lines such as
`clipart/aircraft_carrier/x.jpg 0`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.buckets import AnyPath, relative_path
from pipeline.config import read_text, read_text_start
from pipeline.data.names import escape_for_terminal
from pipeline.data.official_splits import DatasetEntry, OfficialSplit
from pipeline.data.symlinks import SymlinkChecker
from pipeline.data.walk import Skipped, is_junk
from pipeline.errors import UserError

MAX_LINE_SHOWN = 1000
PROBED_BYTES = 1 << 15


@dataclass(frozen=True)
class ListLayout:
    list_folders: tuple[str, ...]
    """Candidate folders of the lists, below the root; the first that has lists is used."""
    image_folders: tuple[str, ...]
    """Candidate folders that paths in the lists are relative to; the first that exists is used."""
    splits: Mapping[str, OfficialSplit]
    """End of a list's file name → its split."""

    def files(self, root: AnyPath) -> Sequence[AnyPath]:
        """Return the lists under a root; empty: it has another layout."""
        for folder in self.list_folders:
            files: Iterable[AnyPath] = (root / folder).glob("*.txt")
            lists = [file for file in files if self.split_of(file) and not is_junk(file.name)]
            if lists:
                return sorted(lists, key=str)
        return []

    def images_root(self, root: AnyPath) -> AnyPath:
        return next((root / folder for folder in self.image_folders if (root / folder).is_dir()), root)

    def split_of(self, file: AnyPath) -> OfficialSplit | None:
        """Return the split of a list; None: not the name of a list."""
        return next((split for ending, split in self.splits.items() if file.stem.endswith(ending)), None)


_TRAIN_AND_TEST: dict[str, OfficialSplit] = {"_train": "train", "_test": "test"}
LIST_LAYOUTS = {
    "mini_domainnet": ListLayout(("splits_mini",), ("",), _TRAIN_AND_TEST),
    "domainnet": ListLayout(("splits", ""), ("",), _TRAIN_AND_TEST),
    # Its test lists name all images of a domain, for tests on unseen domains.
    "pacs": ListLayout(
        ("splits", ""),
        ("images", "kfold", ""),
        {"_train_kfold": "train", "_crossval_kfold": "test", "_test_kfold": "other"},
    ),
}


def is_image_list(file: AnyPath) -> bool:
    """Return whether a text file has lines of an image list."""
    return bool(listed_paths(file))


def listed_paths(file: AnyPath) -> list[str]:
    """Return paths of images from the first lines of a list; none: the file is no list."""
    try:
        lines = read_text_start(file, PROBED_BYTES).split("\n")
    except OSError:
        return []
    return [path for line in lines if (path := _parse_line(line))]


def _parse_line(line: str) -> str | None:
    """Return the path of a line `task/class/image label`; None: it has another form."""
    # File names with backslashes are refused in every layout.
    path, label = (line.strip().replace("\\", "/").rsplit(None, 1) + ["", ""])[:2]
    parts = path.split("/")
    is_valid = len(parts) >= 3 and label.isdigit() and {"", ".", ".."}.isdisjoint(parts) and "\0" not in path
    return path if is_valid else None


def read_lists(layout: str, root: AnyPath, symlinks: SymlinkChecker) -> tuple[list[DatasetEntry], list[Skipped]]:
    """Return the union of the lists of LIST_LAYOUTS[layout], sorted by path, and files that have a list's name only.

    Raises:
        UserError: an invalid line, or an image in lists of two splits; lists that are links out of the root.
    """
    list_layout = LIST_LAYOUTS[layout]
    splits: dict[str, OfficialSplit] = {}
    files = list_layout.files(root)
    for file in files:
        if symlinks.escapes_root(file):
            symlinks.raise_on_escape(root)
    lists = [file for file in files if is_image_list(file)] or files
    for file in lists:
        split = list_layout.split_of(file)
        assert split
        for number, line in enumerate(read_text(file, str(file), "surrogateescape").split("\n"), 1):
            if not line.strip():
                continue
            path = _parse_line(line)
            if path is None:
                raise UserError(f"{file}:{number}: expected `task/class/image label`, got {line[:MAX_LINE_SHOWN]!r}")
            known_split = splits.get(path, "other")
            if "other" not in (known_split, split) and known_split != split:
                raise UserError(f"{file}:{number}: {escape_for_terminal(path)} is also listed as a {known_split} image")
            splits[path] = split if known_split == "other" else known_split
    images_root = list_layout.images_root(root)
    for folder in {path.rpartition("/")[0] for path in splits}:
        symlinks.escapes_root(images_root / folder)
    entries = []
    for path, split in sorted(splits.items()):
        task, class_folder = path.split("/")[:2]
        entries.append(DatasetEntry(path, task, class_folder, split))
    return entries, [Skipped(relative_path(file, root), ".txt") for file in files if file not in lists]
