#!/usr/bin/env python
"""Print a script for a shell that completes jobs, options and values with the Tab key.

    mmap-clip completion bash > ~/.local/share/bash-completion/completions/mmap-clip
    mmap-clip completion zsh > ~/.zfunc/_mmap-clip   # in ~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit; compinit
    mmap-clip completion fish > ~/.config/fish/completions/mmap-clip.fish

It takes effect in the next shell. Print it again after an update.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from typing import Any, ClassVar

import shtab

from jobs.__main__ import job_names, run_script, summary
from pipeline.command_line import Field, report_user_errors
from pipeline.config import JobOptions, JobParser, did_you_mean
from pipeline.errors import UserError

FILES = {"config", "search", "output", "inputs", "data.root", "data.class_names", "clip.model", "clip.pretrained"}
FOLDERS = {"run", "source", "storage", "cache"}


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("shell",)

    shell: str = Field(description="bash, zsh, fish, tcsh or powershell.", examples=list(shtab.SUPPORTED_SHELLS))


def describe_options(job: str) -> list[dict[str, Any]]:
    """Return what a job's --help-json prints."""
    arguments, output = sys.argv, io.StringIO()
    sys.argv = [f"mmap-clip {job}", "--help-json"]
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            run_script(job)
    finally:
        sys.argv = arguments
    options: list[dict[str, Any]] = json.loads(output.getvalue())
    return options


def completion_parser() -> argparse.ArgumentParser:
    """Return a parser of all jobs with what shtab needs: names, values, help."""
    parser = argparse.ArgumentParser("mmap-clip")
    parser.add_argument("--version", action="store_true", help="show the version")
    subparsers = parser.add_subparsers(dest="job")
    for job in job_names():
        name = job.replace("_", "-")
        subparser = subparsers.add_parser(name, help=summary(job), description=summary(job))
        for option in describe_options(job):
            action = subparser.add_argument(
                option["name"] if option["positional"] else f"--{option['name']}",
                nargs="*" if option["list"] else None,
                help=option["help"].replace("%", "%%"),
                choices=option["choices"] or None,
            )
            if option["name"] in FILES | FOLDERS:
                action.complete = shtab.DIRECTORY if option["name"] in FOLDERS else shtab.FILE  # type: ignore[attr-defined]
    return parser


def main() -> None:
    with report_user_errors("rerun the same command to start over"):
        shell = JobParser(__doc__, Options, field_help={}).parse().options.shell
        if shell not in shtab.SUPPORTED_SHELLS:
            shells = shtab.SUPPORTED_SHELLS
            raise UserError(f"no completion for {shell}{did_you_mean(shell, shells)} Valid: {', '.join(shells)}")
        print(shtab.complete(completion_parser(), shell))


if __name__ == "__main__":
    main()
