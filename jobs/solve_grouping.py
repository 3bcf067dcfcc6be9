#!/usr/bin/env python
"""Stages 1-3: which tasks help each other, from gradient snapshots. Finished stages are not redone, so other objectives
and constraints can be tried on an existing run in seconds.

    python jobs/solve_grouping.py --config configs/demo.yaml --grouping.objective mean --grouping.max_size 3
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.command_line import run_job

if TYPE_CHECKING:
    from pipeline.runtime.run import Run


def main(run: Run) -> None:
    from pipeline.stages.global_prompt import train_global_prompt
    from pipeline.stages.grouping import solve_grouping
    from pipeline.stages.splits import build_splits

    build_splits(run)
    solve_grouping(run, train_global_prompt(run))


if __name__ == "__main__":
    run_job(__doc__, main)
