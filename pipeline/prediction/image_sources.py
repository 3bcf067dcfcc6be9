"""Images in the forms in which programs hold them: paths, URLs, bytes, open files, Pillow images, arrays, tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

import numpy as np
import torch
from PIL import Image

from pipeline.data.images import MAX_BYTES, BrokenImage, read_image
from pipeline.data.walk import find_images, skipped_note
from pipeline.errors import UserError
from pipeline.files import is_uri
from pipeline.prediction.encoded_images import decode_base64, is_data_url, is_url, read_url

_LOGGER = logging.getLogger(__name__)
UnnamedImage = bytes | bytearray | BinaryIO | Image.Image | np.ndarray | torch.Tensor
ImageSource = str | os.PathLike[str] | UnnamedImage
"""A path, an http, https or data URL, an encoded image, a file opened in binary mode, a Pillow image, an array (H, W),
(H, W, 1), (H, W, 3) or (H, W, 4), or a tensor (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are uint8,
or floats of 0 to 1."""
CHANNELS = (1, 3, 4)
_EXPECTED = {
    np.ndarray: "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)",
    torch.Tensor: "(H, W), (1, H, W), (3, H, W) or (4, H, W)",
}


def is_single_image(images: ImageSource | Iterable[ImageSource]) -> TypeGuard[ImageSource]:
    """Return whether this is one image, rather than a list of images. Raises TypeError if it is neither."""
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OSU":
        return False  # an array of paths or bytes
    if isinstance(images, _IMAGE_TYPES) or hasattr(images, "read"):
        return True
    if isinstance(images, Iterable) and not (isinstance(images, Mapping) or hasattr(images, "columns")):
        return False
    raise TypeError(f"images must be an image or a list of images, not {type(images).__name__}; {_EXPECTED_SOURCE}")


_IMAGE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
_EXPECTED_SOURCE = "expected a path, a URL, bytes, an open file, a Pillow image, an array or a tensor"


def is_folder(source: object) -> bool:
    return isinstance(source, str | os.PathLike) and os.path.isdir(os.path.expanduser(source))


def expand_folders(sources: Iterable[ImageSource]) -> Iterator[ImageSource]:
    """Yield the images, those in a folder in place of it; log a warning about its files that are not read.

    Raises:
        UserError: a folder without images.
    """
    for source in sources:
        if not is_folder(source):
            yield source
            continue
        folder = os.path.expanduser(os.fsdecode(cast(os.PathLike[str], source)))
        files, skipped = find_images(folder)
        note = f": {skipped_note(skipped)}" if skipped else ""
        if not files:
            raise UserError(f"no images in {folder}{note}")
        if skipped:
            _LOGGER.warning("%s", folder + note)
        yield from files


def source_path(source: Any) -> str | None:
    """Return the path or URL of an image; None if it has none."""
    if not isinstance(source, str | os.PathLike):
        return None
    name = os.fsdecode(source)
    return None if is_data_url(name) else name


def read_source(source: Any) -> bytes | Image.Image:
    """Return an image as `evaluation_pixels` takes it.

    Raises:
        BrokenImage: not an image, or what makes `source` broken if it is a BrokenImage itself.
        OSError: a file cannot be read.
    """
    data = _read(source)
    if isinstance(data, bytes) and not data:
        raise BrokenImage("no bytes")
    return data


def _read(source: Any) -> bytes | Image.Image:
    match source:
        case BrokenImage():
            raise source
        case str() | os.PathLike():
            return _read_named(os.fsdecode(source))
        case bytes() | bytearray() | memoryview():
            return bytes(source)
        case Image.Image():
            if not source.width * source.height:
                raise BrokenImage(f"image of {source.width} x {source.height} pixels")
            return source
        case np.ndarray() | torch.Tensor():
            return _array_to_image(source)
        case _ if hasattr(source, "read"):
            return _read_stream(source)
    raise BrokenImage(f"no image but {type(source).__name__}; {_EXPECTED_SOURCE}")


def _read_named(name: str) -> bytes:
    if is_url(name):
        return read_url(name)
    if is_data_url(name):
        return decode_base64(name)
    if is_uri(name):
        scheme = name.partition("://")[0]
        raise BrokenImage(f"an address with {scheme}://; expected a path, http:// or https://")
    if "\0" in name:
        raise BrokenImage("no such file")
    return read_image(Path(name).expanduser())


def _read_stream(stream: Any) -> bytes:
    data = stream.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise BrokenImage("a file opened as text; open it in binary mode, 'rb'")
    if len(data) > MAX_BYTES:
        raise BrokenImage(f"file too large (limit {MAX_BYTES:,} bytes)")
    return data


def _array_to_image(array: np.ndarray | torch.Tensor) -> Image.Image:
    kind = torch.Tensor if isinstance(array, torch.Tensor) else np.ndarray
    shape, problem = tuple(array.shape), None
    channels_first = len(shape) == 3 and shape[0] in CHANNELS
    channels_last = len(shape) == 3 and shape[2] in CHANNELS
    if isinstance(array, torch.Tensor):
        if channels_last and not channels_first:
            problem = "has its channels last: use tensor.permute(2, 0, 1)"
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        array = array.transpose(1, 2, 0) if channels_first else array
    elif channels_first and not channels_last:
        problem = "has its channels first: use array.transpose(1, 2, 0)"
    if len(shape) == 4:
        problem = "is a batch of images: use list(images)"
    elif not problem and (0 in shape or not (len(shape) == 2 or channels_first or channels_last)):
        problem = f"is no image; expected {_EXPECTED[kind]}"
    if problem:
        raise BrokenImage(f"{kind.__name__} of shape {shape} {problem}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not 0 <= low <= high <= 1:  # false for NaN
            raise BrokenImage(
                f"{kind.__name__} of floats from {low:g} to {high:g}; expected 0 to 1, without normalization, or uint8"
            )
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise BrokenImage(f"{kind.__name__} of {array.dtype}; expected uint8, or floats of 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))
