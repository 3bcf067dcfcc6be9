"""Entry points of the job scripts: parse the command line, report user errors and signals.

torch, Ray and MLflow take seconds to import, so --help and option errors are handled without them: this module imports
none of them, and the job scripts import their stages only after the command line is validated.
"""

from __future__ import annotations

from pipeline import interrupts

interrupts.handle_signals()
with interrupts.ending_at_once():  # what follows takes a third of a second
    import logging
    import re
    import sys
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import contextmanager
    from pathlib import Path
    from typing import TYPE_CHECKING

    from pydantic import Field as Field  # the jobs' options
    from rich.console import Console
    from rich.markup import escape

    from pipeline.config import HUB_PREFIX, JobParser, did_you_mean
    from pipeline.errors import UserError
    from pipeline.imports import no_garbage_collection
    from pipeline.stages.paths import check_paths

if TYPE_CHECKING:
    from pipeline.runtime.session import Session
    from pipeline.stages.plan import Plan

LOG_WIDTH = 160


def run_job(description: str | None, main: Callable[[Plan, Session], object], fetches_weights: bool = True) -> None:
    """Run a job script that makes one run: parse the command line, check the run, call `main(plan, session)`.

    Args:
        fetches_weights: whether CLIP's weights are fetched; a job that only reads images needs none.
    """
    with report_user_errors() as console:
        config = JobParser(description).parse().config()
        check_paths(config)
        with importing("PyTorch and Ray", console):
            from pipeline.stages.run import open_run

        with open_run(config, console, fetches_weights) as (plan, session):
            main(plan, session)


@contextmanager
def report_user_errors(after_interrupt: str = "rerun the same command to resume") -> Iterator[Console]:
    """Yield the job's console; report user errors and signals in a line on stderr, without a traceback.

    The exit status is 2 after a user error, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    interrupts.handle_signals()
    interrupts.forget_signals()
    try:
        # A log is wider than most terminals: it has room for the tables of many methods.
        yield Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    except BaseException as error:
        if number := interrupts.received_signal(error):
            resume_point = interrupts.resume_point()
            message = f"rerun the same command to resume at {resume_point}" if resume_point else after_interrupt
            _print_error(f"[yellow]{interrupts.interruption(number)}:[/] {escape(message)}")
            sys.exit(interrupts.exit_status(number))
        if isinstance(error, UserError):
            _print_error(f"[bold red]error:[/] {escape(str(error))}")
            sys.exit(2)
        raise
    finally:
        interrupts.end_at_once_at_exit()


def check_adapter_exists(source: str) -> None:
    """Check an adapter on this machine; those of buckets, the Hub and MLflow are looked for later.

    Raises:
        UserError: there is none.
    """
    if not re.match(rf"[a-z0-9-]+:/|{HUB_PREFIX}", source) and not Path(source).expanduser().exists():
        raise UserError(f"adapter file {source} does not exist")


def check_task(task: str, tasks: Sequence[str], source: str) -> None:
    """Raises: UserError: the adapter of `source` has no such task."""
    if task not in tasks:
        hint = did_you_mean(task, tasks)
        raise UserError(f"unknown --task {task}{hint} {source} has the tasks {', '.join(tasks)}")


@contextmanager
def importing(libraries: str, console: Console | None = None) -> Iterator[None]:
    """Import libraries in the block, which takes seconds, and say so: on `console`, or None: on stderr."""
    text = f"importing {libraries} ..."
    with interrupts.ending_at_once(), no_garbage_collection():
        if console:
            console.print(text, highlight=False)
        else:
            print_status(text)
        yield


def print_status(text: str) -> None:
    """Print to stderr, for jobs that write data to stdout."""
    print(text, file=sys.stderr, flush=True)


def _print_error(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, highlight=False)
