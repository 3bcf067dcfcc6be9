#!/usr/bin/env python
"""The whole pipeline: image folders in, a grouped multi-task prompt model and its report out.

    python jobs/full_pipeline.py                                       the embedded demo, on a local Ray
    python jobs/full_pipeline.py --config configs/office_home.yaml --data.root /data/OfficeHome
    ray job submit --working-dir . -- python jobs/full_pipeline.py     on a running cluster

Stages: data check -> few-shot splits -> global prompt with gradient snapshots -> grouping -> group trainings ->
report. The same command again does only what is missing: a finished stage is found by the hash of all that it depends
on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.command_line import run_job

if TYPE_CHECKING:
    from pipeline.runtime.run import Run


def main(run: Run) -> None:
    from pipeline.stages.flow import run_all_stages

    run_all_stages(run)


if __name__ == "__main__":
    run_job(__doc__, main)
