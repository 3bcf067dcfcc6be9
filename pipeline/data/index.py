"""Finds the images of every task and class under a data root; opens none of them.

Layouts:
- `folders`: <root>/<task>/<class>/<any depth>/image;
- `split_folders`: <root>/<task>/<split>/<class>/... or <root>/<split>/<task>/<class>/..., splits train, test, val;
- `manifest`: a table with a row for each image (manifest.py);
- `office_home`: the published archive, with or without its top folder;
- `mini_domainnet`, `domainnet`, `pacs`: folders with image lists (lists.py).

Everything is ordered by name, so that no file system's own order reaches a result. Links are followed, except
those that lead back to a folder they lie in; those that lead out of data.root are refused, unless they may.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from pipeline.config import DataConfig, read_text, resolve_config_path
from pipeline.data.images import SUFFIXES_OF_FORMAT
from pipeline.data.lists import LIST_LAYOUTS, read_lists
from pipeline.data.manifest import SUFFIXES, read_manifest
from pipeline.data.names import escape_for_terminal, plain_name, split_synonyms, truncated_list
from pipeline.data.official_splits import SPLIT_NAMES, DatasetEntry, OfficialSplit
from pipeline.data.symlinks import SymlinkChecker
from pipeline.errors import UserError, escape_controls

IMAGE_SUFFIXES = frozenset(chain.from_iterable(SUFFIXES_OF_FORMAT.values()))
OFFICE_HOME_FOLDER = "OfficeHomeDataset_10072016"
MINI_DOMAINNET_LISTS = LIST_LAYOUTS["mini_domainnet"].lists[0]
OFFICE_HOME_TASKS = ("Art", "Clipart", "Product", "Real World")
UNSPLIT_FOLDER = "full"
"""Beside split folders, VLCS as Dassl has it keeps all images once more under this name."""
MAX_CLASS_LINE = 1000


@dataclass(frozen=True)
class ImageRecord:
    path: str
    """Relative to the root, with forward slashes; `<file>#<row>` for one in a Parquet file."""
    task: str
    class_folder: str
    size: int
    """Bytes of its file; 0 for a file that is not there, which is for the scan to report."""
    modified_ns: int
    official_split: OfficialSplit | None = None
    """Where given splits are respected: train or test."""
    row_group: int | None = None
    """Of an image in a Parquet file; those of one group are read together."""


@dataclass(frozen=True)
class DatasetIndex:
    """What lies under a root. `images` is sorted by path; `ignored` are the files that are no images, and the
    links that lead back."""

    root: Path
    layout: str
    images: tuple[ImageRecord, ...]
    classes: dict[str, tuple[str, ...]]
    """Task → its class folders, sorted; the position is the label."""
    class_names: dict[str, str]
    """Class folder → the words shown to CLIP."""
    ignored: tuple[str, ...]
    excluded_classes: tuple[str, ...]
    """Class folders that data.class_names does not list, as task/class."""
    unused_images: dict[str, int] = field(default_factory=dict)
    """Task → images for validation, or for no split, which are left out where given splits are respected."""

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times: changes when a file may have, without reading it."""
        digest = hashlib.sha256()
        for image in self.images:
            line = f"{image.path}\0{image.size}\0{image.modified_ns}\n"
            if self.layout == "manifest":  # elsewhere the path says both
                line += f"{image.task}\0{image.class_folder}\n"
            if image.official_split:
                line += f"{image.official_split}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(repr((sorted(self.classes.items()), sorted(self.class_names.items()))).encode())
        return digest.hexdigest()


def index_dataset(config: DataConfig, root: Path) -> DatasetIndex:
    """Listing of `root` by `config` (layout, tasks, class_names, given_splits).

    Raises:
        UserError: root missing, no tasks, a task or class that is asked for and not there, links that lead out of
            root, a folder name that is not plain text, or the same as another's, rows of a manifest that cannot be
            used, no splits where they are asked for.
    """
    if not root.is_dir() and not root.is_file():  # a pipe is neither
        raise UserError(f"data.root={root} is not a folder or file on this machine")
    manifest, root = root, root if root.is_dir() else root.parent
    symlinks = SymlinkChecker(root, config.follow_external_symlinks)
    layout, root = _recognize(config.layout, manifest, root)
    symlinks.escapes_root(root)
    selected = config.tasks or (OFFICE_HOME_TASKS if layout == "office_home" else None)
    wanted = None if selected is None else {plain_name(task, "task") for task in selected}
    class_names = _ClassNames(config.class_names)
    files, ignored, places = _files_of(config, layout, manifest, root, wanted, class_names, symlinks)
    if layout in LIST_LAYOUTS:
        root = LIST_LAYOUTS[layout].images_root(root)
    named = layout in ("manifest", "split_folders")  # tasks are not the folders just below the root
    symlinks.refuse(root, None if named else selected)
    what = "names" if layout == "manifest" else "folders"
    found, unused_images = _by_class(files, root, what, config.use_official_splits)
    if config.use_official_splits and not any(file.split in ("train", "test") for file in files):
        raise UserError(
            f"data.given_splits=true, and {manifest} has no splits: image lists, a manifest with a column `split`, or "
            "folders <task>/train/<class> and <task>/test/<class> have; without them: --data.given_splits false"
        )
    if wanted is None:
        class_names.refuse_others(found)
    tasks = _tasks_of(found, wanted, root)
    classes, left_out = _classes_of({task: found[task] for task in tasks}, class_names, root)
    images = [
        _image_file(root, file, task, name, config.use_official_splits, symlinks)
        for task in tasks
        for name in classes[task]
        for file in found[task][name]
    ]
    symlinks.refuse(root, None if named else tasks)
    _refuse_missing(images, places, manifest, config.max_broken_fraction)
    return DatasetIndex(
        root,
        layout,
        tuple(sorted(images, key=lambda image: image.path)),
        classes,
        class_names.words(classes),
        tuple(sorted(map(escape_for_terminal, ignored))),
        left_out,
        {task: unused_images[task] for task in tasks if unused_images[task]},
    )


def _files_of(
    config: DataConfig,
    layout: str,
    manifest: Path,
    root: Path,
    tasks: set[str] | None,
    class_names: _ClassNames,
    symlinks: SymlinkChecker,
) -> tuple[list[DatasetEntry], list[str], dict[str, str]]:
    """Images and class folders; files that are neither; of a manifest's images, path → line or row."""
    if layout == "manifest":
        columns = dict[str, str](config.columns.items())
        files, places = read_manifest(
            manifest, root, columns, tasks, class_names.order, config.use_official_splits, symlinks
        )
        return files, [], places
    if layout in LIST_LAYOUTS:
        return read_lists(layout, root, symlinks), [], {}
    return *_walk(root, symlinks, _folder_roles(layout, root)), {}


def _by_class(
    files: Sequence[DatasetEntry], root: Path, what: str, use_official_splits: bool
) -> tuple[dict[str, dict[str, list[DatasetEntry]]], Counter[str]]:
    """Task → class → images; task → images that are left out for being in neither split.

    Raises:
        UserError: two names that not every file system tells apart; `what` is what it calls them.
    """
    found: dict[str, dict[str, list[DatasetEntry]]] = {}
    unused_images: Counter[str] = Counter()
    folder_of: dict[tuple[str, ...], str] = {}
    for file in files:
        task, name = plain_name(file.task), plain_name(file.class_folder)
        # Tasks name files of the results, which other file systems must be able to hold.
        for key, folder in (((task.casefold(),), file.task), ((task, name), file.class_folder)):
            if (other := folder_of.setdefault(key, folder)) != folder:
                raise UserError(
                    f"the {what} {other!a} and {folder!a} under {root} differ only in case or in the form of their "
                    "Unicode characters; rename one"
                )
        of_class = found.setdefault(task, {}).setdefault(name, [])
        if not file.path:
            continue
        if use_official_splits and file.split not in ("train", "test"):
            unused_images[task] += 1
        else:
            of_class.append(file)
    return found, unused_images


def _tasks_of(found: Collection[str], wanted: set[str] | None, root: Path) -> list[str]:
    """Raises: UserError: none, or one that is wanted and not there."""
    tasks = sorted(found if wanted is None else wanted)
    if missing := [task for task in tasks if task not in found]:
        raise UserError(
            f"data.tasks: {', '.join(missing)} not found under {root}; "
            f"found: {truncated_list(sorted(found)) or 'no <task>/<class> folders'}"
        )
    if not tasks:
        raise UserError(f"data.root={root} holds no <task>/<class>/<image> folders")
    return tasks


def _classes_of(
    found: dict[str, dict[str, list[DatasetEntry]]], class_names: _ClassNames, root: Path
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Task → its classes; those that data.class_names does not list, as task/class.

    Raises:
        UserError: a class that is listed and not there; a task with fewer than two.
    """
    classes: dict[str, tuple[str, ...]] = {}
    left_out: list[str] = []
    for task, of_task in found.items():
        words_of = class_names.of(task)
        if words_of is not None:
            if absent := [name for name in words_of if name not in of_task]:
                raise UserError(
                    f"{class_names.file_of(task)} lists classes that task {task!r} lacks: {truncated_list(absent)} "
                    f"({root / task})"
                )
            left_out += [f"{task}/{name}" for name in sorted(of_task) if name not in words_of]
        classes[task] = tuple(sorted(of_task if words_of is None else words_of))
        if len(classes[task]) < 2:
            raise UserError(
                f"task {task!r} has {len(classes[task])} class folder(s) under {root / task}; a task needs two or more"
            )
    return classes, tuple(left_out)


def _image_file(
    root: Path, file: DatasetEntry, task: str, name: str, use_official_splits: bool, symlinks: SymlinkChecker
) -> ImageRecord:
    size, modified_ns, row_group = file.table or (*_size_and_time(root, file.path, symlinks), None)
    return ImageRecord(file.path, task, name, size, modified_ns, file.split if use_official_splits else None, row_group)


def unexpected_counts(config: DataConfig, dataset: DatasetIndex) -> list[str]:
    """What of `config.expected_images` the listing's tasks do not have, a sentence each."""
    counts = Counter(image.task for image in dataset.images) + Counter(dataset.unused_images)
    notes = []
    for name, expected in (config.expected_images or {}).items():
        tasks = name.split(" + ")
        count = sum(counts[task] for task in tasks)
        if all(task in dataset.classes for task in tasks) and count != expected:
            has = "has" if len(tasks) == 1 else "have"
            notes.append(f"{name} {has} {count:,} images, {expected:,} are published: is the copy complete?")
    return notes


class _ClassNames:
    """The files of data.class_names.

    Raises:
        UserError: as `read_class_names`.
    """

    def __init__(self, given: str | dict[str, str] | None):
        self._file = given if isinstance(given, str) else None
        self._file_of_task = {
            plain_name(task, "task"): file for task, file in (given if isinstance(given, dict) else {}).items()
        }
        files = {file for file in (self._file, *self._file_of_task.values()) if file is not None}
        self._read = {file: read_class_names(resolve_config_path(Path(file).expanduser())) for file in sorted(files)}

    @property
    def order(self) -> list[str] | None:
        """The classes of all tasks, in the order of their file."""
        return None if self._file is None else list(self._read[self._file])

    def file_of(self, task: str) -> str | None:
        return self._file_of_task.get(task, self._file)

    def of(self, task: str) -> dict[str, str] | None:
        """Class folder → words; None: no file says."""
        file = self.file_of(task)
        return None if file is None else self._read[file]

    def refuse_others(self, tasks: Collection[str]) -> None:
        """Raises: UserError: a file for none of the tasks."""
        if others := sorted(self._file_of_task.keys() - tasks):
            raise UserError(
                f"data.class_names: there is no task {', '.join(others)}; found: {truncated_list(sorted(tasks))}"
            )

    def words(self, classes: dict[str, tuple[str, ...]]) -> dict[str, str]:
        """Class folder → words, for all classes of all tasks, sorted. Raises: UserError: two tasks differ in them."""
        words: dict[str, tuple[str, str]] = {}
        for task, names in classes.items():
            of_task = self.of(task) or {}
            for name in names:
                own = of_task.get(name, name.replace("_", " "))
                other, before = words.setdefault(name, (task, own))
                if before != own:
                    raise UserError(
                        f"data.class_names: the class {name!r} is {before!r} in task {other!r} and {own!r} in task "
                        f"{task!r}; a folder's name must mean the same in all tasks, so give both the same words"
                    )
        return {name: own for name, (_, own) in sorted(words.items())}


def read_class_names(path: Path) -> dict[str, str]:
    """Class folder → words, from a text file: one class a line, `folder` or `folder<TAB>words`, where words may
    be several names with | between them; a line that begins with # is a comment."""
    if not path.is_file():
        raise UserError(f"data.class_names={path} is no file")
    lines = read_text(path, f"data.class_names={path}").removeprefix("\ufeff").split("\n")
    words: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        line = line.removesuffix("\r")
        folder, _, text = line.partition("\t")
        folder = folder.strip()
        if not folder or len(line) > MAX_CLASS_LINE or line != escape_controls(line, keep="\t") or "\t" in text.strip():
            raise UserError(
                f"{path}:{number}: expected `folder` or `folder<TAB>words` of up to {MAX_CLASS_LINE} plain "
                f"characters, got {line[:MAX_CLASS_LINE]!r}"
            )
        folder = plain_name(folder)
        if folder in words:
            raise UserError(f"{path}:{number}: class {folder!r} is listed twice")
        words[folder] = text.strip() or folder.replace("_", " ")
        if len({*split_synonyms(words[folder])}) <= words[folder].count("|"):
            raise UserError(f"{path}:{number}: {words[folder]!r}: a name beside | is empty, or there twice")
    if not words:
        raise UserError(f"data.class_names={path} lists no class")
    return words


def _recognize(layout: str, given: Path, root: Path) -> tuple[str, Path]:
    """The layout, and where its images or lists are.

    Args:
        given: data.root, a folder or a file.
        root: that folder, or the file's.
    """
    nested = root / OFFICE_HOME_FOLDER
    if given.is_file() and layout not in ("auto", "manifest"):
        raise UserError(f"data.root={given} is a file, data.layout={layout} needs a folder")
    if given.is_file() and given.suffix.lower() not in SUFFIXES:
        raise UserError(f"data.root={given} is no folder and no manifest ({', '.join(SUFFIXES)})")
    if given.is_file():
        layout = "manifest"
    elif layout == "auto":
        folders = _subfolders(root)
        if (root / MINI_DOMAINNET_LISTS).is_dir():
            layout = "mini_domainnet"
        elif nested.is_dir() or set(folders) == set(OFFICE_HOME_TASKS):
            layout = "office_home"
        elif LIST_LAYOUTS["pacs"].files(root):
            layout = "pacs"
        elif LIST_LAYOUTS["domainnet"].files(root):
            layout = "domainnet"
        elif not folders and any(root.glob("*.parquet")):
            layout = "manifest"
        elif _split_roles(root, folders):
            layout = "split_folders"
        else:  # also Office-Home with a task of the user's own beside it
            layout = "folders"
    if layout == "office_home" and nested.is_dir():
        root = nested
    return layout, root


FOLDER_LAYOUTS = ("folders", "office_home")
"""Of tasks with class folders; of others the parts are told by tables, lists, or folders of splits."""
Roles = tuple[str, ...]
"""What the folders above an image are, from the root: task, split, class."""


def _folder_roles(layout: str, root: Path) -> Roles:
    if layout in FOLDER_LAYOUTS:
        return ("task", "class")
    if layout != "split_folders":
        raise ValueError(f"layout {layout!r} is unknown")
    roles = _split_roles(root, _subfolders(root))
    if roles is None:
        raise UserError(
            f"data.layout=split_folders needs {root}/<task>/<split>/<class> or {root}/<split>/<task>/<class>, with "
            f"train among the splits and nothing else beside them: {', '.join(SPLIT_NAMES)}"
        )
    return roles


def _split_roles(root: Path, folders: Sequence[str]) -> Roles | None:
    """None: there are no folders of splits.

    Raises:
        UserError: folders of splits without tasks.
    """
    if len(folders) > 1 and _are_splits(folders):
        (train,) = [name for name in folders if SPLIT_NAMES.get(name.lower()) == "train"][:1]
        if not any(_subfolders(root / train / name) for name in _subfolders(root / train)):
            raise UserError(
                f"{root} has the folders {', '.join(folders)}: splits, but of which task? Put them into a folder with "
                "the task's name, <root>/<task>/<split>/<class>/*, and give what that folder is in as data.root. If "
                "they are tasks: --data.layout folders"
            )
        return ("split", "task", "class")
    if folders and all(_are_splits(_subfolders(root / task)) for task in folders):
        return ("task", "split", "class")
    return None


def _are_splits(folders: Sequence[str]) -> bool:
    words = {name.lower() for name in folders} - {UNSPLIT_FOLDER}
    return words <= SPLIT_NAMES.keys() and "train" in {SPLIT_NAMES[word] for word in words}


def _subfolders(folder: Path) -> list[str]:
    _, names, _ = next(os.walk(folder, onerror=_cannot_read))
    return sorted(name for name in names if not name.startswith("."))


def _walk(root: Path, symlinks: SymlinkChecker, roles: Roles) -> tuple[list[DatasetEntry], list[str]]:
    """All images, and with an empty path the class folders themselves; other files."""
    files: list[DatasetEntry] = []
    ignored: list[str] = []
    depth, task_at, class_at = len(roles), roles.index("task"), roles.index("class")
    split_at = roles.index("split") if "split" in roles else None
    lies_in: dict[str, frozenset[str]] = {str(root): frozenset()}  # folder → all real folders above it
    for folder, subfolders, names in os.walk(root, onerror=_cannot_read, followlinks=True):
        parts = Path(folder).relative_to(root).parts
        real = os.path.realpath(folder)
        above = lies_in.pop(folder) | {real, *map(str, Path(real).parents)}
        further = []
        for name in sorted(name for name in subfolders if not name.startswith(".")):
            path = os.path.join(folder, name)
            real_path = os.path.realpath(path)
            if real_path in above or (len(parts) == split_at and name.lower() == UNSPLIT_FOLDER):
                ignored.append("/".join((*parts, name)))
            elif not symlinks.escapes_root(path, real_path):
                further.append(name)
                lies_in[path] = above
        subfolders[:] = further
        split = SPLIT_NAMES[parts[split_at].lower()] if split_at is not None and len(parts) > split_at else None
        if len(parts) == depth:
            files.append(DatasetEntry("", parts[task_at], parts[class_at]))
        for name in sorted(names):
            path = "/".join((*parts, name))
            if len(parts) >= depth and Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                files.append(DatasetEntry(path, parts[task_at], parts[class_at], split))
            else:
                ignored.append(path)
    return files, ignored


def _cannot_read(error: OSError) -> None:
    raise UserError(f"cannot read {escape_for_terminal(str(error.filename))}: {error.strerror}")


def _size_and_time(root: Path, path: str, symlinks: SymlinkChecker) -> tuple[int, int]:
    try:
        status = os.lstat(root / path)
        if stat.S_ISLNK(status.st_mode):
            symlinks.escapes_root(root / path)
            status = os.stat(root / path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _refuse_missing(images: Sequence[ImageRecord], places: dict[str, str], manifest: Path, allowed: float) -> None:
    """Raises: UserError: a manifest names more files that are not there than may be dropped."""
    missing = [image.path for image in images if not image.modified_ns and image.path in places]
    if len(missing) > allowed * len(images):
        named = "\n  ".join(f"{places[path]}: {escape_for_terminal(path)}" for path in missing[:10])
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise UserError(
            f"{len(missing)} of {len(images)} images of {manifest} are not there, more than "
            f"data.max_broken_fraction={allowed:g} allows:\n  {named}{more}\nPaths are relative to the manifest's "
            "folder"
        )
