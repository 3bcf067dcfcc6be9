"""Index of the images of every task and class below data.root; opens no image.

Layouts (recognized by layouts.py):
- `folders`: <root>/<task>/<class>/<any depth>/image;
- `split_folders`: <root>/<task>/<split>/<class>/... or <root>/<split>/<task>/<class>/..., splits train, test, val;
- `manifest`: a table with one row per image (manifest.py);
- `office_home`: the published archive, with or without its top folder;
- `mini_domainnet`, `domainnet`, `pacs`: folders with image lists (lists.py).

All is sorted by name, so that results do not depend on the file system. Symbolic links are followed, except those to
a folder that contains them; links out of data.root are refused with data.follow_external_symlinks=false.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.buckets import AnyPath, BucketPath
from pipeline.config import DataConfig, read_text, resolve_config_path
from pipeline.config.values import list_arguments
from pipeline.data.layouts import OFFICE_HOME_TASKS, Layout, Roles, recognize_layout, similar_path_hint
from pipeline.data.lists import LIST_LAYOUTS, read_lists
from pipeline.data.manifest import SUFFIXES, read_manifest
from pipeline.data.names import escape_for_terminal, normalize_name, pluralize, split_synonyms, truncated_list
from pipeline.data.official_splits import DatasetEntry, OfficialSplit, parse_split_name
from pipeline.data.splits import MULTI_LABEL
from pipeline.data.symlinks import SymlinkChecker
from pipeline.data.walk import (
    BESIDE_SPLITS,
    BROKEN_LINK,
    EXTERNAL_LINK,
    LOOSE_IMAGE,
    NO_IMAGES,
    Skipped,
    skip_remedy,
    skipped_note,
    walk_folders,
)
from pipeline.errors import UserError, escape_controls
from pipeline.files import is_uri

NOT_SELECTED = "tasks that are not selected"
MAX_CLASS_LINE = 1000
MISSING_NS = -1
"""Times of a missing file; those of archives may be 0."""


@dataclass(frozen=True)
class ImageRecord:
    path: str
    """Relative to the root, with forward slashes; `<file>#<row>` for an image in a Parquet file."""
    task: str
    class_folder: str
    size: int
    """Bytes of its file; 0 for a missing file, which the scan reports."""
    modified_ns: int
    changed_ns: int
    """Time at which anything about the file changed last, which no program can set; `modified_ns` where there is
    none."""
    official_split: OfficialSplit | None = None
    """train or test with data.use_official_splits, else None."""
    row_group: int | None = None
    """Row group of an image in a Parquet file; images of one group are read together."""
    other_classes: tuple[str, ...] = ()
    """Further classes, sorted, with data.multi_label."""

    @property
    def class_folders(self) -> tuple[str, ...]:
        """All classes of the image."""
        return (self.class_folder, *self.other_classes)


@dataclass(frozen=True)
class DatasetIndex:
    """Images, tasks and classes below a root. `images` and `skipped`, what is not used of the root, are sorted by
    path."""

    root: AnyPath
    layout: str
    images: tuple[ImageRecord, ...]
    classes: dict[str, tuple[str, ...]]
    """Task → class folders, sorted; the position is the label."""
    class_names: dict[str, str]
    """Class folder → class name shown to CLIP."""
    skipped: tuple[Skipped, ...]
    excluded_classes: tuple[str, ...]
    """Class folders not in data.class_names, as task/class."""
    unused_images: dict[str, int] = field(default_factory=dict)
    """Task → number of images in neither train nor test, with data.use_official_splits."""
    notes: tuple[str, ...] = ()
    """What was not read as documented, for the user."""
    roles: Roles = ()
    """Roles of the folders from the root to the images, if they have some."""
    multi_label: bool = False
    """Whether an image may have several classes."""

    def describe(self) -> str:
        """Return what was recognized: layout, tasks, classes, images, and the files that are not read."""
        folders = "".join(f" <{role}>/" for role in self.roles).replace("/ <", "/<")
        num_classes = len(self.class_names)
        counts = [
            f"{pluralize(len(self.classes), 'task')} ({truncated_list(self.classes, 6)})",
            f"{num_classes:,} {'class' if num_classes == 1 else 'classes'}",
            f"{len(self.images):,} images",
        ]
        skipped = [skipped_note(self.skipped)] if self.skipped else []
        labels = ["several labels per image"] if self.multi_label else []
        return "; ".join([f"layout {self.layout}{folders}: {', '.join([*counts, *labels])}", *skipped])

    def listing_fingerprint(self) -> str:
        """Return the SHA-256 of the root's path and of the files' names, sizes and times, and what else `contents`
        covers: as long as it is the same, so are the contents."""
        digest = hashlib.sha256(MULTI_LABEL if self.multi_label else b"")
        digest.update(f"{self.root}\n".encode("utf-8", "surrogateescape"))
        for image in self.images:
            file = image.path, image.size, image.modified_ns, image.changed_ns
            digest.update(f"{(*file, image.task, *image.class_folders, image.official_split)!r}\n".encode())
        digest.update(repr((sorted(self.classes.items()), sorted(self.class_names.items()))).encode())
        return digest.hexdigest()


def open_root(root: str) -> AnyPath:
    """Return the path of data.root: a folder, a file, or the URI of one in a bucket.

    Raises:
        UserError: a URI of a file, or with credentials.
    """
    if root.startswith("file://"):
        raise UserError(f"data.root={root} is a path on this machine: give it without file://")
    return BucketPath(root) if is_uri(root) else Path(root).expanduser().absolute()


def index_dataset(config: DataConfig, data_root: AnyPath) -> DatasetIndex:
    """Index `data_root` according to `config` (layout, tasks, class_names, use_official_splits).

    Raises:
        UserError: the root, or a requested task, class or split, is missing; links out of the root; invalid or
            equivalent folder names; unusable rows of a manifest.
    """
    if isinstance(data_root, BucketPath):
        data_root.check_access(f"data.root={data_root}")
    if not data_root.is_dir() and not data_root.is_file():  # a pipe is neither
        location = "on this machine" if isinstance(data_root, Path) else "of this bucket"
        raise UserError(f"data.root={data_root} is not a folder or file {location}{similar_path_hint(data_root)}")
    folder = data_root if data_root.is_dir() else data_root.parent
    symlinks, probed = (SymlinkChecker(folder, config.follow_external_symlinks) for _ in range(2))
    selected = config.tasks
    task_names = None if selected is None else {normalize_name(task, "task") for task in selected}
    recognized = recognize_layout(config.layout, data_root, task_names, probed)
    layout, root = recognized.name, recognized.root
    if config.multi_label and not recognized.source:
        raise UserError(
            f"data.multi_label=true needs a table, which can name several labels for an image; {data_root} has the "
            f"layout {layout}: give --data.root a table ({', '.join(SUFFIXES)}), or set --data.multi_label false"
        )
    symlinks.escapes_root(root)
    if layout == "office_home":
        selected = selected or OFFICE_HOME_TASKS
    task_filter = None if selected is None else {normalize_name(task, "task") for task in selected}
    class_names = _ClassNameFiles(config.class_names)
    entries, skipped, locations, notes = _read_entries(config, recognized, task_filter, class_names, symlinks)
    if layout in LIST_LAYOUTS:
        root = LIST_LAYOUTS[layout].images_root(root)
    has_task_folders = layout not in ("manifest", "split_folders")  # directly below the root
    symlinks.raise_on_escape(root, selected if has_task_folders else None)
    kind = "names" if layout == "manifest" else "folders"
    entries_by_task, unused_images = _group_by_class(entries, root, kind, config.use_official_splits)
    if config.use_official_splits and not any(entry.split in ("train", "test") for entry in entries):
        raise UserError(
            f"data.use_official_splits=true, but {data_root} has no splits: provide image lists, a manifest with a "
            "column `split`, or folders <task>/train/<class> and <task>/test/<class>; or set "
            "--data.use_official_splits false"
        )
    if task_filter is None:
        class_names.check_tasks(entries_by_task)
    tasks = _select_tasks(entries_by_task, task_filter, root)
    classes, excluded_classes = _select_classes({task: entries_by_task[task] for task in tasks}, class_names, root)
    listed = {task: frozenset(names) for task, names in classes.items()}
    images = [
        _image_record(root, entry, task, used, config.use_official_splits, symlinks)
        for task in tasks
        for name, class_entries in entries_by_task[task].items()
        for entry in class_entries
        if (used := sorted({name, *map(normalize_name, entry.other_classes)} & listed[task]))
    ]
    symlinks.raise_on_escape(root, tasks if has_task_folders else None)
    if isinstance(root, BucketPath):
        root.forget_listings()
    _check_missing(images, locations, data_root, config.max_broken_fraction)
    return DatasetIndex(
        root,
        layout,
        tuple(sorted(images, key=lambda image: image.path)),
        classes,
        class_names.merge(classes),
        tuple(sorted(Skipped(escape_for_terminal(path), kind) for path, kind in skipped)),
        excluded_classes,
        {task: unused_images[task] for task in tasks if unused_images[task]},
        (*recognized.notes, *notes),
        recognized.roles,
        config.multi_label,
    )


def _read_entries(
    config: DataConfig,
    layout: Layout,
    tasks: set[str] | None,
    class_names: _ClassNameFiles,
    symlinks: SymlinkChecker,
) -> tuple[list[DatasetEntry], list[Skipped], dict[str, str], tuple[str, ...]]:
    """Return images and class folders, what is left out, and for a manifest's images path → line or row, and notes."""
    if layout.source:
        columns = dict[str, str](config.columns.items())
        manifest = read_manifest(
            layout.source,
            layout.root,
            columns,
            tasks,
            class_names.for_task,
            config.use_official_splits,
            symlinks,
            config.multi_label,
        )
        return manifest.entries, [], manifest.locations, manifest.notes
    if layout.name in LIST_LAYOUTS:
        return *read_lists(layout.name, layout.root, symlinks), {}, ()
    return *_walk_folders(layout, tasks, symlinks), {}, ()


def _group_by_class(
    entries: Sequence[DatasetEntry], root: AnyPath, kind: str, use_official_splits: bool
) -> tuple[dict[str, dict[str, list[DatasetEntry]]], Counter[str]]:
    """Return task → class → images, and task → number of images in neither split. An image of several classes is in the
    list of the first.

    Raises:
        UserError: two names that some file systems treat as equal; the message calls them `kind`.
    """
    entries_by_task: dict[str, dict[str, list[DatasetEntry]]] = {}
    unused_images: Counter[str] = Counter()
    folder_by_key: dict[tuple[str, ...], str] = {}
    for entry in entries:
        task, names = normalize_name(entry.task), [normalize_name(folder) for folder in entry.class_folders]
        class_keys = [((task, name), folder) for name, folder in zip(names, entry.class_folders)]
        # Result files are named by task, and must be valid on other file systems.
        for key, folder in (((task.casefold(),), entry.task), *class_keys):
            if (known_folder := folder_by_key.setdefault(key, folder)) != folder:
                raise UserError(
                    f"the {kind} {known_folder!a} and {folder!a} under {root} differ only in case or Unicode "
                    "normalization; rename one"
                )
        class_entries, *_ = [entries_by_task.setdefault(task, {}).setdefault(name, []) for name in names]
        if not entry.path:
            continue
        if use_official_splits and entry.split not in ("train", "test"):
            unused_images[task] += 1
        else:
            class_entries.append(entry)
    return entries_by_task, unused_images


def _select_tasks(available: Collection[str], task_filter: set[str] | None, root: AnyPath) -> list[str]:
    """Return the tasks to use, sorted. Raises UserError if there are none, or one of `task_filter` is missing."""
    tasks = sorted(available if task_filter is None else task_filter)
    if missing := [task for task in tasks if task not in available]:
        raise UserError(
            f"data.tasks: {', '.join(missing)} not found under {root}; "
            f"found: {truncated_list(sorted(available)) or 'no <task>/<class> folders'}"
        )
    if not tasks:
        raise UserError(f"data.root={root} has no <task>/<class>/<image> folders")
    return tasks


def _select_classes(
    entries_by_task: dict[str, dict[str, list[DatasetEntry]]], class_names: _ClassNameFiles, root: AnyPath
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return task → classes, and as task/class those that data.class_names does not list.

    Raises:
        UserError: a listed class is missing; a task has fewer than two classes.
    """
    classes: dict[str, tuple[str, ...]] = {}
    excluded_classes: list[str] = []
    for task, entries_by_class in entries_by_task.items():
        listed = class_names.for_task(task)
        if listed is not None:
            if missing := [name for name in listed if name not in entries_by_class]:
                spaced = next((name for name in missing if _class_before_space(name, entries_by_class)), None)
                hint = "; a tab separates class and name: spaces are part of the class" if spaced else ""
                raise UserError(
                    f"{class_names.file_for(task)} lists classes that task {task!r} lacks: {truncated_list(missing)} "
                    f"({root / task}){hint}"
                )
            excluded_classes += [f"{task}/{name}" for name in sorted(entries_by_class) if name not in listed]
        classes[task] = tuple(sorted(entries_by_class if listed is None else listed))
        if len(classes[task]) < 2:
            usable = [name for name, entries_by_class in entries_by_task.items() if len(entries_by_class) > 1]
            remedy = f"; to leave it out: --data.tasks {list_arguments(usable)}" if usable else ""
            raise UserError(
                f"task {task!r} has only {pluralize(len(classes[task]), 'class')} in {root}; a task needs two or more"
                + remedy
            )
    return classes, tuple(excluded_classes)


def _class_before_space(line: str, class_folders: Collection[str]) -> bool:
    """Return whether a line of a class names file is a class and a name with spaces for the tab between them."""
    return any(line[: match.start()].rstrip(":,;=") in class_folders for match in re.finditer(r"\s+", line))


def _image_record(
    root: AnyPath,
    entry: DatasetEntry,
    task: str,
    names: Sequence[str],
    use_official_splits: bool,
    symlinks: SymlinkChecker,
) -> ImageRecord:
    """Return the record of an image of the classes `names`."""
    size, modified_ns, changed_ns, row_group = entry.table_row or (*_size_and_times(root, entry.path, symlinks), None)
    split = entry.split if use_official_splits else None
    return ImageRecord(entry.path, task, names[0], size, modified_ns, changed_ns, split, row_group, tuple(names[1:]))


def unexpected_counts(config: DataConfig, dataset: DatasetIndex) -> list[str]:
    """Return a message for each deviation from `config.expected_images`."""
    counts = Counter(image.task for image in dataset.images) + Counter(dataset.unused_images)
    notes = []
    for name, expected in (config.expected_images or {}).items():
        tasks = name.split(" + ")
        num_images = sum(counts[task] for task in tasks)
        if all(task in dataset.classes for task in tasks) and num_images != expected:
            has = "has" if len(tasks) == 1 else "have"
            notes.append(f"{name} {has} {num_images:,} images, {expected:,} are published: is the copy complete?")
    return notes


class _ClassNameFiles:
    """Class names from the files of data.class_names.

    Raises:
        UserError: as `read_class_names`.
    """

    def __init__(self, setting: str | dict[str, str] | None):
        self._default_file = setting if isinstance(setting, str) else None
        self._file_by_task = {
            normalize_name(task, "task"): file for task, file in (setting if isinstance(setting, dict) else {}).items()
        }
        files = {file for file in (self._default_file, *self._file_by_task.values()) if file is not None}
        self._contents = {
            file: read_class_names(open_root(file) if is_uri(file) else resolve_config_path(Path(file).expanduser()))
            for file in sorted(files)
        }

    def file_for(self, task: str) -> str | None:
        return self._file_by_task.get(task, self._default_file)

    def for_task(self, task: str) -> dict[str, str] | None:
        """Return class folder → class name; None: the task has no file."""
        file = self.file_for(task)
        return None if file is None else self._contents[file]

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raise UserError if there is a file for an unknown task."""
        if unknown := sorted(self._file_by_task.keys() - tasks):
            raise UserError(
                f"data.class_names: there is no task {', '.join(unknown)}; found: {truncated_list(sorted(tasks))}"
            )

    def merge(self, classes: dict[str, tuple[str, ...]]) -> dict[str, str]:
        """Return class folder → class name over all tasks, sorted. Raises UserError if two tasks contradict."""
        merged: dict[str, tuple[str, str]] = {}
        for task, folders in classes.items():
            listed = self.for_task(task) or {}
            for folder in folders:
                class_name = listed.get(folder, folder.replace("_", " "))
                known_task, known_name = merged.setdefault(folder, (task, class_name))
                if known_name != class_name:
                    raise UserError(
                        f"data.class_names: the class {folder!r} is {known_name!r} in task {known_task!r} and "
                        f"{class_name!r} in task {task!r}; a class folder must have the same name in all tasks"
                    )
        return {folder: class_name for folder, (_, class_name) in sorted(merged.items())}


def read_class_names(path: AnyPath) -> dict[str, str]:
    """Read class folder → class name from a text file with one class per line, `folder` or `folder<TAB>class name`;
    synonyms are separated by |, and lines that begin with # are comments."""
    if not path.is_file():
        raise UserError(f"data.class_names={path} is not a file")
    lines = read_text(path, f"data.class_names={path}").split("\n")
    class_names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        folder, _, text = line.partition("\t")
        folder = folder.strip()
        if not folder or len(line) > MAX_CLASS_LINE or line != escape_controls(line, keep="\t") or "\t" in text.strip():
            raise UserError(
                f"{path}:{number}: expected `folder` or `folder<TAB>class name` of up to {MAX_CLASS_LINE} plain "
                f"characters, got {line[:MAX_CLASS_LINE]!r}"
            )
        folder = normalize_name(folder)
        if folder in class_names:
            raise UserError(f"{path}:{number}: class {folder!r} is listed twice")
        class_name = class_names[folder] = text.strip() or folder.replace("_", " ")
        if len({*split_synonyms(class_name)}) <= class_name.count("|"):
            raise UserError(f"{path}:{number}: {class_name!r} has an empty or repeated name next to |")
    if not class_names:
        raise UserError(f"data.class_names={path} lists no classes: write the folder of one per line")
    return class_names


def _walk_folders(
    layout: Layout, tasks: Collection[str] | None, symlinks: SymlinkChecker
) -> tuple[list[DatasetEntry], list[Skipped]]:
    """Return all images and (with an empty path) class folders of the tasks; and what is left out.

    Raises:
        UserError: a task or class is a link without a target.
    """
    entries: list[DatasetEntry] = []
    skipped: list[Skipped] = []
    broken_links: list[str] = []
    task_folders: set[str] = set()
    kinds_by_class: dict[tuple[str, str], set[str]] = {}
    root, roles = layout.root, layout.roles
    depth, task_depth, class_depth = len(roles), roles.index("task"), roles.index("class")
    split_depth = roles.index("split") if "split" in roles else None

    def is_selected(parts: Sequence[str]) -> bool:
        return tasks is None or len(parts) <= task_depth or unicodedata.normalize("NFC", parts[task_depth]) in tasks

    def leave_out(parts: tuple[str, ...], real: str) -> str | None:
        if not is_selected(parts):
            return NOT_SELECTED
        if len(parts) - 1 == split_depth and parse_split_name(parts[-1]) is None:
            return BESIDE_SPLITS
        return EXTERNAL_LINK if symlinks.escapes_root(root.joinpath(*parts), real) else None

    for folder in walk_folders(root, leave_out):
        parts = folder.parts
        skipped += [file for file in folder.skipped if file.kind != NOT_SELECTED]
        task_folders |= {*parts[task_depth : task_depth + 1]}
        if len(parts) < depth:
            skipped += [Skipped("/".join((*parts, name)), LOOSE_IMAGE) for name in folder.images]
            broken_links += [
                path for path, kind in folder.skipped if kind == BROKEN_LINK and is_selected(path.split("/"))
            ]
            continue
        task, class_folder = parts[task_depth], parts[class_depth]
        split = None if split_depth is None else parse_split_name(parts[split_depth])
        kinds_by_class.setdefault((task, class_folder), set()).update(kind for _, kind in folder.skipped)
        if len(parts) == depth:
            entries.append(DatasetEntry("", task, class_folder))
        entries += [DatasetEntry("/".join((*parts, name)), task, class_folder, split) for name in folder.images]
    # Folders of annotations are no classes; an empty folder, or one of images that are not read, is one without images.
    annotations = {
        key
        for key in kinds_by_class.keys() - {entry[1:3] for entry in entries if entry.path}
        if any(kind.startswith(".") for kind in kinds_by_class[key]) and not any(map(skip_remedy, kinds_by_class[key]))
    }
    skipped += [Skipped(f"{task}/{class_folder}/", NO_IMAGES) for task, class_folder in annotations]
    entries = [entry for entry in entries if entry[1:3] not in annotations]
    if tasks is None:
        used = {entry.task for entry in entries if entry.path}
        skipped += [Skipped(f"{task}/", NO_IMAGES) for task in sorted(task_folders - used)]
        entries = [entry for entry in entries if entry.task in used]
    if broken_links:
        listed = truncated_list(
            f"{escape_for_terminal(path)} → {escape_for_terminal(os.readlink(str(root / path)))}"
            for path in broken_links
        )
        raise UserError(f"links of {root} have no target: {listed}; mount or restore the targets, or remove the links")
    return entries, skipped


def _size_and_times(root: AnyPath, path: str, symlinks: SymlinkChecker) -> tuple[int, int, int]:
    try:
        if isinstance(root, BucketPath):
            file = (root / path).listed_stat()
            return file.st_size, file.st_mtime_ns, file.st_mtime_ns
        status = os.lstat(root / path)
        if stat.S_ISLNK(status.st_mode):
            symlinks.escapes_root(root / path)
            status = os.stat(root / path)
    except OSError:
        return 0, MISSING_NS, MISSING_NS
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_missing(
    images: Sequence[ImageRecord], locations: dict[str, str], manifest: AnyPath, max_fraction: float
) -> None:
    """Raise UserError if more files of a manifest are missing than may be dropped."""
    missing = [image.path for image in images if image.changed_ns == MISSING_NS and image.path in locations]
    if len(missing) > max_fraction * len(images):
        listed = "\n  ".join(f"{locations[path]}: {escape_for_terminal(path)}" for path in missing[:10])
        remainder = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise UserError(
            f"{len(missing)} of {len(images)} images of {manifest} are missing, more than "
            f"data.max_broken_fraction={max_fraction:g} allows:\n  {listed}{remainder}\nPaths are relative to the "
            "manifest's folder"
        )
