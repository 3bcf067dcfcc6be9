"""What can be told of an image without knowing what it should show."""

from __future__ import annotations

import io
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import ExifTags, Image

from pipeline.data.images import FORMATS, decode_rgb

STORED_UPRIGHT = 1
"""EXIF's orientation of an image whose pixels are not to be turned."""


@dataclass(frozen=True)
class ImageFacts:
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
    """Standard deviation of the grey values, 0 to 255; 0: one colour."""
    looks: int
    """Perceptual hash, 64 bits: images that look alike differ in few of them."""


def image_facts(data: bytes) -> ImageFacts:
    """Raises: BrokenImage: as `decode_rgb`."""
    pixels = decode_rgb(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode, kind, frames = image.mode, str(image.format), int(getattr(image, "n_frames", 1))
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, STORED_UPRIGHT))
    looks = np.packbits(imagehash.phash(pixels).hash.ravel())
    contrast = float(np.asarray(pixels.convert("L").resize((64, 64), Image.Resampling.BOX)).std())
    return ImageFacts(
        pixels.width, pixels.height, mode, kind, frames, orientation, contrast, int.from_bytes(looks.tobytes(), "big")
    )
