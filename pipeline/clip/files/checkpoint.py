"""Reading of weights in the forms that people have, as tensors. No pickle is run.

A file is recognized by its content: safetensors, torch.save, or TorchScript. A state dict may be nested under a key and
have a prefix.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.clip.files.torchscript import is_torchscript, read_torchscript
from pipeline.clip.files.weights import Weights
from pipeline.errors import UserError

State = dict[str, torch.Tensor]
_NESTED = ("state_dict", "model_state_dict", "model")
_MAX_NESTED = 4
_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""In OpenAI's state dicts, and in no others."""
_AGAIN = "download it again"
_NUMPY = b"\x93NUMPY"
_FOREIGN = {
    _NUMPY: ("has arrays of NumPy", "convert the weights to safetensors"),
    b"\x89HDF": ("is an HDF5 file of TensorFlow", "download the weights of PyTorch"),
    b"\x1f\x8b": ("is compressed with gzip", "unpack it"),
    b"{": ("is a JSON text", "give the file of weights"),
}
"""First bytes of files that are no weights → the fact and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read, with the names that they had."""

    state: State
    numbers: Mapping[str, int]
    """Image size, context length and vocabulary size of OpenAI's state dicts."""
    quick_gelu: bool | None


class _UnreadableError(ValueError):
    """A fact about a file, and a remedy."""

    def __init__(self, fact: str, remedy: str):
        super().__init__(fact)
        self.fact, self.remedy = fact, remedy


def read_checkpoint(weights: Weights) -> Checkpoint:
    """Read the tensors of files, memory-mapped where the format allows it.

    Raises:
        UserError: a file cannot be read, or holds more than tensors.
    """
    state: State = {}
    quick_gelu = weights.quick_gelu
    for file in weights.files:
        option = weights.option if weights.option.endswith(file.name) else f"{weights.option}: {file.name}"
        try:
            content, activation = _read_file(file)
            state |= _flatten(content)
        except _UnreadableError as error:
            raise UserError(f"{option} {error.fact}: {error.remedy}") from None
        except Exception as error:  # malformed files raise anything
            reason = str(error).partition("\n")[0][:100]
            if isinstance(error, EOFError) or "unexpected EOF" in reason:
                raise UserError(f"{option} is truncated (after {file.stat().st_size:,} bytes): {_AGAIN}") from None
            if isinstance(error, pickle.UnpicklingError):  # torch's message says how to run it anyway
                name = re.search(r"GLOBAL (\S+)", str(error))
                reason = f"it names {name[1]}, which could run code" if name else "not a pickle of tensors"
            raise UserError(
                f"{option} is not a plain file of tensors ({reason}): save the weights as safetensors, where you trust "
                "the file"
            ) from None
        quick_gelu = activation if activation is not None else quick_gelu
    numbers = {name: int(state.pop(name)) for name in _NUMBERS if name in state and state[name].numel() == 1}
    if len(numbers) == len(_NUMBERS):
        quick_gelu = True
    return Checkpoint(_without_prefix(state), numbers, quick_gelu)


def _read_file(file: Path) -> tuple[Any, bool | None]:
    """Return the content, and whether it needs QuickGELU if it says so.

    Raises:
        _UnreadableError, and others of malformed files.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(512)
    start = head.lstrip()
    if not size:
        raise _UnreadableError("is empty", _AGAIN)
    if head.startswith(b"version https://git-lfs"):
        whole = re.search(rb"size (\d+)", head)
        raise _UnreadableError(
            f"is a pointer of Git LFS ({size} bytes), not the file" + (f" of {int(whole[1]):,} bytes" if whole else ""),
            "run `git lfs pull` in its folder",
        )
    if start.startswith(b"<"):
        raise _UnreadableError("is a web page", "download the file itself (on the Hub /resolve/ in place of /blob/)")
    if head[8:9] == b"{":
        return _read_safetensors(file, size, head), None
    for magic, (fact, remedy) in _FOREIGN.items():
        if start.startswith(magic):
            raise _UnreadableError(fact, remedy)
    if not head.startswith(b"PK\x03\x04"):
        return _load_pickle(file), None
    if not zipfile.is_zipfile(file):
        raise _UnreadableError(f"is truncated (after {size:,} bytes)", _AGAIN)
    with zipfile.ZipFile(file) as archive:
        if is_torchscript(archive):
            script = read_torchscript(file)
            return script.state, script.quick_gelu
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch.save never does")
        if all(name.endswith(".npy") for name in archive.namelist()):
            raise _UnreadableError(*_FOREIGN[_NUMPY])
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise _UnreadableError(f"is an archive of other files ({archive.namelist()[0]}, ...)", "unpack it")
    if file.suffix == ".safetensors":
        return _load_pickle(file), None
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True), None


def _load_pickle(file: Path) -> Any:
    """Load what torch.save wrote, whatever its suffix: torch.load looks at that of a path."""
    with open(file, "rb") as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


def _read_safetensors(file: Path, size: int, head: bytes) -> State:
    header = int.from_bytes(head[:8], "little")
    if 8 + header > size:
        raise _UnreadableError(f"is truncated (its header has {header:,} bytes, the file {size:,})", _AGAIN)
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    except SafetensorError as error:
        if "incomplete" in str(error).lower():
            raise _UnreadableError(f"is truncated or damaged (after {size:,} bytes)", _AGAIN) from None
        raise


def _flatten(content: Any) -> State:
    """Return the state dict in a checkpoint, which may be nested under `state_dict`, `model_state_dict` or `model`.

    Raises:
        _UnreadableError: there is none, or more than one.
    """
    for _ in range(_MAX_NESTED):
        nested = [key for key in _NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if len(nested) > 1:
            raise _UnreadableError(f"has several state dicts ({', '.join(nested)})", "save one of them as safetensors")
        if not nested:
            break
        content = content[nested[0]]
    if not isinstance(content, Mapping) or not content:
        raise _UnreadableError("has no state dict", "save the model's state_dict() as safetensors")
    for name, value in content.items():
        if name in _NUMBERS and isinstance(value, int):
            continue
        if not isinstance(name, str) or not _is_plain(value):
            raise _UnreadableError(
                f"has a state dict with {name!r:.60}, which is {type(value).__name__}, not a tensor of numbers",
                "save the model's state_dict() as safetensors",
            )
    return {name: torch.tensor(value) if isinstance(value, int) else value for name, value in content.items()}


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_complex()
    )


def _without_prefix(state: State) -> State:
    """Strip what wrappers put before all names: `module.` (data parallel), `_orig_mod.` (torch.compile), `model.`
    (Lightning), or another attribute; the model is known by its logit_scale."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    prefix = os.path.commonprefix(list(state)).rpartition(".")[0]
    if f"{prefix}.logit_scale" in state:
        state = {name.removeprefix(f"{prefix}."): value for name, value in state.items()}
    return state
