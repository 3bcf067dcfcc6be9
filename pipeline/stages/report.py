"""The report: methods side by side, in the terminal, as JSON and Markdown, and in MLflow."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import make_folder, write_atomically, write_json
from pipeline.grouping.text import format_groups
from pipeline.methods.prompt_file import load_prompts, merge_prompts, save_prompts
from pipeline.methods.registry import VARIANTS, get_method, training_of
from pipeline.report.summary import Summary, accuracy_table, method_result, title, to_markdown, to_note
from pipeline.runtime.run import PARENT, Run
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artefact
from pipeline.stages.finished_run import record_artefacts
from pipeline.stages.flow import titled
from pipeline.stages.group_trainings import PROMPTS, MethodArtefacts
from pipeline.stages.grouping import FIGURES, MORE_FIGURES, PAGE, read_grouping

NAME = "report"


def make_report(run: Run, global_prompt: Artefact, grouping: Artefact, methods: Sequence[MethodArtefacts]) -> Path:
    """Writes <run folder>/report and <run folder>/prompts, and shows the table; returns the report's folder."""
    from pipeline.report.summary_figures import accuracy_picture  # matplotlib

    folder = make_folder(run.folder / "report")
    with Stage(run, NAME, titled(NAME)) as stage:
        stage.computed = True
        result = read_grouping(grouping)
        prompts = _gather_prompts(run, methods)
        copy_grouping_pages(grouping, folder)
        results = {method.name: method_result(run.tasks, method.results()) for method in methods}
        accuracy_picture(run.tasks, results).savefig(folder / "accuracy.png", dpi=150)
    summary = Summary(
        name=run.config.name,
        tasks=run.tasks,
        groups=result["groups"],
        stages=dict(run.stage_seconds),
        methods=results,
        shots=run.config.data.shots,
        seed=run.config.seed,
        clip=f"{run.config.clip.model}, weights {run.config.clip.pretrained or 'random'}",
        warnings=result["warnings"],
    )
    write_json(folder / "summary.json", vars(summary))
    write_atomically(folder / "report.md", to_markdown(summary))

    track_results(run, results, {method.name: method.groups for method in methods})
    run.tracker.set_tags(PARENT, {"mlflow.note.content": to_note(summary)})
    run.tracker.log_metrics(PARENT, {f"seconds/{name}": value for name, value in summary.stages.items()}, step=0)
    run.tracker.log_artifact(PARENT, folder)
    for file in prompts:
        run.tracker.log_artifact(PARENT, file, "prompts")
    register_model(run, prompts[-1])
    run.console.print(accuracy_table(summary))
    where = run.storage.shown
    run.console.print(f"report: {where(folder)}\nprompts: {where(prompts[-1])}", markup=False, highlight=False)
    record_artefacts(run, [global_prompt])
    return folder


def copy_grouping_pages(grouping: Artefact, folder: Path) -> None:
    """Pictures and page of the grouping, for a report."""
    for name in (*FIGURES, *MORE_FIGURES, PAGE):
        shutil.copyfile(grouping.local() / name, folder / name)


def track_results(
    run: Run, results: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Gives the methods' results to MLflow: each one's to a run of its own, whose metrics have the same names for all
    methods, so that the page can draw a point or a line for each; and to the parent run, by name. The page folds nested
    runs away, so these are not.

    Args:
        results: method → accuracy (task → 0-1), average, trained_parameters.
        groups: method → the tasks that trained together.
    """
    for method, of_method in results.items():
        accuracies = {**of_method["accuracy"], "average": of_method["average"]}
        parameters = of_method["trained_parameters"]
        run.tracker.log_metrics(
            PARENT,
            {f"accuracy/{method}/{task}": value for task, value in accuracies.items()}
            | {f"trained_parameters/{method}": parameters},
            step=0,
        )
        name, config, kind = f"method: {title(method)}", run.config, VARIANTS[method].method
        run.tracker.start_run(
            name,
            tags={
                "mlflow.runName": f"{title(method)} ({config.data.shots} shots, seed {config.seed}, {run.key[:6]})",
                "mlflow.source.name": sys.argv[0],
                "level": "method",
                "method": method,
                "groups": format_groups(groups[method]),
                "run": run.title,
            },
            params={
                "method": title(method),
                "data": config.name,
                "shots": config.data.shots,
                "seed": config.seed,
                "clip": config.clip.model,
                "num_groups": len(groups[method]),
                "objective": config.grouping.objective,
                "affinity": config.grouping.affinity,
                # MLflow's plots draw a run that lacks a parameter beyond all that have it.
                "learning_rate": training_of(kind, config).learning_rate if get_method(kind).trained else 0,
            },
        )
        run.tracker.log_metrics(
            name,
            {f"accuracy/{task}": value for task, value in accuracies.items()} | {"trained_parameters": parameters},
            step=0,
        )
        run.tracker.end_run(name)


def register_model(run: Run, prompts: Path) -> None:
    """Makes a prompts file a version of tracking.registered_model, if that is set."""
    if not (name := run.config.tracking.registered_model):
        return
    from pipeline.prediction.mlflow_model import saved_mlflow_model  # mlflow takes seconds to import

    with saved_mlflow_model(prompts) as model:
        run.tracker.log_artifact(PARENT, model)
        run.tracker.register_model(PARENT, name, model.name)


def _gather_prompts(run: Run, methods: Sequence[MethodArtefacts]) -> list[Path]:
    """One prompts file for each trained method, all its groups in it."""
    folder = make_folder(run.folder / "prompts")
    files = []
    for method in methods:
        parts = [artefact.local() / PROMPTS for artefact in method.artefacts]
        if all(part.exists() for part in parts):
            files.append(folder / f"{method.name}.safetensors")
            save_prompts(files[-1], merge_prompts([load_prompts(part) for part in parts]))
    return files
