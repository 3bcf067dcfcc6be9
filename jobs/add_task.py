#!/usr/bin/env python
"""Add a task to a finished run: the new domain gets its own prompt; the prompts of existing tasks are unchanged.

    mmap-clip add-task --run mmap-runs/runs/<run> --task sketch
    mmap-clip add-task --run mmap-runs/runs/<run> --task sketch --data.root /data/new --rerun

The images are <data.root>/<task>/<class>/*; --data.root defaults to that of the run. The new task's gradients on the
run's global prompt decide which group it joins, or that it gets its own group; the run's images are not needed. --rerun
also trains all tasks again and compares both. All other options default to those of the run.

The result is an ordinary run folder: its adapters can predict, and further tasks can be added to it.
"""

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import Config, JobOptions, JobParser
from pipeline.stages.paths import check_paths


class Options(JobOptions):
    run: str = Field(description="Run directory, <storage>/runs/<run>; local or s3://.")
    task: str = Field(description="Name of the new task, and of its folder.")
    rerun: bool = Field(False, description="Also train all tasks again, to compare.")


def main() -> None:
    with report_user_errors() as console:
        replacements = {"storage": "--run", "data.tasks": "--task"}
        arguments = JobParser(__doc__, Options, replacements=replacements, base_help="config.yaml of the run").parse()
        options = arguments.options

        from pipeline.stages.finished_run import read_finished_run

        finished = read_finished_run(options.run, arguments.fields.get("cache", Config().cache))
        config = arguments.config(base=finished.config_file)

        check_paths(config)
        with importing("PyTorch and Ray", console):
            from pipeline.workflows.added_task import add_task

        add_task(finished, config, options.task, options.rerun, console)


if __name__ == "__main__":
    main()
