#!/usr/bin/env python
"""Searches for good values of config fields on held-out training images, then runs the pipeline with the best.

    python jobs/tune.py --search configs/searches/demo.yaml                 the demo
    python jobs/tune.py --search configs/searches/mmap.yaml \\
        --config configs/office_home.yaml --data.root /data/OfficeHome
    ray job submit --working-dir . -- python jobs/tune.py --search configs/searches/mmap.yaml \\
        --cluster.gpus_per_training 0.25 --storage /shared/runs

The same command again does only what is missing. Table, picture, and the best config as YAML that full_pipeline.py
takes are in <storage>/searches/ and in MLflow. docs/tuning.md says what a search file holds.
"""

from pathlib import Path

from pipeline.command_line import faults_told_to_people, job_parser
from pipeline.config import add_config_arguments, arguments_of, config_from_command_line, given_or_shipped


def main() -> None:
    with faults_told_to_people() as console:
        parser = job_parser(__doc__, "--search FILE [--no-final-run] ")
        parser.add_argument(
            "--search", type=Path, required=True, metavar="FILE", help="YAML of what is searched, and how"
        )
        parser.add_argument("--no-final-run", action="store_true", help="leave out the run with the best values")
        add_config_arguments(parser)
        config = config_from_command_line(parser)
        given = arguments_of(parser)

        from pipeline.tuning.search_file import read_search

        search = read_search(given_or_shipped(given.search), config)

        from pipeline.workflows.tuning import run_search

        run_search(config, search, console, final_run=not given.no_final_run)


if __name__ == "__main__":
    main()
