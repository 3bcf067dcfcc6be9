#!/usr/bin/env python
"""Verify a storage: every file of every finished artifact against its size and SHA-256.

    mmap-clip verify mmap-runs
    mmap-clip verify s3://bucket/folder

Also lists what interrupted jobs left behind, and runs whose artifacts are missing, each with what to do. Nothing is
changed, so a read-only storage can be verified too, and one that jobs use. The exit status is 1 if anything is damaged.
"""

import sys
import time
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.command_line import Field, report_user_errors
from pipeline.config import JobOptions, JobParser


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("storage",)

    storage: str = Field(description="Storage of runs: a folder, or a bucket (s3://bucket/folder).")


REPLACED = {"storage": "verify STORAGE, without an option"}


def main() -> None:
    with report_user_errors("rerun the same command to start over") as console:
        location = JobParser(__doc__, Options, {}, replacements=REPLACED).parse().options.storage

        from pipeline.workflows.verification import issue_table, verify_storage

        started = time.monotonic()
        columns = (
            TextColumn("{task.completed} of {task.total} artifacts"),
            BarColumn(),
            TextColumn("{task.fields[mb]:,.0f} MB"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=None, mb=0)
            result = verify_storage(
                location,
                lambda completed, total, read: progress.update(bar, completed=completed, total=total, mb=read / 1e6),
            )
        if result.issues:
            console.print(issue_table(result.issues))
        damaged = sum(issue.is_damage for issue in result.issues)
        leftovers = sum(issue.size or 0 for issue in result.issues if not issue.is_damage)
        console.print(
            f"{result.artifacts} artifacts, {result.files} files, {result.bytes / 1e6:,.1f} MB verified in "
            f"{time.monotonic() - started:.1f} s: {damaged or 'nothing'} damaged or missing; {leftovers / 1e6:,.1f} MB "
            "not needed",
            highlight=False,
        )
        sys.exit(0 if result.is_intact else 1)


if __name__ == "__main__":
    main()
