"""One image file → pixels, the way CLIP's own preprocessing does it (RGB, bicubic with antialiasing).

Choices that change pixels only where an image is not 8-bit RGB or gray:
- it becomes RGB before it is resized, as in CoOp and its successors; resized first, a palette image would be
  cut to its nearest pixels;
- alpha is dropped; 16-bit gray is scaled to 8 bits, where Pillow alone would clip nearly all of it to white.
"""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

TRAINING_OVERSIZE = 2
"""Training images are kept with a shorter side of up to this many times the model's input, so that a small
random crop still has real detail, and memory does not follow the camera."""
SUFFIXES_OF_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm",),
    "AVIF": (".avif",),
}
"""Pillow knows more formats, some of which start other programs (EPS: Ghostscript)."""
FORMATS = tuple(sorted(SUFFIXES_OF_FORMAT.keys() - {"MPO"}))
"""As Pillow opens them: it finds that a JPEG is an MPO after it has opened it."""
MAX_RATIO = 1000
"""Of an image that is longer than this many times its width, the evaluation takes the middle first."""
MAX_PIXELS = cast(int, Image.MAX_IMAGE_PIXELS)  # None only where a program takes Pillow's limit away
"""Pillow's own limit, above which it suspects a decompression bomb (89 million)."""
MAX_BYTES = 6 * MAX_PIXELS
"""What those take without compression at 16 bits a channel."""
MAX_SCANS = 100
"""Of a progressive JPEG, each of which goes over all pixels: a small file of thousands would take minutes."""

# Pillow advises RGBA, suspects bombs and finds fault with metadata, once for each file; a filter set around each
# decoding instead would not be safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImage(ValueError):
    """The bytes are no image that can be decoded to the end."""


def read_image(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        BrokenImage: no file, or larger than MAX_BYTES.
        OSError: it cannot be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
        raise BrokenImage("no such file")
    if status.st_size > MAX_BYTES:
        raise BrokenImage(f"{status.st_size:,} bytes are more than {MAX_BYTES:,}")
    return path.read_bytes()


def decode_rgb(data: bytes) -> Image.Image:
    """The whole image as RGB.

    Raises:
        BrokenImage: not an image, truncated, larger than MAX_PIXELS, of more than MAX_SCANS, or of pixel values without
            a range.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                raise BrokenImage(f"{scans} scans are more than {MAX_SCANS}")
            return _rgb(image)
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"no image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise almost anything on bad bytes
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def evaluation_pixels(source: bytes | Image.Image, image_size: int) -> np.ndarray:
    """Encoded or decoded image: shorter side resized to `image_size`, center crop → uint8
    (3, image_size, image_size)."""
    image = _rgb(source) if isinstance(source, Image.Image) else decode_rgb(source)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_RATIO * short:
        # Resized whole, a thread of 1 x 60,000 pixels would take gigabytes.
        image = _center(image, min(width, MAX_RATIO * short), min(height, MAX_RATIO * short))
        width, height = image.size
    if short != image_size:
        # torchvision's rule: the longer side is cut to an integer, not rounded.
        width, height = int(image_size * width / short), int(image_size * height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _channels_first(_center(image, image_size, image_size))


def training_pixels(data: bytes, image_size: int) -> np.ndarray:
    """The whole image, shorter side at most TRAINING_OVERSIZE × `image_size` → uint8 (3, height, width)."""
    image = decode_rgb(data)
    width, height = image.size
    shrink = TRAINING_OVERSIZE * image_size / min(width, height)
    if shrink < 1:
        image = image.resize((round(width * shrink), round(height * shrink)), Image.Resampling.BICUBIC)
    return _channels_first(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("pixel values are fractions (mode F), whose range is not known")
    if image.mode.startswith("I"):
        gray = np.asarray(image).clip(0, 65535)
        return Image.fromarray(np.round(gray / 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
