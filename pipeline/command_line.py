"""What the job scripts do before their work: options are read and a user's faults told.

torch, Ray and MLflow take seconds to import, so --help and a wrong option are answered without them: nothing here
imports them at the top, nor do the job scripts, which import their stages once the command line is known to be right.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipeline.config import add_config_arguments, arguments_of, config_from_command_line
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.runtime.run import Run

LOG_WIDTH = 160


def run_job(description: str, main: Callable[[Run], object]) -> None:
    """The body of a job script of one run: command line, checks, `main(run)`."""
    parser = job_parser(description)
    add_config_arguments(parser)
    with faults_told_to_people() as console:
        config = config_from_command_line(parser)

        from pipeline.runtime.run import open_run

        with open_run(config, console) as run:
            main(run)


def job_parser(description: str, own_usage: str = "") -> argparse.ArgumentParser:
    """For a job's own options; the config's are to be added behind them."""
    return argparse.ArgumentParser(
        usage=f"%(prog)s [-h] {own_usage}[--config FILE ...] [--section.field VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def refuse_options(
    parser: argparse.ArgumentParser, instead: dict[str, str], why: str = "is one value for all runs"
) -> None:
    """For a job with options of its own for them: config field → that option.

    Raises:
        UserError: such a field is on the command line, or an option that is not known.
    """
    given = arguments_of(parser)
    for field_name, option in instead.items():
        if hasattr(given, f"config.{field_name}"):
            raise UserError(f"--{field_name} {why}: use {option}")


@contextmanager
def faults_told_to_people() -> Iterator[Console]:
    """Gives a job its console; ends it with a status and, for a user's faults, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # A log has room for the tables of many methods.
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        yield console
    except UserError as error:
        console.print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted:[/] the same command goes on from here", highlight=False)
        sys.exit(130)
