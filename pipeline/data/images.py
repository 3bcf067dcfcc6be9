"""One image file → pixels, the way CLIP's own preprocessing does it (RGB, bicubic with antialiasing)."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

TRAINING_OVERSIZE = 2
"""Training images are kept with a shorter side of up to this many times the model's input, so that a small random
crop still has real detail, and memory does not follow the camera."""


class BrokenImage(ValueError):
    """The bytes are no image that can be decoded to the end."""


def decode_rgb(data: bytes) -> Image.Image:
    """The whole image as RGB; grey and palette images are expanded, alpha is dropped.

    Raises:
        BrokenImage: not an image, truncated, or so large that it looks like a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Palette transparency given as bytes: Pillow advises RGBA, but alpha is dropped here anyway.
            warnings.filterwarnings("ignore", message="Palette images with Transparency")
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on bad bytes
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def evaluation_pixels(data: bytes, image_size: int) -> np.ndarray:
    """Shorter side resized to `image_size`, centre crop → uint8 (3, image_size, image_size)."""
    image = decode_rgb(data)
    width, height = image.size
    short = min(width, height)
    if short != image_size:
        # torchvision's rule: the longer side is cut to an integer, not rounded.
        width, height = int(image_size * width / short), int(image_size * height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return _channels_first(image.crop((left, top, left + image_size, top + image_size)))


def training_pixels(data: bytes, image_size: int) -> np.ndarray:
    """The whole image, its shorter side at most TRAINING_OVERSIZE × `image_size` → uint8 (3, height, width)."""
    image = decode_rgb(data)
    width, height = image.size
    shrink = TRAINING_OVERSIZE * image_size / min(width, height)
    if shrink < 1:
        image = image.resize((round(width * shrink), round(height * shrink)), Image.Resampling.BICUBIC)
    return _channels_first(image)


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
