"""Bearer tokens of the HTTP service. Only their SHA-256 leaves the process that reads the file."""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError

MIN_TOKEN_LENGTH = 16
MAX_FILE_BYTES = 64 * 2**10
_CREATE = "create one: install --mode 600 /dev/null FILE && openssl rand -hex 32 > FILE"


def read_token_digests(file: str) -> tuple[str, ...]:
    """Read a file with a token per line, and return their SHA-256 digests; empty lines and lines with # are skipped.

    Raises:
        UserError: the file cannot be read, can be read by everyone, has no token, or one that is short, has spaces or
            characters other than ASCII, or occurs twice.
    """
    path = Path(file).expanduser()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise UserError(f"--token_file {file} is not a file of up to {MAX_FILE_BYTES:,} bytes; {_CREATE}")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--token_file {file} cannot be read: {reason}; {_CREATE}") from None
    if status.st_mode & stat.S_IROTH:
        raise UserError(f"--token_file {file} can be read by every user of this machine; run: chmod 600 {file}")
    tokens = [token for line in lines if (token := line.strip()) and not token.startswith("#")]
    if not tokens:
        raise UserError(f"--token_file {file} has no token; {_CREATE}")
    for number, token in enumerate(tokens, start=1):
        if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
            raise UserError(
                f"--token_file {file}: token {number} must have at least {MIN_TOKEN_LENGTH} ASCII characters, without "
                f"spaces; {_CREATE}"
            )
    if len(set(tokens)) < len(tokens):
        raise UserError(f"--token_file {file} has a token twice; remove one")
    return tuple(map(_digest, tokens))


def find_token(authorization: str | None, digests: Sequence[str]) -> int | None:
    """Return the index of the token of an Authorization header; None if it is none of them. Takes the same time for
    every wrong token."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    digest = _digest(token.strip())
    matches = [hmac.compare_digest(digest, valid_digest) for valid_digest in digests]
    return matches.index(True) if any(matches) else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
