"""Image statistics for the data check, and thumbnails."""

from __future__ import annotations

import io
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import ExifTags, Image

from pipeline.data.images import decode_rgb, gray_bits, open_image

STORED_UPRIGHT = 1
"""EXIF orientation of an image that is not rotated or mirrored."""
THUMBNAIL = 64
"""Longer side of a thumbnail in pixels."""
DARK_GRAY, BRIGHT_GRAY = 20, 235
"""Below and above which a pixel is nearly black or white, of 255."""


@dataclass(frozen=True, slots=True)
class ImageStats:
    """Properties of an image that can be decoded."""

    width: int
    height: int
    mode: str
    """Pillow's mode of the file: RGB, L, P, RGBA, CMYK, I;16, ..."""
    format: str
    """Pillow's name of the format: JPEG, PNG, ..."""
    frames: int
    orientation: int
    """EXIF orientation; STORED_UPRIGHT by default."""
    contrast: float
    """Standard deviation of the gray values (0 to 255); 0: a single color."""
    phash: int
    """64-bit perceptual hash; those of near-duplicates differ in few bits."""
    bits: int = 8
    """Bits per pixel that gray of more than 8 uses (images.GRAY_BITS)."""
    dark: float = 0.0
    """Fraction of nearly black pixels."""
    bright: float = 0.0
    """Fraction of nearly white pixels."""
    transparent: float = 0.0
    """Fraction of pixels that are at least half transparent."""


def image_stats(data: bytes, pixels: Image.Image | None = None) -> ImageStats:
    """Compute the statistics of an encoded image.

    Args:
        pixels: `data` decoded to RGB, if available.

    Raises:
        BrokenImage: as `decode_rgb`.
    """
    pixels = pixels or decode_rgb(data)
    with open_image(data) as image:
        mode, image_format = image.mode, str(image.format)
        bits, transparent = gray_bits(image), _transparent(image)
        frames, orientation = _frames(image), _orientation(image)
    gray = pixels.convert("L")
    histogram, num_pixels = gray.histogram(), gray.width * gray.height
    dark, bright = sum(histogram[:DARK_GRAY]) / num_pixels, sum(histogram[BRIGHT_GRAY + 1 :]) / num_pixels
    phash = int.from_bytes(np.packbits(imagehash.phash(gray).hash.ravel()).tobytes(), "big")
    contrast = float(np.asarray(gray.resize((64, 64), Image.Resampling.BOX)).std())
    return ImageStats(
        *(pixels.width, pixels.height, mode, image_format, frames, orientation, contrast, phash),
        *(bits, dark, bright, transparent),
    )


def thumbnail(pixels: Image.Image, size: int = THUMBNAIL) -> bytes:
    """Encode an RGB image as a JPEG with sides of at most `size` pixels."""
    small = pixels.copy()
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=75)
    return stream.getvalue()


def _transparent(image: Image.Image) -> float:
    """Return the fraction of pixels that are at least half transparent."""
    if not image.has_transparency_data:
        return 0.0
    return sum(image.convert("RGBA").getchannel("A").histogram()[:128]) / (image.width * image.height)


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # broken later frames; only the first is used
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, STORED_UPRIGHT))
    except Exception:  # broken metadata, which is not used
        return STORED_UPRIGHT
