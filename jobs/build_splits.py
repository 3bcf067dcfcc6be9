#!/usr/bin/env python
"""Stages 0 and 1: folders of images -> what stands out in them, and few-shot splits in Parquet.

python jobs/build_splits.py --config configs/office_home.yaml --data.root /data/OfficeHome --data.shots 12
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.command_line import run_job

if TYPE_CHECKING:
    from pipeline.runtime.run import Run


def main(run: Run) -> None:
    from pipeline.stages.splits import build_splits

    build_splits(run)


if __name__ == "__main__":
    run_job(__doc__, main)
