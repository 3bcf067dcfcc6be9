"""Hyperparameter search with Ray Tune: trials measured on held-out training images, their report, and one run of the
pipeline with the best params.

Ray Tune saves and restores the state of an unfinished search. Trainings have their own checkpoints, in a folder per
params, so that a trial resumes from them even if Tune's state does not include it.
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
from pipeline.data.names import pluralize
from pipeline.errors import UserError
from pipeline.files import DamagedFile, read_record, write_file, write_record
from pipeline.grouping.search.constraints import check_constraints
from pipeline.interrupts import set_resume_point
from pipeline.methods.registry import DEFAULT_VARIANTS, VARIANTS
from pipeline.report.summary import method_title
from pipeline.report.tuning import format_params, search_figure, trials_table, trials_to_csv
from pipeline.runtime.cluster import num_slots
from pipeline.runtime.session import PARENT, Session
from pipeline.stages.flow import run_stages
from pipeline.stages.plan import Plan, check_methods, check_single_label, make_plan
from pipeline.stages.run import connect_cluster, run_session
from pipeline.training.aggregation import check_packages
from pipeline.tuning.points import Check, PlannedTrials, plan_trials
from pipeline.tuning.search_file import AGGREGATION, Search, trial_config
from pipeline.tuning.trials import Trial, best_trial
from pipeline.workflows.tuning_searchers import TrialListener, UniqueOptunaSearch, early_stopping
from pipeline.workflows.tuning_trial import METRIC, TrialSetup, run_trial
from pipeline.workflows.validation_split import make_validation_split

SEARCHES = "searches"
RESULT = "search.json"
BEST = "best.yaml"


def run_search(base: Config, search: Search, console: Console, final_run: bool = True) -> Path:
    """Run the missing trials of a search, report on all, run the pipeline with the best params, and return the search's
    folder.

    Args:
        final_run: whether to run the pipeline.

    Raises:
        UserError: config, search or cluster are invalid (before any work); no trial completed.
    """
    console.print(f"[bold]{base.name}[/]: checking data, model, storage, tracking, cluster and search", highlight=False)
    check_single_label(base, "mmap-clip tune")
    if base.cluster.workers_per_training > 1:
        raise UserError(
            f"cluster.workers_per_training={base.cluster.workers_per_training} is not supported: a trial trains on one "
            "worker, and trials run concurrently. Set it to 1"
        )
    for aggregation in search.space[AGGREGATION].values if AGGREGATION in search.space else ():
        check_packages(aggregation)
    plan = make_plan(base, console, output_kind=SEARCHES, extra_key_inputs={"search": search.to_json()})
    check = partial(_check_params, plan.config, replace(plan.dataset_index, images=()), search.methods)
    planned = plan_trials(search, check)
    write_file(plan.folder / "search.yaml", yaml.safe_dump(search.to_json(), sort_keys=False, default_flow_style=None))
    # Tune asks the dashboard for the placement groups of ended trials.
    with connect_cluster(plan, console, dashboard=True) as connect:
        if not (plan.folder / RESULT).exists():
            connect()
        with run_session(plan, connect, console) as session:
            session.tracker.set_tags(PARENT, {"level": "search", "mlflow.runName": plan.folder.name})
            session.tracker.log_params(PARENT, {f"search.{key}": value for key, value in search.to_json().items()})
            session.tracker.log_artifact(PARENT, plan.folder / "search.yaml")
            trials = _run_trials(plan, session, search, planned, check)
            best = _report(plan, session, search, trials)
            config, method = _best_config(plan, search, best)
            write_file(plan.folder / BEST, to_yaml(config))
            session.tracker.log_artifact(PARENT, plan.folder / BEST)
            best_uri, best_params = plan.storage.display_uri(plan.folder / BEST), format_params(best.params)
            console.print(f"best: trial {best.number}: {escape(best_params)}\n  {escape(best_uri)}", highlight=False)
            if final_run:
                accuracy = _run_pipeline(plan, session, config, method)
                session.tracker.log_metrics(PARENT, {"test_accuracy/average": accuracy}, step=0)
                console.print(
                    f"{escape(method_title(method))}, best of {pluralize(len(trials), 'trial')}: validation accuracy "
                    f"{100 * best.validation_accuracy:.1f} %, [bold]test accuracy {100 * accuracy:.1f} %[/]",
                    highlight=False,
                )
    return plan.folder


def _check_params(
    config: Config, dataset_index: DatasetIndex, methods: Sequence[str], params: Mapping[str, Any]
) -> None:
    """Raises: UserError: the values contradict each other, the model or the tasks."""
    towers = _towers(config.clip)
    config, method = trial_config(config, params, methods)
    check_methods(config, dataset_index, towers, (method,))
    if VARIANTS[method].uses_grouping:
        check_constraints(list(dataset_index.classes), **config.grouping.constraints)


_towers = cache(build_meta_towers)  # not an argument of the check, which Ray Tune pickles


def _run_trials(plan: Plan, session: Session, search: Search, planned: PlannedTrials, check: Check) -> list[Trial]:
    """Run the trials that have not ended, and return all."""
    console, state = session.console, plan.folder / "tune"
    try:
        trials = [Trial(**trial) for trial in read_record(plan.folder / RESULT)["trials"]]
        console.print(f"  cached: {pluralize(len(trials), 'trial')}", highlight=False)
        return trials
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        console.print(f"  {error}; all trials run again", style="yellow", markup=False, highlight=False)
    if planned.num_invalid and search.options.searcher != "optuna":
        message = f"skipped {pluralize(planned.num_invalid, 'invalid configuration')}, such as: {planned.reason}"
        console.print(f"  {escape(message)}", highlight=False)
    splits = make_validation_split(plan, session, search.options.validation_shots)
    checkpoints = plan.folder / "checkpoints"
    trial_plan = replace(plan, dataset_index=replace(plan.dataset_index, images=()), splits=splits)
    setup = TrialSetup(trial_plan, search.methods, checkpoints)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup),
        {"cpu": session.worker_resources.cpus, "gpu": session.worker_resources.gpus},
    )
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow has their content
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output cannot be silenced
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupt ends the job
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    TrialListener.on_change = partial(_track, session)
    tuner = _restore_tuner(plan, session, search, state, trainable) or _new_tuner(
        plan, session, search, planned, check, state, trainable
    )
    try:
        console.print("  starting the trials, whose workers import PyTorch and load CLIP ...", highlight=False)
        tuner.fit()
    except KeyboardInterrupt:
        ended = sum(trial.state != "running" for trial in TrialListener.trials)
        set_resume_point(f"the search, in which {pluralize(ended, 'trial')} had ended")
        raise
    write_record(
        plan.folder / RESULT, {"search": search.to_json(), "trials": [asdict(trial) for trial in TrialListener.trials]}
    )
    plan.storage.remove(checkpoints)
    plan.storage.remove(state)
    return TrialListener.trials


def _restore_tuner(plan: Plan, session: Session, search: Search, state: Path, trainable: Any) -> tune.Tuner | None:
    """Restore the state of an interrupted job; None if there is none."""
    filesystem, path = plan.storage.filesystem(state)
    if not tune.Tuner.can_restore(path, filesystem):
        return None
    try:
        tuner = tune.Tuner.restore(path, trainable, storage_filesystem=filesystem)
        results = tuner.get_results()
    except OSError:
        raise
    except Exception as error:  # incomplete, or of another version
        message = f"Ray Tune cannot restore the search: {error}. It starts over; trials resume from their checkpoints"
        session.console.print(f"  {message}", style="yellow", markup=False, highlight=False)
        plan.storage.remove(state)
        return None
    message = f"resumed: {results.num_terminated + results.num_errors} trials had ended"
    if search.options.early_stopping != "none":
        message += "; early stopping ignores their results"
    session.console.print(f"  {message}", highlight=False)
    return tuner


def _new_tuner(
    plan: Plan, session: Session, search: Search, planned: PlannedTrials, check: Check, state: Path, trainable: Any
) -> tune.Tuner:
    options, is_optuna = search.options, search.options.searcher == "optuna"
    numbered = [{"number": number, "params": params} for number, params in enumerate(planned.params)]
    filesystem, path = plan.storage.filesystem(state.parent)
    return tune.Tuner(
        trainable,
        param_space={} if is_optuna else {"trial": tune.grid_search(numbered)},
        tune_config=tune.TuneConfig(
            num_samples=(options.trials or 1) if is_optuna else 1,
            search_alg=UniqueOptunaSearch(search, check) if is_optuna else None,
            scheduler=early_stopping(search, plan.config),
            # Unlimited, Optuna would suggest many trials before it has any result.
            max_concurrent_trials=max(1, num_slots(session.worker_resources)) if is_optuna else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[TrialListener()],
            failure_config=tune.FailureConfig(max_failures=plan.config.cluster.max_retries),
            verbose=0,
        ),
    )


def _track(session: Session, trial: Trial) -> None:
    """Report a trial to MLflow and, when it has ended, to the console."""
    label = f"trial {trial.number}"
    # With the params: after an interruption, a number lost from Ray Tune's state may be used again.
    tracker, name = session.tracker, f"{label} {content_hash(trial.params)}"
    tags = {"level": "trial", "trial": trial.number, "mlflow.runName": label}
    tracker.start_run(name, parent=PARENT, tags=tags, params=trial.params)
    if trial.accuracy:
        metrics = {f"{METRIC}/{task}": value for task, value in trial.accuracy.items()}
        metrics |= {f"{METRIC}/average": trial.validation_accuracy, "trained_parameters": trial.trained_parameters}
        tracker.log_metrics(name, metrics, step=trial.epochs)
    if trial.state == "running":
        return
    tracker.set_tags(name, {"state": trial.state, **({"error": trial.error} if trial.error else {})})
    tracker.end_run(name, "FAILED" if trial.state == "failed" else "FINISHED")
    message = f"failed: {trial.error}"
    if trial.state != "failed":
        message = f"{100 * trial.validation_accuracy:.1f} % after {trial.epochs} epochs, {trial.state}"
    session.console.print(f"  {label}: {escape(message)} · {escape(format_params(trial.params))}", highlight=False)


def _report(plan: Plan, session: Session, search: Search, trials: Sequence[Trial]) -> Trial:
    """Write and print the trials, and return the best.

    Raises:
        UserError: no trial completed.
    """
    folder, name = plan.folder, f"{plan.config.name}: {pluralize(len(trials), 'trial')}"
    session.console.print(
        trials_table(
            search, trials, f"{name}, {pluralize(search.options.validation_shots, 'validation image')} per class"
        )
    )
    write_file(folder / "trials.csv", trials_to_csv(search, plan.tasks, trials))
    search_figure(search, trials).savefig(folder / "trials.png", dpi=150)
    for file in ("trials.csv", "trials.png"):
        session.tracker.log_artifact(PARENT, folder / file)
    best = best_trial(trials)
    if best is None:
        error = next((trial.error for trial in trials if trial.error), "all were pruned")
        raise UserError(
            f"no trial of {len(trials)} completed: {error}. See {plan.storage.display_uri(folder / 'trials.csv')}"
        )
    session.tracker.log_metrics(PARENT, {f"{METRIC}/best": best.validation_accuracy}, step=0)
    return best


def _best_config(plan: Plan, search: Search, best: Trial) -> tuple[Config, str]:
    """Return the pipeline's config with the best params, its report including the best method; and that method."""
    config, method = trial_config(plan.config, best.params, search.methods)
    if method not in (*DEFAULT_VARIANTS, *config.baselines):
        config = config.model_copy(update={"baselines": (*config.baselines, method)})
    return config, method


def _run_pipeline(search: Plan, session: Session, config: Config, method: str) -> float:
    """Run all stages with all training images; return the method's mean test accuracy over tasks, 0 to 1."""
    plan = make_plan(config, session.console)
    with run_session(plan, session.connect, session.console) as pipeline_session:
        pipeline_session.tracker.set_tags(PARENT, {"search": search.folder.name})
        report = run_stages(plan, pipeline_session)["report"]
    accuracy: float = read_record(report / "summary.json")["methods"][method]["average"]
    return accuracy
