"""A search for good values of config fields, by Ray Tune: trials on held-out training images, their report, and one run
of the pipeline with the best values.

Ray Tune keeps the state of a search that is not finished, and restores it. The trainings have checkpoints of their own,
a folder a point, so that a trial of which Tune knows nothing, or no more, still goes on from there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from rich.console import Console
from rich.markup import escape

from pipeline.clip.load import build_meta_towers
from pipeline.config import Config, content_hash, to_yaml
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.files import read_json, write_file, write_json
from pipeline.grouping.search.constraints import check_constraints
from pipeline.methods.registry import DEFAULT_VARIANTS, VARIANTS
from pipeline.report.summary import title
from pipeline.report.tuning import STATES, described, search_figure, trials_table, trials_to_csv
from pipeline.runtime.cluster import num_slots
from pipeline.runtime.session import PARENT, Session
from pipeline.stages.flow import run_stages
from pipeline.stages.plan import Plan, check_methods, make_plan
from pipeline.stages.run import connect_cluster, run_session
from pipeline.tuning.points import Check, Points, planned_points
from pipeline.tuning.search_file import Search, config_at
from pipeline.tuning.trials import Trial, best_trial
from pipeline.workflows.tuning_searchers import Listener, OptunaPoints, early_stopping
from pipeline.workflows.tuning_trial import METRIC, TrialSetup, run_trial
from pipeline.workflows.validation_split import hold_out

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
    plan = make_plan(base, console, output_kind=PLACE, extra_key_inputs={"search": search.to_json()})
    check = partial(_check_point, plan.config, replace(plan.dataset_index, images=()), search.methods)
    points = planned_points(search, check)
    write_file(plan.folder / "search.yaml", yaml.safe_dump(search.to_json(), sort_keys=False, default_flow_style=None))
    # Tune asks the dashboard whether the placement groups of trials that it ended are still needed.
    with connect_cluster(plan, console, dashboard=True) as worker_resources:
        with run_session(plan, worker_resources, console) as session:
            session.tracker.set_tags(PARENT, {"level": "search", "mlflow.runName": plan.folder.name})
            session.tracker.log_params(PARENT, {f"search.{key}": value for key, value in search.to_json().items()})
            session.tracker.log_artifact(PARENT, plan.folder / "search.yaml")
            trials = _carry_out(plan, session, search, points, check)
            best = _report(plan, session, search, trials)
            config, method = _best_config(plan, search, best)
            write_file(plan.folder / BEST, to_yaml(config))
            session.tracker.log_artifact(PARENT, plan.folder / BEST)
            where = escape(plan.storage.display_uri(plan.folder / BEST))
            console.print(f"best: trial {best.number}: {escape(described(best.point))}\n  {where}", highlight=False)
            if final_run:
                accuracy = _run_pipeline(plan, session, config, method)
                session.tracker.log_metrics(PARENT, {"test_accuracy/average": accuracy}, step=0)
                console.print(
                    f"{escape(title(method))}, best of {len(trials)} trials: {100 * best.validation_accuracy:.1f} % on "
                    f"validation images, [bold]{100 * accuracy:.1f} % on the test set[/]",
                    highlight=False,
                )
    return plan.folder


def _check_point(config: Config, dataset_index: DatasetIndex, methods: Sequence[str], point: Mapping[str, Any]) -> None:
    """Raises UserError for values that do not go together, or not with the model or the tasks."""
    towers = _towers(config.clip)
    config, method = config_at(config, point, methods)
    check_methods(config, dataset_index, towers, (method,))
    if VARIANTS[method].uses_grouping:
        check_constraints(list(dataset_index.classes), **config.grouping.constraints)


_towers = cache(build_meta_towers)  # which Ray Tune cannot pickle with the check


def _carry_out(plan: Plan, session: Session, search: Search, points: Points, check: Check) -> list[Trial]:
    """All trials of the search; those that ended are not done again."""
    console, state = session.console, plan.folder / "tune"
    if (plan.folder / RESULT).exists():
        trials = [Trial(**trial) for trial in read_json(plan.folder / RESULT)["trials"]]
        console.print(f"  found finished: {len(trials)} trials", highlight=False)
        return trials
    if points.refused and search.options.searcher != "optuna":
        told = f"{points.refused} points are not tried, since their values do not go together, such as: {points.reason}"
        console.print(f"  {escape(told)}", highlight=False)
    splits = hold_out(plan, session, search.options.validation_shots)
    checkpoints = plan.folder / "checkpoints"
    of_trials = replace(plan, dataset_index=replace(plan.dataset_index, images=()), splits=splits)
    setup = TrialSetup(of_trials, search.methods, checkpoints)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup),
        {"cpu": session.worker_resources.cpus, "gpu": session.worker_resources.gpus},
    )
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # what they write is in MLflow
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which is not silent
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupt ends the job, as everywhere
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    Listener.changed = partial(_track, session)
    tuner = _restored(plan, session, search, state, trainable) or _new_tuner(
        plan, session, search, points, check, state, trainable
    )
    tuner.fit()
    write_json(
        plan.folder / RESULT, {"search": search.to_json(), "trials": [asdict(trial) for trial in Listener.trials]}
    )
    plan.storage.remove(checkpoints)
    plan.storage.remove(state)
    return Listener.trials


def _restored(plan: Plan, session: Session, search: Search, state: Path, trainable: Any) -> tune.Tuner | None:
    """The search as it was when an earlier job was interrupted; None if none was."""
    filesystem, place = plan.storage.filesystem(state)
    if not tune.Tuner.can_restore(place, filesystem):
        return None
    try:
        tuner = tune.Tuner.restore(place, trainable, storage_filesystem=filesystem)
        before = tuner.get_results()
    except OSError:
        raise
    except Exception as error:  # there is no state yet, or one of another version
        told = f"Ray Tune cannot restore the search: {error}. It begins anew; its trials go on from their checkpoints"
        session.console.print(f"  {told}", style="yellow", markup=False, highlight=False)
        plan.storage.remove(state)
        return None
    told = f"{before.num_terminated + before.num_errors} trials were done before"
    if search.options.early_stopping != "none":
        told += "; early stopping does not know what they measured"
    session.console.print(f"  {told}", highlight=False)
    return tuner


def _new_tuner(
    plan: Plan, session: Session, search: Search, points: Points, check: Check, state: Path, trainable: Any
) -> tune.Tuner:
    options, by_optuna = search.options, search.options.searcher == "optuna"
    numbered = [{"number": number, "point": point} for number, point in enumerate(points.points)]
    filesystem, place = plan.storage.filesystem(state.parent)
    return tune.Tuner(
        trainable,
        param_space={} if by_optuna else {"trial": tune.grid_search(numbered)},
        tune_config=tune.TuneConfig(
            num_samples=(options.trials or 1) if by_optuna else 1,
            search_alg=OptunaPoints(search, check) if by_optuna else None,
            scheduler=early_stopping(search, plan.config),
            # Else Optuna would be asked for many points before it knows of any.
            max_concurrent_trials=max(1, num_slots(session.worker_resources)) if by_optuna else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=place,
            storage_filesystem=filesystem,
            callbacks=[Listener()],
            failure_config=tune.FailureConfig(max_failures=plan.config.cluster.max_retries),
            verbose=0,
        ),
    )


def _track(session: Session, trial: Trial) -> None:
    """A change of a trial, to MLflow and, at its end, to the console."""
    label = f"trial {trial.number}"
    # Of trials that began just before an interruption Ray Tune may not know: the next may have such a one's number.
    tracker, name = session.tracker, f"{label} {content_hash(trial.point)}"
    tags = {"level": "trial", "trial": trial.number, "mlflow.runName": label}
    tracker.start_run(name, parent=PARENT, tags=tags, params=trial.point)
    if trial.accuracy:
        metrics = {f"{METRIC}/{task}": value for task, value in trial.accuracy.items()}
        metrics |= {f"{METRIC}/average": trial.validation_accuracy, "trained_parameters": trial.trained_parameters}
        tracker.log_metrics(name, metrics, step=trial.epochs)
    if trial.state == "running":
        return
    tracker.set_tags(name, {"state": STATES[trial.state], **({"fault": trial.fault} if trial.fault else {})})
    tracker.end_run(name, "FAILED" if trial.state == "failed" else "FINISHED")
    told = f"failed: {trial.fault}"
    if trial.state != "failed":
        told = f"{100 * trial.validation_accuracy:.1f} % after {trial.epochs} epochs, {STATES[trial.state]}"
    session.console.print(f"  {label}: {escape(told)} · {escape(described(trial.point))}", highlight=False)


def _report(plan: Plan, session: Session, search: Search, trials: Sequence[Trial]) -> Trial:
    """Writes and shows the trials; returns the best.

    Raises:
        UserError: none trained to its end.
    """
    folder, name = plan.folder, f"{plan.config.name}: {len(trials)} trials"
    session.console.print(
        trials_table(search, trials, f"{name}, {search.options.validation_shots} validation images a class")
    )
    write_file(folder / "trials.csv", trials_to_csv(search, plan.tasks, trials))
    search_figure(search, trials).savefig(folder / "trials.png", dpi=150)
    for file in ("trials.csv", "trials.png"):
        session.tracker.log_artifact(PARENT, folder / file)
    best = best_trial(trials)
    if best is None:
        fault = next((trial.fault for trial in trials if trial.fault), "all were ended early")
        raise UserError(
            f"none of {len(trials)} trials trained to its end: {fault}. All are in "
            f"{plan.storage.display_uri(folder / 'trials.csv')}"
        )
    session.tracker.log_metrics(PARENT, {f"{METRIC}/best": best.validation_accuracy}, step=0)
    return best


def _best_config(plan: Plan, search: Search, best: Trial) -> tuple[Config, str]:
    """What the pipeline takes, with the best trial's method in its report; and that method."""
    config, method = config_at(plan.config, best.point, search.methods)
    if method not in (*DEFAULT_VARIANTS, *config.baselines):
        config = config.model_copy(update={"baselines": (*config.baselines, method)})
    return config, method


def _run_pipeline(search: Plan, session: Session, config: Config, method: str) -> float:
    """All stages with all training images; the method's test accuracy, the mean over the tasks, 0 to 1."""
    plan = make_plan(config, session.console)
    with run_session(plan, session.worker_resources, session.console) as of_run:
        of_run.tracker.set_tags(PARENT, {"search": search.folder.name})
        report = run_stages(plan, of_run)["report"]
    accuracy: float = read_json(report / "summary.json")["methods"][method]["average"]
    return accuracy
