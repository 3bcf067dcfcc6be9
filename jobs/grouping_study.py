#!/usr/bin/env python
"""Does grouping help here? Trains MmAP for every group that the tasks could form (63 trainings for six tasks), and
compares what every partition reaches with its score, with all tasks in one group, and with random partitions.

    python jobs/grouping_study.py                                          the demo, seeds 1, 2, 3
    python jobs/grouping_study.py --config configs/office_home.yaml --data.root /data/OfficeHome --seeds 1 2

The same command again does only what is missing; trainings are shared with the pipeline and the benchmark.
"""

from pipeline.command_line import faults_told_to_people, job_parser, refuse_options
from pipeline.config import add_config_arguments, arguments_of, config_from_command_line


def main() -> None:
    with faults_told_to_people() as console:
        parser = job_parser(__doc__, "[--seeds N ...] ")
        parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
        add_config_arguments(parser)
        refuse_options(parser, {"seed": "--seeds"})
        config = config_from_command_line(parser)
        seeds = list(dict.fromkeys(arguments_of(parser).seeds))

        from pipeline.workflows.grouping_study import run_grouping_study
        from pipeline.workflows.many_runs import configs_of

        run_grouping_study(configs_of(config, [config.data.shots], seeds), console)


if __name__ == "__main__":
    main()
