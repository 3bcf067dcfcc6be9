#!/usr/bin/env python
"""The whole pipeline: image folders in, a grouped multi-task prompt model and its report out.

    python jobs/full_pipeline.py                                       the embedded demo, on a local Ray
    python jobs/full_pipeline.py --config configs/office_home.yaml --data.root /data/OfficeHome
    python jobs/full_pipeline.py --until grouping --grouping.max_size 3
    ray job submit --working-dir . -- python jobs/full_pipeline.py     on a running cluster

The same command again does only what is missing: a finished stage is found by the hash of all that it depends on. With
other options it begins at the first stage that they change, so there is no --from. The stages:
"""

from pydantic import Field

from pipeline.command_line import report_user_errors
from pipeline.config import JobOptions, JobParser
from pipeline.stages.flow import NAMES, check_stage, run_stages, stage_summary


class Options(JobOptions):
    until: str = Field(NAMES[-1], description="The last stage.")


def main() -> None:
    with report_user_errors() as console:
        given = JobParser(f"{__doc__}\n{stage_summary()}", Options).given()
        config, until = given.config(), check_stage("--until", given.own.until)

        from pipeline.stages.run import open_run

        with open_run(config, console) as (plan, session):
            run_stages(plan, session, until)


if __name__ == "__main__":
    main()
