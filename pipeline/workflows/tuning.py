"""A search for good values of config fields, by Ray Tune: trials on held-out training images, their report, and one run
of the pipeline with the best values.

What Tune knows of a search ends with the process. What is known of its trials lies in the search's folder, a JSON file
a trial, and the trainings have checkpoints of their own: so an interrupted search goes on without reading pickles from
the storage, and with early stopping and Optuna knowing what was measured before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from rich.console import Console
from rich.markup import escape

from pipeline.clip.load import towers_without_weights
from pipeline.config import Config, to_yaml
from pipeline.errors import UserError
from pipeline.files import read_json, write_atomically, write_json
from pipeline.grouping.search.constraints import check_constraints
from pipeline.methods.registry import ALWAYS, VARIANTS, training_of
from pipeline.report.summary import title
from pipeline.report.tuning import STATES, described, search_figure, trials_table, trials_to_csv
from pipeline.runtime.cluster import places
from pipeline.runtime.run import PARENT, Run, check_methods, check_run, connected, tracked
from pipeline.stages.flow import run_stages
from pipeline.tuning.points import Check, Point, Points, planned_points
from pipeline.tuning.search_file import Search, config_at
from pipeline.tuning.trials import Trial, TrialRecords, best_trial
from pipeline.workflows.held_out import hold_out
from pipeline.workflows.tuning_searchers import OptunaPoints, Recorder, early_stopping
from pipeline.workflows.tuning_trial import METRIC, TrialSetup, run_trial

PLACE = "searches"
RESULT = "search.json"
BEST = "best.yaml"


def run_search(base: Config, search: Search, console: Console, final_run: bool = True) -> Path:
    """Tries what is missing of a search's points, reports on all, and runs the pipeline with the best values; returns
    the search's folder.

    Args:
        final_run: whether to run the pipeline.

    Raises:
        UserError: what is wrong with config, search or cluster, before any work; no trial that trained to its end.
    """
    console.print(f"[bold]{base.name}[/]: checking data, model, storage, tracking, cluster and search", highlight=False)
    if base.cluster.workers_per_training > 1:
        raise UserError(
            f"cluster.workers_per_training={base.cluster.workers_per_training}: a trial trains on one worker, and "
            "trials run beside each other: leave it at 1"
        )
    run = check_run(base, console, place=PLACE, decided_by={"search": search.to_json()})
    check = _point_check(run, search)
    points = planned_points(search, check)
    write_atomically(
        run.folder / "search.yaml", yaml.safe_dump(search.to_json(), sort_keys=False, default_flow_style=None)
    )
    # Tune asks the dashboard whether the placement groups of trials that it ended are still needed.
    with connected([run], dashboard=True):
        with tracked(run):
            run.tracker.set_tags(PARENT, {"level": "search", "mlflow.runName": run.folder.name})
            run.tracker.log_params(PARENT, {f"search.{key}": value for key, value in search.to_json().items()})
            run.tracker.log_artifact(PARENT, run.folder / "search.yaml")
            trials = _carry_out(run, search, points, check)
            best = _report(run, search, trials)
            config, method = _best_config(run, search, best)
            write_atomically(run.folder / BEST, to_yaml(config))
            run.tracker.log_artifact(PARENT, run.folder / BEST)
            where = escape(run.storage.shown(run.folder / BEST))
            console.print(f"best: trial {best.number}: {escape(described(best.point))}\n  {where}", highlight=False)
            if final_run:
                accuracy = _run_pipeline(run, config, method)
                run.tracker.log_metrics(PARENT, {"test_accuracy/average": accuracy}, step=0)
                console.print(
                    f"{escape(title(method))}, best of {len(trials)} trials: {100 * best.validation_accuracy:.1f} % on "
                    f"validation images, [bold]{100 * accuracy:.1f} % on the test set[/]",
                    highlight=False,
                )
    return run.folder


def _point_check(run: Run, search: Search) -> Check:
    """Raises UserError for values that do not go together, or not with the model or the tasks."""
    towers = towers_without_weights(run.config.clip)

    def check(point: Mapping[str, Any]) -> None:
        config, method = config_at(run.config, point, search.methods)
        check_methods(config, run.listing, towers, (method,))
        if VARIANTS[method].uses_grouping:
            check_constraints(run.tasks, **config.grouping.constraints)

    return check


def _carry_out(run: Run, search: Search, points: Points, check: Check) -> list[Trial]:
    """All trials of the search; those that are recorded as ended are not done again."""
    console, options = run.console, search.options
    records = TrialRecords(run.storage, run.folder / "trials")
    before = records.read()
    if (run.folder / RESULT).exists():
        console.print(f"  found finished: {len(before)} trials", highlight=False)
        return before
    if points.refused and options.searcher != "optuna":
        told = f"{points.refused} points are not tried, since their values do not go together, such as: {points.reason}"
        console.print(f"  {escape(told)}", highlight=False)
    splits = hold_out(run, options.validation_shots)
    setup = TrialSetup(
        run.config, search.methods, replace(run.listing, images=()), run.clip, splits, run.folder / "checkpoints"
    )
    ended = {trial.number for trial in before if trial.state != "running"}
    number = len(points.points)
    if options.searcher == "optuna":
        assert options.trials is not None  # SearchOptions asks for it
        number = options.trials
    if ended:
        console.print(f"  {len(ended)} of {number} trials were done before", highlight=False)
    if len(ended) < number:
        _tune(run, search, points, check, setup, before, number - len(ended))
    trials = records.read()
    if any(trial.state == "running" for trial in trials):
        raise UserError("Ray Tune ended before all trials did; its logs say why, and the same command goes on")
    write_json(run.folder / RESULT, {"search": search.to_json(), "trials": [asdict(trial) for trial in trials]})
    run.storage.remove(setup.checkpoints)
    run.storage.remove(run.folder / "tune")
    return trials


def _tune(
    run: Run, search: Search, points: Points, check: Check, setup: TrialSetup, before: Sequence[Trial], number: int
) -> None:
    """Has Ray Tune do `number` trials more; `before`: all that began."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # what they write is in the records
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which is not silent
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupt ends the job, as everywhere
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    state = {trial.number: trial.state for trial in before}
    space: dict[str, Any] = {}
    searcher = None
    if search.options.searcher == "optuna":
        searcher = OptunaPoints(search, check, before)
    else:
        todo = [at for at in range(len(points.points)) if state.get(at, "running") == "running"]
        todo.sort(key=lambda at: at not in state)  # first those that have a checkpoint
        space["trial"] = tune.grid_search([{"number": at, "point": points.points[at]} for at in todo])
    run.storage.remove(run.folder / "tune")
    filesystem, place = run.storage.filesystem(run.folder)
    records = TrialRecords(run.storage, run.folder / "trials")
    recorder = Recorder(records, partial(_epochs_at, run.config, search), before, partial(_track, run, search))
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, setup=setup), {"cpu": run.needs.cpus, "gpu": run.needs.gpus}
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=number if searcher else 1,
            search_alg=searcher,
            scheduler=early_stopping(search, _most_epochs(run.config, search), before),
            # Else Optuna would be asked for many points before it knows of any.
            max_concurrent_trials=max(1, places(run.needs)) if searcher else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=place,
            storage_filesystem=filesystem if run.storage.is_bucket else None,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=run.config.cluster.max_retries),
            verbose=0,
        ),
    )
    tuner.fit()


def _epochs_at(base: Config, search: Search, point: Point) -> int:
    config, method = config_at(base, point, search.methods)
    return training_of(VARIANTS[method].method, config).epochs


def _most_epochs(base: Config, search: Search) -> int:
    """No point's trainings are longer."""
    lengths = [_epochs_at(base, search, {"method": method}) for method in search.methods]
    searched = [of.values for name, of in search.space.items() if name.endswith("training.epochs")]
    most: int = max([*lengths, *(value for values in searched for value in values if value)])
    return most


def _track(run: Run, search: Search, trial: Trial) -> None:
    """A change of a trial, to MLflow and, at its end, to the console."""
    tracker, name = run.tracker, f"trial {trial.number}"
    tracker.start_run(name, parent=PARENT, tags={"level": "trial", "trial": trial.number}, params=trial.point)
    if trial.epochs:
        last = trial.epochs[-1]
        metrics = {f"{METRIC}/{task}": value for task, value in last.accuracy.items()}
        metrics |= {f"{METRIC}/average": last.average, "trained_parameters": trial.trained_parameters}
        tracker.log_metrics(name, metrics, step=last.epoch)
    if trial.state == "running":
        return
    tracker.set_tags(name, {"state": STATES[trial.state], **({"fault": trial.fault} if trial.fault else {})})
    tracker.end_run(name, "FAILED" if trial.state == "failed" else "FINISHED")
    told = f"failed: {trial.fault}"
    if trial.state != "failed":
        told = f"{100 * trial.validation_accuracy:.1f} % after {trial.epochs[-1].epoch} epochs, {STATES[trial.state]}"
    run.console.print(f"  {name}: {escape(told)} · {escape(described(trial.point))}", highlight=False)


def _report(run: Run, search: Search, trials: Sequence[Trial]) -> Trial:
    """Writes and shows the trials; returns the best.

    Raises:
        UserError: none trained to its end.
    """
    folder, name = run.folder, f"{run.config.name}: {len(trials)} trials"
    run.console.print(
        trials_table(search, trials, f"{name}, {search.options.validation_shots} validation images a class")
    )
    write_atomically(folder / "trials.csv", trials_to_csv(search, run.tasks, trials))
    search_figure(search, trials).savefig(folder / "trials.png", dpi=150)
    for file in ("trials.csv", "trials.png"):
        run.tracker.log_artifact(PARENT, folder / file)
    best = best_trial(trials)
    if best is None:
        fault = next((trial.fault for trial in trials if trial.fault), "all were ended early")
        raise UserError(
            f"none of {len(trials)} trials trained to its end: {fault}. All are in "
            f"{run.storage.shown(folder / 'trials.csv')}"
        )
    run.tracker.log_metrics(PARENT, {f"{METRIC}/best": best.validation_accuracy}, step=0)
    return best


def _best_config(run: Run, search: Search, best: Trial) -> tuple[Config, str]:
    """What the pipeline takes, with the best trial's method in its report; and that method."""
    config, method = config_at(run.config, best.point, search.methods)
    if method not in (*ALWAYS, *config.compare):
        config = config.model_copy(update={"compare": (*config.compare, method)})
    return config, method


def _run_pipeline(search: Run, config: Config, method: str) -> float:
    """All stages with all training images; the method's test accuracy, the mean over the tasks, 0 to 1."""
    run = check_run(config, search.console)
    run.needs, run.board = search.needs, search.board
    with tracked(run):
        run.tracker.set_tags(PARENT, {"search": search.folder.name})
        report = run_stages(run)["report"]
    accuracy: float = read_json(report / "summary.json")["methods"][method]["average"]
    return accuracy
