#!/usr/bin/env python
"""Check a data set before training, and report issues with examples and suggested fixes. Trains nothing.

    mmap-clip check-data --data.root /data/shops
    mmap-clip check-data --data.root s3://bucket/shops
    mmap-clip check-data --config configs/office_home.yaml --data.root /data/OfficeHome --data.shots 12

Every image is read and decoded once, in parallel. Severities of the findings:
  error    a run would stop: broken files, classes with too few images
  warning  results may be degraded or inflated: contradicting labels, near-duplicates in training and test images, blank
           or tiny images, classes with the same name
  note     duplicates, images with an EXIF orientation, animations, extreme aspect ratios, classes that some tasks lack,
           class imbalance, rare class names (split into many tokens)

The page check.html shows all findings and samples of each class and task, check.json has every example. Every run
begins with this check, and does not read the images again. Exit status: 1 if there is an error, 2 if the check failed.
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
    run_job(__doc__, main, fetches_weights=False)
    sys.exit(1 if "error" in severities else 0)
