"""Recognizing layouts of image folders; files that are not read; symbolic links."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex, index_dataset
from pipeline.data.walk import JUNK_KIND, describe_skipped, find_images, skipped_note
from pipeline.errors import UserError

JUNK_FOLDERS = (
    *("__MACOSX", "@eaDir", "#recycle", "#snapshot", ".snapshot", "@Recycle", "@tmp", "$RECYCLE.BIN", "lost+found"),
    *("System Volume Information", ".Trash-1000", ".ipynb_checkpoints", ".git", ".thumbnails", ".picasaoriginals"),
    *(".AppleDouble", ".Spotlight-V100", ".fseventsd", ".stfolder", ".sync", ".dropbox.cache", "__pycache__"),
)
JUNK_FILES = (
    *("._a.png", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "~$x.png", ".nfs0001", ".hidden.jpg"),
    *("a.png.part", "a.jpg.crdownload", "a.tmp", "a.png~"),
)
PHOTOS = tuple(f"photo/{name}/{number}.png" for name in ("cat", "dog") for number in (1, 2))
SKETCHES = tuple(f"sketch/{name}/{number}.png" for name in ("cat", "dog") for number in (1, 2))
PLAIN = (*PHOTOS, *SKETCHES)


def write_files(root: Path, paths: Sequence[str], content: bytes = b"an image") -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def image_paths(dataset: DatasetIndex) -> list[str]:
    return [image.path for image in dataset.images]


# --- files that are not read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["", "photo/", "photo/cat/"])
def test_junk_is_left_out_at_every_level_and_counted(tmp_path, level):
    """The same of a run and of a prediction."""
    root = write_files(tmp_path / "data", PLAIN)
    write_files(root, [f"{level}{name}" for name in JUNK_FILES])
    write_files(root, [f"{level}{name}/cat/1.png" for name in JUNK_FOLDERS])
    dataset = index_dataset(DataConfig(), root)
    assert dataset.classes == {"photo": ("cat", "dog"), "sketch": ("cat", "dog")}
    assert image_paths(dataset) == list(PLAIN)
    expected = {f"{level}{name}" for name in JUNK_FILES} | {f"{level}{name}/" for name in JUNK_FOLDERS}
    assert dict(dataset.skipped) == dict.fromkeys(expected, JUNK_KIND)
    files, skipped = find_images(str(root))
    assert files == [f"{root}/{path}" for path in PLAIN] and set(skipped) == set(dataset.skipped)


def test_files_that_are_not_read_are_counted_by_kind(tmp_path):
    suffixes = "heic HEIF jp2 tga svg pdf psd cr2 nef arw dng mp4 npy txt json xml".split()
    root = write_files(tmp_path, [*PLAIN, *(f"photo/cat/x.{suffix}" for suffix in suffixes), "photo/cat/noname"])
    write_files(root, [f"photo/cat/x{number}.heic" for number in range(3)])
    dataset = index_dataset(DataConfig(), root)
    text = describe_skipped(dataset.skipped)
    assert text.startswith("4 HEIC (.heic), 1 ") and len(dataset.skipped) == len(suffixes) + 4
    kinds = ("1 .txt", "1 .json", "1 .xml", "1 no suffix", "1 HEIC (.heif)", "1 video (.mp4)", "1 camera raw (.cr2)")
    assert all(kind in text for kind in kinds)
    note = skipped_note(dataset.skipped)
    assert "20 files not read" in note and "convert" in note and "rename" in note
    assert "convert" not in skipped_note([file for file in dataset.skipped if file.kind == ".txt"])


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "pgm", "ppm", "pbm", "pnm", "tif", "TIFF", "JPG", "dib"])
def test_common_suffixes_of_readable_formats_are_taken(tmp_path, suffix):
    kind = {"j": "JPEG", "p": "PPM", "t": "TIFF", "d": "BMP"}[suffix[0].lower()]
    root = write_files(tmp_path, PLAIN)
    Image.new("1" if suffix == "pbm" else "L", (4, 4)).save(root / f"photo/cat/3.{suffix}", kind)
    assert f"photo/cat/3.{suffix}" in image_paths(index_dataset(DataConfig(), root))


def test_prediction_follows_links_and_reports_broken_ones(tmp_path):
    write_files(tmp_path, ["elsewhere/1.png", "images/2.png"])
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    (tmp_path / "images/gone").symlink_to(tmp_path / "nowhere")
    files, skipped = find_images(str(tmp_path / "images"))
    assert [Path(file).name for file in files] == ["2.png", "1.png"]
    assert describe_skipped(skipped) == "1 broken links, 1 links to a folder that contains them"
    with pytest.raises(UserError, match="no such file or folder"):
        find_images(str(tmp_path / "images/gone"))
