#!/usr/bin/env python
"""Adds a task to a finished run: a new domain gets a prompt of its own, and the others stay as they are, to the bit.

    python jobs/add_task.py --run mmap-runs/runs/<run> --task sketch
    python jobs/add_task.py --run mmap-runs/runs/<run> --task sketch --data.root /data/new --rerun

The images are <data.root>/<task>/<class>/*; without --data.root, of the folder that the run's own tasks are in. The new
task's gradients on the run's global prompt tell which group it joins, or that it is alone; the run's own images are not
needed. --rerun also trains all tasks again, and shows both. All other options are those of the run.

The result is a run folder as any other: with prompts to predict with, and to add the next task to.
"""

from pydantic import Field

from pipeline.command_line import report_user_errors
from pipeline.config import Config, JobOptions, JobParser


class Options(JobOptions):
    run: str = Field(description="<storage>/runs/<run>, also in a bucket.")
    task: str = Field(description="Name of the new task's folder.")
    rerun: bool = Field(False, description="Whether all tasks are also trained again, to compare.")


def main() -> None:
    with report_user_errors() as console:
        instead = {"storage": "--run", "data.tasks": "--task"}
        given = JobParser(__doc__, Options, instead=instead, base="the run's own config.yaml").given()

        from pipeline.stages.finished_run import read_finished_run

        finished = read_finished_run(given.own.run, given.fields.get("cache", Config().cache))
        config = given.config(base=finished.config_file)

        from pipeline.workflows.added_task import add_task

        add_task(finished, config, given.own.task, given.own.rerun, console)


if __name__ == "__main__":
    main()
