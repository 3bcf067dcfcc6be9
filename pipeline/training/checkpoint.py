"""Checkpoints that are whole or not there: written beside, synced, renamed; the one before is kept.

A file is the SHA-256 of what follows, and what torch.save makes of the state. torch itself does not notice a changed
byte among the numbers.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.files import atomic_write, rename_durably, sync

log = logging.getLogger(__name__)
DIGEST = hashlib.sha256().digest_size
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.before.pt"


@dataclass(frozen=True)
class Checkpoints:
    """Of one training. `on_saved`: told of each file that changed, for a copy of it elsewhere."""

    folder: Path
    on_saved: Callable[[Path], None] = lambda path: None

    def save(self, state: dict[str, Any]) -> None:
        """Raises: UserError: the disk is full or the folder cannot be written; the one before stays as it was."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        newest, before = self.folder / NEWEST, self.folder / PREVIOUS
        with atomic_write(newest) as partial:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as stream:
                stream.write(hashlib.sha256(content).digest())
                stream.write(content)
            sync(partial)  # before it moves the one before
            if newest.exists():
                with suppress(FileNotFoundError):  # a worker that was given up for lost may do the same
                    rename_durably(newest, before)
                self.on_saved(before)
        self.on_saved(newest)

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, or None. A damaged newest file is told of, and the one before is used."""
        for path in (self.folder / NEWEST, self.folder / PREVIOUS):
            if not path.exists():
                continue
            content = memoryview(path.read_bytes())
            if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
                state: dict[str, Any] = torch.load(io.BytesIO(content[DIGEST:]), map_location="cpu", weights_only=True)
                return state
            log.warning("the checkpoint %s is damaged; going back to the one before", path)
        return None
