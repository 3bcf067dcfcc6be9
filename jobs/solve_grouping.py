#!/usr/bin/env python
"""Stages 0-4: group the tasks by their affinities. Finished stages are cached, so other affinities, objectives and
constraints can be tried on an existing run in seconds.

    mmap-clip solve-grouping --config configs/demo.yaml --grouping.objective mean --grouping.max_size 3
"""

from functools import partial

from pipeline.command_line import run_job
from pipeline.stages.flow import run_stages

if __name__ == "__main__":
    run_job(__doc__, partial(run_stages, last_stage="grouping"))
