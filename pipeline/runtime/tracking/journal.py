"""Journal of tracking operations on disk: durable, without duplicates."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

from pipeline.errors import UserError
from pipeline.files import atomic_write, write_advice, write_file

log = logging.getLogger(__name__)

JOURNAL, DAMAGED = "journal.jsonl", "journal.damaged"
Kind = Literal["start", "params", "tags", "metrics", "artifact", "dataset", "model", "status"]


def journal_id(folder: Path, operation: Operation) -> str:
    """Return a name that is unique over all journals: the time of the first operation distinguishes those of one config
    in different storages."""
    return f"{folder.name}-{operation.time:x}"


def run_key(journal_id: str, run: str) -> str:
    return f"{journal_id}/{quote(run, safe=' :+,')}"


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

    @classmethod
    def parse(cls, line: bytes) -> Operation | None:
        """Return the operation that a line of a journal holds; None if the line is damaged."""
        try:
            op = cls(**json.loads(line))
            fits = all(isinstance(text, str) for text in (op.run, op.key)) and op.kind in get_args(Kind)
            return op if fits and isinstance(op.time, int) and isinstance(op.step, int) else None
        except (ValueError, TypeError, RecursionError):
            return None


class Journal:
    """Append-only file of operations in `folder`, for one process at a time; `changed` is notified of new ones.

    Raises:
        UserError: The file cannot be read or written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.operations: list[Operation] = []
        self.status: dict[str, str] = {}
        """Run → status as last recorded."""
        self.parent: dict[str, str | None] = {}
        self.params: dict[str, set[str]] = {}
        """Run → keys of its params."""
        self._identities: set[tuple[Any, ...]] = set()
        self.changed = threading.Condition(threading.RLock())
        self.was_mended = False
        """Whether damaged lines were removed, so that the indices of operations changed."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / JOURNAL).open("a+b", buffering=0)
            self._file.seek(0)
            *lines, partial_line = self._file.read().split(b"\n")
            self._file.truncate(self._file.tell() - len(partial_line))  # left by a crash
            operations = [Operation.parse(line) for line in lines]
            for op in self._mended(lines, operations) if None in operations else operations:
                if op:
                    self._index(op)
        except OSError as error:
            raise UserError(f"cannot use {folder / JOURNAL}: {error.strerror}; {write_advice(error)}") from error
        self.id = journal_id(folder, self.operations[0]) if self.operations else ""

    def record(self, kind: Kind, run: str, values: Mapping[str, Any], step: int = 0) -> None:
        """Append the values that the journal does not hold yet.

        Raises: ValueError: The run was not started. UserError: The disk is full; the journal is unchanged.
        """
        self.record_steps(kind, run, [(step, values)])

    def record_steps(self, kind: Kind, run: str, steps: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Append the values of several steps at once, as `record` does: each write waits for the disk."""
        with self.changed:
            if kind != "start" and run not in self.status:
                raise ValueError(f"the tracking run {run!r} was not started: call start_run({run!r}) first")
            time_ms = int(time.time() * 1000)
            operations = [
                Operation(kind, run, key, value, time_ms, step)
                for step, values in steps
                for key, value in values.items()
            ]
            # A status may recur (failed, resumed, failed again); everything else is recorded once.
            if kind != "status":
                op_by_identity = {op.identity: op for op in reversed(operations)}
                operations = [
                    op for identity, op in reversed(op_by_identity.items()) if identity not in self._identities
                ]
            if operations:
                self._append(operations)
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
        """Return a name of the run that is unique over all journals."""
        return run_key(self.id, run)

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

    def _mended(self, lines: Sequence[bytes], operations: Sequence[Operation | None]) -> list[Operation]:
        """Move damaged lines to another file; return the operations, with a start for each run that lost it."""
        damaged = [number for number, op in enumerate(operations, 1) if op is None]
        operations_read = [op for op in operations if op]
        started = {op.run for op in operations_read if op.kind == "start"}
        mended: list[Operation] = []
        for op in operations_read:
            run = op.value if op.kind == "start" else op.run
            if run and run not in started:
                started.add(run)
                parent = mended[0].run if mended else None
                mended.append(Operation("start", run, "parent", parent, op.time))
            mended.append(op)
        file = self.folder / JOURNAL
        with (self.folder / DAMAGED).open("ab") as stream:
            stream.writelines(lines[number - 1] + b"\n" for number in damaged)
        self._file.close()
        write_file(file, "".join(json.dumps(asdict(op)) + "\n" for op in mended))
        self._file = file.open("a+b", buffering=0)
        self.was_mended = True
        log.warning(
            "%s is damaged in %d of %d lines (%s): their values are lost for MLflow unless the same command logs them "
            "again. The lines are moved to %s; all others are kept and sent",
            file,
            len(damaged),
            len(lines),
            ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else ""),
            self.folder / DAMAGED,
        )
        return mended

    def _append(self, operations: Sequence[Operation]) -> None:
        """Append to the file and the index: both, or neither if the disk is full or a signal interrupts."""
        lines = "".join(json.dumps(asdict(op)) + "\n" for op in operations).encode()
        size, count, status = os.fstat(self._file.fileno()).st_size, len(self.operations), dict(self.status)
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
            for op in operations:
                self._index(op)
            self.id = self.id or journal_id(self.folder, operations[0])
        except BaseException as error:
            self._file.truncate(size)
            del self.operations[count:]
            self._identities.difference_update(op.identity for op in operations)
            self.status = status
            if isinstance(error, OSError):
                raise UserError(f"cannot write {self._file.name}: {error.strerror}; {write_advice(error)}") from error
            raise
