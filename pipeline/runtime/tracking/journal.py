"""Journal of tracking operations on disk: durable, without duplicates."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pipeline.errors import UserError
from pipeline.files import FREE_SPACE_ADVICE, atomic_write

JOURNAL = "journal.jsonl"
Kind = Literal["start", "params", "tags", "metrics", "artifact", "dataset", "model", "status"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One value of a run to be sent to MLflow."""

    kind: Kind
    run: str
    key: str
    value: Any
    time: int
    """Milliseconds since 1970."""
    step: int = 0

    @property
    def identity(self) -> tuple[Any, ...]:
        """Key that detects duplicates: of a metric its step, otherwise the value itself."""
        return self.kind, self.run, self.key, self.step if self.kind == "metrics" else json.dumps(self.value)


class Journal:
    """Append-only file of operations in `folder`, for one process at a time; `changed` is notified of new ones."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.operations: list[Operation] = []
        self.status: dict[str, str] = {}
        """Run → status as last recorded."""
        self.parent: dict[str, str | None] = {}
        self.params: dict[str, set[str]] = {}
        """Run → keys of its params."""
        self._identities: set[tuple[Any, ...]] = set()
        self.changed = threading.Condition(threading.RLock())
        self._file = (folder / JOURNAL).open("a+b", buffering=0)
        self._file.seek(0)
        *lines, partial_line = self._file.read().split(b"\n")
        self._file.truncate(self._file.tell() - len(partial_line))  # left by a crash
        for line in lines:
            self._index(Operation(**json.loads(line)))

    def record(self, kind: Kind, run: str, values: Mapping[str, Any], step: int = 0) -> None:
        """Append the values that the journal does not hold yet.

        Raises: ValueError: The run was not started. UserError: The disk is full; the journal is unchanged.
        """
        with self.changed:
            if kind != "start" and run not in self.status:
                raise ValueError(f"the tracking run {run!r} was not started: call start_run({run!r}) first")
            time_ms = int(time.time() * 1000)
            operations = [Operation(kind, run, key, value, time_ms, step) for key, value in values.items()]
            # A status may recur (failed, resumed, failed again); everything else is recorded once.
            new = [op for op in operations if kind == "status" or op.identity not in self._identities]
            if new:
                self._append("".join(json.dumps(asdict(op)) + "\n" for op in new).encode())
                for op in new:
                    self._index(op)
                self.changed.notify_all()

    def keep(self, file: Path) -> str:
        """Copy a file in its current state; return the copy's path in `folder`. Raises: UserError: The disk is full."""
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        copy = self.folder / "files" / digest / file.name
        if not copy.exists():
            with atomic_write(copy) as partial:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, partial)
        return copy.relative_to(self.folder).as_posix()

    def run_key(self, run: str) -> str:
        """Return a name of the run that is unique over all journals.

        The time of the first operation distinguishes journals of the same config in different storages.
        """
        return f"{self.folder.name}-{self.operations[0].time:x}/{quote(run, safe=' :+,')}"

    def close(self) -> None:
        self._file.close()

    def _index(self, op: Operation) -> None:
        self.operations.append(op)
        self._identities.add(op.identity)
        if op.kind == "start":
            self.status.setdefault(op.run, "RUNNING")
            self.parent[op.run] = op.value
        elif op.kind == "status":
            self.status[op.run] = op.value
        elif op.kind == "params":
            self.params.setdefault(op.run, set()).add(op.key)

    def _append(self, lines: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            raise UserError(f"cannot write {self._file.name}: {error.strerror}; {FREE_SPACE_ADVICE}") from error
