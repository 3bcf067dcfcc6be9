"""jobs/benchmark.py on the demo: concurrent runs, only missing work, tables of the results."""

from __future__ import annotations

import csv
import json
import re
import signal
import sys
from statistics import fmean

import pytest
from mlflow import MlflowClient
from notebooks import execute_repeatedly, num_images, stdout, tables
from pipelines import Job
from rich.console import Console

from docs.mlflow_results import open_experiment, read_benchmark
from jobs.benchmark import main, select_methods
from pipeline.config import DEMO_CONFIG, load_yaml, parse_config
from pipeline.methods.registry import VARIANTS
from pipeline.report.benchmark_tables import to_csv
from pipeline.report.paper_results import PAPER_METHODS
from pipeline.runtime.progress import Report, run_progress
from pipeline.stages.flow import run_stages
from pipeline.stages.group_trainings import plan_trainings
from pipeline.stages.run import open_run

BENCHMARK = ("jobs/benchmark.py",)
TASKS = ("blur_right", "ink_left")
QUICK = ("--training.epochs", "2", "--global_prompt.epochs", "1", "--data.tasks", f"[{', '.join(TASKS)}]")


def run_benchmark(run_job, storage, *arguments):
    finished = run_job("benchmark", "--storage", storage, *QUICK, *arguments)
    assert finished.status == 0, finished.output
    return finished.output


def trainings(storage):
    """Method, group, shots and seed of each finished training and evaluation → modification time."""
    modified = {}
    for file in (storage / "group_trainings").glob("[!.]*/artifact.json"):
        inputs = json.loads(file.read_text())["inputs"]
        shots, seed = inputs["splits"]["shots"], inputs["splits"]["seed"]
        modified[inputs["method"], *inputs["group"], shots, seed] = file.stat().st_mtime_ns
    return modified


def rows(storage):
    """Rows of the newest benchmark's CSV, by method, shots, seed and task."""
    file = max((storage / "benchmarks").glob("*/benchmark.csv"), key=lambda path: path.stat().st_mtime_ns)
    return {(row["method"], row["shots"], row["seed"], row["task"]): row for row in csv.DictReader(file.open())}


@pytest.fixture(scope="module")
def storage(tmp_path_factory, run_job):
    storage = tmp_path_factory.mktemp("benchmark") / "storage"
    run_benchmark(
        run_job, storage, "--methods", "zero_shot", "coop_mt", "grouped", "--shots", "2", "4", "--seeds", "1", "2"
    )
    return storage


@pytest.mark.slow
def test_every_run_is_in_the_tables_and_in_mlflow(storage):
    (folder,) = (storage / "benchmarks").iterdir()
    results = rows(storage)
    for shots in "24":
        for seed in "12":
            for method in ("zero_shot", "coop_mt", "grouped"):
                for task in TASKS:
                    assert 0 <= float(results[method, shots, seed, task]["accuracy"]) <= 1
    table = (folder / "benchmark.md").read_text()
    assert "4-shot test accuracy (%), 2 seeds" in table and "MmAP, grouped" in table
    counts = ", ".join(f"{task} 360" for task in TASKS)
    assert f"- Test images at 2 shots, seed 1: {counts}; a task's accuracy in one run has a standard" in table
    assert r"\begin{tabular}" in (folder / "benchmark.tex").read_text()
    for picture in ("accuracy_parameters_2_shots", "accuracy_parameters_4_shots", "shots"):
        for kind in ("png", "svg"):
            assert (folder / f"{picture}.{kind}").stat().st_size > 5000

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    benchmark_runs = client.search_runs(["1"], f"tags.benchmark = '{folder.name}'")
    assert len(benchmark_runs) == 1 + 4 and all(run.info.status == "FINISHED" for run in benchmark_runs)
    (benchmark_run,) = [run for run in benchmark_runs if run.data.tags["mlflow.runName"] == folder.name]
    history = {
        metric.step: metric.value
        for metric in client.get_metric_history(benchmark_run.info.run_id, "accuracy/grouped/average")
    }
    for shots, average in history.items():
        accuracies = [float(results["grouped", str(shots), seed, task]["accuracy"]) for seed in "12" for task in TASKS]
        assert average == pytest.approx(fmean(accuracies))
    assert {"benchmark/benchmark.md", "benchmark/shots.png"} <= {
        file.path for file in client.list_artifacts(benchmark_run.info.run_id, "benchmark")
    }
    assert {run.data.params["seed"] for run in benchmark_runs if "seed" in run.data.params} == {"1", "2"}


@pytest.mark.slow
def test_the_notebook_shows_what_is_in_mlflow(storage, tmp_path):
    uri = f"sqlite:///{storage}/mlflow.db"
    (folder,) = (storage / "benchmarks").iterdir()
    benchmark = read_benchmark(open_experiment(uri, "mmap-clip"))
    assert to_csv(benchmark) == (folder / "benchmark.csv").read_text()
    report = (folder / "benchmark.md").read_text()
    assert f"- CLIP: {benchmark.clip}." in report and benchmark.protocol
    assert all(f"- {sentence}\n" in report for sentence in benchmark.protocol)

    settings = {"DATA": "demo", "SHOTS": [2], "SEEDS": [1], "METHODS": ["grouped"], "SAVE_TO": str(tmp_path / "saved")}
    outputs, filtered = execute_repeatedly(uri, tmp_path, {}, settings)
    assert stdout(outputs["read"]).startswith(f"{folder.name}: demo, shots 2, 4, seeds 1, 2, 3 methods\n")
    text = tables(outputs["tables"]) + tables(outputs["parts"])
    assert {line for line in text.splitlines() if line} <= set(report.splitlines())
    assert "4-shot test accuracy (%), 2 seeds" in text and "minus each other variant" in text
    assert {cell: num_images(cell_outputs) for cell, cell_outputs in outputs.items() if num_images(cell_outputs)} == {
        "figure-1": 1,
        "figure-5": 1,
        "groups": 3,
    }
    assert "mmap-clip benchmark --methods paper" in stdout(outputs["figure-4"])
    assert re.match(r"demo, [24] shots, seed [12] \(\w+\): blur_right", stdout(outputs["groups"]))

    assert "2-shot test accuracy (%), 1 seed\n" in (text := tables(filtered["tables"])) and "CoOp" not in text
    assert "several numbers of shots" in stdout(filtered["figure-5"])
    assert stdout(filtered["groups"]).startswith("demo, 2 shots, seed 1 (")
    assert (tmp_path / "saved" / "accuracy_parameters_2_shots.pdf").stat().st_size > 5000
    assert r"\begin{tabular}" in (tmp_path / "saved" / "accuracy_2_shots.tex").read_text()


@pytest.mark.slow
def test_a_larger_benchmark_runs_only_what_is_missing(storage, run_job):
    previous, previous_rows = trainings(storage), rows(storage)
    larger = ("--methods", "zero_shot", "clip_adapter_mt", "grouped", "--shots", "4", "--seeds", "1", "2", "3")
    run_benchmark(run_job, storage, *larger)
    current = trainings(storage)
    assert {key: current[key] for key in previous} == previous
    added = {(method, seed) for method, *_, seed in current.keys() - previous.keys()}
    assert {seed for method, seed in added if method == "clip_adapter"} == {1, 2, 3}
    assert {seed for method, seed in added if method != "clip_adapter"} == {3}
    current_rows = rows(storage)
    for key in (("grouped", "4", "1", "blur_right"), ("zero_shot", "4", "2", "ink_left")):
        assert current_rows[key] == previous_rows[key]


@pytest.mark.fault_injection
def test_an_interrupted_benchmark_resumes(tmp_path, run_job):
    storage = tmp_path / "storage"
    arguments = ("--methods", "zero_shot", "clip_adapter_mt", "grouped", "--shots", "2", "--seeds", "1", "2")
    job = Job(storage, *QUICK, *arguments, prefix=BENCHMARK)
    try:
        job.wait_until(lambda: trainings(storage))
        job.process.send_signal(signal.SIGINT)
    finally:
        interrupted = job.finish()
    assert interrupted.status == 130, interrupted.output
    assert "rerun the same command to resume" in interrupted.output
    previous = trainings(storage)
    run_benchmark(run_job, storage, *arguments)
    current = trainings(storage)
    assert {key: current[key] for key in previous} == previous
    assert current.keys() > previous.keys()
    assert {seed for *_, seed in current} == {1, 2} and len(rows(storage)) == 3 * 2 * 2


def test_a_single_task_is_trained_once_for_both_variants_of_a_method(shared_ray, tmp_path):
    """`coop` and `coop_mt` of one task are the same training, so they have the same key."""
    names = [name for name in VARIANTS if f"{name}_mt" in VARIANTS and not VARIANTS[name].init_from]
    assert len(names) > 10
    values = load_yaml(DEMO_CONFIG) | {"storage": str(tmp_path / "storage")}
    values["data"] |= {"tasks": ["ink_right"], "shots": 1}
    with open_run(parse_config(values), Console(quiet=True)) as (plan, session):
        run_stages(plan, session, "splits")
        for name in names:
            ((single,), (multi,)) = (plan_trainings(plan, variant, None, {}) for variant in (name, f"{name}_mt"))
            assert single.artifact.key == multi.artifact.key and single.spec.tasks == multi.spec.tasks == ("ink_right",)


def test_runs_share_one_progress_board_and_receive_their_own_reports(shared_ray):
    first_run, second_run = run_progress(print), run_progress(print)
    assert first_run.actor is second_run.actor  # each would be a process
    first_run.begin("coop mt", "a machine")
    first_run.expect("coop mt", 3, "images")
    second_run.expect("coop mt", 5, "images")
    second_run.advance("coop mt", 4, "images")
    first_run.post(Report("coop mt", 1, 2, "steps"))
    assert first_run.nodes() == {"coop mt": "a machine"} and second_run.nodes() == {}
    assert (
        first_run.drain() == [Report("coop mt", 0, 3, "images"), Report("coop mt", 1, 2, "steps")]
        and first_run.drain() == []
    )
    assert second_run.drain() == [Report("coop mt", 0, 5, "images"), Report("coop mt", 4, 5, "images")]


def test_methods_are_selected_by_name_or_set():
    assert select_methods(["grouped", "zero_shot"]) == ("zero_shot", "grouped")
    assert select_methods(["all"]) == tuple(VARIANTS)
    assert set(select_methods(["paper", "clip_lora"])) == {*PAPER_METHODS, "clip_lora"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--methods", "cooop"],
            "--methods: unknown method cooop; did you mean coop? Valid: all, paper, zero_shot, coop",
        ),
        (["--dataset", "imagenet"], "--dataset imagenet: no file"),
        (["--seed", "3"], "--seed is not an option of this job: use --seeds"),
        (["--data.shots", "3"], "--data.shots is not an option of this job: use --shots"),
        (["--shots", "0"], "data.shots=0"),
        (["--maple.depth", "9", "--methods", "maple"], "maple.depth=9: the shallower tower has 4 layers"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_errors_are_reported_before_any_work(new_storage, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--storage", str(new_storage), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (new_storage / "splits").exists()
