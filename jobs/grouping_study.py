#!/usr/bin/env python
"""Measure whether grouping helps: train MmAP for every possible group of the tasks (63 trainings per seed for six) and
compare what every affinity and objective chooses with all tasks in one group, each alone, random groups and the best
ones.

    mmap-clip grouping-study                                          the demo, seeds 1, 2, 3
    mmap-clip grouping-study --seeds 1 2 3 4 5 6 7 8 9 10             smaller standard errors
    mmap-clip grouping-study --config configs/office_home.yaml --data.root /data/OfficeHome --seeds 1 2

Rerun the same command to resume; trainings are shared with the pipeline and the benchmark.
"""

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import JobOptions, JobParser
from pipeline.stages.paths import check_paths


class Options(JobOptions):
    seeds: tuple[int, ...] = Field((1, 2, 3), description="Seeds; one run per seed.")


def main() -> None:
    with report_user_errors() as console:
        arguments = JobParser(__doc__, Options, replacements={"seed": "--seeds"}).parse()
        config, seeds = arguments.config(), list(dict.fromkeys(arguments.options.seeds))
        check_paths(config)
        with importing("PyTorch and Ray", console):
            from pipeline.workflows.grouping_study import run_grouping_study
            from pipeline.workflows.many_runs import expand_configs

        run_grouping_study(expand_configs(config, [config.data.shots], seeds), console)


if __name__ == "__main__":
    main()
