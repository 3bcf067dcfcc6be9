"""Checkpoints that are whole or not there: written beside, synced, renamed; the one before is kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError

log = logging.getLogger(__name__)
_NEWEST, _BEFORE = "checkpoint.pt", "checkpoint.before.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Raises: UserError: the disk is full or the folder cannot be written; the checkpoint before stays as it was."""
    target, partial = folder / _NEWEST, folder / f"{_NEWEST}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            os.replace(target, folder / _BEFORE)
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the checkpoint {target}: {error}; free some space and run again") from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest readable state, or None. A damaged newest file is reported and the one before is used."""
    for path in (folder / _NEWEST, folder / _BEFORE):
        if not path.exists():
            continue
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged zip or pickle can raise anything
            log.warning("checkpoint %s cannot be read (%s); going back to the one before", path, error)
    return None
