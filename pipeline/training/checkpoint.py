"""Atomic checkpoints: written to a temporary file, synced, renamed; the previous one is kept.

A file is the SHA-256 of its content, and the content by torch.save, which itself detects no corrupted values.
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
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one training. `on_saved` is called with each file that changed, to copy it elsewhere."""

    folder: Path
    on_saved: Callable[[Path], None] = lambda path: None

    def save(self, state: dict[str, Any]) -> None:
        """Save a checkpoint. Raises: UserError: the folder cannot be written; the previous checkpoint is intact."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        newest, previous = self.folder / NEWEST, self.folder / PREVIOUS
        with atomic_write(newest) as partial:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as stream:
                stream.write(hashlib.sha256(content).digest())
                stream.write(content)
            sync(partial)  # before the previous one is replaced
            if newest.exists():
                with suppress(FileNotFoundError):  # a worker presumed lost may do the same
                    rename_durably(newest, previous)
                self.on_saved(previous)
        self.on_saved(newest)

    def load(self) -> dict[str, Any] | None:
        """Return the newest intact state, or None. A damaged newest file is logged, and the previous one is used."""
        for path in (self.folder / NEWEST, self.folder / PREVIOUS):
            if not path.exists():
                continue
            content = memoryview(path.read_bytes())
            if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
                state: dict[str, Any] = torch.load(io.BytesIO(content[DIGEST:]), map_location="cpu", weights_only=True)
                return state
            log.warning("checkpoint %s is damaged; using the previous one", path)
        return None
