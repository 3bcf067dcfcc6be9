"""Benchmark of methods on one data set, for several numbers of shots and seeds: runs, tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from pipeline.config import Config, content_hash
from pipeline.data.names import pluralize
from pipeline.files import create_folder, write_file
from pipeline.methods.registry import DEFAULT_VARIANTS, METHODS, VARIANTS, training_config, with_sources
from pipeline.report.benchmark_tables import (
    Benchmark,
    Result,
    comparison_table,
    framework_table,
    main_tables,
    recommendations,
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
)
from pipeline.report.metrics import ACCURACY, MAP, metric_of
from pipeline.report.scores import binomial_standard_error
from pipeline.report.summary import merge_results
from pipeline.runtime.environment import run_environment
from pipeline.runtime.run_lock import exclusive_run
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.tracking.tracker import Tracker, end_status, open_tracker
from pipeline.stages.flow import run_stages
from pipeline.stages.group_trainings import train_groups
from pipeline.stages.plan import Plan
from pipeline.stages.report import track_results
from pipeline.stages.run import connect_cluster
from pipeline.workflows.many_runs import expand_configs, make_plans, map_concurrently

CURVES = ("zero_shot", "coop_mt", "vpt_mt", "maple_mt", "grouped")
"""Methods of the paper's Figure 5."""
FIGURE_FORMATS = ("png", "svg")
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


def benchmark_configs(base: Config, methods: Sequence[str], shots: Sequence[int], seeds: Sequence[int]) -> list[Config]:
    """Return one config per run, ordered by shots, then seeds."""
    baselines = tuple(name for name in methods if name != "zero_shot" and name not in DEFAULT_VARIANTS)
    return expand_configs(base.model_copy(update={"baselines": baselines}), shots, seeds)


def run_benchmark(configs: Sequence[Config], methods: Sequence[str], console: Console) -> Path:
    """Train and evaluate what is missing of `methods` (names of registry.VARIANTS) in all runs, write the report and
    return its folder.

    Raises:
        UserError: a config or the cluster is invalid (before any work); a run failed (after the others have ended and
            are reported).
    """
    name, plans = configs[0].name, make_plans(configs, console, methods)
    storage = plans[0].storage
    key = content_hash({"runs": [plan.key for plan in plans], "methods": list(methods)})
    folder = create_folder(storage.folder / "benchmarks" / f"{name}-{key}")
    create_folder(folder / "tracking")

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, highlight=False)

    with (
        connect_cluster(plans[0], console) as connect,
        exclusive_run(storage, folder / "tracking", say, lambda: False),  # two jobs must not write one journal
        _benchmark_tracker(name, configs, methods, folder) as tracker,
    ):
        errors: list[BaseException] = []
        completed: list[Plan] = []
        results = []
        for plan, outcome in map_concurrently(plans, connect, partial(_run_methods, methods, folder.name)):
            if isinstance(outcome, BaseException):
                errors.append(outcome)
                continue
            completed.append(plan)
            shots, seed = plan.config.data.shots, plan.config.seed
            results += [
                Result(method, shots, seed, result[metric_of(result)], result["trained_parameters"])
                for method, result in outcome.items()
            ]
        if completed:
            benchmark = _make_benchmark(completed[0], methods, results)
            write_report(benchmark, folder, console)
            _track(tracker, benchmark, folder)
            storage.upload(folder)
            console.print(f"report: {storage.display_uri(folder / 'benchmark.md')}", markup=False, highlight=False)
        if errors:
            raise errors[0]
    return folder


def write_report(benchmark: Benchmark, folder: Path, console: Console) -> None:
    """Write tables as Markdown, LaTeX and CSV, and figures as PNG and SVG; print the tables."""
    from pipeline.report.benchmark_figures import (  # matplotlib
        accuracy_parameters_figure,
        prompt_ablation_figure,
        shots_figure,
    )

    tables = main_tables(benchmark)
    tables += [table for table in (framework_table(benchmark), comparison_table(benchmark)) if table]
    settings = [f"CLIP: {benchmark.clip}.", *benchmark.protocol]
    for table in tables:
        console.print(to_rich(table))
    sentences = recommendations(benchmark)
    console.print("\n".join([*settings, *sentences]), highlight=False)
    figures = []
    for shots in benchmark.shots:
        figures.append((f"{benchmark.metric}_parameters_{shots}_shots", accuracy_parameters_figure(benchmark, shots)))
        if {"joint_prompts_mt", "mlp_prompts_mt"} & set(benchmark.methods):
            figures.append((f"prompt_ablation_{shots}_shots", prompt_ablation_figure(benchmark, shots)))
    if len(benchmark.shots) > 1 and set(CURVES) & set(benchmark.methods):
        figures.append(("shots", shots_figure(benchmark, CURVES)))
    for name, figure in figures:
        for kind in FIGURE_FORMATS:
            figure.savefig(folder / f"{name}.{kind}", dpi=150)
    markdown = [f"# {benchmark.name}", "\n".join(f"- {sentence}" for sentence in settings), *sentences]
    markdown += map(to_markdown, tables)
    markdown += [f"![{name}]({name}.png)" for name, _ in figures]
    write_file(folder / "benchmark.md", "\n\n".join(markdown) + "\n")
    latex = ["\n".join(f"% {sentence}" for sentence in settings), *map(to_latex, tables)]
    write_file(folder / "benchmark.tex", "\n\n".join(latex) + "\n")
    write_file(folder / "benchmark.csv", to_csv(benchmark))


def _run_methods(methods: Sequence[str], benchmark: str, plan: Plan, session: Session) -> dict[str, dict[str, Any]]:
    session.tracker.set_tags(PARENT, {"benchmark": benchmark})
    uses_grouping = any(VARIANTS[name].uses_grouping for name in methods)
    uses_gradients = any(VARIANTS[name].uses_gradients for name in methods)
    last_stage = "grouping" if uses_grouping else "global_prompt" if uses_gradients else "splits"
    outputs = run_stages(plan, session, last_stage)
    earlier = {name: outputs.get(name) for name in ("global_prompt", "single_tasks", "grouping")}
    artifacts = train_groups(plan, session, **earlier, names=methods)
    results = {method.name: merge_results(method.results(), plan.num_test_images) for method in artifacts}
    track_results(plan, session, results, {method.name: method.groups for method in artifacts})
    session.console.print("done", highlight=False)
    return results


def _make_benchmark(plan: Plan, methods: Sequence[str], results: Sequence[Result]) -> Benchmark:
    order = {name: position for position, name in enumerate(methods)}
    clip = plan.config.clip
    return Benchmark(
        plan.config.name,
        tuple(plan.tasks),
        tuple(sorted(results, key=lambda result: order[result.method])),
        f"{clip.model}, weights {clip.pretrained or 'random'}",
        (*_protocol(plan.config, methods), _test_images(plan)),
        MAP if plan.dataset_index.multi_label else ACCURACY,
    )


def _test_images(plan: Plan) -> str:
    """Describe the numbers of test images of a completed run, and its standard error."""
    counts, config = plan.num_test_images, plan.config
    numbers = ", ".join(f"{task} {count:,}" for task, count in counts.items())
    images = f"Test images at {pluralize(config.data.shots, 'shot')}, seed {config.seed}: {numbers}"
    if plan.dataset_index.multi_label:  # of mAPs, the reports of the runs have standard errors
        return f"{images}."
    error = 100 * binomial_standard_error(0.5, min(counts.values()))
    return f"{images}; a task's accuracy in one run has a standard error of up to {error:.1f} points."


def _protocol(config: Config, methods: Sequence[str]) -> tuple[str, ...]:
    """Describe how the methods were trained, a sentence for each setting that some of them share."""
    titles: dict[str, list[str]] = {}
    for name in with_sources(methods):
        spec = METHODS[VARIANTS[name].method]
        if spec.takes_steps:
            training = training_config(VARIANTS[name].method, config)
            setting = (
                f"{OPTIMIZERS[training.optimizer]}, learning rate {training.learning_rate:g}, "
                f"{training.epochs} epochs, batch size {training.batch_size}{'' if spec.mixes_tasks else ' per task'}"
            )
            titles.setdefault(setting, []).append(spec.title)
    return tuple(f"{', '.join(dict.fromkeys(names))}: {setting}." for setting, names in titles.items())


@contextmanager
def _benchmark_tracker(name: str, configs: Sequence[Config], methods: Sequence[str], folder: Path) -> Iterator[Tracker]:
    """Track the benchmark as an MLflow run; its pipeline runs have its name as their tag `benchmark`."""
    config = configs[0]
    tracker = open_tracker(config.tracking, folder.parent.parent, folder / "tracking")
    tracker.start_run(
        PARENT,
        tags={
            "mlflow.runName": folder.name,
            "mlflow.source.name": sys.argv[0],
            "level": "benchmark",
            "benchmark": folder.name,
            **{f"env.{key}": value for key, value in run_environment().items()},
        },
        params={
            "name": name,
            "methods": ", ".join(methods),
            "shots": ", ".join(str(shots) for shots in sorted({config.data.shots for config in configs})),
            "seeds": ", ".join(str(seed) for seed in dict.fromkeys(config.seed for config in configs)),
        },
    )
    status = end_status(None)
    try:
        yield tracker
    except BaseException as error:
        status = end_status(error)
        raise
    finally:
        tracker.end_run(PARENT, status)
        tracker.close(timeout_s=20)


def _track(tracker: Tracker, benchmark: Benchmark, folder: Path) -> None:
    for method in benchmark.methods:
        for shots in benchmark.shots:
            if accuracies := benchmark.accuracy_by_seed(method, shots):
                tracker.log_metrics(
                    PARENT, {f"{benchmark.metric}/{method}/average": fmean(accuracies.values())}, step=shots
                )
                parameters = {run.trained_parameters for run in benchmark.runs(method, shots)}
                tracker.log_metrics(PARENT, {f"trained_parameters/{method}": max(parameters)}, step=shots)
    for file in sorted(folder.iterdir()):
        if file.is_file():
            tracker.log_artifact(PARENT, file, "benchmark")
