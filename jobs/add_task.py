#!/usr/bin/env python
"""Adds a task to a finished run: a new domain gets a prompt of its own, and the others stay as they are, to the bit.

    python jobs/add_task.py --run mmap-runs/runs/<run> --task sketch
    python jobs/add_task.py --run mmap-runs/runs/<run> --task sketch --data.root /data/new --rerun

The images are <data.root>/<task>/<class>/*; without --data.root, of the folder that the run's own tasks are in. The new
task's gradients on the run's global prompt tell which group it joins, or that it is alone; the run's own images are not
needed. --rerun also trains all tasks again, and shows both. All other options are those of the run.

The result is a run folder as any other: with prompts to predict with, and to add the next task to.
"""

from pipeline.command_line import faults_told_to_people, job_parser, refuse_options
from pipeline.config import Config, add_config_arguments, arguments_of, config_from_command_line


def main() -> None:
    with faults_told_to_people() as console:
        parser = job_parser(__doc__, "--run FOLDER --task NAME [--rerun] ")
        parser.add_argument("--run", required=True, metavar="FOLDER", help="<storage>/runs/<run>, also in a bucket")
        parser.add_argument("--task", required=True, metavar="NAME", help="name of the new task's folder")
        parser.add_argument("--rerun", action="store_true", help="also train all tasks again, to compare")
        add_config_arguments(parser, base="the run's own config.yaml")
        refuse_options(parser, {"storage": "--run", "data.tasks": "--task"}, why="is known here")
        given = arguments_of(parser)

        from pipeline.stages.finished_run import read_finished_run

        finished = read_finished_run(given.run, getattr(given, "config.cache", Config().cache))
        config = config_from_command_line(parser, base=finished.config_file)

        from pipeline.workflows.added_task import add_task

        add_task(finished, config, given.task, given.rerun, console)


if __name__ == "__main__":
    main()
