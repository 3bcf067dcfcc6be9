"""Recognize the layout of a data set by its folders and lists, or refuse it by name, with the option that fits.

Nothing is guessed: folders that fit two layouts, or none, are refused. The remedies in the messages are tried first:
a root one level higher or lower is named only if its layout is recognized.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipeline.buckets import AnyPath, relative_path
from pipeline.config.values import list_arguments
from pipeline.data.lists import LIST_LAYOUTS, is_image_list, listed_paths
from pipeline.data.manifest import check_suffix, is_table_name, table_files
from pipeline.data.names import escape_for_terminal, truncated_list
from pipeline.data.official_splits import SPLIT_NAMES, parse_split_name, similar_split_names
from pipeline.data.symlinks import SymlinkChecker
from pipeline.data.walk import (
    ARCHIVE_SUFFIXES,
    BROKEN_LINK,
    is_directory,
    is_junk,
    is_unread_image,
    list_folder,
    skip_kind,
    skipped_note,
    walk_folders,
)
from pipeline.errors import UserError

OFFICE_HOME_FOLDER = "OfficeHomeDataset_10072016"
OFFICE_HOME_TASKS = ("Art", "Clipart", "Product", "Real World")
MINI_DOMAINNET_LISTS = LIST_LAYOUTS["mini_domainnet"].list_folders[0]
UNSPLIT_FOLDER = "full"
"""Folder in which Dassl's VLCS repeats all images, next to those of its splits."""
FOLDER_LAYOUTS = ("folders", "office_home")
"""Layouts in which the path alone gives task and class."""
MAX_PROBED_FOLDERS = 1000
"""Folders listed to find out whether a root at another level fits."""
MAX_PROBED_ROOTS, MAX_ROOTS_SHOWN = 20, 5
MAX_TABLE_DEPTH = 3
"""Levels below the root at which Parquet files are searched."""
IMAGE_FOLDERS = frozenset("images image imgs img jpegimages".split())
ANNOTATION_FOLDERS = frozenset(
    "labels annotations masks imagesets bboxes segmentation segmentationclass segmentationobject ground_truth".split()
)
"""Names, in lower case, of the folders in data sets for object detection and segmentation."""
CAMERA_FOLDER = re.compile(r"\d{3}[A-Z_][A-Z0-9_]{4}")
"""Name of a folder that cameras number, such as 100CANON."""
Roles = tuple[str, ...]
"""Meaning of the folders above an image, from the root: task, split, class."""


@dataclass(frozen=True)
class Layout:
    name: str
    root: AnyPath
    """Folder of the images or lists."""
    roles: Roles = ()
    """Roles of the folders; empty for lists and tables."""
    source: AnyPath | None = None
    """Table, or folder of tables."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""


class _Remedy(NamedTuple):
    """Options that may fit."""

    effect: str
    layout: str | None = None
    root: AnyPath | None = None
    tasks: Sequence[str] | None = None

    def __str__(self) -> str:
        return f"{self.effect}: {self.options}"

    @property
    def options(self) -> str:
        options = [f"--data.root {shlex.quote(str(self.root))}"] if self.root else []
        options += [f"--data.tasks {list_arguments(self.tasks)}"] if self.tasks else []
        options += [f"--data.layout {self.layout}"] if self.layout else []
        return " ".join(options)


class _Mismatch(Exception):
    """The folders do not have a layout.

    Args:
        reason: what is wrong, for the user.
        remedies: options to try.
        levels: how the root may be wrong, if so: too deep, too high.
    """

    def __init__(self, reason: str, *remedies: _Remedy, levels: Collection[str] = ("deep", "high")):
        super().__init__(reason)
        self.reason, self.remedies, self.levels = reason, remedies, levels


class _Folder:
    """A folder whose content is listed once, when it is needed, without junk."""

    def __init__(self, path: AnyPath, symlinks: SymlinkChecker | None = None, budget: list[int] | None = None):
        self.path = path
        self._symlinks = symlinks
        self._budget = budget
        self._children: dict[str, _Folder] = {}

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        self._spend()
        folders: list[str] = []
        files: list[str] = []
        for entry in list_folder(self.path):
            if not is_directory(entry):
                files += [] if is_junk(entry.name) else [entry.name]
            elif not is_junk(entry.name) and not (entry.is_symlink() and self._is_external(entry.path)):
                folders.append(entry.name)
        return folders, files

    def _is_external(self, path: str | AnyPath) -> bool:
        return self._symlinks is not None and self._symlinks.escapes_root(path)

    def _spend(self) -> None:
        if self._budget is not None:
            self._budget[0] -= 1
            if self._budget[0] < 0:
                raise _Mismatch(f"{_shown(self.path)} has many folders")

    @property
    def folders(self) -> list[str]:
        return self._entries[0]

    @property
    def files(self) -> list[str]:
        return self._entries[1]

    def __getitem__(self, name: str) -> _Folder:
        return self._children.setdefault(name, _Folder(self.path / name, self._symlinks, self._budget))

    @cached_property
    def has_images(self) -> bool:
        """Whether images are directly in the folder."""
        return any(skip_kind(name) is None for name in self.files)

    @cached_property
    def contains_images(self) -> bool:
        """Whether there are images at any depth."""
        if self.has_images:
            return True
        for folder in walk_folders(
            self.path, lambda parts, real: "link" if self._is_external(real) else None, lists_ahead=False
        ):
            self._spend()
            if folder.images:
                return True
        return False

    @property
    def image_folders(self) -> Iterator[str]:
        """Folders that contain images."""
        return (name for name in self.folders if self[name].contains_images)

    @cached_property
    def has_classes(self) -> bool:
        """Whether a folder has images directly in it."""
        return any(self[name].has_images for name in self.folders)

    @cached_property
    def split_folders(self) -> list[str]:
        """Folders with the name of a split, and images in folders below."""
        names = [name for name in self.folders if parse_split_name(name)]
        return [name for name in names if self[name].contains_images and not self[name].has_images]

    @cached_property
    def extra_folders(self) -> list[str]:
        """Folders with images beside those of splits."""
        names = [name for name in self.folders if not parse_split_name(name) and name.casefold() != UNSPLIT_FOLDER]
        return [name for name in names if self[name].contains_images]


def recognize_layout(name: str, data_root: AnyPath, tasks: Collection[str] | None, symlinks: SymlinkChecker) -> Layout:
    """Return the layout of `data_root`, a folder or a file.

    Args:
        name: data.layout; auto: recognize it.
        tasks: names of the tasks to use, in NFC; None: all.
        symlinks: records links out of the root that are not followed.

    Raises:
        UserError: no layout fits, or several do; names what was found, and the options that fit.
    """
    if data_root.is_file():
        return _table_layout(name, data_root)
    try:
        return _match(name, _Folder(data_root, symlinks), tasks)
    except _Mismatch as mismatch:
        symlinks.raise_on_escape(data_root)
        folder = _Folder(data_root)
        remedies = list(mismatch.remedies)
        if name == "auto" and folder.contains_images:
            remedies += [remedy for remedy in _table_remedies(folder, depth=1) if remedy not in remedies]
        if name != "auto" and not remedies:
            remedies = [
                _Remedy("to use what is recognized", layout) for layout in ("folders", "split_folders", "manifest")
            ]
        usable = [remedy for remedy in remedies if _is_usable(remedy, name, folder, tasks)]
        lines = [mismatch.reason, *_other_levels(name, data_root, tasks, mismatch.levels), *map(str, usable)]
        raise UserError("\n  ".join(lines)) from None


def similar_path_hint(path: AnyPath) -> str:
    """Return the remedy for a path that does not exist, if its folder has a similar name; else no text."""
    try:
        names = [entry.name for entry in list_folder(path.parent) if entry.name != path.name]
    except UserError:
        return ""
    similar = get_close_matches(path.name, names, 1, 0.7)
    return f"; {_Remedy('did you mean', root=path.parent / similar[0])}" if similar else ""


def _table_layout(name: str, file: AnyPath) -> Layout:
    if name not in ("auto", "manifest"):
        raise UserError(f"data.root={file} is a file, but data.layout={name} needs a folder")
    check_suffix(file)
    return Layout("manifest", file.parent, source=file)


def _match(name: str, folder: _Folder, tasks: Collection[str] | None) -> Layout:
    """Return the layout of a folder. Raises _Mismatch if it has none."""
    match name:
        case "auto":
            return _match_any(folder, tasks)
        case "folders":
            return _match_folders(folder, tasks)
        case "split_folders":
            return Layout(name, folder.path, _split_roles(folder, tasks))
        case "office_home":
            return _match_office_home(folder, tasks)
        case "manifest":
            return _match_tables(folder)
    if name in LIST_LAYOUTS:
        return _match_lists(name, folder, tasks)
    raise ValueError(f"layout {name!r} is unknown")


def _match_any(folder: _Folder, tasks: Collection[str] | None) -> Layout:
    if MINI_DOMAINNET_LISTS in folder.folders:
        return _match_lists("mini_domainnet", folder, tasks)
    if OFFICE_HOME_FOLDER in folder.folders or set(folder.folders) == set(OFFICE_HOME_TASKS):
        return _match_office_home(folder, tasks)
    for name in ("pacs", "domainnet"):
        if any(map(is_image_list, LIST_LAYOUTS[name].files(folder.path))):
            return _match_lists(name, folder, tasks)
    if next(folder.image_folders, None) is None:
        return _match_without_folders(folder)
    selected = [name for name in _selected(folder, tasks) if folder[name].contains_images]
    _check_unread_tasks(folder, selected, tasks)
    splits = [name for name in folder.folders if parse_split_name(name) and folder[name].contains_images]
    if not selected and tasks:  # they may be below the folders of splits
        selected = [split for split in splits if _selected(folder[split], tasks)]
    if any(map(parse_split_name, selected)):
        return _match_root_splits(folder, splits, tasks)
    return _match_task_folders(folder, selected, tasks)


def _match_folders(folder: _Folder, tasks: Collection[str] | None) -> Layout:
    selected = _selected(folder, tasks)
    _check_tasks_found(folder, selected, tasks)
    if not any(next(folder[task].image_folders, None) for task in selected):
        raise _Mismatch(_found(folder))
    return Layout("folders", folder.path, ("task", "class"))


def _match_office_home(folder: _Folder, tasks: Collection[str] | None) -> Layout:
    if OFFICE_HOME_FOLDER in folder.folders:
        folder = folder[OFFICE_HOME_FOLDER]
    _check_tasks_found(folder, folder.folders, tasks or OFFICE_HOME_TASKS)
    return Layout("office_home", folder.path, ("task", "class"))


def _match_lists(name: str, folder: _Folder, tasks: Collection[str] | None) -> Layout:
    layout = LIST_LAYOUTS[name]
    files = layout.files(folder.path)
    if not files:
        folders = " or ".join(str(folder.path / list_folder) for list_folder in layout.list_folders)
        patterns = ", ".join(f"*{ending}.txt" for ending in layout.splits)
        raise _Mismatch(
            f"data.layout={name} needs image lists ({patterns}) in {folders}",
            _Remedy("to use all images of the folders", "folders"),
        )
    images_root = layout.images_root(folder.path)
    paths = [path for file in files for path in listed_paths(file)]
    archives = [name for name in folder.files if name.lower().endswith(ARCHIVE_SUFFIXES)]
    if paths and not any((images_root / path).exists() for path in paths):
        raise _Mismatch(
            f"{_shown(files[0])} lists images that do not exist, such as {_shown(images_root / paths[0])}"
            + (f"; unpack {truncated_list(archives)}" if archives else ""),
            _Remedy("to use all images of the folders", "folders"),
        )
    return Layout(name, folder.path)


def _match_tables(folder: _Folder) -> Layout:
    """Return the layout of a folder of Parquet files, such as a repository of the Hugging Face Hub."""
    sources = list(_parquet_folders(folder, MAX_TABLE_DEPTH))
    files = [folder.path / name for name in folder.files if is_table_name(name) and not is_table_name(name, ".parquet")]
    if len(sources) == 1 and not files:
        return Layout("manifest", folder.path, source=sources[0])
    if candidates := [*sources, *files]:
        raise _Mismatch(
            f"{_shown(folder.path)} has {'several tables' if len(candidates) > 1 else 'a table'}; choose what to use",
            *map(_table_remedy, candidates[:MAX_ROOTS_SHOWN]),
            levels=(),
        )
    raise _Mismatch(
        f"data.root={_shown(folder.path)} contains no .parquet files, and no other table; {_content(folder)}"
    )


def _parquet_folders(folder: _Folder, depth: int) -> Iterator[AnyPath]:
    """Yield the folders that have Parquet files, or folders of splits with them, from the top; those below such a
    folder are not searched."""
    tables = [name for name in folder.folders if depth and table_files(folder.path / name)]
    if any(is_table_name(name, ".parquet") for name in folder.files):
        yield folder.path
    elif tables and all(map(_names_split, tables)):
        yield folder.path
    elif depth:
        for name in folder.folders:
            yield from _parquet_folders(folder[name], depth - 1)


def _names_split(name: str) -> bool:
    return parse_split_name(name.removeprefix("partial-")) is not None


def _match_without_folders(folder: _Folder) -> Layout:
    """Match a root whose folders contain no images."""
    try:
        return _match_tables(folder)
    except _Mismatch as mismatch:
        if not mismatch.levels:
            raise
    if folder.has_images:
        raise _Mismatch(f"{_found(folder)}; images need folders of a task and a class", levels=("deep",))
    skipped = [file for walked in walk_folders(folder.path) for file in walked.skipped]
    if links := [folder.path / path for path, kind in skipped if kind == BROKEN_LINK]:
        targets = (f"{_shown(link)} → {escape_for_terminal(os.readlink(str(link)))}" for link in links)
        raise _Mismatch(f"links have no target: {truncated_list(targets)}; mount or restore the targets", levels=())
    raise _Mismatch(f"{_found(folder)}{f'; {skipped_note(skipped)}' if skipped else ''}", levels=())


def _check_unread_tasks(folder: _Folder, selected: Sequence[str], tasks: Collection[str] | None) -> None:
    """Raise _Mismatch if a task has images only in formats that are not read."""
    for name in sorted({*_selected(folder, tasks)} - {*selected}):
        files = [file for walked in walk_folders(folder.path / name) for file in walked.skipped]
        if any(is_unread_image(file.kind) for file in files):
            raise _Mismatch(
                f"{_shown(folder.path / name)} has no images that are read: {skipped_note(files)}",
                *([_Remedy("to leave it out", tasks=selected)] if selected else []),
                levels=(),
            )


def _match_root_splits(folder: _Folder, splits: Sequence[str], tasks: Collection[str] | None) -> Layout:
    """Match a root with the folders `splits`, which are called like splits."""
    root, split_names = _shown(folder.path), truncated_list(splits)
    as_tasks = _Remedy(f"to use {truncated_list([*folder.image_folders])} as tasks", "folders")
    if all(folder[split].has_images and not folder[split].has_classes for split in splits):
        hint = _detection_hint(folder)
        raise _Mismatch(
            f"{root} has split folders ({split_names}) with images directly in them, and no classes{hint}", levels=()
        )
    if extras := folder.extra_folders:
        raise _Mismatch(
            f"{root} has {truncated_list(extras)} beside folders called like splits ({split_names})",
            _Remedy(f"to leave {truncated_list(extras)} out", "split_folders"),
            _Remedy(f"to use only {truncated_list(extras)}", tasks=extras),
            as_tasks,
            levels=(),
        )
    if any(folder[split].has_classes for split in splits):
        hint = next(filter(None, (_detection_hint(folder[split]) for split in splits)), "")
        if hint and all(map(_has_only_images, (folder[split] for split in splits))):
            raise _Mismatch(f"{root} has split folders ({split_names}) without classes{hint}", levels=())
        raise _Mismatch(
            f"{root} has split folders ({split_names}) but no tasks: their folders are classes",
            _single_task_remedy(folder),
            as_tasks,
            levels=("deep",),
        )
    if len(splits) == 1:
        raise _Mismatch(
            f"{root} has only the split folder {split_names}",
            _Remedy("to use its folders as tasks", root=folder.path / splits[0]),
            _Remedy(f"the same, with {split_names} as their official split", "split_folders"),
            as_tasks,
            levels=(),
        )
    _check_tasks_found(folder, {name for split in splits for name in folder[split].folders}, tasks)
    if not any(folder[split][name].has_classes for split in splits for name in folder[split].folders):
        raise _Mismatch(f"the images of {root} are deeper than <split>/<task>/<class>/<image>", levels=("high",))
    return Layout("split_folders", folder.path, ("split", "task", "class"), notes=_table_notes(folder))


def _match_task_folders(folder: _Folder, selected: Sequence[str], tasks: Collection[str] | None) -> Layout:
    """Match a root whose folders `selected`, which contain images, are tasks."""
    _check_tasks_found(folder, selected, tasks)
    by_shape: dict[str, list[str]] = {}
    for task in selected:
        by_shape.setdefault(_shape(folder[task]), []).append(task)
    root, shapes = _shown(folder.path), set(by_shape)
    if similar := similar_split_names(selected):
        raise _Mismatch(
            f"{root} has folders called like splits ({truncated_list(similar)}); rename them to train and test if they "
            "are splits",
            _Remedy("to use them as tasks", "folders"),
        )
    if shapes == {"flat"}:
        hint = _detection_hint(folder)
        raise _Mismatch(
            f"the folders of {root} ({truncated_list(selected)}) have images directly in them: "
            f"{hint.removeprefix('; ') or 'they are classes without a task'}",
            *([] if hint else [_single_task_remedy(folder)]),
            levels=() if hint else ("deep",),
        )
    if shapes == {"no classes"} or shapes == {"camera"}:
        examples = truncated_list(f"{task}/{name}" for task in selected for name in folder[task].image_folders)
        hint = next(filter(None, (_detection_hint(folder[task]) for task in selected)), "")
        raise _Mismatch(
            f"{root} has no classes: {examples} {'were numbered by a camera' if shapes == {'camera'} else 'are none'}"
            f"{hint or '; sort the images into <task>/<class> folders'}",
            _Remedy("to use them as classes", "folders"),
            levels=(),
        )
    if shapes == {"split images"}:
        raise _Mismatch(
            f"{root} has split folders with images directly in them ({_examples(folder, selected)}), and no classes"
            f"{_detection_hint(folder)}",
            _Remedy("to use them as classes", "folders"),
        )
    if shapes == {"splits"} and (extras := [task for task in selected if folder[task].extra_folders]):
        extra_folders = truncated_list(f"{task}/{name}" for task in extras for name in folder[task].extra_folders)
        raise _Mismatch(
            f"{root} has {extra_folders} beside folders called like splits ({_examples(folder, extras)})",
            _Remedy("to leave other folders out", "split_folders"),
            _Remedy("to use all of them as classes", "folders"),
            levels=(),
        )
    if shapes == {"deep"}:
        raise _Mismatch(
            f"the images of {root} are deeper than <task>/<class>/<image>{_similar_hint(folder, selected)}",
            _Remedy("if classes have images only in their subfolders", "folders"),
            levels=("high",),
        )
    if shapes == {"splits"}:
        return Layout("split_folders", folder.path, ("task", "split", "class"), notes=_table_notes(folder))
    if shapes <= {"classes", "split images"}:
        return Layout("folders", folder.path, ("task", "class"), notes=_table_notes(folder))
    raise _Mismatch(
        f"the folders of {root} differ: "
        + "; ".join(f"{_SHAPES[shape]}: {truncated_list(names)}" for shape, names in sorted(by_shape.items())),
        *(_Remedy("to use only these", tasks=names) for _, names in sorted(by_shape.items())),
        levels=(),
    )


_SHAPES = {
    "camera": "with folders numbered by a camera",
    "classes": "with class folders",
    "deep": "with images only in folders of folders",
    "flat": "with images directly in them, and no class folders",
    "no classes": "with images in a folder that is no class",
    "split images": "with split folders, but no classes",
    "splits": "with split folders",
}


def _shape(task: _Folder) -> str:
    """Return how the images lie in a task's folder: a key of _SHAPES."""
    if splits := [task[name] for name in task.split_folders]:
        if all(map(_has_only_images, splits)):
            return "split images"
        return "splits" if any(split.has_classes for split in splits) else "deep"
    if _has_only_images(task):
        return "no classes"
    if task.folders and all(map(CAMERA_FOLDER.fullmatch, task.folders)):
        return "camera"
    if task.has_classes:
        is_split = all(parse_split_name(name) for name in task.folders if task[name].has_images)
        return "split images" if is_split else "classes"
    return "flat" if next(task.image_folders, None) is None else "deep"


def _has_only_images(folder: _Folder) -> bool:
    """Return whether the folders that contain images are called `images` or as annotations, and are no classes."""
    names = [name.casefold() for name in islice(folder.image_folders, len(IMAGE_FOLDERS | ANNOTATION_FOLDERS))]
    return not IMAGE_FOLDERS.isdisjoint(names) and IMAGE_FOLDERS | ANNOTATION_FOLDERS >= {*names}


def _split_roles(folder: _Folder, tasks: Collection[str] | None) -> Roles:
    """Return the roles of data.layout=split_folders, where other folders beside those of splits are left out."""
    inner_folders = {name: folder[split][name] for split in folder.split_folders for name in folder[split].folders}
    if any(inner.has_classes for inner in inner_folders.values()):
        _check_tasks_found(folder, inner_folders, tasks)
        return "split", "task", "class"
    selected = _selected(folder, tasks)
    _check_tasks_found(folder, selected, tasks)
    selected = [name for name in selected if folder[name].contains_images]
    unsplit = [name for name in selected if _shape(folder[name]) != "splits"]
    if selected and not unsplit:
        return "task", "split", "class"
    raise _Mismatch(
        f"data.layout=split_folders needs {_shown(folder.path)}/<task>/<split>/<class> or <split>/<task>/<class>, with "
        f"folders called {', '.join(SPLIT_NAMES)}; without them: {truncated_list(unsplit) or 'all'}"
    )


def _selected(folder: _Folder, tasks: Collection[str] | None) -> list[str]:
    return [name for name in folder.folders if tasks is None or _nfc(name) in tasks]


def _check_tasks_found(folder: _Folder, selected: Collection[str], tasks: Collection[str] | None) -> None:
    """Raise _Mismatch if a requested task has no folder."""
    if missing := sorted({*(tasks or ())} - {_nfc(name) for name in selected}):
        available = [name for name in folder.folders if next(folder[name].image_folders, None)]
        similar = [
            next(iter(get_close_matches(task.casefold(), [name.casefold() for name in available], 1, 0.8)), "")
            for task in sorted(tasks or ())
        ]
        similar = [name for name in available if name.casefold() in similar] if all(similar) else []
        raise _Mismatch(
            f"data.tasks: {', '.join(missing)} not found under {_shown(folder.path)}; "
            f"found: {truncated_list(available) or 'no <task>/<class> folders'}",
            *([_Remedy("did you mean", tasks=similar)] if similar else []),
        )


def _other_levels(name: str, root: AnyPath, tasks: Collection[str] | None, levels: Collection[str]) -> Iterator[str]:
    """Yield remedies with roots at other levels that fit the layout `name`."""
    ancestors: Sequence[AnyPath] = root.absolute().parents
    for distance, ancestor in enumerate(ancestors[:2] if "deep" in levels else [], 1):
        if ancestor != Path(ancestor.anchor) and _probe(name, ancestor, tasks, root):
            yield f"{_levels(distance)} too deep: try {_Remedy('', root=ancestor).options}"
            return
    candidates = [root] if "high" in levels else []
    for distance in (1, 2):
        subfolders = (candidate / name for candidate in candidates for name in _subfolders(candidate))
        candidates = list(islice(subfolders, MAX_PROBED_ROOTS))
        if fitting := [candidate for candidate in candidates if _probe(name, candidate, tasks)]:
            for candidate in fitting[:MAX_ROOTS_SHOWN]:
                yield f"{_levels(distance)} too high: try {_Remedy('', root=candidate).options}"
            return


def _subfolders(path: AnyPath) -> list[str]:
    try:
        return _Folder(path).folders
    except UserError:  # unreadable
        return []


def _probe(name: str, root: AnyPath, tasks: Collection[str] | None, inner: AnyPath | None = None) -> bool:
    """Return whether a root has the layout, found with few steps; `inner`: a folder below it that has to be a task or
    a class of the layout."""
    layout = _usable_layout(name, _Folder(root, budget=[MAX_PROBED_FOLDERS]), tasks)
    if layout is None or layout.source:
        return layout is not None and inner is None
    if inner is None or layout.name in LIST_LAYOUTS:
        return True
    parts = relative_path(inner, root).split("/")
    is_used = tasks is None or _nfc(parts[0]) in tasks
    return is_used and len(parts) <= len(layout.roles) and not relative_path(inner, layout.root).startswith("..")


def _usable_layout(name: str, folder: _Folder, tasks: Collection[str] | None) -> Layout | None:
    """Return the layout of a folder if it has two classes in each task."""
    try:
        layout = _match(name, folder, tasks)
        if layout.root != folder.path or not layout.roles:
            return layout
        classes: dict[str, set[str]] = {}
        for path in _class_folders(folder, layout.roles, tasks):
            classes.setdefault(path[layout.roles.index("task")], set()).add(path[-1])
        return layout if all(len(names) > 1 for names in classes.values()) else None
    except (_Mismatch, UserError):
        return None


def _class_folders(folder: _Folder, roles: Roles, tasks: Collection[str] | None) -> Iterator[tuple[str, ...]]:
    """Yield the paths of up to two class folders with images in each folder of a task."""
    if roles == ("class",):
        yield from ((name,) for name in islice(folder.image_folders, 2))
        return
    names = _selected(folder, tasks) if roles[0] == "task" else filter(parse_split_name, folder.folders)
    for name in names:
        if folder[name].contains_images:
            yield from ((name, *path) for path in _class_folders(folder[name], roles[1:], tasks))


def _is_usable(remedy: _Remedy, name: str, folder: _Folder, tasks: Collection[str] | None) -> bool:
    """Return whether a remedy leads to a layout; tables are not read for that."""
    if remedy.root:
        folder = _Folder(remedy.root, budget=[MAX_PROBED_FOLDERS])
    if remedy.tasks:
        tasks = set(map(_nfc, remedy.tasks))
    is_table = remedy.root is not None and remedy.root.is_file()
    return is_table or _usable_layout(remedy.layout or name, folder, tasks) is not None


def _single_task_remedy(folder: _Folder) -> _Remedy:
    """Return the remedy for a root that is a single task: its parent, with only this task."""
    path = folder.path.absolute()
    return _Remedy("if it is a single task", root=path.parent, tasks=[path.name])


def _table_notes(folder: _Folder) -> tuple[str, ...]:
    remedies = "; ".join(map(str, _table_remedies(folder)))
    return (f"folders are used, not the tables beside them; {remedies}",) if remedies else ()


def _table_remedies(folder: _Folder, depth: int = 0) -> list[_Remedy]:
    """Return the remedies to use tables in a folder, or in folders up to `depth` levels below."""
    remedies = [_table_remedy(folder.path / name) for name in folder.files if is_table_name(name)]
    for name in folder.folders if depth else []:
        remedies += _table_remedies(folder[name], depth - 1)
    return remedies[:MAX_ROOTS_SHOWN]


def _table_remedy(path: AnyPath) -> _Remedy:
    return _Remedy(f"to use {_shown(Path(path.name))}", root=path)


def _detection_hint(folder: _Folder) -> str:
    """Return that a folder looks like an export for object detection or segmentation, if it does."""
    has_annotations = any(name.casefold() in ANNOTATION_FOLDERS for name in folder.folders) or any(
        name.endswith((".coco.json", "data.yaml", "data.yml")) for name in folder.files
    )
    if not has_annotations:
        return ""
    return (
        "; it looks like a data set for object detection or segmentation: sort the images into <task>/<class> folders, "
        "or give a table with the columns path, task and label"
    )


def _similar_hint(folder: _Folder, tasks: Sequence[str]) -> str:
    similar = [f"{task}/{name}" for task in tasks for name in similar_split_names(folder[task].folders)]
    return f"; rename {truncated_list(similar, 4)} to train and test if they are splits" if similar else ""


def _examples(folder: _Folder, tasks: Sequence[str]) -> str:
    return truncated_list(f"{task}/{name}" for task in tasks for name in folder[task].folders if parse_split_name(name))


def _found(folder: _Folder) -> str:
    return f"data.root={_shown(folder.path)} has no <task>/<class>/<image> folders; {_content(folder)}"


def _content(folder: _Folder) -> str:
    """Return what a folder without a layout contains."""
    contents = []
    if folder.has_images:
        contents.append("images directly in it")
    if folder.folders:
        suffix = "" if folder.contains_images else " without images"
        contents.append(f"folders {truncated_list(map(escape_for_terminal, folder.folders))}{suffix}")
    return f"found: {' and '.join(contents) or ('other files' if folder.files else 'nothing')}"


def _levels(number: int) -> str:
    return "one level" if number == 1 else f"{number} levels"


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _shown(path: AnyPath) -> str:
    return escape_for_terminal(str(path))
