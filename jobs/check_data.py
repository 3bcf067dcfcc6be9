#!/usr/bin/env python
"""What should be known of a data set before training on it, and what to do about it. Trains nothing.

    python jobs/check_data.py --data.root /data/shops
    python jobs/check_data.py --config configs/office_home.yaml --data.root /data/OfficeHome --data.shots 12

Every image is read and decoded once, in parallel. Told, with examples and a remedy each:
  error    a run would stop: broken files, classes with too few images
  warning  results get worse, or look better than they are: contradicting labels, images that look alike in training
           and test, images of one color, tiny ones, classes with the same words
  note     good to know: copies, images that are turned, moving or very long, classes that some tasks lack, imbalance,
           class names that CLIP has hardly read

The page check.html has all of that and samples of each class and task, check.json every example. Every run does this
check first, and then does not read the images again. Exit status: 1 if there is an error, else 0; 2 if the check could
not be made.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pipeline.command_line import run_job

if TYPE_CHECKING:
    from pipeline.runtime.session import Session
    from pipeline.stages.plan import Plan

severities: set[str] = set()


def main(plan: Plan, session: Session) -> None:
    from pipeline.stages.data_check import check_data

    severities.update(finding.severity for finding in check_data(plan, session, verbose=True))


if __name__ == "__main__":
    run_job(__doc__, main)
    sys.exit(1 if "error" in severities else 0)
