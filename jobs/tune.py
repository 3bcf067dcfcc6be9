#!/usr/bin/env python
"""Search config fields for the best accuracy on held-out training images, then run the pipeline with the best.

    mmap-clip tune --search configs/searches/demo.yaml                 the demo
    mmap-clip tune --search configs/searches/mmap.yaml \\
        --config configs/office_home.yaml --data.root /data/OfficeHome
    ray job submit --working-dir . -- python jobs/tune.py --search configs/searches/mmap.yaml \\
        --cluster.gpus_per_worker 0.25 --storage /shared/runs

Rerun the same command to resume. The table, the figure, and the best config (a YAML file for full_pipeline.py) are in
<storage>/searches/ and in MLflow. docs/hyperparameter_search.md describes the search file.
"""

from pathlib import Path

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import JobOptions, JobParser, resolve_config_path
from pipeline.stages.paths import check_paths


class Options(JobOptions):
    search: Path = Field(description="YAML file with the search space and the searcher.")
    final_run: bool = Field(True, description="Run the pipeline with the best values at the end.")


def main() -> None:
    with report_user_errors() as console:
        arguments = JobParser(__doc__, Options).parse()
        config = arguments.config()

        from pipeline.tuning.search_file import read_search

        search = read_search(resolve_config_path(arguments.options.search), config)
        check_paths(config)
        with importing("PyTorch, Ray Tune and Optuna", console):
            from pipeline.workflows.tuning import run_search

        run_search(config, search, console, final_run=arguments.options.final_run)


if __name__ == "__main__":
    main()
