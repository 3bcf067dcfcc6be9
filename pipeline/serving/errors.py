"""Error responses of the HTTP service."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import escape_controls

RETRY_AFTER_S = 1


class HttpError(Exception):
    """An error response.

    Args:
        message: says what is wrong and what to do.
        reason: value of the label `reason` in the metrics, of requests that a limit rejects.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, reason: str | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, escape_controls(message), headers
        self.reason = reason


def retry_after() -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_S)}
