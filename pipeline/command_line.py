"""Entry points of the job scripts: parse the command line, report user errors.

torch, Ray and MLflow take seconds to import, so --help and option errors are handled without them: this module imports
none of them, and the job scripts import their stages only after the command line is validated.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipeline.config import JobParser
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.runtime.session import Session
    from pipeline.stages.plan import Plan

LOG_WIDTH = 160


def run_job(description: str | None, main: Callable[[Plan, Session], object]) -> None:
    """Run a job script that makes one run: parse the command line, check the run, call `main(plan, session)`."""
    with report_user_errors() as console:
        config = JobParser(description).parse().config()

        from pipeline.stages.run import open_run

        with open_run(config, console) as (plan, session):
            main(plan, session)


@contextmanager
def report_user_errors(after_interrupt: str = "rerun the same command to resume") -> Iterator[Console]:
    """Yield the job's console; report user errors and interrupts on stderr, without a traceback.

    The exit status is 2 after a user error and 130 after an interrupt.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        # A log is wider than most terminals: it has room for the tables of many methods.
        yield Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    except UserError as error:
        _print_error(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        _print_error(f"[yellow]interrupted:[/] {after_interrupt}")
        sys.exit(130)


def print_status(text: str) -> None:
    """Print to stderr, for jobs that write data to stdout."""
    print(text, file=sys.stderr, flush=True)


def _print_error(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, highlight=False)
