#!/usr/bin/env python
"""The whole pipeline: image folders in, a grouped multi-task prompt model and its report out.

    python jobs/full_pipeline.py                                       the embedded demo, on a local Ray
    python jobs/full_pipeline.py --config configs/office_home.yaml --data.root /data/OfficeHome
    python jobs/full_pipeline.py --until grouping --grouping.max_size 3
    ray job submit --working-dir . -- python jobs/full_pipeline.py     on a running cluster

The same command again does only what is missing: a finished stage is found by the hash of all that it depends on. With
other options it begins at the first stage that they change, so there is no --from. The stages:
"""

from pipeline.command_line import faults_told_to_people, job_parser
from pipeline.config import add_config_arguments, arguments_of, config_from_command_line
from pipeline.stages.flow import NAMES, check_stage, run_stages, stages_in_words


def main() -> None:
    with faults_told_to_people() as console:
        parser = job_parser(f"{__doc__}\n{stages_in_words()}", "[--until STAGE] ")
        parser.add_argument("--until", default=NAMES[-1], metavar="STAGE", help="the last stage (default: %(default)s)")
        add_config_arguments(parser)
        config = config_from_command_line(parser)
        until = check_stage("--until", arguments_of(parser).until)

        from pipeline.runtime.run import open_run

        with open_run(config, console) as run:
            run_stages(run, until)


if __name__ == "__main__":
    main()
