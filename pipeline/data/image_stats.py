"""What can be told of an image without knowing what it should show, and a small picture of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import ExifTags, Image

from pipeline.data.images import FORMATS, decode_rgb

STORED_UPRIGHT = 1
"""EXIF's orientation of an image whose pixels are not to be turned."""


THUMBNAIL = 64
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True, slots=True)
class ImageStats:
    """Of an image that can be decoded."""

    width: int
    height: int
    mode: str
    """Pillow's, as the file has it: RGB, L, P, RGBA, CMYK, I;16, ..."""
    format: str
    """Pillow's name of it: JPEG, PNG, ..."""
    frames: int
    orientation: int
    """EXIF's; STORED_UPRIGHT where there is none."""
    contrast: float
    """Standard deviation of the gray values, 0 to 255; 0: one color."""
    phash: int
    """Perceptual hash, 64 bits: images that look alike differ in few of them."""


def image_stats(data: bytes, pixels: Image.Image | None = None) -> ImageStats:
    """
    Args:
        pixels: `data` as RGB, if it is decoded already.

    Raises:
        BrokenImage: as `decode_rgb`.
    """
    pixels = pixels or decode_rgb(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode, kind = image.mode, str(image.format)
        frames, orientation = _frames(image), _orientation(image)
    gray = pixels.convert("L")
    phash = np.packbits(imagehash.phash(gray).hash.ravel())
    contrast = float(np.asarray(gray.resize((64, 64), Image.Resampling.BOX)).std())
    return ImageStats(
        pixels.width, pixels.height, mode, kind, frames, orientation, contrast, int.from_bytes(phash.tobytes(), "big")
    )


def thumbnail(pixels: Image.Image) -> bytes:
    """A JPEG of an RGB image, no side longer than THUMBNAIL pixels."""
    small = pixels.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=75)
    return stream.getvalue()


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # broken frames behind the first, which alone is used
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, STORED_UPRIGHT))
    except Exception:  # broken metadata, of which nothing is used
        return STORED_UPRIGHT
