"""Stage 5: the report, which compares the methods in the terminal, as JSON and Markdown, and in MLflow."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import create_folder, write_file, write_json
from pipeline.grouping.text import format_groups
from pipeline.methods.adapter_file import load_adapter, merge_adapters, save_adapter
from pipeline.methods.registry import VARIANTS, get_method, training_config
from pipeline.report.summary import (
    Summary,
    accuracy_table,
    method_result,
    method_title,
    to_markdown,
    to_mlflow_description,
)
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artifact
from pipeline.stages.finished_run import write_provenance
from pipeline.stages.flow import stage_title
from pipeline.stages.group_trainings import ADAPTER, MethodArtifacts
from pipeline.stages.grouping import FIGURES, PAGE, STABILITY_FIGURES, read_grouping
from pipeline.stages.plan import Plan

NAME = "report"


def make_report(
    plan: Plan, session: Session, global_prompt: Artifact, grouping: Artifact, methods: Sequence[MethodArtifacts]
) -> Path:
    """Write <run folder>/report and <run folder>/adapters, and print the table; return the folder of the report."""
    from pipeline.report.summary_figures import accuracy_figure  # matplotlib

    folder = create_folder(plan.folder / "report")
    with Stage(session, NAME, stage_title(NAME)) as stage:
        stage.computed = True
        result = read_grouping(grouping)
        adapter_files = _merge_adapters(plan, methods)
        copy_grouping_pages(grouping, folder)
        results = {method.name: method_result(plan.tasks, method.results()) for method in methods}
        accuracy_figure(plan.tasks, results).savefig(folder / "accuracy.png", dpi=150)
    summary = Summary(
        name=plan.config.name,
        tasks=plan.tasks,
        groups=result["groups"],
        stages=dict(session.stage_seconds),
        methods=results,
        shots=plan.config.data.shots,
        seed=plan.config.seed,
        clip=f"{plan.config.clip.model}, weights {plan.config.clip.pretrained or 'random'}",
        warnings=result["warnings"],
    )
    write_json(folder / "summary.json", vars(summary))
    write_file(folder / "report.md", to_markdown(summary))

    track_results(plan, session, results, {method.name: method.groups for method in methods})
    session.tracker.set_tags(PARENT, {"mlflow.note.content": to_mlflow_description(summary)})
    session.tracker.log_metrics(PARENT, {f"seconds/{name}": value for name, value in summary.stages.items()}, step=0)
    session.tracker.log_artifact(PARENT, folder)
    for file in adapter_files:
        session.tracker.log_artifact(PARENT, file, "adapters")
    register_model(plan, session, adapter_files[-1])
    session.console.print(accuracy_table(summary))
    display_uri = plan.storage.display_uri
    session.console.print(
        f"report: {display_uri(folder)}\nadapter: {display_uri(adapter_files[-1])}", markup=False, highlight=False
    )
    write_provenance(plan, [global_prompt])
    return folder


def copy_grouping_pages(grouping: Artifact, folder: Path) -> None:
    """Copy figures and page of the grouping to a report."""
    for name in (*FIGURES, *STABILITY_FIGURES, PAGE):
        shutil.copyfile(grouping.download() / name, folder / name)


def track_results(
    plan: Plan,
    session: Session,
    results: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Sequence[Sequence[str]]],
) -> None:
    """Log the methods' results to MLflow: to one run per method, whose metrics have the same names for all methods, so
    that the UI can plot each as a point or a line; and to the parent run, by name. They are top-level runs, as the UI
    folds nested ones.

    Args:
        results: method → accuracy (task → 0-1), average, trained_parameters.
        groups: method → the tasks that trained together.
    """
    for method, result in results.items():
        accuracies = {**result["accuracy"], "average": result["average"]}
        parameters = result["trained_parameters"]
        session.tracker.log_metrics(
            PARENT,
            {f"accuracy/{method}/{task}": value for task, value in accuracies.items()}
            | {f"trained_parameters/{method}": parameters},
            step=0,
        )
        title, config, kind = method_title(method), plan.config, VARIANTS[method].method
        name = f"method: {title}"
        session.tracker.start_run(
            name,
            tags={
                "mlflow.runName": f"{title} ({config.data.shots} shots, seed {config.seed}, {plan.key[:6]})",
                "mlflow.source.name": sys.argv[0],
                "level": "method",
                "method": method,
                "groups": format_groups(groups[method]),
                "run": plan.title,
            },
            params={
                "method": title,
                "data": config.name,
                "shots": config.data.shots,
                "seed": config.seed,
                "clip": config.clip.model,
                "num_groups": len(groups[method]),
                "objective": config.grouping.objective,
                "affinity": config.grouping.affinity,
                # MLflow's plots draw a run without a parameter beyond all that have it.
                "learning_rate": training_config(kind, config).learning_rate if get_method(kind).trainable else 0,
            },
        )
        session.tracker.log_metrics(
            name,
            {f"accuracy/{task}": value for task, value in accuracies.items()} | {"trained_parameters": parameters},
            step=0,
        )
        session.tracker.end_run(name)


def register_model(plan: Plan, session: Session, adapter_file: Path) -> None:
    """Register an adapter file as a version of tracking.registered_model, if that is set."""
    if not (name := plan.config.tracking.registered_model):
        return
    from pipeline.prediction.mlflow_model import saved_mlflow_model  # mlflow takes seconds to import

    with saved_mlflow_model(adapter_file) as model:
        session.tracker.log_artifact(PARENT, model)
        session.tracker.register_model(PARENT, name, model.name)


def _merge_adapters(plan: Plan, methods: Sequence[MethodArtifacts]) -> list[Path]:
    """Write one adapter file per trained method, with all its groups."""
    folder = create_folder(plan.folder / "adapters")
    files = []
    for method in methods:
        parts = [artifact.download() / ADAPTER for artifact in method.artifacts]
        if all(part.exists() for part in parts):
            files.append(folder / f"{method.name}.safetensors")
            save_adapter(files[-1], merge_adapters([load_adapter(part) for part in parts]))
    return files
