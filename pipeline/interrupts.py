"""Signals that end a job: Ctrl-C, SIGTERM and SIGHUP become an exception in the main thread, and one line on stderr.

Signals that the process inherited as ignored (`nohup`, `command &` in a script) stay ignored.
"""

from __future__ import annotations

import _thread
import atexit
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STDERR = 2
REPEAT_AFTER_S = 0.05
SAME_REQUEST_S = 0.2
"""`timeout` and process managers send a signal to the process and to its group, so twice."""
BEFORE_ANY_WORK = "rerun the same command: nothing was started yet"


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    ignored: frozenset[int] | None = None
    received: int | None = None
    """The signal that asked this process to end."""
    received_at = -math.inf
    sent_again = False
    """Whether the next signal is one that this process sends itself, not a second request."""
    resume_point: str | None = None
    stderr = STDERR
    ends_at_once: str | None = None
    """Message where nothing is to be ended in order, so that a signal ends the process at once."""


def handle_signals() -> None:
    """Install the handlers; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    if _State.ignored is None:
        _State.ignored = frozenset(number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN)
        sys.excepthook, sys.unraisablehook = _excepthook, _unraisablehook
        atexit.register(_skip_finalization)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in _State.ignored else _on_signal)


def are_handled() -> bool:
    """Return whether this process has the handlers."""
    return _State.ignored is not None


@contextmanager
def ending_at_once(message: str = BEFORE_ANY_WORK, stderr: int = STDERR) -> Iterator[None]:
    """While the block runs, which has nothing to end in order, a signal ends the process at once: an exception in the
    midst of an import may be swallowed or turned into another one.

    Args:
        stderr: file descriptor for the line, where another one takes its place for a while.
    """
    previous = _State.ends_at_once, _State.stderr
    _State.ends_at_once, _State.stderr = message, stderr
    try:
        yield
    finally:
        _State.ends_at_once, _State.stderr = previous


def end_at_once_at_exit() -> None:
    """Let a signal end the process at once while it exits, after a job has ended."""
    atexit.register(setattr, _State, "ends_at_once", "the job had ended")


def forget_signals() -> None:
    """Forget a signal that was received: a process may run several jobs, as the tests do."""
    _State.received = _State.resume_point = None


def set_resume_point(text: str) -> None:
    """Record what the same command begins with. Not an attribute of the exception: Ray raises one of its own."""
    _State.resume_point = text


def resume_point() -> str | None:
    return _State.resume_point


def received_signal(error: BaseException) -> int | None:
    """Return the signal that is the reason of an error; libraries turn KeyboardInterrupt into errors of their own."""
    if isinstance(error, Interrupted):
        return error.number
    return _State.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)


def exit_status(number: int) -> int:
    return 128 + number


def interruption(number: int) -> str:
    """Return the first words of the line that reports a signal."""
    return "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _State.sent_again:
        _State.sent_again = False
    else:
        previous, _State.received_at = _State.received_at, time.monotonic()
        if _State.received_at - previous < SAME_REQUEST_S:
            return
        if _State.received is not None:
            _exit(_State.received, "stopped at once")
    _State.received = number
    if _State.ends_at_once:
        _exit(number, _State.ends_at_once)
    if _is_importing(frame):
        # An exception there may leave Python's import lock locked, for which the other threads then wait for ever.
        _send_again(number)
    else:
        raise Interrupted(number)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether Python's import of a module is in the call stack. The command `mmap-clip` executes a job's script
    without importing it."""
    while frame:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" and code.co_name != "_call_with_frames_removed":
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    def send() -> None:
        time.sleep(REPEAT_AFTER_S)
        _State.sent_again = True
        os.kill(os.getpid(), number)

    _thread.start_new_thread(send, ())  # threading.Thread takes locks, which the interrupted code may hold


def _exit(number: int, message: str) -> None:
    os.write(_State.stderr, f"{interruption(number)}: {message}\n".encode())
    try:
        _kill_children()
    finally:  # psutil may be half imported; then there are no children
        os._exit(exit_status(number))


def _kill_children() -> None:
    """Kill all processes that this one started: Ray's agents would notice its end only after a while."""
    if psutil := sys.modules.get("psutil"):  # imported before Ray is started; nothing is imported in a handler
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def _skip_finalization() -> None:
    """End an interrupted process here: to remove the modules of PyTorch, Ray and MLflow from memory takes seconds."""
    if _State.received:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed by its reader
                stream.flush()
        os._exit(exit_status(_State.received))


def _unraisablehook(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception was raised in a callback, such as a finalizer, where Python drops it."""
    error = unraisable.exc_value
    if not isinstance(error, Interrupted):
        sys.__unraisablehook__(unraisable)
    else:
        _send_again(error.number)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        _exit(received_signal(error) or signal.SIGINT, BEFORE_ANY_WORK)
    sys.__excepthook__(kind, error, traceback)
