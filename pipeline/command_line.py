"""What every job script does around its work: it reads the command line, and tells a user's errors.

torch, Ray and MLflow take seconds to import, so --help and a wrong option are answered without them: nothing here
imports them at the top, nor do the job scripts, which import their stages once the command line is known to be right.
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
    """The body of a job script of one run: command line, checks, `main(plan, session)`."""
    with report_user_errors() as console:
        config = JobParser(description).given().config()

        from pipeline.stages.run import open_run

        with open_run(config, console) as (plan, session):
            main(plan, session)


@contextmanager
def report_user_errors(after_interrupt: str = "the same command goes on from here") -> Iterator[Console]:
    """Gives a job its console; ends it with status 2 for a user's error, 130 when it is interrupted, and without a
    traceback, on the standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        # A log has room for the tables of many methods.
        yield Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    except UserError as error:
        _tell(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        _tell(f"[yellow]interrupted:[/] {after_interrupt}")
        sys.exit(130)


def say(text: str) -> None:
    """On the standard error, for jobs whose output is data."""
    print(text, file=sys.stderr, flush=True)


def _tell(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, highlight=False)
