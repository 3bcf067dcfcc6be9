"""Tensors of a TorchScript archive, as OpenAI distributes its weights. Nothing in it is executed.

Such an archive has the modules as a pickle, `data.pkl`, their code as compressed text, which is not read, and one
uncompressed record per tensor. Of the pickle only the few opcodes are interpreted that torch writes for modules and
tensors: names of classes and functions stay names, none of them is imported or called.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MAX_PICKLE_BYTES = 4 << 20
_MAX_DEPTH = 32
_MAX_ATTRIBUTES = 100_000
_DTYPES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch ByteStorage": torch.uint8,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch BoolStorage": torch.bool,
}
_CONTAINERS = {
    "collections OrderedDict",
    *(f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
    "torch.jit._pickle restore_type_tag",
    "torch device",
}


@dataclass(frozen=True)
class TorchScript:
    state: dict[str, torch.Tensor]
    """All tensors, by the path of their attribute."""
    quick_gelu: bool | None
    """Whether the modules have QuickGELU; None: neither QuickGELU nor GELU is among them."""


class _Name(str):
    """A class or function that the pickle names, `module name`."""


@dataclass
class _Module:
    type_name: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    record: str
    length: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def read_torchscript(file: Path) -> TorchScript:
    """Read the tensors of an archive.

    Raises:
        ValueError, and others of malformed data: it is not an archive of modules and tensors only, or is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        records = _Records(archive, root.removesuffix("data.pkl"))
        module = _interpret(records.read("data.pkl", MAX_PICKLE_BYTES))
        if not isinstance(module, _Module):
            raise ValueError("its data.pkl is not a module")
        state, types = {}, set()
        for name, value in _walk(module):
            if isinstance(value, _Module):
                types.add(value.type_name.rpartition(" ")[2])
            else:
                state[name] = records.tensor(value)
    return TorchScript(state, True if "QuickGELU" in types else False if "GELU" in types else None)


class _Records:
    """Uncompressed records of an archive; together they are no larger than its file, whatever it declares."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self._archive, self._root = archive, root
        self._remaining = Path(str(archive.filename)).stat().st_size
        self._storages: dict[str, torch.Tensor] = {}

    def read(self, name: str, limit: int | None = None) -> bytes:
        record = self._archive.getinfo(self._root + name)
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {name} is compressed, which torch.jit.save never does")
        self._remaining -= record.file_size
        if self._remaining < 0 or record.file_size > (limit or math.inf):
            raise ValueError(f"its record {name} is too large")
        return self._archive.read(record)

    def tensor(self, tensor: _Tensor) -> torch.Tensor:
        storage = tensor.storage
        if storage.record not in self._storages:
            data = bytearray(self.read(f"data/{storage.record}"))
            if len(data) != storage.length * storage.dtype.itemsize:
                raise ValueError(f"its record data/{storage.record} has {len(data)} bytes for {storage}")
            self._storages[storage.record] = (
                torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
            )
        if math.prod(tensor.size) > storage.length:
            raise ValueError(f"a tensor of shape {tensor.size} has {storage.length} elements")
        return self._storages[storage.record].view(storage.dtype).as_strided(tensor.size, tensor.stride, tensor.offset)


def _interpret(data: bytes) -> Any:
    """Return what a pickle of modules describes, by a stack machine that knows no classes or functions."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop_marked() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                break
            case "MARK":
                marks.append(len(stack))
            case "GLOBAL":
                stack.append(_Name(argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "TUPLE":
                stack.append(tuple(pop_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(opcode.name[-1]) :] = [tuple(stack[-int(opcode.name[-1]) :])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = pop_marked()
                stack[-1].extend(items)
            case "SETITEMS":
                items = pop_marked()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "NEWOBJ":
                if stack.pop() != () or not stack[-1].startswith(("__torch__ ", "__torch__.")):
                    raise ValueError(f"it names {stack[-1]}, which is not a module of TorchScript")
                stack[-1] = _Module(stack[-1])
            case "BUILD":
                attributes = stack.pop()
                stack[-1].attributes.update(attributes)
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_construct(stack.pop(), arguments))
            case name:
                raise ValueError(f"its data.pkl has the opcode {name}, which torch.jit.save never writes")
    return stack.pop()


def _storage(persistent_id: tuple[Any, ...]) -> _Storage:
    kind, storage_type, record, _, length = persistent_id
    if kind != "storage" or storage_type not in _DTYPES:
        raise ValueError(f"it has a storage of {storage_type}")
    return _Storage(_DTYPES[storage_type], record, length)


def _construct(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a tensor's description; None for lists and the like, which are no weights."""
    if function == "torch._utils _rebuild_tensor_v2":
        storage, offset, size, stride, *_ = arguments
        return _Tensor(storage, offset, size, stride)
    if isinstance(function, _Name) and function in _CONTAINERS:
        return None
    raise ValueError(f"it names {str(function).replace(' ', '.')}, which could run code")


def _walk(root: _Module) -> Iterator[tuple[str, _Module | _Tensor]]:
    """Iterate over the modules and tensors with their names.

    Raises:
        ValueError: modules within themselves, or too many.
    """
    pending: list[tuple[str, int, _Module | _Tensor]] = [("", 0, root)]
    for _ in range(_MAX_ATTRIBUTES):
        if not pending:
            return
        path, depth, value = pending.pop()
        if depth > _MAX_DEPTH:
            break
        yield path.removesuffix("."), value
        if isinstance(value, _Module):
            pending += [
                (f"{path}{name}.", depth + 1, attribute)
                for name, attribute in value.attributes.items()
                if isinstance(attribute, _Module | _Tensor)
            ]
    raise ValueError("its modules are nested too deeply, or too many")
