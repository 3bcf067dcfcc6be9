"""Walk folders of images: the one rule of which files are images, which are left out and why.

A file is an image by its suffix (SUFFIXES_OF_FORMAT); its format is detected by content when it is read. Hidden files
and those that operating systems, network storage and tools leave behind are junk. Symbolic links are followed, except
to a folder that contains them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.data.images import SUFFIXES_OF_FORMAT
from pipeline.data.names import escape_for_terminal, pluralize
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.buckets import AnyPath, BucketEntry, BucketPath

    Entry = os.DirEntry[str] | BucketEntry

IMAGE_SUFFIXES = frozenset(chain.from_iterable(SUFFIXES_OF_FORMAT.values()))
JUNK = (
    # Hidden: .DS_Store, ._* (AppleDouble), .git, .ipynb_checkpoints, .nfs*, .snapshot, .Trash-1000, .thumbnails, ...
    *(".*", "__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),
    *("thumbs.db*", "ehthumbs*.db", "desktop.ini", "*:zone.identifier", "~$*"),
    *("$recycle.bin", "system volume information", "found.[0-9][0-9][0-9]", "lost+found"),
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "@__thumb", "@sharebin", "#recycle", "#snapshot"),
    *("~snapshot", "@gmt-*", "lost.dir", "picasa.ini", "zbthumbnail.info", "__pycache__"),
)
"""Patterns of the names, in lower case, of files and folders of systems and tools."""
TEMPORARY_FILES = (
    "*.part",
    "*.partial",
    "*.crdownload",
    "*.download",
    "*.filepart",
    "*.opdownload",
    "*.aria2",
    "*.tmp",
    "*.temp",
    "*~",
)
"""Patterns of the names of files that are not complete."""
JUNK_KIND = "hidden, system or temporary"
UNREAD_FORMATS = {
    "HEIC": (".heic", ".heif", ".hif"),
    "JPEG 2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c"),
    "JPEG XL": (".jxl",),
    "TGA": (".tga",),
    "ICO": (".ico",),
    "SVG": (".svg",),
    "PDF": (".pdf",),
    "EPS": (".eps", ".ps"),
    "Photoshop": (".psd", ".psb"),
    "OpenEXR or HDR": (".exr", ".hdr", ".pfm"),
    "DICOM": (".dcm", ".dicom"),
    "camera raw": (
        *(".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf"),
        *(".pef", ".srw", ".raw", ".3fr", ".kdc"),
    ),
    "video": (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"),
    "NumPy": (".npy", ".npz"),
}
"""Formats of images that are not read → suffixes."""
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")
NO_SUFFIX = "no suffix"
CIRCULAR_LINK, BROKEN_LINK, EXTERNAL_LINK = (
    "link to a folder that contains it",
    "link without a target",
    "link out of the root",
)
NO_IMAGES, LOOSE_IMAGE = "folder without images", "image outside of class folders"
BESIDE_SPLITS = "folder beside those of splits"
EMPTY_NAME = "folder without a name"
"""Of keys in a bucket with two slashes, which have no path."""
_REMEDIES = {
    NO_SUFFIX: "images need a suffix: rename them to .jpg or .png",
    LOOSE_IMAGE: "move images into folders of their tasks and classes",
    BROKEN_LINK: "restore the targets of links",
    EMPTY_NAME: "rename objects whose keys have two slashes",
}
_JUNK, _TEMPORARY = (re.compile("|".join(map(translate, patterns))) for patterns in (JUNK, TEMPORARY_FILES))
_FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in UNREAD_FORMATS.items() for suffix in suffixes}


class Skipped(NamedTuple):
    """A file, or a folder with a `/` at its end, that is left out."""

    path: str
    """Relative to the root, with forward slashes."""
    kind: str
    """Reason, as `describe_skipped` lists it."""


@dataclass
class WalkedFolder:
    parts: tuple[str, ...]
    """Its path below the root."""
    images: list[str]
    """Names, sorted."""
    skipped: list[Skipped] = field(default_factory=list)


def is_junk(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, was left by a system or a tool, or has no name."""
    return not name or bool(_JUNK.match(name.casefold()))


def skip_kind(name: str) -> str | None:
    """Return why a file of this name is left out; None: it is an image."""
    if is_junk(name) or _TEMPORARY.match(name.casefold()):
        return JUNK_KIND
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in _FORMAT_OF_SUFFIX:
        return f"{_FORMAT_OF_SUFFIX[suffix]} ({suffix})"
    if suffix in ARCHIVE_SUFFIXES:
        return f"archive ({suffix})"
    return suffix if re.fullmatch(r"\.[a-z0-9_+-]{1,12}", suffix) else NO_SUFFIX


def is_unread_image(kind: str) -> bool:
    """Return whether files of this `skip_kind` are images in a format that is not read."""
    return kind.endswith(")") and not kind.startswith(("archive (", "video (", "NumPy ("))


def skip_remedy(kind: str) -> str | None:
    """Return how files of this kind can be read as images; None: they are none."""
    if kind in _REMEDIES:
        return _REMEDIES[kind]
    if kind.startswith("archive ("):
        return "unpack archives"
    if kind.startswith("video ("):
        return "extract the frames of videos as images"
    return "convert images of other formats to JPEG or PNG" if "(" in kind else None


def describe_skipped(skipped: Iterable[Skipped]) -> str:
    """Return the number of files of each kind, the most frequent first: "36 HEIC (.heic), 2 .txt"."""
    counts = Counter(kind for _, kind in skipped)
    texts = []
    for kind, number in sorted(counts.items(), key=lambda item: (-item[1], item)):
        word, _, qualifier = kind.partition(" ")
        plural = f"{word}s {qualifier}" if number > 1 and word in ("link", "folder", "image") else kind
        texts.append(f"{number:,} {plural}")
    return ", ".join(texts)


def walk_folders(
    root: AnyPath,
    leave_out: Callable[[tuple[str, ...], str], str | None] = lambda parts, real: None,
    lists_ahead: bool = True,
) -> Iterator[WalkedFolder]:
    """Yield each folder from `root` on, in order of the names.

    Args:
        leave_out: called with a folder's path below the root and its resolved path; returns why it is left out, or
            None.
        lists_ahead: list many folders of a bucket at once; False: the walk may end early.

    Raises:
        UserError: a folder cannot be read.
    """
    stack: list[tuple[tuple[str, ...], frozenset[str]]] = [((), frozenset())]
    while stack:
        parts, ancestors = stack.pop()
        folder = _join(root, parts)
        if lists_ahead and len(parts) == 1 and not isinstance(folder, str):
            folder.load_below()
        real = resolve(folder)
        visited = ancestors | {real, *map(str, Path(real).parents)}
        walked, subfolders = WalkedFolder(parts, []), []
        for entry in list_folder(folder):
            path, is_folder = (*parts, entry.name), is_directory(entry)
            kind = _kind(entry, is_folder)
            if is_folder:
                real_path = resolve(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if real_path in visited:
                    kind = kind or CIRCULAR_LINK
                kind = kind or leave_out(path, real_path)
                if kind is None:
                    subfolders.append((path, visited))
            elif kind is None:
                walked.images.append(entry.name)
            if kind is not None:
                walked.skipped.append(Skipped("/".join(path) + "/" * is_folder, kind))
        yield walked
        stack += reversed(subfolders)


def _join(root: AnyPath, parts: tuple[str, ...]) -> str | BucketPath:
    return os.path.join(root, *parts) if isinstance(root, Path) else root.joinpath(*parts)


def resolve(path: str | AnyPath) -> str:
    """Return a path without links, which buckets do not have."""
    return os.path.realpath(path) if isinstance(path, str | Path) else path.location


def _kind(entry: Entry, is_folder: bool) -> str | None:
    if not entry.name:
        return EMPTY_NAME
    if is_folder:
        return JUNK_KIND if is_junk(entry.name) else None
    kind = skip_kind(entry.name)
    return BROKEN_LINK if kind and entry.is_symlink() and not Path(str(entry.path)).exists() else kind


def is_directory(entry: Entry) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_folder(folder: str | AnyPath) -> Sequence[Entry]:
    """Return the entries of a folder, sorted by name. Raises UserError if it cannot be read."""
    if not isinstance(folder, str | Path):
        return folder.entries()
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {escape_for_terminal(str(error.filename))}: {error.strerror}") from None


def find_images(path: str | BucketPath, other_suffixes: tuple[str, ...] = ()) -> tuple[list[str], list[Skipped]]:
    """Return the images below a folder, in order of the names, or the file itself; and what was left out. Files of a
    bucket are named as in pyarrow's file system.

    Args:
        other_suffixes: suffixes of files to return, too.

    Raises:
        UserError: there is nothing at `path`, or a folder cannot be read.
    """
    root, name = (Path(path), path) if isinstance(path, str) else (path, path.key)
    if not root.exists():
        raise UserError(f"{path}: no such file or folder")
    if not root.is_dir():
        return [name], []
    files: list[str] = []
    skipped: list[Skipped] = []
    for folder in walk_folders(root):
        names = list(folder.images)
        for file in folder.skipped:
            if file.kind != JUNK_KIND and file.path.lower().endswith(other_suffixes):
                names.append(os.path.basename(file.path))
            else:
                skipped.append(file)
        files += [os.path.join(name, *folder.parts, image) for image in sorted(names)]
    return files, skipped


def skipped_note(skipped: Collection[Skipped]) -> str:
    """Return the number of files that are not read, in all and by kind, and the remedy for images among them."""
    remedies = {remedy for kind in {kind for _, kind in skipped} if (remedy := skip_remedy(kind))}
    return f"{pluralize(len(skipped), 'file')} not read: {'; '.join([describe_skipped(skipped), *sorted(remedies)])}"


def unread_images_note(skipped: Iterable[Skipped]) -> str:
    """Return the number of files that are not read and may be images, with their remedies; without such files no
    text."""
    files = [file for file in skipped if skip_remedy(file.kind)]
    return skipped_note(files) if files else ""
