#!/usr/bin/env python
"""Stages 0 and 1: folders of images -> what stands out in them, and few-shot splits in Parquet.

python jobs/build_splits.py --config configs/office_home.yaml --data.root /data/OfficeHome --data.shots 12
"""

from pipeline.run import run_job
from pipeline.stages.splits import build_splits

if __name__ == "__main__":
    run_job(__doc__, build_splits)
