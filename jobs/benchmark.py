#!/usr/bin/env python
"""Trains many methods with several seeds and numbers of shots, and makes the tables and figures of the comparison.

    python jobs/benchmark.py                                             all methods on the demo, seeds 1, 2, 3
    python jobs/benchmark.py --methods coop_mt vpt_mt maple_mt grouped --shots 1 3 6 12
    python jobs/benchmark.py --dataset office_home --methods paper --shots 6 12 --data.root /data/OfficeHome \\
        --config configs/paper_protocol.yaml configs/paper_parameters.yaml
    ray job submit --working-dir . -- python jobs/benchmark.py --cluster.gpus_per_worker 0.25 --storage /shared/runs

Every run (shots x seed) goes through the pipeline's stages, and all are at work at once on what the cluster has. The
same command again does only what is missing; more seeds, shots or methods add to what is there. The report (Markdown,
LaTeX, CSV, PNG, SVG) is in <storage>/benchmarks/ and in MLflow. docs/methods.md says what each method is.
"""

from pathlib import Path

from pydantic import Field

from pipeline.command_line import report_user_errors
from pipeline.config import CONFIGS, JobOptions, JobParser
from pipeline.errors import UserError, did_you_mean
from pipeline.methods.registry import VARIANTS
from pipeline.report.paper_results import PAPER_METHODS

SETS = {"all": tuple(VARIANTS), "paper": PAPER_METHODS}


class Options(JobOptions):
    methods: tuple[str, ...] = Field(
        ("all",),
        description="Names, `paper` (the methods of the paper's tables and Figure 4), or `all` (--help-methods).",
    )
    dataset: str = Field("demo", description="The config configs/<dataset>.yaml, which is under all others.")
    shots: tuple[int, ...] | None = Field(None, description="Training images of a class; null: data.shots alone.")
    seeds: tuple[int, ...] = Field((1, 2, 3), description="Seeds of the runs with each number of shots.")


def chosen_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of the registry, whatever the order they are asked for in."""
    chosen = set()
    for name in names:
        if name not in SETS and name not in VARIANTS:
            valid = (*SETS, *VARIANTS)
            raise UserError(f"--methods {name} is not known{did_you_mean(name, valid)} Valid: {', '.join(valid)}")
        chosen |= set(SETS.get(name, (name,)))
    return tuple(name for name in VARIANTS if name in chosen)


def dataset_file(name: str) -> Path:
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        found = sorted(path.stem for path in file.parent.glob("*.yaml"))
        hint = did_you_mean(name, found)
        raise UserError(f"--dataset {name}: there is no {file}{hint} Valid: {', '.join(found)}; of yours: --config")
    return file


def main() -> None:
    with report_user_errors() as console:
        instead = {"seed": "--seeds", "data.shots": "--shots", "baselines": "--methods"}
        given = JobParser(__doc__, Options, instead=instead, base="that of --dataset, under these always").given()
        base = given.config(base=dataset_file(given.own.dataset))
        methods = chosen_methods(given.own.methods)
        shots = list(dict.fromkeys(given.own.shots or [base.data.shots]))

        from pipeline.workflows.benchmark import benchmark_configs, run_benchmark

        run_benchmark(benchmark_configs(base, methods, shots, list(dict.fromkeys(given.own.seeds))), methods, console)


if __name__ == "__main__":
    main()
