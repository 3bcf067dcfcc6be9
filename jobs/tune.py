#!/usr/bin/env python
"""Searches for good values of config fields on held-out training images, then runs the pipeline with the best.

    python jobs/tune.py --search configs/searches/demo.yaml                 the demo
    python jobs/tune.py --search configs/searches/mmap.yaml \\
        --config configs/office_home.yaml --data.root /data/OfficeHome
    ray job submit --working-dir . -- python jobs/tune.py --search configs/searches/mmap.yaml \\
        --cluster.gpus_per_worker 0.25 --storage /shared/runs

The same command again does only what is missing. Table, picture, and the best config as YAML that full_pipeline.py
takes are in <storage>/searches/ and in MLflow. docs/tuning.md says what a search file holds.
"""

from pathlib import Path

from pydantic import Field

from pipeline.command_line import user_errors_told
from pipeline.config import JobOptions, JobParser, given_or_shipped


class Options(JobOptions):
    search: Path = Field(description="YAML file of what is searched, and how.")
    final_run: bool = Field(True, description="Whether the pipeline is run with the best values at the end.")


def main() -> None:
    with user_errors_told() as console:
        given = JobParser(__doc__, Options).given()
        config = given.config()

        from pipeline.tuning.search_file import read_search

        search = read_search(given_or_shipped(given.own.search), config)

        from pipeline.workflows.tuning import run_search

        run_search(config, search, console, final_run=given.own.final_run)


if __name__ == "__main__":
    main()
