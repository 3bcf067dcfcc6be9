#!/usr/bin/env python
"""Run the whole pipeline: from image folders to grouped multi-task prompts and a report.

    mmap-clip full-pipeline                        the built-in demo, on a local Ray
    mmap-clip full-pipeline --config configs/office_home.yaml --data.root /data/OfficeHome --until grouping

Rerun the same command to resume. With other options the run starts at the first stage that they affect. The stages:
"""

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import JobOptions, JobParser
from pipeline.stages.flow import NAMES, check_stage, needs_weights, run_stages, stage_summary
from pipeline.stages.paths import check_paths


class Options(JobOptions):
    until: str = Field(NAMES[-1], description="Last stage to run.", examples=list(NAMES))


def main() -> None:
    with report_user_errors() as console:
        arguments = JobParser(f"{__doc__}{stage_summary()}", Options).parse()
        config, last_stage = arguments.config(), check_stage("--until", arguments.options.until)
        check_paths(config)
        with importing("PyTorch and Ray", console):
            from pipeline.stages.run import open_run

        with open_run(config, console, needs_weights(last_stage)) as (plan, session):
            run_stages(plan, session, last_stage)


if __name__ == "__main__":
    main()
