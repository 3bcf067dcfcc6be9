#!/usr/bin/env python
"""Stages 0-2: train the global prompt and store snapshots of the tasks' gradients. Finished stages are cached.

mmap-clip train-global-prompt --config configs/office_home.yaml --data.root /data/OfficeHome
"""

from functools import partial

from pipeline.command_line import run_job
from pipeline.stages.flow import run_stages

if __name__ == "__main__":
    run_job(__doc__, partial(run_stages, last_stage="global_prompt"))
