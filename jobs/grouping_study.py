#!/usr/bin/env python
"""Does grouping help here? Trains MmAP for every group that the tasks could form (63 trainings for six tasks), and
compares what every partition reaches with its score, with all tasks in one group, and with random partitions.

    python jobs/grouping_study.py                                          the demo, seeds 1, 2, 3
    python jobs/grouping_study.py --config configs/office_home.yaml --data.root /data/OfficeHome --seeds 1 2

The same command again does only what is missing; trainings are shared with the pipeline and the benchmark.
"""

from pydantic import Field

from pipeline.command_line import report_user_errors
from pipeline.config import JobOptions, JobParser


class Options(JobOptions):
    seeds: tuple[int, ...] = Field((1, 2, 3), description="Seeds of the runs whose groups are studied.")


def main() -> None:
    with report_user_errors() as console:
        given = JobParser(__doc__, Options, instead={"seed": "--seeds"}).given()
        config = given.config()
        seeds = list(dict.fromkeys(given.own.seeds))

        from pipeline.workflows.grouping_study import run_grouping_study
        from pipeline.workflows.many_runs import configs_of

        run_grouping_study(configs_of(config, [config.data.shots], seeds), console)


if __name__ == "__main__":
    main()
