#!/usr/bin/env python
"""List the runs of a storage with their data, settings, test accuracies and state, the newest first.

    mmap-clip runs                                       those in ./mmap-runs
    mmap-clip runs office --storage s3://bucket/folder   whose name contains `office`; also wildcards, 'pacs-*'
    mmap-clip runs --limit null --json                   all, as JSON, for scripts

`mmap-clip predict`, `serve` and `add-task` take the folder of a run, <storage>/runs/<run>. Nothing is downloaded.
"""

import json
import shlex
from typing import ClassVar

from pipeline.command_line import Field, print_status, report_user_errors
from pipeline.config import Config, JobOptions, JobParser, PositiveInt
from pipeline.errors import UserError


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("patterns",)

    patterns: tuple[str, ...] = Field(
        (), description="Parts of names of runs, or names with wildcards; none: all runs."
    )
    limit: PositiveInt | None = Field(20, description="Maximum number of runs, the newest; null: all.")
    as_json: bool = Field(False, alias="json", description="Print a list of JSON objects, with all methods.")


FIELD_HELP = {"storage": "Storage of the runs: a folder, or a bucket (s3://bucket/folder); default: mmap-runs."}


def main() -> None:
    with report_user_errors("rerun the same command to start over") as console:
        arguments = JobParser(__doc__, Options, FIELD_HELP).parse()
        options, storage = arguments.options, str(arguments.fields.get("storage", Config().storage))
        if paths := [pattern for pattern in options.patterns if "/" in pattern]:
            raise UserError(f"{paths[0]} is not the name of a run: give a storage as --storage {shlex.quote(paths[0])}")

        from pipeline.workflows.run_list import MIN_WIDTH, list_runs, run_table, to_json

        runs, num_more = list_runs(storage, options.patterns, options.limit)
        if options.as_json:
            print(json.dumps([to_json(run) for run in runs], indent=2, ensure_ascii=False))
        elif runs:
            console.width = max(console.width, MIN_WIDTH)
            console.print(run_table(runs))
            console.print(
                f"\nRuns of {storage}; average test accuracy (or mAP) of the tasks in %: zero-shot CLIP, and MmAP with "
                "each task alone, with all tasks in one group, and grouped.",
                markup=False,
            )
        if num_more:
            print_status(f"{num_more} older runs are not listed: --limit null lists all")
        if not runs:
            matching = f" match {' '.join(options.patterns)}" if options.patterns else ""
            print_status(
                f"no runs{matching} in storage={storage}: mmap-clip full-pipeline --storage {shlex.quote(storage)} "
                + ("makes one, --storage names another storage" if storage == Config().storage else "makes one")
            )


if __name__ == "__main__":
    main()
