"""Decode and resize images as open_clip does, with Pillow, which resizes with antialiasing.

Choices that matter only for images other than 8-bit RGB or gray:
- convert to RGB before resizing, as CoOp and its successors: a palette image is otherwise resized by nearest neighbor;
- drop alpha;
- scale gray of 16 and 32 bits by the bits that its brightest pixel needs: cameras and scanners store 10, 12 or 14 bits
  in 16, which are black otherwise. Pillow alone clips nearly all of such images to white;
- read nothing of a file but the pixels of its first frame: metadata cannot break an image.

With `Preprocessing.jpeg_draft`, pixels of large JPEGs differ slightly from open_clip's.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.names import escape_for_terminal
from pipeline.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pipeline.buckets import AnyPath, BucketPath

TRAINING_OVERSIZE = 2
"""Training images are kept with a shorter side of up to this many times the model's input: enough detail for small
random crops, in memory that does not depend on the camera."""
SUFFIXES_OF_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
}
"""Allowed formats; some others of Pillow start programs (EPS: Ghostscript)."""
FORMATS = tuple(sorted(SUFFIXES_OF_FORMAT.keys() - {"MPO"}))
"""Formats to open: Pillow opens an MPO as JPEG."""
DRAFT_OVERSIZE = 2
"""With `jpeg_draft`, sides are at least this many times the size to which the image is resized, as with the default
`reducing_gap` of Pillow's `thumbnail`."""
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_RATIO = 1000
"""Above this aspect ratio, evaluation crops the center before it resizes the shorter side."""
MAX_PIXELS = cast(int, Image.MAX_IMAGE_PIXELS)  # None only if a program removed Pillow's limit
"""Pillow's limit against decompression bombs (89 million)."""
MAX_BYTES = 6 * MAX_PIXELS
"""Size of MAX_PIXELS without compression, at 16 bits per channel."""
MAX_SCANS = 100
"""Scans of a progressive JPEG, each over all pixels: a small file with thousands would take minutes."""
GRAY_BITS: tuple[int, ...] = (8, 10, 12, 14, *range(16, 33))
"""Bits per pixel that cameras, scanners and programs use."""
_JPEG_SCAN = b"\xff\xda"
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG whose size Pillow limits, once decompressed: texts and the color profile."""
_TIFF_SAMPLE_FORMAT, _UNSIGNED = 339, 1

# Pillow warns of palettes, large images and broken metadata once per file; warnings.catch_warnings around each decoding
# would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImage(ValueError):
    """The bytes cannot be decoded as an image."""


def read_image(path: AnyPath) -> bytes:
    """Read an image file, also in a bucket.

    Raises:
        BrokenImage: not a file, or larger than MAX_BYTES.
        OSError: the file cannot be read.
    """
    if not isinstance(path, Path):
        return _read_from_bucket(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
        target = f": a link to {escape_for_terminal(os.readlink(path))}" if path.is_symlink() else ""
        raise BrokenImage(f"no such file{target}")
    if status.st_size > MAX_BYTES:
        raise BrokenImage(f"file too large ({status.st_size:,} bytes, limit {MAX_BYTES:,})")
    return path.read_bytes()


def _read_from_bucket(path: BucketPath) -> bytes:
    try:
        data = path.read_bytes(MAX_BYTES)
    except FileNotFoundError:
        raise BrokenImage("no such file") from None
    if len(data) > MAX_BYTES:
        raise BrokenImage(f"file too large (limit {MAX_BYTES:,} bytes)")
    return data


def decode_rgb(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decode an image to RGB. Arguments and errors as `_decode`."""
    return _decode(data, min_side)[0]


def _decode(data: bytes, min_side: int | None) -> tuple[Image.Image, tuple[float, float]]:
    """Decode an image to RGB; also return its width and height, which are fractions of pixels if its size is not
    divisible by the scale at which it was decoded.

    Args:
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with sides of at least this many pixels, which
            is faster.

    Raises:
        BrokenImage: not an image, truncated, above MAX_PIXELS or MAX_SCANS, or floating-point pixels (unknown range).
    """
    try:
        with open_image(data) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"image too large ({image.width} x {image.height} pixels, limit {MAX_PIXELS:,})")
            if image.format in ("JPEG", "MPO") and data.count(_JPEG_SCAN) > MAX_SCANS:
                if (scans := _num_jpeg_scans(data)) > MAX_SCANS:
                    raise BrokenImage(f"too many JPEG scans ({scans}, limit {MAX_SCANS})")
            draft = image.draft("RGB", (min_side, min_side)) if min_side else None
            return _rgb(image), draft[1][2:] if draft else image.size
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"not an image of a supported format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise almost anything on bad bytes
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image of one of FORMATS, without decoding it. Raises what Pillow does."""
    return Image.open(io.BytesIO(_without_png_metadata(data)), formats=FORMATS)


def _without_png_metadata(data: bytes) -> bytes:
    """Return a PNG without its texts and color profile; other data unchanged."""
    if not data.startswith(_PNG_START) or not any(name in data for name in _PNG_METADATA):
        return data
    kept, position = [_PNG_START], len(_PNG_START)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] not in _PNG_METADATA:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _num_jpeg_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG. Embedded thumbnails and what follows the image, such as a phone's video or
    more images, do not count."""
    position, num_scans = 0, 0
    while match := _JPEG_MARKER.search(data, position):
        marker, position = match[1][0], match.end()
        if marker == 0xD9:  # end of image
            break
        num_scans += marker == _JPEG_SCAN[1]
        if marker not in (0xD8, 0x01):  # those have no segment
            position += int.from_bytes(data[position : position + 2], "big")
    return num_scans


def evaluation_pixels(source: bytes | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop or pad an encoded or decoded image → uint8 (3, S, S), S = `preprocessing.image_size`."""
    size, resampling = preprocessing.image_size, RESAMPLING[preprocessing.interpolation]
    width: float
    height: float
    if isinstance(source, Image.Image):
        image, (width, height) = _rgb(source), source.size
    else:
        image, (width, height) = _decode(source, _min_side(preprocessing, size))
    match preprocessing.resize_mode:
        case "shortest":
            if max(image.size) > (longest := MAX_RATIO * min(image.size)):
                # Resizing an image of 1 x 60,000 pixels would take gigabytes.
                image = _center(image, min(image.width, longest), min(image.height, longest))
                width, height = image.size
            # As torchvision: the longer side is truncated to an integer, not rounded.
            short = min(width, height)
            target = int(size * width / short), int(size * height / short)
            image = _center(image.resize(target, resampling, (0, 0, width, height)), size, size)
        case "longest":
            ratio = max(width, height) / size
            target = max(1, round(width / ratio)), max(1, round(height / ratio))
            padded = Image.new("RGB", (size, size), (preprocessing.fill_color,) * 3)
            image = image.resize(target, resampling, (0, 0, width, height))
            padded.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
            image = padded
        case "squash":
            image = image.resize((size, size), resampling, (0, 0, width, height))
    return _channels_first(image)


def training_pixels(data: bytes, preprocessing: Preprocessing, random_crop: bool) -> np.ndarray:
    """Decode an image for training → uint8 (3, height, width).

    Args:
        random_crop: keep the whole image, its shorter side at most TRAINING_OVERSIZE times the model's input; False:
            return the pixels of `evaluation_pixels`.
    """
    if not random_crop:
        return evaluation_pixels(data, preprocessing)
    size = TRAINING_OVERSIZE * preprocessing.image_size
    image, (width, height) = _decode(data, _min_side(preprocessing, size))
    shrink = size / min(width, height)
    if shrink < 1:
        target = round(width * shrink), round(height * shrink)
        image = image.resize(target, RESAMPLING[preprocessing.interpolation], (0, 0, width, height))
    return _channels_first(image)


def _min_side(preprocessing: Preprocessing, size: int) -> int | None:
    """Return the `min_side` to decode with before resizing to `size`."""
    return DRAFT_OVERSIZE * size if preprocessing.jpeg_draft else None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("floating-point pixels (mode F) of unknown range")
    if image.mode.startswith("I"):
        gray = _gray_levels(image)
        largest = 2 ** gray_bits(image) - 1
        return Image.fromarray(np.round(gray / (largest / 255)).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    return image.convert("RGB")


def gray_bits(image: Image.Image) -> int:
    """Return the bits that the brightest pixel of a gray image needs, one of GRAY_BITS; 8 if it is not gray of more."""
    if not image.mode.startswith("I"):
        return 8
    brightest = int(_gray_levels(image).max())
    return next(bits for bits in GRAY_BITS if brightest < 2**bits)


def _gray_levels(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image)
    if image.mode == "I" and getattr(image, "tag_v2", {}).get(_TIFF_SAMPLE_FORMAT, (None,))[0] == _UNSIGNED:
        return levels.view(np.uint32)  # Pillow's mode is signed
    return levels.clip(0)


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
