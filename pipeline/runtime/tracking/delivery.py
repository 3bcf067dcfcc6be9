"""Delivery of a journal to MLflow: in order, with retries during an outage, and a report on what was not sent."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import takewhile

from pipeline.files import DamagedFile, read_json, write_json
from pipeline.runtime.tracking.journal import JOURNAL, Journal, Operation
from pipeline.runtime.tracking.mlflow_adapter import BATCH_LIMITS, MlflowServer, Refused, shortened, without_password

log = logging.getLogger(__name__)

PROGRESS, REFUSED = "delivery.json", "refused.jsonl"
MIN_RETRY_DELAY_S, MAX_RETRY_DELAY_S = 0.5, 15.0
MAX_FAILURES = 10  # failures of one operation while the server answers other requests


@dataclass(frozen=True)
class DeliveryReport:
    """Numbers of operations delivered, waiting and refused, and a message about them."""

    delivered: int
    waiting: int
    refused: int
    message: str


@dataclass
class _Progress:
    """Position up to which the journal was sent, as on disk."""

    position: int = 0
    refused: int = 0
    run_ids: dict[str, str] = field(default_factory=dict)


class Delivery:
    """A thread that sends `journal` to `server` until `stop`."""

    def __init__(self, journal: Journal, server: MlflowServer):
        self._journal, self._server = journal, server
        self._progress = self._read_progress()
        self._changed = journal.changed
        self._connected = self._flush_requested = self._stopping = False
        self._error: Exception | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._deliver, name="mlflow-delivery", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> DeliveryReport:
        """Wait until all is sent, or nothing was sent for `timeout_s`; return a report."""
        with self._changed:
            self._flush_requested = True
            self._changed.notify_all()
            while (self._num_waiting() or not self._connected) and self._changed.wait(timeout_s):
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
                if not self._connected:
                    self._connect()
                if self._num_waiting():
                    self._deliver_next()
                with self._changed:
                    if self._error:
                        log.warning("MLflow at %s is reachable again.", self._server.address)
                    self._error, self._failures, delay = None, 0, MIN_RETRY_DELAY_S
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._num_waiting() or self._stopping)
            except Exception as error:
                with self._changed:
                    previous_error, self._error = self._error, error
                    if not previous_error:
                        log.warning("%s Training continues.", self._report().message)
                    self._changed.wait_for(lambda: self._flush_requested or self._stopping, delay)
                    self._flush_requested = False
                delay = min(2 * delay, MAX_RETRY_DELAY_S)

    def _connect(self) -> None:
        self._server.connect()
        run, run_id = next(iter(self._progress.run_ids.items()), (None, None))
        if run is None or self._server.find_run(self._journal.run_key(run)) != run_id:
            self._progress = _Progress()  # another server, or an emptied one: send the whole journal
        self._connected = True

    def _deliver_next(self) -> None:
        """Send the operations at the journal's position that fit into one request of each run."""
        position = self._progress.position
        kind = self._journal.operations[position].kind
        # After each failure the batch is halved, to find the operation that fails.
        max_batch = max(1, BATCH_LIMITS.get(kind, 1) >> self._failures)
        batch = list(takewhile(lambda op: op.kind == kind, self._journal.operations[position : position + max_batch]))
        refused: list[tuple[Operation, Exception]] = []
        try:
            for run in dict.fromkeys(op.run for op in batch):
                refused += self._send([op for op in batch if op.run == run])
        except Exception as error:
            self._failures = self._failures + 1 if self._server.answers() else 0
            if self._failures < MAX_FAILURES or len(batch) > 1:
                raise
            refused = [(batch[0], error)]
        if not self._stopping:
            for op, reason in refused:
                self._note_refused(op, reason)
            with self._changed:
                self._progress.position += len(batch)
                write_json(self._journal.folder / PROGRESS, asdict(self._progress))

    def _send(self, operations: Sequence[Operation]) -> list[tuple[Operation, Exception]]:
        """Send operations of one kind and run, bisecting a refused batch; return the refused operations."""
        try:
            self._send_batch(operations)
            return []
        except Refused as error:
            if len(operations) == 1:
                return [(operations[0], error)]
            half = len(operations) // 2
            return self._send(operations[:half]) + self._send(operations[half:])

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
        self._progress.refused += 1

    def _read_progress(self) -> _Progress:
        """Return the progress on disk; position 0 if it or the journal was lost, as sending is idempotent."""
        with suppress(FileNotFoundError, DamagedFile):
            progress = _Progress(**read_json(self._journal.folder / PROGRESS))
            if progress.position <= len(self._journal.operations):
                return progress
        return _Progress()

    def _num_waiting(self) -> int:
        return len(self._journal.operations) - self._progress.position

    def _report(self) -> DeliveryReport:
        folder, address = self._journal.folder, self._server.address
        total, waiting, refused = len(self._journal.operations), self._num_waiting(), self._progress.refused
        message = f"MLflow at {address} has all {total} tracking operations."
        if waiting:
            reason = f" ({shortened(self._error)})" if self._error else ""
            message = (
                f"MLflow at {address} lacks {waiting} of {total} tracking operations{reason}. "
                f"They are kept in {folder / JOURNAL}; rerun the same command to send them."
            )
        if refused:
            message += f" It refused {refused}: see {folder / REFUSED}."
        return DeliveryReport(total - waiting - refused, waiting, refused, message)
