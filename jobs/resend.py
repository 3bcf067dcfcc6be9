#!/usr/bin/env python
"""Send to MLflow what runs could not send, or what it refused: of one run, or of all in a storage.

    mmap-clip resend mmap-runs                                          all runs, benchmarks and searches
    mmap-clip resend mmap-runs/runs/<run>                               one of them; local or s3://
    mmap-clip resend mmap-runs --tracking.uri http://mlflow.lab:5000    to another server: all of their values

It fills a new or restored MLflow database, and ends runs whose job was killed. Values that MLflow has are not doubled.
The exit status is 1 if something still waits.
"""

import sys
from typing import ClassVar

from pipeline.command_line import Field, importing, print_status, report_user_errors
from pipeline.config import Config, JobOptions, JobParser


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str = Field(description="Storage, or a folder of it, <storage>/runs/<run>; local or s3://.")


FIELD_HELP = {
    "tracking.uri": "MLflow tracking URI; null: the one that each run was sent to.",
    "tracking.experiment": "Name of the MLflow experiment; null: likewise.",
}


def main() -> None:
    with report_user_errors() as console:
        arguments = JobParser(__doc__, Options, FIELD_HELP).parse()
        fields = arguments.fields
        with importing("MLflow"):
            from pipeline.workflows.resend import resend

        count = num_waiting = 0
        for resent in resend(
            arguments.options.source,
            Config().cache,
            fields.get("tracking.uri"),
            fields.get("tracking.experiment"),
            lambda text: console.print(f"  {text}", markup=False, highlight=False),
        ):
            count += 1
            report = resent.report
            if report is None:
                state = "in use by a job, which sends its values itself"
            else:
                missing = report.waiting + report.refused
                state = f"MLflow has all {report.delivered} operations"
                if missing:
                    state = f"MLflow has {report.delivered} of {report.delivered + missing} operations"
                    state += f"; {report.waiting} waiting, {report.refused} refused"
            num_waiting += report is None or report.waiting > 0
            console.print(f"{resent.uri}: {state}", markup=False, highlight=False)
        if not count:
            print_status(f"nothing to send: {arguments.options.source} has no run with values for MLflow")
    sys.exit(1 if num_waiting else 0)


if __name__ == "__main__":
    main()
