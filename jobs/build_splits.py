#!/usr/bin/env python
"""Stages 0 and 1: check the data and write few-shot splits as Parquet files.

mmap-clip build-splits --config configs/office_home.yaml --data.root /data/OfficeHome --data.shots 12
"""

from functools import partial

from pipeline.command_line import run_job
from pipeline.stages.flow import run_stages

if __name__ == "__main__":
    run_job(__doc__, partial(run_stages, last_stage="splits"), fetches_weights=False)
