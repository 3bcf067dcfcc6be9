#!/usr/bin/env python
"""Trains many methods with several seeds and numbers of shots, and makes the tables and figures of the comparison.

    python jobs/benchmark.py                                             all methods on the demo, seeds 1, 2, 3
    python jobs/benchmark.py --methods coop_mt vpt_mt maple_mt grouped --shots 1 3 6 12
    python jobs/benchmark.py --dataset office_home --methods paper --shots 6 12 --data.root /data/OfficeHome \\
        --config configs/paper_protocol.yaml configs/paper_parameters.yaml
    ray job submit --working-dir . -- python jobs/benchmark.py --cluster.gpus_per_training 0.25 --storage /shared/runs

Every run (shots x seed) goes through the pipeline's stages, and all are at work at once on what the cluster has. The
same command again does only what is missing; more seeds, shots or methods add to what is there. The report (Markdown,
LaTeX, CSV, PNG, SVG) is in <storage>/benchmarks/ and in MLflow. docs/methods.md says what each method is.
"""

import argparse
from pathlib import Path

from pipeline.command_line import faults_told_to_people, job_parser, refuse_options
from pipeline.config import CONFIGS, add_config_arguments, arguments_of, config_from_command_line
from pipeline.errors import UserError
from pipeline.methods.registry import VARIANTS
from pipeline.report.paper_results import PAPER_METHODS

SETS = {"all": tuple(VARIANTS), "paper": PAPER_METHODS}
PER_RUN = {"seed": "--seeds", "data.shots": "--shots", "compare": "--methods"}


def parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "[--methods NAME ...] [--dataset NAME] [--shots N ...] [--seeds N ...] ")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"all, paper (those of the paper's tables and Figure 4), or any of: {', '.join(VARIANTS)} (default: all)",
    )
    parser.add_argument("--dataset", default="demo", metavar="NAME", help="configs/NAME.yaml (default: demo)")
    parser.add_argument(
        "--shots", nargs="+", type=int, metavar="N", help="training images of a class (default: data.shots)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    add_config_arguments(parser, "that of --dataset, which is under these always")
    return parser


def chosen_methods(names: list[str]) -> tuple[str, ...]:
    """In the order of the registry, whatever the order they are asked for in."""
    chosen = set()
    for name in names:
        if name not in SETS and name not in VARIANTS:
            raise UserError(f"--methods {name}: not known; valid: {', '.join((*SETS, *VARIANTS))}")
        chosen |= set(SETS.get(name, (name,)))
    return tuple(name for name in VARIANTS if name in chosen)


def dataset_file(name: str) -> Path:
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        found = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise UserError(f"--dataset {name}: there is no {file}; there are {found}. Your own file: --config FILE")
    return file


def main() -> None:
    with faults_told_to_people() as console:
        command = parser()
        refuse_options(command, PER_RUN)
        given = arguments_of(command)
        base = config_from_command_line(command, base=dataset_file(given.dataset))
        methods = chosen_methods(given.methods)
        shots = dict.fromkeys(given.shots or [base.data.shots])

        from pipeline.workflows.benchmark import benchmark_configs, run_benchmark

        run_benchmark(benchmark_configs(base, methods, list(shots), list(dict.fromkeys(given.seeds))), methods, console)


if __name__ == "__main__":
    main()
