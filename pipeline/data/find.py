"""Finds the images of every task and class under a data root; opens none of them.

Layouts:
- `folders`: <root>/<task>/<class>/<any depth>/image;
- `office_home`: the published archive, with or without its top folder;
- `mini_domainnet`: DomainNet's folders; the images are those of the lists splits_mini/*.txt.

Everything is ordered by name, so that no file system's own order reaches a result. Links are followed, except
those that lead back to a folder they lie in; those that lead out of data.root are refused, unless they may.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipeline.config import DataConfig, read_text
from pipeline.errors import UserError, escaped

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".avif"}
)
OFFICE_HOME_FOLDER = "OfficeHomeDataset_10072016"
OFFICE_HOME_TASKS = ("Art", "Clipart", "Product", "Real World")
MINI_DOMAINNET_LISTS = "splits_mini"
MAX_CLASS_LINE = 1000


@dataclass(frozen=True)
class ImageFile:
    path: str
    """Relative to the root, with forward slashes."""
    task: str
    class_folder: str
    size: int
    """Bytes; 0 for a file that is not there, which is for the scan to report."""
    modified_ns: int


@dataclass(frozen=True)
class Listing:
    """What lies under a root. `images` is sorted by path; `ignored` are the files that are no images, and the
    links that lead back."""

    root: Path
    layout: str
    images: tuple[ImageFile, ...]
    classes: dict[str, tuple[str, ...]]
    """Task → its class folders, sorted; the position is the label."""
    class_words: dict[str, str]
    """Class folder → the words shown to CLIP."""
    ignored: tuple[str, ...]
    left_out_classes: tuple[str, ...]
    """Class folders that data.class_names does not list, as task/class."""

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times: changes when a file may have, without reading it."""
        digest = hashlib.sha256()
        for image in self.images:
            line = f"{image.path}\0{image.size}\0{image.modified_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(repr((sorted(self.classes.items()), sorted(self.class_words.items()))).encode())
        return digest.hexdigest()


def find_images(config: DataConfig, root: Path) -> Listing:
    """Listing of `root` by `config` (layout, tasks, class_names).

    Raises:
        UserError: root missing, no tasks, a task or class that is asked for and not there, links that lead out of
            root, a folder name that is not plain text, or the same as another's.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder on this machine")
    links = _Links(root, config.links_out_of_root)
    layout, root = _recognise(config.layout, root)
    links.leads_out(root)
    if layout == "mini_domainnet":
        files, ignored = _listed_files(root, links), []
    else:
        files, ignored = _walk(root, links)
    selected_tasks = config.tasks or (OFFICE_HOME_TASKS if layout == "office_home" else None)
    links.refuse(root, selected_tasks)
    words_of = read_class_names(Path(config.class_names).expanduser()) if config.class_names else None

    found: dict[str, dict[str, list[str]]] = {}
    folder_of: dict[tuple[str, ...], str] = {}
    for path, task_folder, class_folder in files:
        task, name = _folder_name(task_folder), _folder_name(class_folder)
        # Tasks name files of the results, which other file systems must be able to hold.
        for key, folder in (((task.casefold(),), task_folder), ((task, name), class_folder)):
            if (other := folder_of.setdefault(key, folder)) != folder:
                raise UserError(
                    f"the folders {other!a} and {folder!a} under {root} differ only in case or in the form of their "
                    "Unicode characters; rename one"
                )
        of_class = found.setdefault(task, {}).setdefault(name, [])
        if path:
            of_class.append(path)
    tasks = sorted({_folder_name(task) for task in selected_tasks} if selected_tasks else found)
    missing = [task for task in tasks if task not in found]
    if missing:
        raise UserError(
            f"data.tasks: {', '.join(missing)} not found under {root}; "
            f"found: {_some(sorted(found)) or 'no <task>/<class> folders'}"
        )
    if not tasks:
        raise UserError(f"data.root={root} holds no <task>/<class>/<image> folders")

    classes: dict[str, tuple[str, ...]] = {}
    left_out: list[str] = []
    images: list[ImageFile] = []
    for task in tasks:
        of_task = found[task]
        if words_of is not None:
            absent = [name for name in words_of if name not in of_task]
            if absent:
                raise UserError(
                    f"{config.class_names} lists classes that task {task!r} does not have: {_some(absent)} "
                    f"({root / task})"
                )
            left_out += [f"{task}/{name}" for name in sorted(of_task) if name not in words_of]
        classes[task] = tuple(sorted(words_of if words_of is not None else of_task))
        if len(classes[task]) < 2:
            raise UserError(
                f"task {task!r} has {len(classes[task])} class folder(s) under {root / task}; a task needs two or more"
            )
        for class_folder in classes[task]:
            for path in of_task[class_folder]:
                images.append(ImageFile(path, task, class_folder, *_size_and_time(root, path, links)))
    links.refuse(root, tasks)
    folders = sorted({name for names in classes.values() for name in names})
    class_words = words_of or {name: name.replace("_", " ") for name in folders}
    images.sort(key=lambda image: image.path)
    return Listing(
        root,
        layout,
        tuple(images),
        classes,
        {name: class_words[name] for name in folders},
        tuple(sorted(printable(path) for path in ignored)),
        tuple(left_out),
    )


class _Links:
    """Which of the paths under a root lead out of it by a link, unless they may."""

    def __init__(self, root: Path, may_lead_out: bool):
        self._root, self._may = root, may_lead_out
        self._real = os.path.realpath(root)
        self._out: dict[str, str] = {}

    def leads_out(self, path: str | Path, real: str | None = None) -> bool:
        """Whether it does, to be refused then; `real`: its real path, if that is known."""
        real = real or os.path.realpath(path)
        if self._may or os.path.commonpath((self._real, real)) == self._real:
            return False
        self._out[str(path)] = real
        return True

    def refuse(self, root: Path, tasks: Collection[str] | None = None) -> None:
        """Raises: UserError: links that lead out, in the folders of `tasks` below `root`, and at `root` itself."""
        ways = [
            f"{printable(os.path.relpath(path, self._root))} → {printable(real)}"
            for path, real in sorted(self._out.items())
            if tasks is None or Path(path) == root or Path(path).relative_to(root).parts[0] in tasks
        ]
        if ways:
            raise UserError(
                f"links lead out of data.root={self._root}: {_some(ways)}; put in their places what they lead to, or "
                "allow them all with --data.links_out_of_root true"
            )


def printable(path: str) -> str:
    """The path as one line of plain text, of which no two paths have the same: what is not plain is escaped, and
    backslashes are doubled."""
    return escaped(path.replace("\\", "\\\\"))


def name_fault(path: str) -> str | None:
    """Why a name cannot be stored and told as it is, or None."""
    if path == printable(path):
        return None
    if path == path.encode("utf-8", "replace").decode():
        return "holds control characters or a backslash"
    return "is not UTF-8"


def read_class_names(path: Path) -> dict[str, str]:
    """Class folder → words, from a text file: one class a line, `folder` or `folder<TAB>words`; a line that
    begins with # is a comment."""
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
        if not folder or len(line) > MAX_CLASS_LINE or line != escaped(line, keep="\t") or "\t" in text.strip():
            raise UserError(
                f"{path}:{number}: expected `folder` or `folder<TAB>words` of up to {MAX_CLASS_LINE} plain "
                f"characters, got {line[:MAX_CLASS_LINE]!r}"
            )
        folder = _folder_name(folder)
        if folder in words:
            raise UserError(f"{path}:{number}: class {folder!r} is listed twice")
        words[folder] = text.strip() or folder.replace("_", " ")
    if not words:
        raise UserError(f"data.class_names={path} lists no class")
    return words


def _recognise(layout: str, root: Path) -> tuple[str, Path]:
    nested = root / OFFICE_HOME_FOLDER
    if layout == "auto":
        _, folders, _ = next(os.walk(root, onerror=_cannot_read))
        if (root / MINI_DOMAINNET_LISTS).is_dir():
            layout = "mini_domainnet"
        elif nested.is_dir() or {name for name in folders if name[0] != "."} == set(OFFICE_HOME_TASKS):
            layout = "office_home"
        else:  # also Office-Home with a task of the user's own beside it
            layout = "folders"
    if layout == "office_home" and nested.is_dir():
        root = nested
    if layout == "mini_domainnet" and not (root / MINI_DOMAINNET_LISTS).is_dir():
        raise UserError(f"data.layout=mini_domainnet needs image lists, {root / MINI_DOMAINNET_LISTS}/*.txt")
    return layout, root


def _walk(root: Path, links: _Links) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(path, task, class folder) of all images, with an empty path for a class folder itself; other files."""
    files: list[tuple[str, str, str]] = []
    ignored: list[str] = []
    lies_in: dict[str, frozenset[str]] = {str(root): frozenset()}  # folder → all real folders above it
    for folder, subfolders, names in os.walk(root, onerror=_cannot_read, followlinks=True):
        parts = Path(folder).relative_to(root).parts
        real = os.path.realpath(folder)
        above = lies_in.pop(folder) | {real, *map(str, Path(real).parents)}
        further = []
        for name in sorted(name for name in subfolders if not name.startswith(".")):
            path = os.path.join(folder, name)
            real_path = os.path.realpath(path)
            if real_path in above:
                ignored.append("/".join((*parts, name)))
            elif not links.leads_out(path, real_path):
                further.append(name)
                lies_in[path] = above
        subfolders[:] = further
        if len(parts) == 2:
            files.append(("", parts[0], parts[1]))
        for name in sorted(names):
            path = "/".join((*parts, name))
            if len(parts) >= 2 and Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                files.append((path, parts[0], parts[1]))
            else:
                ignored.append(path)
    return files, ignored


def _cannot_read(error: OSError) -> None:
    raise UserError(f"cannot read {printable(str(error.filename))}: {error.strerror}")


@lru_cache(maxsize=4096)
def _folder_name(name: str) -> str:
    """A task's or class's name, the same on every file system: some store é as e and an accent."""
    if fault := name_fault(name) or ("begins or ends with a space" if name != name.strip() else None):
        raise UserError(f"the folder name '{printable(name)}' {fault}; rename it")
    return unicodedata.normalize("NFC", name)


def _listed_files(root: Path, links: _Links) -> list[tuple[str, str, str]]:
    """The union of Dassl's lists: `clipart/aircraft_carrier/x.jpg 0` a line, file name <task>_<split>.txt."""
    lists = sorted((root / MINI_DOMAINNET_LISTS).glob("*.txt"))
    if not lists:
        raise UserError(f"no *.txt lists in {root / MINI_DOMAINNET_LISTS}")
    paths: set[str] = set()
    for file in lists:
        if links.leads_out(file):
            links.refuse(root)
        for number, line in enumerate(read_text(file, str(file), "surrogateescape").split("\n"), 1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            parts = path.split("/")
            if len(parts) < 3 or not label.isdigit() or not {"", ".", ".."}.isdisjoint(parts) or "\0" in path:
                raise UserError(f"{file}:{number}: expected `task/class/image label`, got {line[:MAX_CLASS_LINE]!r}")
            paths.add(path)
    for folder in {path.rpartition("/")[0] for path in paths}:
        links.leads_out(root / folder)
    return [(path, *path.split("/")[:2]) for path in sorted(paths)]


def _size_and_time(root: Path, path: str, links: _Links) -> tuple[int, int]:
    try:
        status = os.lstat(root / path)
        if stat.S_ISLNK(status.st_mode):
            links.leads_out(root / path)
            status = os.stat(root / path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _some(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
