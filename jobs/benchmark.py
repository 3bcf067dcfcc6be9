#!/usr/bin/env python
"""Train many methods with several seeds and numbers of shots, and compare them in tables and figures.

    mmap-clip benchmark                                             all methods on the demo, seeds 1, 2, 3
    mmap-clip benchmark --methods coop_mt vpt_mt maple_mt grouped --shots 1 3 6 12
    mmap-clip benchmark --dataset office_home --methods paper --shots 6 12 --data.root /data/OfficeHome \\
        --config configs/paper_protocol.yaml configs/paper_parameters.yaml
    ray job submit --working-dir . -- python jobs/benchmark.py --cluster.gpus_per_worker 0.25 --storage /shared/runs

Every run (shots x seed) goes through the stages of the pipeline; all runs share the cluster at the same time. Rerun the
same command to resume; additional seeds, shots or methods reuse finished results. The report (Markdown, LaTeX, CSV,
PNG, SVG) is in <storage>/benchmarks/ and in MLflow. docs/methods.md describes the methods.
"""

from pathlib import Path

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import CONFIGS, JobOptions, JobParser, did_you_mean
from pipeline.errors import UserError
from pipeline.methods.registry import VARIANTS
from pipeline.report.paper_results import PAPER_METHODS
from pipeline.stages.paths import check_paths

METHOD_SETS = {"all": tuple(VARIANTS), "paper": PAPER_METHODS}


class Options(JobOptions):
    methods: tuple[str, ...] = Field(
        ("all",),
        description="Method names, `paper` (those of the paper's tables and Figure 4), or `all`; see --help-methods.",
        examples=[*METHOD_SETS, *VARIANTS],
    )
    dataset: str | None = Field(
        None, description="Base config, configs/<dataset>.yaml; null: none with --data.root, else the demo."
    )
    shots: tuple[int, ...] | None = Field(None, description="Numbers of training images per class; null: data.shots.")
    seeds: tuple[int, ...] = Field((1, 2, 3), description="Seeds; one run per seed and number of shots.")


def select_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the methods of these names and sets, in the order of the registry."""
    selected = set()
    for name in names:
        if name not in METHOD_SETS and name not in VARIANTS:
            valid = (*METHOD_SETS, *VARIANTS)
            raise UserError(f"--methods: unknown method {name}{did_you_mean(name, valid)} Valid: {', '.join(valid)}")
        selected |= set(METHOD_SETS.get(name, (name,)))
    return tuple(name for name in VARIANTS if name in selected)


def dataset_config_file(name: str) -> Path:
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        valid = sorted(path.stem for path in file.parent.glob("*.yaml"))
        hint = did_you_mean(name, valid)
        raise UserError(f"--dataset {name}: no file {file}{hint} Valid: {', '.join(valid)}; or use --config FILE")
    return file


def main() -> None:
    with report_user_errors() as console:
        replacements = {"seed": "--seeds", "data.shots": "--shots", "baselines": "--methods"}
        arguments = JobParser(__doc__, Options, replacements=replacements).parse()
        options = arguments.options
        base = arguments.config(dataset_config_file(options.dataset) if options.dataset else None)
        methods = select_methods(options.methods)
        shots = list(dict.fromkeys(options.shots or [base.data.shots]))
        seeds = list(dict.fromkeys(options.seeds))
        check_paths(base)
        with importing("PyTorch and Ray", console):
            from pipeline.workflows.benchmark import benchmark_configs, run_benchmark

        run_benchmark(benchmark_configs(base, methods, shots, seeds), methods, console)


if __name__ == "__main__":
    main()
