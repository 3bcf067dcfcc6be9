#!/usr/bin/env python
"""Searches for good values of config fields on held-out training images, then runs the pipeline with the best.

    python jobs/tune.py --search configs/searches/demo.yaml                 the demo
    python jobs/tune.py --search configs/searches/mmap.yaml \\
        --config configs/office_home.yaml --data.root /data/OfficeHome
    ray job submit --working-dir . -- python jobs/tune.py --search configs/searches/mmap.yaml \\
        --cluster.gpus_per_worker 0.25 --storage /shared/runs

The same command again does only what is missing. Table, picture, and the best config as YAML that full_pipeline.py
takes are in <storage>/searches/ and in MLflow. docs/hyperparameter_search.md says what a search file holds.
"""

from pathlib import Path

from pydantic import Field

from pipeline.command_line import report_user_errors
from pipeline.config import JobOptions, JobParser, resolve_config_path


class Options(JobOptions):
    search: Path = Field(description="YAML file of what is searched, and how.")
    final_run: bool = Field(True, description="Whether the pipeline is run with the best values at the end.")


def main() -> None:
    with report_user_errors() as console:
        given = JobParser(__doc__, Options).given()
        config = given.config()

        from pipeline.tuning.search_file import read_search

        search = read_search(resolve_config_path(given.own.search), config)

        from pipeline.workflows.tuning import run_search

        run_search(config, search, console, final_run=given.own.final_run)


if __name__ == "__main__":
    main()
