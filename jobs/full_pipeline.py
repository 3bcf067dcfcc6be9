#!/usr/bin/env python
"""The whole pipeline: image folders in, a grouped multi-task prompt model and its report out.

    python jobs/full_pipeline.py                                       the embedded demo, on a local Ray
    python jobs/full_pipeline.py --config configs/office_home.yaml --data.root /data/OfficeHome
    ray job submit --working-dir . -- python jobs/full_pipeline.py     on a running cluster

Stages: few-shot splits -> global prompt with gradient snapshots -> grouping -> group trainings -> report. The same
command again does only what is missing: a finished stage is found by the hash of all that it depends on.
"""

from pipeline.run import Run, run_job
from pipeline.stages.global_prompt import train_global_prompt
from pipeline.stages.group_trainings import train_groups
from pipeline.stages.grouping import solve_grouping
from pipeline.stages.report import make_report
from pipeline.stages.splits import build_splits


def main(run: Run) -> None:
    build_splits(run)
    global_prompt = train_global_prompt(run)
    grouping = solve_grouping(run, global_prompt)
    methods = train_groups(run, grouping)
    make_report(run, grouping, methods)


if __name__ == "__main__":
    run_job(__doc__, main)
