"""Decode and resize images as open_clip does, with Pillow, which resizes with antialiasing.

Choices that matter only for images other than 8-bit RGB or gray:
- convert to RGB before resizing, as CoOp and its successors: a palette image is otherwise resized by nearest neighbor;
- drop alpha; scale 16-bit gray to 8 bits, where Pillow alone clips nearly all of it to white.
"""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.preprocessing import Preprocessing

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
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_RATIO = 1000
"""Above this aspect ratio, evaluation crops the center before it resizes the shorter side."""
MAX_PIXELS = cast(int, Image.MAX_IMAGE_PIXELS)  # None only if a program removed Pillow's limit
"""Pillow's limit against decompression bombs (89 million)."""
MAX_BYTES = 6 * MAX_PIXELS
"""Size of MAX_PIXELS without compression, at 16 bits per channel."""
MAX_SCANS = 100
"""Scans of a progressive JPEG, each over all pixels: a small file with thousands would take minutes."""

# Pillow warns of palettes, large images and broken metadata once per file; warnings.catch_warnings around each decoding
# would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImage(ValueError):
    """The bytes cannot be decoded as an image."""


def read_image(path: Path) -> bytes:
    """Read an image file.

    Raises:
        BrokenImage: not a file, or larger than MAX_BYTES.
        OSError: the file cannot be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
        raise BrokenImage("no such file")
    if status.st_size > MAX_BYTES:
        raise BrokenImage(f"file too large ({status.st_size:,} bytes, limit {MAX_BYTES:,})")
    return path.read_bytes()


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        BrokenImage: not an image, truncated, above MAX_PIXELS or MAX_SCANS, or floating-point pixels (unknown range).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"image too large ({image.width} x {image.height} pixels, limit {MAX_PIXELS:,})")
            if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                raise BrokenImage(f"too many JPEG scans ({scans}, limit {MAX_SCANS})")
            return _rgb(image)
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"not an image of a supported format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise almost anything on bad bytes
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def evaluation_pixels(source: bytes | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop or pad an encoded or decoded image → uint8 (3, S, S), S = `preprocessing.image_size`."""
    image = _rgb(source) if isinstance(source, Image.Image) else decode_rgb(source)
    size, resampling = preprocessing.image_size, RESAMPLING[preprocessing.interpolation]
    match preprocessing.resize_mode:
        case "shortest":
            short = min(image.size)
            if max(image.size) > MAX_RATIO * short:
                # Resizing an image of 1 x 60,000 pixels would take gigabytes.
                image = _center(image, min(image.width, MAX_RATIO * short), min(image.height, MAX_RATIO * short))
            # As torchvision: the longer side is truncated to an integer, not rounded.
            image = image.resize((int(size * image.width / short), int(size * image.height / short)), resampling)
            image = _center(image, size, size)
        case "longest":
            ratio = max(image.size) / size
            width, height = max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
            padded = Image.new("RGB", (size, size), (preprocessing.fill_color,) * 3)
            padded.paste(image.resize((width, height), resampling), ((size - width) // 2, (size - height) // 2))
            image = padded
        case "squash":
            image = image.resize((size, size), resampling)
    return _channels_first(image)


def training_pixels(data: bytes, preprocessing: Preprocessing, random_crop: bool) -> np.ndarray:
    """Decode an image for training → uint8 (3, height, width).

    Args:
        random_crop: keep the whole image, its shorter side at most TRAINING_OVERSIZE times the model's input; False:
            return the pixels of `evaluation_pixels`.
    """
    if not random_crop:
        return evaluation_pixels(data, preprocessing)
    image = decode_rgb(data)
    width, height = image.size
    shrink = TRAINING_OVERSIZE * preprocessing.image_size / min(width, height)
    if shrink < 1:
        image = image.resize((round(width * shrink), round(height * shrink)), RESAMPLING[preprocessing.interpolation])
    return _channels_first(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("floating-point pixels (mode F) of unknown range")
    if image.mode.startswith("I"):
        gray = np.asarray(image).clip(0, 65535)
        return Image.fromarray(np.round(gray / 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
