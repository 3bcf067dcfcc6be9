#!/usr/bin/env python
"""Stages 1-2: the prompt shared by all tasks, with snapshots of each task's gradient. Finished stages are not redone.

python jobs/train_global_prompt.py --config configs/office_home.yaml --data.root /data/OfficeHome
"""

from pipeline.run import Run, run_job
from pipeline.stages.global_prompt import train_global_prompt
from pipeline.stages.splits import build_splits


def main(run: Run) -> None:
    build_splits(run)
    train_global_prompt(run)


if __name__ == "__main__":
    run_job(__doc__, main)
