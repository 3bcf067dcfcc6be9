"""Delivery of a journal to MLflow: in order, with retries during an outage, and a report on what was not sent."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.runtime.tracking.journal import JOURNAL, Journal, Operation, journal_id
from pipeline.runtime.tracking.mlflow_adapter import BATCH_LIMITS, MlflowServer, Refused, shortened, without_password

log = logging.getLogger(__name__)

PROGRESS, REFUSED = "delivery.json", "refused.jsonl"
MIN_RETRY_DELAY_S, MAX_RETRY_DELAY_S = 0.5, 15.0
MAX_FAILURES = 10  # failures of one operation while the server answers other requests, before it is postponed
RETRY_POSTPONED_S = 60.0


@dataclass(frozen=True)
class DeliveryReport:
    """Numbers of operations delivered, waiting and refused, and a message about them."""

    delivered: int
    waiting: int
    refused: int
    message: str


@dataclass
class _Progress:
    """Record on disk of the operations that were sent."""

    journal_id: str
    position: int = 0
    """Operations before it were sent, postponed or refused."""
    postponed: list[int] = field(default_factory=list)
    """Those that the server could not write while it answered other requests, and those that need them."""
    refused: list[int] = field(default_factory=list)
    """Those whose content the server rejects."""
    run_ids: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, journal: Journal) -> _Progress:
        """Return the progress on disk; position 0 if it or the journal was lost, as sending is idempotent."""
        file = journal.folder / PROGRESS
        try:
            progress = cls(**read_json(file))
            if not progress._is_valid():
                raise ValueError("invalid values")
        except FileNotFoundError:
            return cls(journal.id)
        except (ValueError, TypeError) as error:
            log.warning("%s is damaged (%s): all operations are sent again, none is lost", file, error)
            return cls(journal.id)
        if journal.was_mended or progress.position > len(journal.operations):
            return cls(progress.journal_id)
        return progress

    def _is_valid(self) -> bool:
        indices = [self.position, *self.postponed, *self.refused]
        return (
            isinstance(self.journal_id, str)
            and all(isinstance(index, int) and 0 <= index <= self.position for index in indices)
            and all(isinstance(run_id, str) for run_id in self.run_ids.values())
        )


def read_journal_id(folder: Path) -> str:
    """Return the id of a journal that another process may be writing.

    Raises: UserError: There is no journal, or it cannot be read.
    """
    try:
        return str(read_json(folder / PROGRESS)["journal_id"])
    except (OSError, ValueError, TypeError, KeyError):  # nothing was sent yet, or it is damaged
        pass
    try:
        with (folder / JOURNAL).open("rb") as stream:
            op = Operation.parse(stream.readline())
    except OSError:
        op = None
    if op is None:
        raise UserError(f"{folder / JOURNAL} is missing or damaged: rerun the command that made the run")
    return journal_id(folder, op)


class Delivery:
    """A thread that sends `journal` to `server` until `stop`."""

    def __init__(self, journal: Journal, server: MlflowServer, retry_refused: bool = False):
        self._journal, self._server = journal, server
        self._progress = _Progress.read(journal)
        journal.id = self._progress.journal_id or journal.id
        if journal.was_mended:
            write_json(journal.folder / PROGRESS, asdict(self._progress))
        if retry_refused:
            self._progress.postponed = sorted({*self._progress.postponed, *self._progress.refused})
            self._progress.refused = []
        if not self._progress.refused:
            (journal.folder / REFUSED).unlink(missing_ok=True)
        self._retries: list[int] = []
        """Postponed operations that are still to be tried in this round."""
        self._changed = journal.changed
        self._connected = self._flush_requested = self._stopping = False
        self._round_requested = True
        """Whether a round of retries is to follow the new operations."""
        self._error: Exception | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._deliver, name="mlflow-delivery", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> DeliveryReport:
        """Wait until all is sent or was tried, or nothing was sent for `timeout_s`; return a report."""
        with self._changed:
            self._flush_requested = self._round_requested = True
            self._changed.notify_all()
            while (self._round_requested or self._has_work()) and self._changed.wait(timeout_s):
                pass
            return self._report()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(2)  # a hanging request is left to the daemon thread, which then sends no more

    # The thread

    def _deliver(self) -> None:
        delay = MIN_RETRY_DELAY_S
        while not self._stopping:
            try:
                if not self._connected and (self._has_work() or not self._is_settled):
                    self._connect()
                if self._has_work():
                    self._deliver_next()
                with self._changed:
                    if self._round_requested and self._progress.position == len(self._journal.operations):
                        self._begin_round()
                    if self._error and not self._progress.postponed:
                        log.warning("MLflow at %s is reachable again.", self._server.address)
                        self._error = None
                    self._failures, delay = 0, MIN_RETRY_DELAY_S
                    self._changed.notify_all()
                    if not self._changed.wait_for(
                        lambda: self._has_work() or self._round_requested or self._stopping,
                        RETRY_POSTPONED_S if self._progress.postponed else None,
                    ):
                        self._begin_round()
            except Exception as error:
                with self._changed:
                    previous_error, self._error = self._error, error
                    if not previous_error:
                        log.warning("%s Training continues.", self._report().message)
                    self._changed.wait_for(lambda: self._flush_requested or self._stopping, delay)
                    self._flush_requested = False
                delay = min(2 * delay, MAX_RETRY_DELAY_S)

    @cached_property
    def _is_settled(self) -> bool:
        """Whether all that an earlier process recorded was sent, to a database that still has it."""
        run, run_id = self._first_run()
        return bool(run and run_id) and self._server.holds(self._journal.run_key(run), run_id)

    def _first_run(self) -> tuple[str, str]:
        """Return name and id of the first run that was sent, or empty texts."""
        return next(iter(self._progress.run_ids.items()), ("", ""))

    def _connect(self) -> None:
        self._server.connect()
        run, run_id = self._first_run()
        if not run or self._server.find_run(self._journal.run_key(run)) != run_id:
            self._progress = _Progress(self._journal.id)  # another server, or an emptied one: send the whole journal
            (self._journal.folder / REFUSED).unlink(missing_ok=True)
        self._connected = True

    def _begin_round(self) -> None:
        """Begin a round of retries of the postponed operations; statuses and tags that have later values are done."""
        operations, progress = self._journal.operations, self._progress
        latest = {(op.kind, op.run, op.key): index for index, op in enumerate(operations)} if progress.postponed else {}

        def is_superseded(index: int) -> bool:
            op = operations[index]
            return op.kind in ("status", "tags") and latest[op.kind, op.run, op.key] != index

        progress.postponed = [index for index in progress.postponed if not is_superseded(index)]
        self._retries, self._round_requested = list(progress.postponed), False

    def _deliver_next(self) -> None:
        """Send the next operations that fit into one request of each run: new ones, then those to retry."""
        operations, progress = self._journal.operations, self._progress
        is_retry = progress.position == len(operations)
        indices: Sequence[int] = self._retries if is_retry else range(progress.position, len(operations))
        kind = operations[indices[0]].kind
        # After each failure the batch is halved, to find the operation that fails.
        max_batch = max(1, BATCH_LIMITS.get(kind, 1) >> self._failures)
        batch = list(takewhile(lambda index: operations[index].kind == kind, islice(indices, max_batch)))
        postponed = self._blocked(batch, is_retry)
        sendable = [index for index in batch if index not in postponed]
        refused: list[tuple[int, Exception]] = []
        failure: Exception | None = None
        try:
            for run in dict.fromkeys(operations[index].run for index in sendable):
                refused += self._send([index for index in sendable if operations[index].run == run])
        except Exception as error:
            self._failures = self._failures + 1 if self._server.answers() else 0
            max_failures = 1 if is_retry else MAX_FAILURES
            if self._failures == 0 or self._failures < max_failures or len(batch) > 1:
                raise
            postponed, failure = set(batch), error
        if self._stopping:
            return
        for index, reason in refused:
            self._note_refused(operations[index], reason)
            progress.refused.append(index)
        with self._changed:
            settled = {*batch} - postponed
            progress.postponed = sorted({*progress.postponed, *postponed} - settled)
            if is_retry:
                self._retries = [index for index in self._retries if index not in set(batch)]
            else:
                progress.position = min(progress.position + len(batch), len(operations))
            progress.journal_id = self._journal.id
            write_json(self._journal.folder / PROGRESS, asdict(progress))
        if failure:
            self._failures = 0
            raise failure

    def _blocked(self, indices: Sequence[int], is_retry: bool) -> set[int]:
        """Return those of the operations that have to wait for one that was postponed."""
        operations = self._journal.operations
        runs: dict[str, set[str]] = {"start": set(), "artifact": set()}
        for index in self._progress.postponed:
            if (op := operations[index]).kind in runs:
                runs[op.kind].add(op.run)

        def is_blocked(op: Operation) -> bool:
            if (op.value if op.kind == "start" else op.run) in runs["start"]:
                return True
            if op.kind == "artifact":  # its store is another server than the database: spare it the same failure
                return bool(runs["artifact"]) and not is_retry
            return op.kind == "model" and op.run in runs["artifact"]

        return {index for index in indices if is_blocked(operations[index])}

    def _send(self, indices: Sequence[int]) -> list[tuple[int, Exception]]:
        """Send operations of one kind and run, bisecting a refused batch; return the refused operations."""
        try:
            self._send_batch([self._journal.operations[index] for index in indices])
            return []
        except Refused as error:
            if len(indices) == 1:
                return [(indices[0], error)]
            half = len(indices) // 2
            return self._send(indices[:half]) + self._send(indices[half:])

    def _send_batch(self, operations: Sequence[Operation]) -> None:
        op = operations[0]
        if op.kind == "start":
            parent_id = self._run_id(op.value) if op.value else None
            run_id = self._server.start_run(self._journal.run_key(op.run), op.run, parent_id, op.time)
            self._progress.run_ids[op.run] = run_id
        else:
            self._server.send(self._run_id(op.run), operations)

    def _run_id(self, run: str) -> str:
        if run not in self._progress.run_ids:
            raise Refused(f"its run {run!r} was refused")
        return self._progress.run_ids[run]

    # Helpers

    def _note_refused(self, op: Operation, error: Exception) -> None:
        file = self._journal.folder / REFUSED
        reason = {"error": without_password(str(error)), "server": self._server.address}
        with file.open("a") as stream:
            stream.write(json.dumps(asdict(op) | reason) + "\n")
        if not self._progress.refused:
            name = f"{op.key} of run {op.run!r}"
            log.warning("MLflow refused %s: %s. Further refusals are only logged to %s.", name, shortened(error), file)

    def _has_work(self) -> bool:
        """Return whether an operation is to be sent, or tried again in this round."""
        return bool(self._retries) or self._progress.position < len(self._journal.operations)

    def _num_waiting(self) -> int:
        return len(self._journal.operations) - self._progress.position + len(self._progress.postponed)

    def _report(self) -> DeliveryReport:
        folder, address = self._journal.folder, self._server.address
        total, waiting, refused = len(self._journal.operations), self._num_waiting(), len(self._progress.refused)
        message = f"MLflow at {address} has all {total} tracking operations."
        if waiting:
            reason = f" ({shortened(self._error)})" if self._error else ""
            message = (
                f"MLflow at {address} lacks {waiting} of {total} tracking operations{reason}. "
                f"They are kept in {folder / JOURNAL}; rerun the same command to send them, or mmap-clip resend with "
                "the run directory."
            )
        if refused:
            message += f" It refused {refused}: see {folder / REFUSED}."
        return DeliveryReport(total - waiting - refused, waiting, refused, message)
