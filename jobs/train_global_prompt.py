#!/usr/bin/env python
"""Stages 1-2: the prompt shared by all tasks, with snapshots of each task's gradient. Finished stages are not redone.

python jobs/train_global_prompt.py --config configs/office_home.yaml --data.root /data/OfficeHome
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.command_line import run_job

if TYPE_CHECKING:
    from pipeline.runtime.run import Run


def main(run: Run) -> None:
    from pipeline.stages.global_prompt import train_global_prompt
    from pipeline.stages.splits import build_splits

    build_splits(run)
    train_global_prompt(run)


if __name__ == "__main__":
    run_job(__doc__, main)
