"""Hostile input: decompression bombs, links, odd names, foreign and corrupted files, code. All is refused by name."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import REPOSITORY
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.clip.files.checkpoint import read_checkpoint
from pipeline.clip.files.weights import Weights
from pipeline.clip.load import build_meta_towers, clip_identity, load_clip, weights_fingerprint
from pipeline.config import (
    BUILTIN_DIGITS,
    ClipConfig,
    Config,
    DataConfig,
    JobParser,
    MmapConfig,
    Section,
    load_yaml,
    parse_config,
    to_yaml,
)
from pipeline.data import images as images_module
from pipeline.data import parquet
from pipeline.data.images import BrokenImage, decode_rgb, read_image
from pipeline.data.index import escape_for_terminal, index_dataset, read_class_names
from pipeline.data.layouts import OFFICE_HOME_FOLDER
from pipeline.data.parquet import COLUMNS, SplitDescription, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.grouping.gradient_blocks import read_layout
from pipeline.methods import adapter_file
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, save_adapter
from pipeline.methods.mmap import GroupMmap, MmapShape
from pipeline.training.evaluate import decoded_batches
from pipeline.training.frozen_features import StoredFeatures, save_features
from pipeline.training.snapshots import SCHEMA, read_gradients, read_steps

MORE = int(os.environ.get("FUZZ_TIMES", "1"))
"""How many times as many examples: FUZZ_TIMES=20 pytest tests/test_hostile_input.py"""


def fuzz(examples: int):
    return settings(
        max_examples=examples * MORE,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@st.composite
def mutations(draw, original: bytes) -> bytes:
    """Draw the bytes with some changed, cut off, left out, or repeated."""
    size, data = len(original), bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "set", "set", "cut", "leave out", "twice", "fill", "number"])):
            case "flip" if data:
                data[position] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[position] = draw(st.integers(0, 255))
            case "cut":
                del data[position:]
            case "leave out":
                del data[position : position + draw(st.integers(1, 200))]
            case "twice":
                data[position:position] = data[position : position + draw(st.integers(1, 200))]
            case "fill":
                length = min(draw(st.integers(1, 200)), len(data) - position)
                data[position : position + length] = bytes([draw(st.integers(0, 255))]) * length
            case "number":
                data[position : position + 4] = draw(
                    st.sampled_from([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"])
                )
    return bytes(data[: 2 * size])


# --- images --------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def zeros(mib: int) -> bytes:
    """Compress `count` zeros to a thousandth."""
    compress = zlib.compressobj(9)
    return b"".join(compress.compress(bytes(1 << 20)) for _ in range(mib)) + compress.flush()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", pixels or zlib.compress(bytes(25 * 8))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in all_chunks
    )


def tiff(width: int, height: int, *tags: tuple[int, int, int, int], data: bytes = bytes(64)) -> bytes:
    fields = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 2)}
    fields |= {273: (4, 1, 8), 277: (3, 1, 3), 278: (4, 1, height), 279: (4, 1, len(data))}
    fields |= {tag: tuple(entry) for tag, *entry in tags}
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(fields.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + entries + bytes(4)


def replace_bytes(data: bytes, marker: bytes, skip: int, value: bytes) -> bytes:
    start = data.index(marker) + skip
    return data[:start] + value + data[start + len(value) :]


@cache
def bombs() -> dict[str, bytes]:
    small, huge = Image.new("RGB", (8, 8), "red"), 2**31 - 1
    gif, jpeg = encoded(small.quantize(4), "GIF"), encoded(small, "JPEG")
    progressive = encoded(small, "JPEG", progressive=True)
    scan = progressive[progressive.index(b"\xff\xda") : -2]
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(2)]
    webp = encoded(small, "WEBP", save_all=True, append_images=frames)
    bomb = zeros(200)
    return {
        "claims.png": png(huge, huge),
        "valid: text.png": png(8, 8, (b"zTXt", b"k\0\0" + bomb)),
        "valid: international text.png": png(8, 8, (b"iTXt", b"k\0\1\0\0\0" + bomb)),
        "valid: profile.png": png(8, 8, (b"iCCP", b"k\0\0" + bomb)),
        "valid: many texts.png": png(8, 8, *[(b"zTXt", b"%d\0\0" % n + zeros(1)) for n in range(100)]),
        "screen.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        "frame.gif": replace_bytes(gif, b",", 5, struct.pack("<HH", 65535, 65535)),
        "canvas.webp": replace_bytes(webp, b"VP8X", 12, b"\xff\x3f\0\xff\x3f\0"),
        "claims.tif": tiff(huge, huge),
        "samples.tif": tiff(8, 8, (277, 3, 1, 65535)),
        "claims.avif": replace_bytes(encoded(small, "AVIF"), b"ispe", 8, struct.pack(">II", 60000, 60000)),
        "claims.ppm": b"P6\n100000 100000\n255\n" + bytes(100),
        "number.ppm": b"P6\n" + b"9" * 1_000_000,
        "claims.bmp": replace_bytes(encoded(small, "BMP"), b"BM", 18, struct.pack("<ii", huge, huge)),
        "claims.jpg": replace_bytes(jpeg, b"\xff\xc0", 5, struct.pack(">HH", 65500, 65500)),
        "scans.jpg": progressive[: progressive.index(b"\xff\xda")] + scan * 2000 + b"\xff\xd9",
        # Valid images, followed by data that decompresses to much more.
        "valid: pixels.png": png(8, 8, pixels=bomb),
        "valid: strip.tif": tiff(8, 8, data=bomb),
        "valid: frames.gif": gif[:-1] + gif[gif.index(b",") : -1] * 20_000 + b";",
        "valid: frames.webp": encoded(small, "WEBP", save_all=True, append_images=frames * 100),
        "valid: frames.avif": encoded(small, "AVIF", save_all=True, append_images=frames * 50),
    }


def test_bombs_are_broken_images_and_take_no_memory(tmp_path):
    folder = tmp_path / "a/x"
    folder.mkdir(parents=True)
    for name, data in bombs().items():
        (folder / name).write_bytes(data)
    with open(folder / "sparse.ppm", "wb") as file:
        file.write(b"P6\n8 8\n255\n")
        file.truncate(1 << 40)
    code = """if True:
        import json, os, resource, sys
        from pathlib import Path
        from pipeline.data.index import index_dataset
        from pipeline.data.parquet import scan_image
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        root = Path(sys.argv[1])
        baseline = peak()
        names = sorted(os.listdir(root / "a/x"))
        images = {name: scan_image(root, f"a/x/{name}", "a", "x") for name in names}
        print(json.dumps([peak() - baseline, {name: [image.path, image.error] for name, image in images.items()}]))"""
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    grown_mib, errors = json.loads(finished.stdout.splitlines()[-1])
    assert set(errors) == {*bombs(), "sparse.ppm"}
    for name, (path, error) in errors.items():
        assert path == f"a/x/{name}"
        assert bool(error) != name.startswith("valid"), (name, error)
    assert "file too large (" in errors["sparse.ppm"][1]
    assert "too many JPEG scans (" in errors["scans.jpg"][1]
    assert grown_mib < 100


def test_only_bytes_of_the_image_itself_count_against_a_limit():
    """A phone's video, a second image or a thumbnail after or before the image are not more scans of it."""
    jpeg = encoded(Image.linear_gradient("L").convert("RGB"), "JPEG", progressive=True)
    scans = b"\xff\xda" * (2 * images_module.MAX_SCANS)
    exif = Image.Exif()
    exif[270] = scans.decode("latin-1")
    for data in (jpeg + scans, encoded(Image.open(io.BytesIO(jpeg)), "JPEG", exif=exif, comment=scans)):
        assert data.count(b"\xff\xda") > images_module.MAX_SCANS
        assert np.array_equal(np.asarray(decode_rgb(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_largest_images_are_read(monkeypatch, tmp_path):
    """The limits are not below what they are said to be."""
    monkeypatch.setattr(images_module, "MAX_PIXELS", 64)
    assert decode_rgb(encoded(Image.new("RGB", (8, 8)), "PNG")).size == (8, 8)
    with pytest.raises(BrokenImage, match=r"image too large \(9 x 8 pixels, limit 64\)"):
        decode_rgb(encoded(Image.new("RGB", (9, 8)), "PNG"))
    monkeypatch.setattr(images_module, "MAX_BYTES", 5)
    (tmp_path / "a.png").write_bytes(b"12345")
    assert read_image(tmp_path / "a.png") == b"12345"
    (tmp_path / "a.png").write_bytes(b"123456")
    with pytest.raises(BrokenImage, match=r"file too large \(6 bytes, limit 5\)"):
        read_image(tmp_path / "a.png")


IMAGES = {
    kind: encoded(Image.linear_gradient("L").resize((9, 7)), kind) for kind in ("PNG", "GIF", "TIFF", "BMP", "PPM")
}
IMAGES |= {
    kind: encoded(Image.linear_gradient("L").convert("RGB").resize((9, 7)), kind) for kind in ("JPEG", "WEBP", "AVIF")
}


@fuzz(150)
@given(st.sampled_from(sorted(IMAGES)).flatmap(lambda kind: mutations(IMAGES[kind])))
def test_any_bytes_are_an_image_or_a_broken_one(data):
    try:
        assert decode_rgb(data).mode == "RGB"
    except BrokenImage:
        pass


# --- links -----------------------------------------------------------------------------------------------------


STRICT = DataConfig(follow_external_symlinks=False)


@pytest.fixture
def linked(tmp_path) -> Path:
    """data/ with two tasks; elsewhere/ with another, and more images."""
    for folder in ("data/a/x", "data/a/y", "data/b/x", "data/b/y", "elsewhere/x", "elsewhere/y"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "1.png")
    return tmp_path


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a/x/2.png", "elsewhere/x/1.png"),
        ("a/x/deep", "elsewhere/x"),
        ("a/z", "elsewhere/x"),
        ("c", "elsewhere"),
        ("a/x/dangling.png", "nowhere.png"),
        ("a/x/2.png", "data/../elsewhere/x/1.png"),
    ],
)
def test_links_out_of_the_root_are_refused_by_name_and_target(linked, link, target):
    root = linked / "data"
    (root / link).symlink_to(linked / target)
    real = os.path.realpath(linked / target)
    with pytest.raises(UserError) as error:
        index_dataset(STRICT, root)
    assert f"{link} → {real}" in str(error.value) and "--data.follow_external_symlinks true" in str(error.value)
    allowed = index_dataset(DataConfig(), root)
    assert any(image.path.startswith(link) for image in allowed.images)
    # A task that is not used may have what it wants.
    assert index_dataset(DataConfig(tasks=["b"], follow_external_symlinks=False), root).classes == {"b": ("x", "y")}


def test_all_links_are_named_at_once_and_a_chain_to_its_end(linked):
    root = linked / "data"
    (linked / "hop").symlink_to(linked / "elsewhere")
    (root / "a/z").symlink_to(linked / "hop/x")
    (root / "b/x/2.png").symlink_to(root / "a/x/back.png")
    (root / "a/x/back.png").symlink_to("/etc/hostname")
    for number in range(3, 6):
        (root / f"b/x/{number}.png").symlink_to(linked / "elsewhere/x/1.png")
    with pytest.raises(UserError, match=r"a/z → .*/elsewhere/x;"):
        index_dataset(STRICT, root)
    (root / "a/z").unlink()
    with pytest.raises(UserError, match=r"a/x/back.png → /etc/hostname, b/x/2.png → /etc/hostname, b/x/3.png → "):
        index_dataset(STRICT, root)


def test_links_inside_the_root_and_a_root_that_is_a_link_are_followed(linked):
    root = linked / "data"
    (root / "a/x/2.png").symlink_to(root / "b/x/1.png")
    (root / "a/z").symlink_to("../b/y")
    (root / "c").symlink_to("b")
    (linked / "link").symlink_to(root)
    dataset = index_dataset(STRICT, linked / "link")
    assert {"a/x/2.png", "a/z/1.png", "c/x/1.png"} <= {image.path for image in dataset.images}


def test_links_of_listed_images_are_refused_too(linked):
    root = linked / "data"
    (root / "splits_mini").mkdir()
    lines = [f"{task}/{name}/1.png 0" for task in "ab" for name in "xy"]
    (root / "splits_mini/a_train.txt").write_text("\n".join(lines))
    assert len(index_dataset(STRICT, root).images) == 4
    shutil.rmtree(root / "b/x")
    (root / "b/x").symlink_to(linked / "elsewhere/x")
    with pytest.raises(UserError, match="b/x → .*elsewhere/x"):
        index_dataset(STRICT, root)
    (root / "b/x").unlink()
    (root / "b/x").mkdir()
    (root / "b/x/1.png").symlink_to(linked / "elsewhere/x/1.png")
    with pytest.raises(UserError, match="b/x/1.png → .*elsewhere/x/1.png"):
        index_dataset(STRICT, root)
    (root / "splits_mini/b_train.txt").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="splits_mini/b_train.txt → /etc/passwd"):
        index_dataset(DataConfig(tasks=["a"], follow_external_symlinks=False), root)


def test_a_published_archive_that_is_a_link_is_refused_too(linked):
    (linked / "data" / OFFICE_HOME_FOLDER).symlink_to(linked / "elsewhere")
    with pytest.raises(UserError, match=f"{OFFICE_HOME_FOLDER} → .*elsewhere"):
        index_dataset(DataConfig(layout="office_home", follow_external_symlinks=False), linked / "data")


def test_listing_asks_for_each_file_once(linked, monkeypatch):
    """The check of links adds no system calls per file."""
    root = linked / "data"
    for number in range(50):
        (root / f"a/x/{number + 10}.png").write_bytes(b"")
    calls = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *args, real=real, **kwargs: calls.append(str(path)) or real(path, *args, **kwargs)
        )
    index_dataset(DataConfig(), root)
    assert sum(path.endswith(".png") for path in calls) == 54


# --- names -----------------------------------------------------------------------------------------------------

ODD = [
    "a\nb.png",
    "a\tb.png",
    "\x1b[31mred\x1b[0m.png",
    "a\r.png",
    "\u202egnp.exe.png",
    "a\x85b.png",
    "a\u2028b.png",
    "a\\x0ab.png",
]


@given(st.text(), st.text())
@settings(derandomize=True)
def test_a_printable_path_is_one_line_and_of_one_path(path, other_path):
    assert (escape_for_terminal(path) == escape_for_terminal(other_path)) == (path == other_path)
    assert len(escape_for_terminal(path).encode().decode().splitlines()) <= 1


def test_names_that_look_identical_are_distinguished():
    names = ["a\nb.jpg", r"a\nb.jpg", r"a\\nb.jpg", "a\udce9.jpg", r"a\udce9.jpg"]
    assert len({escape_for_terminal(name) for name in names}) == len(names)
    assert escape_for_terminal("smörgås 写真 👩‍🚀\u202f.jpg") == "smörgås 写真 👩‍🚀\u202f.jpg"


def test_odd_file_names_are_broken_images_of_one_line(linked):
    root = linked / "data"
    for name in ODD:
        shutil.copy(root / "a/x/1.png", root / "a/x" / name)
        (root / "a/x" / name.replace(".png", ".txt")).touch()
    dataset = index_dataset(DataConfig(), root)
    scanned = [scan_image(root, image.path, image.task, image.class_folder) for image in dataset.images]
    broken = {image.path: image.error for image in scanned if image.error}
    assert set(broken.values()) == {"the file name contains control characters or a backslash"}
    assert broken.keys() == {escape_for_terminal(f"a/x/{name}") for name in ODD} and len(broken) == len(ODD)
    for path in (*broken, *(path for path, _ in dataset.skipped)):
        assert not any(character < " " for character in path) and len(path.splitlines()) == 1


def test_image_errors_are_one_line(linked):
    def decode(data: bytes):
        raise BrokenImage("tag\n\x1b[31m")

    assert scan_image(linked / "data", "a/x/1.png", "a", "x", decode).error == r"tag\n\x1b[31m"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", " x", "x ", "a\\b", "x\u2029", "\u202ex"])
@pytest.mark.parametrize("level", ["task", "class"])
def test_odd_folder_names_are_refused_by_name(linked, name, level):
    folder = linked / "data" / (f"{name}/x" if level == "task" else f"a/{name}")
    folder.mkdir(parents=True)
    (folder / "1.png").touch()
    with pytest.raises(UserError) as error:
        index_dataset(DataConfig(), linked / "data")
    assert f"the folder name '{escape_for_terminal(name)}'" in str(error.value) and "rename it" in str(error.value)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("names", [("A", "a"), ("Straße", "STRASSE"), ("caf\u00e9", "cafe\u0301")])
def test_tasks_that_differ_in_case_or_form_only_are_refused(linked, names):
    for name in names:
        (linked / "data" / name / "x").mkdir(parents=True, exist_ok=True)
        shutil.copy(linked / "elsewhere/x/1.png", linked / "data" / name / "x")
    with pytest.raises(UserError, match="differ only in case or Unicode normalization; rename one"):
        index_dataset(DataConfig(), linked / "data")


def test_classes_may_differ_in_case_but_not_in_form_only(linked):
    (linked / "data/a/X").mkdir()
    assert index_dataset(DataConfig(), linked / "data").classes["a"] == ("X", "x", "y")
    (linked / "data/a/caf\u00e9").mkdir()
    (linked / "data/a/cafe\u0301").mkdir()
    with pytest.raises(UserError, match=r"'caf\\xe9'|'cafe\\u0301'"):
        index_dataset(DataConfig(), linked / "data")


def test_the_longest_names_are_stored_and_found_again(tmp_path):
    task, class_folder, file = "写" * 85, "y" * 255, "z" * 251 + ".png"
    folder = tmp_path / "data" / task / class_folder
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / file)
    (tmp_path / "data" / task / "x").mkdir()
    (image,) = index_dataset(DataConfig(), tmp_path / "data").images
    scanned = scan_image(tmp_path / "data", image.path, image.task, image.class_folder)
    assert scanned.error is None
    counts = {"train": {task: 0}, "test": {task: 1}}
    description = SplitDescription({task: [class_folder]}, {class_folder: "y"}, 1, 1, "", counts)
    (part,) = plan_parts([scanned], "test", {scanned.path: image.size})
    write_part(tmp_path / "data", part, description, tmp_path / "splits")
    (tmp_path / "splits/splits.json").write_text(json.dumps(vars(description)))
    (row,) = SplitReader(tmp_path / "splits").rows("test", task, ("path",))
    assert row["path"] == image.path


@pytest.mark.parametrize("line", ["x" * 2000, "bed\twords\x1b[31m", "bed\ta\u2028b", "bed\ta\tb", "bed\x0bmug"])
def test_odd_lines_of_a_class_names_file_are_named(tmp_path, line):
    file = tmp_path / "names.txt"
    file.write_bytes(f"mug\n{line}\n".encode())
    with pytest.raises(UserError, match=r"names.txt:2: expected `folder` or `folder<TAB>class name`") as error:
        read_class_names(file)
    assert len(str(error.value)) < 4000 and "\x1b" not in str(error.value)


def test_a_huge_class_names_file_is_not_read(tmp_path):
    with open(tmp_path / "names.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"names.txt is too large \(1,099,511,627,776 bytes"):
        read_class_names(tmp_path / "names.txt")


@pytest.mark.parametrize("line", ["a/x/1.png", "a/x/\x1b[31m 0 0 x", "x"])
def test_odd_list_lines_are_named(linked, line):
    (linked / "data/splits_mini").mkdir()
    (linked / "data/splits_mini/a_train.txt").write_text(line)
    with pytest.raises(UserError, match="a_train.txt:1: expected"):
        index_dataset(DataConfig(), linked / "data")


def test_messages_cannot_drive_a_terminal():
    error = UserError("two lines\n\tof \x1b[31mtext\x07 and \udce9")
    assert str(error) == "two lines\n\tof \\x1b[31mtext\\x07 and \\udce9"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- configs ---------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n" for p, n in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.mkdir [made]", "line 1, column 7"),
        ("name: !!python/name:os.system", "line 1"),
        ("name: !!python/object/new:os.mkdir [made]", "line 1"),
        (LAUGHS, r"line 2, column 8"),
        ("a: &a [*a]", r"\*a: write the value out"),
        ("seed: 1\ntraining: {epochs: 2}\nseed: 2\n", r"(?s)duplicate key seed.*line 3"),
        ("training:\n  epochs: 1\n  epochs: 2\n", r"(?s)duplicate key epochs.*line 3"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("\n".join(" " * depth + "a:" for depth in range(600)), "nested too deeply"),
        ("[1, 2]", "must be a mapping of fields to values .*, not a list"),
        ("just text", "must be a mapping of fields to values .*, not text"),
        ("a: 1\n---\na: 2\n", "single document"),
        ("name: a\0b", "line 1 has a NUL byte"),
        ("training:\n\tepochs: 1", r"(?s)line 2, column 1"),
        (b"name: caf\xe9\n", "not UTF-8: line 1"),
        (b"a: 1\nname: \xff\xfe\n", "not UTF-8: line 2"),
        ("seed: " + "9" * 5000, r"seed=9+\.\.\.: must be a whole number \(.*:1\)"),
        ("seed: 0x" + "f" * 5000, r"seed=0xf+\.\.\.: must be a whole number"),
        ("seed: 1\nname: 2024/13", r"name='2024/13': .*: 2024-13 \(.*:2\)"),
        ("seed: !!int 3", "tag !!int: leave it out"),
        ("name: !x", "tag !x: leave it out, or put text in quotes"),
        ("x" * (2 << 20), "is too large"),
    ],
)
def test_hostile_yaml_is_refused_by_file_and_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        parse_config(load_yaml(file))
    assert "evil.yaml" in str(error.value) and len(str(error.value)) < 2000
    assert time.process_time() - began < 5
    assert not (tmp_path / "made").exists()


BYTE_ORDER_MARK = "\ufeff"
ENCODINGS = {
    "utf-8": "",
    "utf-8 with a mark": BYTE_ORDER_MARK,
    "utf-16-le": BYTE_ORDER_MARK,
    "utf-32-be": BYTE_ORDER_MARK,
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_text_file_is_read_in_each_encoding_and_with_each_line_end(linked, tmp_path, encoding, line_end):
    """The first line is there, and the last one also without an end."""
    root = linked / "data"

    def write(file: Path, *lines: str) -> Path:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((ENCODINGS[encoding] + line_end.join(lines)).encode(encoding.partition(" ")[0]))
        return file

    assert load_yaml(write(tmp_path / "a.yaml", "seed: 3", "name: é")) == {"seed": "3", "name": "é"}
    assert read_class_names(write(tmp_path / "names.txt", "bed\ta bed", "mug")) == {"bed": "a bed", "mug": "mug"}
    images = ["a/x/1.png", "a/y/1.png"]
    write(root / "all.csv", "path,task,label", *(f"{path},a,{path[2]}" for path in images))
    assert [image.path for image in index_dataset(DataConfig(), root / "all.csv").images] == images
    write(root / "splits_mini/a_train.txt", *(f"{path} 0" for path in images))
    write(root / "splits_mini/b_train.txt", "b\\x\\1.png\t0", "b/y/1.png 1")  # as written on Windows, with a tab
    assert [image.path for image in index_dataset(DataConfig(tasks=["a"]), root).images] == images
    assert len(index_dataset(DataConfig(), root).images) == 4


def test_a_nul_byte_is_no_text(tmp_path):
    """As in a spreadsheet or UTF-16 without a byte order mark."""
    for content in (b"mug\nbe\0d\n", "mug\nbed".encode("utf-16-le"), b"PK\3\4\0\xff"):
        (tmp_path / "names.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"names.txt is not a text file: line \d has a NUL byte"):
            read_class_names(tmp_path / "names.txt")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfeb")
    with pytest.raises(UserError, match="is not UTF-16: line 1"):
        read_class_names(tmp_path / "names.txt")


def from_command_line(*arguments: str) -> Config:
    return JobParser("").parse(arguments).config()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "9" * 5000),
        ("--seed", "1e400"),
        ("--seed", str(2**63)),
        ("--seed", "2024-13-45"),
        ("--training", "{epochs: 1, epochs: 2}"),
        ("--training.epochs", "!!python/object/apply:os.mkdir [made]"),
        ("--training.epochs", "[" * 10_000),
        ("--training.epochs", str(10**30)),
        ("--training.learning_rate", ".inf"),
        ("--data.tasks", LAUGHS),
        ("--data.root", "caf\udce9"),
    ],
)
def test_hostile_values_on_the_command_line(option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        from_command_line(option, value)
    assert option.removeprefix("--") in str(error.value) and len(str(error.value)) < 3000
    assert not (tmp_path / "made").exists()


def test_text_that_is_no_yaml_is_text_on_the_command_line():
    assert from_command_line("--clip.template", "{} [photo").clip.template == "{} [photo"
    assert from_command_line("--data.root", "*x").data.root == "*x"


def any_text(size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(), max_size=size) | st.text(
        st.characters(categories=["Cs", "Cc", "Zl"]), max_size=size
    )


def plain_values() -> st.SearchStrategy:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text(20) | st.binary(max_size=5)
    names = st.text(max_size=8) | st.integers() | st.none()
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
    )


def section_values(section: type[Section]) -> st.SearchStrategy:
    """Trees with the section's names, and now and then another, whose values are the defaults or anything."""
    defaults, parts = section(), {}
    for name in section.model_fields:
        default = getattr(defaults, name)
        if isinstance(default, Section):
            parts[name] = section_values(type(default)) | plain_values()
        else:
            number = st.integers(-2, 20) | st.floats(0, 2)
            parts[name] = st.just(default) | number | any_text(12) | plain_values()
    lists = st.lists(st.sampled_from(sorted(parts)), max_size=3, unique=True)
    valid = lists.flatmap(lambda names: st.fixed_dictionaries({name: parts[name] for name in names}))
    return valid | st.tuples(valid, st.dictionaries(st.text(max_size=8), plain_values(), max_size=1)).map(
        lambda two: {**two[1], **two[0]}
    )


def check_config(values, file: Path) -> None:
    try:
        config = parse_config(values)
    except UserError:
        return
    dumped = to_yaml(config)
    assert parse_config(yaml.safe_load(dumped)) == config
    file.write_text(dumped, encoding="utf-8")
    assert parse_config(load_yaml(file)) == config


@fuzz(150)
@given(section_values(Config))
def test_any_values_are_a_config_or_refused(tmp_path, values):
    check_config(values, tmp_path / "again.yaml")


VALID_YAML = to_yaml(Config()).encode()
YAML_BITS = [
    "&a ",
    "*a",
    "!!int ",
    "!!python/name:os ",
    "<<: ",
    "? ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ": ",
    "#",
    "|\n",
    ">",
    "'",
]
YAML_BITS += ['"', "\n", "\n  ", "---\n", "%", "1e5", ".nan", "0x1f", "1:30", "2024-01-01", "seed", "training", "null"]
YAML_BITS += ["\\ud800", "\t", "\x85", "\ufeff", "data:", "root"]


@fuzz(60)
@given(
    st.lists(st.sampled_from(YAML_BITS), max_size=25).map(lambda bits: "".join(bits).encode())
    | mutations(VALID_YAML)
    | st.binary(max_size=60)
)
def test_any_file_is_a_config_or_refused(tmp_path, data):
    file = tmp_path / "fuzz.yaml"
    file.write_bytes(data)
    try:
        values = load_yaml(file)
    except UserError as error:
        assert file.name in str(error)
        return
    check_config(values, file)


# --- CLIP: model configs and weights ----------------------------------------------------------------------------

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def changed(**changes) -> str:
    values = copy.deepcopy(TINY)
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        (values[section] if section else values)[name] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "{}",
        '"text"',
        "[" * 100_000,
        "\0",
        changed(vision_cfg=3),
        changed(vision_cfg__width=10**9),
        changed(vision_cfg__layers=10**9),
        changed(text_cfg__context_length=10**9),
        changed(text_cfg__vocab_size=float("inf")),
        changed(text_cfg__vocab_size=10**6, text_cfg__width=10**6, text_cfg__heads=1),
        changed(vision_cfg__width=-32),
        changed(vision_cfg__width="wide"),
        changed(vision_cfg__width=None),
        changed(vision_cfg__unknown=1),
        changed(text_cfg__heads=0),
        changed(embed_dim="x"),
        '{"embed_dim": ' + "9" * 5000 + ', "vision_cfg": {}, "text_cfg": {}}',
    ],
)
def test_hostile_model_configs_are_refused_up_front(tmp_path, text):
    file = tmp_path / "hostile_model.json"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match="hostile_model.json"):
        clip_identity(ClipConfig(model=str(file), pretrained=None))
        build_meta_towers(ClipConfig(model=str(file), pretrained=None))
    assert time.process_time() - began < 10
    # One that was refused is in nobody else's way.
    assert build_meta_towers(ClipConfig(model=BUILTIN_DIGITS, pretrained=None)).preprocessing.image_size == 32


@pytest.mark.parametrize("model", ["hf-hub:somebody/model", "local-dir:/tmp", "absent.json", "../../x", "builtin:x"])
def test_models_that_do_not_exist_are_refused(model):
    for load in (clip_identity, load_clip):
        with pytest.raises(UserError, match="clip.model"):
            load(ClipConfig(model=model, pretrained=None))


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL_FOLDER"],))


class Confusing:
    """A tensor whose state is a TypeError to torch where no code may be run: then open_clip loads with less care."""

    def __reduce__(self):
        storage, hooks = torch.zeros(1).untyped_storage(), OrderedDict()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return (torch._utils._rebuild_tensor_v2, (typed, 0, (1,), (1,), False, hooks), (False, None, hooks))


def torch_script(file: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


def packed(file: Path, mib: int = 256) -> None:
    """A file of torch whose tensor is compressed."""
    torch.save({"x": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, bytes(mib << 20) if "/data/0" in name else data)


NOT_TENSORS = "not a plain file of tensors.*save the weights"
AGAIN = "download it again"
HOSTILE_WEIGHTS = {
    "code.pt": (
        lambda file: torch.save({"state_dict": Evil()}, file),
        "not a plain file of tensors .*posix.mkdir, which could run code.*save the weights",
    ),
    "plain pickle.pt": (lambda file: file.write_bytes(pickle.dumps({"x": Evil()})), NOT_TENSORS),
    "old format.pt": (lambda file: torch.save({"x": Evil()}, file, _use_new_zipfile_serialization=False), NOT_TENSORS),
    "type error.pt": (lambda file: torch.save([Confusing(), Evil()], file), NOT_TENSORS),
    "pickle.safetensors": (lambda file: file.write_bytes(pickle.dumps(Evil())), NOT_TENSORS),
    "zip.safetensors": (lambda file: torch.save({"x": Evil()}, file), NOT_TENSORS),
    "packed.pt": (packed, NOT_TENSORS),
    "script of another model.pt": (torch_script, "does not fit clip.model=.*bias.*give the weights of a whole CLIP"),
    "numpy.npy": (
        lambda file: np.save(open(file, "wb"), np.array([Evil()], dtype=object), allow_pickle=True),
        "has arrays of NumPy: convert the weights",
    ),
    "header.safetensors": (lambda file: file.write_bytes(struct.pack("<Q", 2**62) + b"{}"), AGAIN),
    "long header.safetensors": (lambda file: file.write_bytes(struct.pack("<Q", 1 << 30) + b"{" + bytes(100)), AGAIN),
    "deep.safetensors": (lambda file: file.write_bytes(struct.pack("<Q", 50_000) + b"{" * 50_000), NOT_TENSORS),
    "deep list.safetensors": (lambda file: file.write_bytes(struct.pack("<Q", 50_000) + b"[" * 50_000), NOT_TENSORS),
    "beyond.safetensors": (
        lambda file: file.write_bytes(
            struct.pack("<Q", 59) + b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}  '
        ),
        AGAIN,
    ),
    "text.pt": (lambda file: file.write_text("no weights"), NOT_TENSORS),
    "empty.pt": (lambda file: file.write_bytes(b""), f"is empty: {AGAIN}"),
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "tiny_hostile.json"
    file.write_text(json.dumps(TINY))
    return str(file)


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_weights_that_are_more_than_tensors_are_refused_and_run_no_code(model_file, tmp_path, monkeypatch, name):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "made by the pickle"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as torch before 2.6 is by itself
    write, message = HOSTILE_WEIGHTS[name]
    write(tmp_path / name)
    config = ClipConfig(model=model_file, pretrained=str(tmp_path / name))
    for load in (clip_identity, load_clip):
        with pytest.raises(UserError, match=f"{name}.*{message}") as error:
            load(config)
        assert "weights_only" not in str(error.value)  # torch's advice how to run the code
    assert not (tmp_path / "made by the pickle").exists()


@pytest.mark.parametrize(
    "state", [{}, {"x": 1}, [1], {"vocab_size": "x"}, torch.zeros(3), {"state_dict": None}, {1: torch.zeros(1)}]
)
def test_weights_of_another_kind_are_named(model_file, tmp_path, state):
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt has .*state dict.*save the model's state_dict\(\)"):
        load_clip(ClipConfig(model=model_file, pretrained=str(tmp_path / "other.pt")))


# --- CLIP: TorchScript archives ---------------------------------------------------------------------------------


def archive(file: Path, pickled: bytes, record: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """An archive with the pickle of its modules, and one record of a tensor."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("clip/data.pkl", pickled)
        archive.writestr("clip/constants.pkl", b"\x80\x02).")
        archive.writestr("clip/data/0", record, compression)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def pickled_tensor(record: str, length: int = 1, size: bytes = b"(t", stride: bytes = b"(t", offset: int = 0) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(record) + text("cpu")
    storage += b"J" + struct.pack("<i", length) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + storage + b"J" + struct.pack("<i", offset) + size + stride + b"\x89" + hooks + b"tR"


def module(*attributes: bytes) -> bytes:
    return b"c__torch__\nModule\n)\x81}(" + b"".join(attributes) + b"ub"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def many_modules() -> bytes:
    """Modules of which each has the one before it ten times."""
    modules = b"c__torch__\nModule\n)\x81q\0"
    for number in range(1, 10):
        attributes = b"".join(text(str(name)) + b"h" + bytes([number - 1]) for name in range(10))
        modules += b"c__torch__\nModule\n)\x81}(" + attributes + b"ubq" + bytes([number])
    return modules


HOSTILE_TORCHSCRIPT = {
    "a call": (lambda: pickled(module(text("x"), b"cos\nmkdir\n(" + evil_folder() + b"tR")), "os.mkdir, .* run code"),
    "a call of Python's pickle": (lambda: pickle.dumps(Evil(), 2), "names posix.mkdir, which could run code"),
    "another protocol": (lambda: pickle.dumps(Evil(), 4), "the opcode FRAME"),
    "an old opcode": (lambda: pickled(b"(" + evil_folder() + b"ios\nmkdir\n"), "the opcode INST"),
    "an object of Python": (lambda: pickled(b"cos\nmkdir\n)\x81"), "os mkdir, which is not a module"),
    "an object with arguments": (lambda: pickled(b"c__torch__\nModule\n" + numbers(1) + b"\x81"), "not a module"),
    "the state of a name": (lambda: pickled(b"cos\nmkdir\n}(" + text("x") + text("y") + b"ub"), "attribute"),
    "a call of a module": (lambda: pickled(module() + b")R"), "could run code"),
    "a list": (lambda: pickled(b"]"), "not a module"),
    "nothing": (lambda: b"", "pickle"),
    "an unknown storage": (
        lambda: pickled(module(text("x"), pickled_tensor("0").replace(b"Float", b"Odd"))),
        "torch OddStorage",
    ),
    "another record": (lambda: pickled(module(text("x"), pickled_tensor("../data.pkl"))), "data.pkl"),
    "beyond its storage": (lambda: pickled(module(text("x"), pickled_tensor("0", offset=5))), "storage offset 5"),
    "before its storage": (lambda: pickled(module(text("x"), pickled_tensor("0", offset=-1))), "offset"),
    "larger than its storage": (
        lambda: pickled(module(text("x"), pickled_tensor("0", size=numbers(10**6, 10**6), stride=numbers(0, 0)))),
        "has 1 elements",
    ),
    "a record of another size": (lambda: pickled(module(text("x"), pickled_tensor("0", length=9))), "has 4 bytes"),
    "a module in itself": (lambda: pickled(b"c__torch__\nModule\n)\x81q\0}(" + text("x") + b"h\0ub"), "too deeply"),
    "modules in modules": (
        lambda: pickled((b"c__torch__\nModule\n)\x81}(" + text("x")) * 50 + b"N" + b"ub" * 50),
        "too deeply",
    ),
    "a billion modules": (lambda: pickled(many_modules()), "too many"),
    "a large pickle": (lambda: b"N" * (5 << 20), "data.pkl is too large"),
}


def evil_folder() -> bytes:
    return text(os.environ["EVIL_FOLDER"])


@pytest.mark.parametrize("name", HOSTILE_TORCHSCRIPT)
def test_hostile_torchscript_is_refused_and_runs_no_code(model_file, tmp_path, monkeypatch, name):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "made by the pickle"))
    write, message = HOSTILE_TORCHSCRIPT[name]
    archive(tmp_path / "script.pt", write(), bytes(4))
    config = ClipConfig(model=model_file, pretrained=str(tmp_path / "script.pt"))
    for load in (clip_identity, load_clip):
        with pytest.raises(UserError, match=f"script.pt is not a plain file of tensors .*{message}.*save the weights"):
            load(config)
    assert not (tmp_path / "made by the pickle").exists()


def test_a_compressed_tensor_of_torchscript_is_refused(model_file, tmp_path):
    data = pickled(module(text("x"), pickled_tensor("0", length=8 << 20)))
    archive(tmp_path / "script.pt", data, bytes(32 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="script.pt is not a plain file of tensors .*data/0 is compressed"):
        clip_identity(ClipConfig(model=model_file, pretrained=str(tmp_path / "script.pt")))


@fuzz(60)
@given(mutations(pickled(module(text("x"), pickled_tensor("0"), text("y"), module(text("z"), pickled_tensor("0"))))))
def test_any_pickle_of_torchscript_is_tensors_or_refused(tmp_path, data):
    file = tmp_path / "script.pt"
    archive(file, data, bytes(4))
    try:
        tensors = read_checkpoint(Weights(f"clip.pretrained={file}", (file,))).state
    except UserError as error:
        assert "script.pt" in str(error)
        return
    assert all(value.tolist() == 0 for value in tensors.values())


# --- splits ----------------------------------------------------------------------------------------------------

CLASSES = {"a b": ["x", "y"], "c": ["x", "y"]}
WORDS = {"x": "cross", "y": "why"}


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    """data/ and splits/, of 6 images of each task, in several row groups."""
    folder = tmp_path_factory.mktemp("splits")
    images, sizes = [], {}
    for number, (task, name, index) in enumerate((t, n, i) for t in CLASSES for n in CLASSES[t] for i in range(3)):
        path = f"{task}/{name}/{index}.png"
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / path)
        images.append(scan_image(folder / "data", path, task, name))
        sizes[path] = (folder / "data" / path).stat().st_size
    counts = {"train": dict.fromkeys(CLASSES, 0), "test": dict.fromkeys(CLASSES, 6)}
    description = SplitDescription(CLASSES, WORDS, 1, 1, "0" * 64, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_BYTES", 350)
        for part in plan_parts(images, "test", sizes):
            write_part(folder / "data", part, description, folder / "splits")
    (folder / "splits/splits.json").write_text(json.dumps(vars(description)))
    return folder


def rows_by_task(folder: Path, columns=COLUMNS.names) -> dict[str, list[dict]]:
    reader = SplitReader(folder)
    return {task: list(reader.rows("test", task, columns)) for task in reader.description.tasks}


def copy_splits(splits: Path, target: Path) -> tuple[Path, Path]:
    """Copy the split folder; return the copy and its file of one task."""
    shutil.copytree(splits / "splits", target)
    return target, target / "test/c-00000.parquet"


SPLIT_FILES = ("splits.json", "test/c-00000.parquet")


@pytest.mark.parametrize("columns", [tuple(COLUMNS.names), ("label",), ("image", "label")])
def test_damaged_splits_are_refused_or_read_exactly(splits, tmp_path, columns):
    folder, _ = copy_splits(splits, tmp_path / "copy")
    originals = {name: (folder / name).read_bytes() for name in SPLIT_FILES}
    original = rows_by_task(folder, columns)
    refused = 0

    @fuzz(150)
    @given(
        st.sampled_from([*SPLIT_FILES, *SPLIT_FILES[1:] * 3]).flatmap(
            lambda n: st.tuples(st.just(n), mutations(originals[n]))
        )
    )
    def check(change):
        nonlocal refused
        name, data = change
        (folder / name).write_bytes(data)
        try:
            assert rows_by_task(folder, columns) == original
        except UserError as error:
            assert str(folder) in str(error)
            refused += 1
        finally:
            (folder / name).write_bytes(originals[name])

    check()
    assert refused > 50 * MORE


def test_no_byte_of_a_row_group_changes_unseen(splits, tmp_path):
    """Every byte, unlike the random mutations above."""
    folder, file = copy_splits(splits, tmp_path / "copy")
    reader, data, refused = SplitReader(folder), file.read_bytes(), 0
    original = list(reader.rows("test", "c", COLUMNS.names))
    with pq.ParquetFile(file) as opened:
        last_column = opened.metadata.row_group(0).column(COLUMNS.names.index("sha256"))
    for i in range(4, last_column.data_page_offset + last_column.total_compressed_size):
        file.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            assert list(reader.rows("test", "c", COLUMNS.names)) == original
        except UserError:
            refused += 1
    assert refused > 500


def hostile_file(file: Path, change=lambda table: table) -> None:
    """Rewrite a file with rows changed by `change`, and the right description and digests."""
    with pq.ParquetFile(file) as opened:
        table, metadata = opened.read(), opened.metadata.metadata
    table = change(table)
    rows = table.to_pylist()
    digests = json.dumps([parquet._digest(rows)]) if set(COLUMNS.names) <= set(table.column_names) else "[]"
    table = table.replace_schema_metadata({b"splits": metadata[b"splits"], b"row_groups": digests})
    pq.write_table(table, file, use_dictionary=False, compression={"image": "none"})


def with_column(name: str, values, kind=None, nullable: bool = False):
    def change(table: pa.Table) -> pa.Table:
        field = COLUMNS.field(name)
        field = pa.field(name, kind or field.type, nullable=nullable)
        column = values(table[name].to_pylist()) if callable(values) else [values] * len(table)
        return table.set_column(table.column_names.index(name), field, pa.array(column, field.type))

    return change


def with_bytes_of_images(change):
    """Replace images, and update their SHA-256."""

    def both(table: pa.Table) -> pa.Table:
        images = [change(image) for image in table["image"].to_pylist()]
        table = with_column("image", lambda _: images)(table)
        return with_column("sha256", lambda _: [hashlib.sha256(image).hexdigest() for image in images])(table)

    return both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_column("label", -1), "has label -1"),
        (with_column("label", 10**6), "has label 1000000"),
        (with_column("label", lambda labels: [1 - label for label in labels]), "has label . and class '(cross|why)'"),
        (with_column("class_name", "mug"), "class 'mug'"),
        (with_column("task", "a b"), "is of task 'a b'"),
        (with_column("split", "train"), "split 'train'"),
        (with_column("sha256", "0" * 64), "SHA-256 mismatch of c/x/0.png"),
        (with_column("image", b"other"), "SHA-256 mismatch of c/x/0.png"),
        (with_column("label", "1", pa.string()), "is not a split file"),
        (with_column("label", 1, pa.int64()), "is not a split file"),
        (with_column("label", None, nullable=True), "is not a split file"),
        (with_column("task", "c", pa.dictionary(pa.int32(), pa.string())), "is not a split file"),
        (lambda table: table.drop(["path"]), "is not a split file"),
        (lambda table: table.append_column("more", table["label"]), "is not a split file"),
        (lambda table: table.select(COLUMNS.names[::-1]), "is not a split file"),
        (lambda table: table.slice(0, 4), "has 4 images of task 'c', splits.json says 6"),
        (lambda table: pa.concat_tables([table] * 2), "has 12 images of task 'c', splits.json says 6"),
    ],
)
def test_split_files_that_were_never_right_are_refused(splits, tmp_path, change, message):
    folder, file = copy_splits(splits, tmp_path / "copy")
    hostile_file(file)
    assert rows_by_task(folder) == rows_by_task(splits / "splits")
    hostile_file(file, change)
    with pytest.raises(UserError, match=message) as error:
        rows_by_task(folder)
    assert str(folder) in str(error.value)


def test_a_small_file_does_not_decompress_into_a_large_table(splits, tmp_path):
    folder, file = copy_splits(splits, tmp_path / "copy")
    values = json.loads((folder / "splits.json").read_text())
    values["counts"]["test"]["c"] = 6 * 100_000
    (folder / "splits.json").write_text(json.dumps(values))
    description = SplitReader(folder).description.to_json().encode()

    def many(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table] * 100_000).combine_chunks()

    with pq.ParquetFile(file) as opened:
        table = opened.read()
    for options in ({"use_dictionary": True}, {"compression": "zstd"}):
        digests = b'[""]'
        packed = many(table.drop(["image"])).add_column(
            0, COLUMNS.field("image"), pa.array([b"x"] * 600_000, pa.binary())
        )
        packed = packed.replace_schema_metadata({b"splits": description, b"row_groups": digests})
        pq.write_table(packed, file, **options)
        with pytest.raises(UserError, match="600000 rows in only .* bytes"):
            next(SplitReader(folder).rows("test", "c"))


def test_bytes_of_a_split_that_are_no_image_are_named(splits, tmp_path):
    folder, file = copy_splits(splits, tmp_path / "copy")
    hostile_file(file, with_bytes_of_images(lambda image: image[:40]))
    with pytest.raises(UserError, match="the test image c/x/0.png of task 'c' cannot be decoded"):
        list(decoded_batches(SplitReader(folder), ["c"], Preprocessing(8), threads=1))


def footer(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:-8] + struct.pack("<I", length) + b"PAR1")


@pytest.mark.parametrize("length", [0, 1, 2**31 - 1, 2**32 - 1])
def test_footers_of_a_wrong_length_are_refused(splits, tmp_path, length):
    folder, file = copy_splits(splits, tmp_path / "copy")
    footer(file, length)
    with pytest.raises(UserError, match="c-00000.parquet cannot be read as Parquet.*remove"):
        rows_by_task(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 3}, "classes"),
        ({"classes": {"a b": "xy", "c": ["x", "y"]}}, "classes"),
        ({"classes": {"a b": ["x", "z"], "c": ["x", "y"]}}, "class_names lacks"),
        ({"class_names": {"x": "cross"}}, "class_names lacks"),
        ({"class_names": {"x": 1, "y": 2}}, "class_names"),
        ({"shots": "6"}, "shots"),
        ({"seed": 1.5}, "seed"),
        ({"counts": {"train": {}, "test": {}}}, "counts of 'train'"),
        ({"counts": {"test": {"a b": 6, "c": 6}}}, "counts of 'train'"),
        ({"counts": {"train": {"a b": 0, "c": 0}, "test": {"a b": 6, "c": -6}}}, "counts"),
        ({"counts": {"train": {"a b": 0, "c": 0}, "test": {"a b": 6, "c": 6}, "val": {}}}, "counts"),
        ({"source_fingerprint": None}, "source_fingerprint"),
        ({"format": "3"}, "has format '3'"),
        ({"format": [[[]]]}, "has format"),
    ],
)
def test_descriptions_that_are_wrong_are_refused(splits, tmp_path, change, message):
    folder, _ = copy_splits(splits, tmp_path / "copy")
    file = folder / "splits.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "more": [1]}))
    assert SplitReader(folder).description.classes == CLASSES
    file.write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=rf"(?s)splits.json.*{message}.*build it again"):
        SplitReader(folder)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"format": ' * 50_000, b"\xff\xfe", b"9" * 5000, b"null", b'{"format": 3}']
)
def test_descriptions_that_are_no_json_are_refused(splits, tmp_path, data):
    folder, _ = copy_splits(splits, tmp_path / "copy")
    (folder / "splits.json").write_bytes(data)
    with pytest.raises(UserError, match="splits.json is not a valid description of splits") as error:
        SplitReader(folder)
    assert len(str(error.value)) < 1000


# --- adapter files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts() -> TrainedAdapter:
    config = Config(
        clip=ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS),
        mmap=MmapConfig(prompt_length=2, source_rows=2, depth=1),
    )
    towers = load_clip(config.clip)
    group = {"ink": ["one", "two"], "neon": ["one", "two"]}
    state = GroupMmap(MmapShape.of(config.mmap, towers), tuple(group), seed=1).state_dict()
    return TrainedAdapter("mmap", config, weights_fingerprint(towers), (group,), (state,))


def same(a: TrainedAdapter, b: TrainedAdapter) -> bool:
    fields = [(p.method, p.config.clip, p.config.mmap, p.weights, p.groups) for p in (a, b)]
    return fields[0] == fields[1] and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a.states, b.states, strict=True)
    )


def test_damaged_prompts_are_refused_or_read_exactly(prompts, tmp_path):
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, prompts)
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0

    # Half of the changes are made to the header, where one may go unseen.
    @fuzz(300)
    @given(mutations(content) | mutations(content[:header]).map(lambda changed: changed + content[header:]))
    def check(data):
        nonlocal refused
        file.write_bytes(data)
        try:
            assert same(load_adapter(file), prompts)
        except UserError as error:
            assert "adapter.safetensors" in str(error)
            refused += 1

    check()
    assert refused > 200 * MORE


def stored(prompts: TrainedAdapter, file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    save_adapter(file, prompts)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["adapter"])
        del header["sha256"]
        return header, {name: opened.get_tensor(name) for name in opened.keys()}


def store(file: Path, header: dict | str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a foreign file with a valid digest."""
    if not isinstance(header, str):
        header = json.dumps(header | {"sha256": adapter_file._digest(header, tensors)})
    save_file(tensors, file, metadata={"adapter": header})


def at(path: str, value):
    def change(header: dict, tensors: dict) -> None:
        *parts, name = path.split(".")
        for part in parts:
            header = header[part]
        header[name] = value

    return change


def tensor(change):
    def change_first(header: dict, tensors: dict) -> None:
        name = sorted(tensors)[0]
        tensors[name] = change(tensors[name])

    return change_first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("format", "3"), "has format '3'; this version reads"),
        (at("format", 2), "has format 2; this version reads"),
        (at("format", None), "has format None"),
        (at("method", "evil"), "unknown method 'evil'"),
        (at("method", 3), "method must be text"),
        (at("config.clip.precision", "int8"), "'auto', 'float32'"),
        (at("config.evil", 1), "Extra inputs"),
        (at("config.mmap.prompt_length", 10**9), "needs more than"),
        (at("groups", []), "at least 1"),
        (at("groups", [{}]), "without tasks"),
        (at("groups", [{"ink": []}]), "without classes"),
        (at("groups", [{"ink": "ab"}]), "valid list"),
        (at("groups", [{"ink": ["one"]}, {"ink": ["two"]}]), "in two groups"),
        (at("groups", {"ink": ["one"]}), "valid list"),
        (at("groups", [{"ink\x1b[31m": ["one"]}]), "control characters"),
        (at("groups", [{"ink": ["one\nneon,two"]}]), "control characters"),
        (at("weights", 7), "weights must be text"),
        (at("more", 7), "Extra inputs"),
        (lambda header, tensors: tensors.update({"7.source": torch.zeros(1)}), "KeyError: '7'"),
        (lambda header, tensors: tensors.update({"-1.x": torch.zeros(1)}), "KeyError: '-1'"),
        (lambda header, tensors: tensors.update({"source": torch.zeros(1)}), "KeyError: 'source'"),
        (lambda header, tensors: header.pop("groups"), "groups is missing"),
        (tensor(lambda value: value * torch.nan), "not finite"),
        (tensor(lambda value: value / 0), "not finite"),
    ],
)
def test_invalid_adapter_files_are_refused(prompts, tmp_path, change, message):
    file = tmp_path / "adapter.safetensors"
    header, tensors = stored(prompts, file)
    store(file, header, tensors)
    assert same(load_adapter(file), prompts)
    change(header, tensors)
    store(file, header, tensors)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(file)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "change",
    [
        tensor(lambda value: value[..., :1].clone()),
        tensor(lambda value: value.to(torch.int32)),
        tensor(lambda value: value.to(torch.float64)),
        lambda header, tensors: tensors.pop(sorted(tensors)[0]),
        lambda header, tensors: tensors.update({"0.more": torch.zeros(1)}),
        at("method", "vpt"),
        at("config.mmap.depth", 2),
        at("config.mmap.source_columns", 32),
    ],
)
def test_numbers_that_do_not_fit_the_method_are_refused(prompts, tmp_path, change):
    file = tmp_path / "adapter.safetensors"
    header, tensors = stored(prompts, file)
    change(header, tensors)
    store(file, header, tensors)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(file).classifier()


def test_headers_that_are_bombs_are_refused_soon(prompts, tmp_path):
    file = tmp_path / "adapter.safetensors"
    header, tensors = stored(prompts, file)
    began = time.process_time()
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "null", "[]", '{"format": ' + "9" * 5000 + "}"):
        store(file, text, tensors)
        with pytest.raises(UserError, match="adapter.safetensors"):
            load_adapter(file)
    header["groups"] = [{f"task {number}": ["one", "two"]} for number in range(100_000)]
    store(file, header, tensors)
    with pytest.raises(UserError, match="needs more than 0 parameters for"):
        load_adapter(file)
    for length in (2**63, 2**31, 100_000_001, 10**8):
        file.write_bytes(struct.pack("<Q", length) + b"{" * 100)
        with pytest.raises(UserError, match="adapter.safetensors is not an adapter file"):
            load_adapter(file)
    assert time.process_time() - began < 10


def test_prompts_name_a_clip_that_is_read_as_tensors_only(prompts, tmp_path, monkeypatch):
    """The file's sender chose the path."""
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "made by the pickle"))
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    file = tmp_path / "adapter.safetensors"
    header, tensors = stored(prompts, file)
    header["config"]["clip"]["pretrained"] = str(tmp_path / "evil.pt")
    store(file, header, tensors)
    with pytest.raises(UserError, match="evil.pt.*is not a plain file of tensors"):
        load_adapter(file).classifier()
    header["config"]["clip"] |= {"model": "hf-hub:evil/clip", "pretrained": None}
    store(file, header, tensors)
    with pytest.raises(UserError, match="hf-hub:evil/clip"):
        load_adapter(file).classifier()
    assert not (tmp_path / "made by the pickle").exists()


# --- features and snapshots ------------------------------------------------------------------------------------


def test_files_of_features_that_are_none_are_named(tmp_path):
    file = tmp_path / "features.safetensors"
    save_features(file, torch.zeros(3, 4))
    content = file.read_bytes()
    assert len(StoredFeatures(file)) == 3
    for data in (
        b"",
        b"\xff" * 100,
        content[:-4],
        content.replace(b'"features"', b'"eeatures"'),
        content.replace(b"F32", b"I32"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match="features.safetensors.*remove"):
            StoredFeatures(file)
    save_features(file, torch.zeros(3))
    with pytest.raises(UserError, match="not image features"):
        StoredFeatures(file)
    with pytest.raises(UserError, match="absent"):
        StoredFeatures(tmp_path / "absent.safetensors")


def test_snapshots_that_are_none_are_named(tmp_path):
    file = tmp_path / "snapshots.parquet"
    row = {"step": 1, "epoch": 1, "task": "a", "loss": 1.0, "gradient": [1.0, 2.0], "layer_norms": [1.0]}

    def write(rows: list[dict], schema: pa.Schema = SCHEMA) -> bytes:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata({"layout": '{"source": [1, 2]}'})), file)
        return file.read_bytes()

    content = write([row])
    assert read_gradients(file, ["a"]).tolist() == [[[1, 2]]] and read_steps(file) == [1]
    for data in (b"", b"x" * 100, content[:-20], content[:60]):
        file.write_bytes(data)
        for read in (lambda path: read_gradients(path, ["a"]), read_steps, read_layout):
            with pytest.raises(UserError, match="snapshots.parquet cannot be read as gradient snapshots.*again"):
                read(file)
    for rows in ([{**row, "step": None}], [{**row, "gradient": None}]):
        write(rows)
        with pytest.raises(UserError, match="cannot be read as gradient snapshots"):
            read_gradients(file, ["a"])
    write([row, {**row, "step": 2, "gradient": [1.0]}])
    with pytest.raises(UserError, match="of several lengths"):
        read_gradients(file, ["a"])
    write([{**row, "step": 1.5}], SCHEMA.set(0, pa.field("step", pa.float64())))
    with pytest.raises(UserError, match="step: double"):
        read_steps(file)
    pq.write_table(pa.table({"step": [1]}), file)
    for read in (lambda path: read_gradients(path, ["a"]), read_layout):
        with pytest.raises(UserError, match="cannot be read as gradient snapshots"):
            read(file)
