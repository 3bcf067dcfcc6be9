"""Stage 6: the report, which compares the methods in the terminal, as HTML, JSON and Parquet, and in MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline.config import content_hash, to_yaml
from pipeline.data.image_stats import thumbnail
from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.names import pluralize, split_synonyms
from pipeline.data.parquet import SplitReader
from pipeline.files import DamagedFile, create_folder, file_digests, read_record, write_file, write_record
from pipeline.grouping.text import describe_candidates, format_groups
from pipeline.methods.adapter_file import load_adapter, merge_adapters, save_adapter
from pipeline.methods.registry import VARIANTS, get_method, training_config
from pipeline.report.metrics import metric_of
from pipeline.report.next_steps import NextStep, format_next_steps, next_steps
from pipeline.report.recommendation import recommendation, recommended_strategy, strategy_differences
from pipeline.report.run_page import THUMBNAIL, Mistake, RunDetails, mistakes_per_task, run_page, shown_methods
from pipeline.report.scores import (
    ScoresByTask,
    TaskScores,
    read_scores,
    write_class_accuracy,
    write_class_precision,
    write_confusions,
    write_run_predictions,
)
from pipeline.report.summary import (
    Summary,
    accuracy_table,
    merge_results,
    method_title,
    result_warnings,
    to_mlflow_description,
)
from pipeline.runtime.environment import run_command, run_environment, source_name
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artifact
from pipeline.runtime.tracking.mlflow_adapter import methods_table_path, resolve_tracking_uri, without_password
from pipeline.stages.data_check import FINDINGS
from pipeline.stages.data_check import NAME as DATA_CHECK
from pipeline.stages.data_check import PAGE as DATA_PAGE
from pipeline.stages.finished_run import REPORT_PAGE, SUMMARY, write_provenance
from pipeline.stages.flow import stage_title
from pipeline.stages.group_trainings import ADAPTER, PREDICTIONS, MethodArtifacts
from pipeline.stages.grouping import FIGURES, output_files, read_grouping
from pipeline.stages.grouping_sources import SingleTasks
from pipeline.stages.plan import Plan
from pipeline.stages.splits import unused_images

NAME = "report"
ACCURACY_FIGURE = "accuracy.png"
RECORD = "report.json"
"""File of the run: key of its report, and the SHA-256 of the report's files."""


def make_report(
    plan: Plan,
    session: Session,
    global_prompt: Artifact,
    single_tasks: SingleTasks,
    grouping: Artifact,
    methods: Sequence[MethodArtifacts],
) -> Path:
    """Write <run folder>/report and <run folder>/adapters, unless those of these artifacts are there, and print the
    table; return the folder of the report."""
    folder, key = create_folder(plan.folder / "report"), _report_key(plan, grouping, methods)
    with Stage(session, NAME, stage_title(NAME)) as stage:
        stage.computed = not _is_current(plan, key)
        if stage.computed:
            _merge_adapters(plan, methods)
            copy_grouping_pages(grouping, folder)
            scores = write_scores(plan, methods, folder)
    if stage.computed:  # the page shows the seconds of this stage too
        summary = _summarize(plan, session, grouping, methods, scores)
        write_record(plan.folder / SUMMARY, vars(summary))
        steps = next_steps_after(plan, session)
        write_run_page(plan, summary, scores, steps)
        write_record(plan.folder / RECORD, {"key": key, "files": _digests(plan)})
    else:
        summary, steps = Summary(**read_record(plan.folder / SUMMARY)), next_steps_after(plan, session)

    adapter_files = [file for _, file in _adapter_files(plan, methods)]
    track_results(plan, session, summary.methods, {method.name: method.groups for method in methods})
    session.tracker.set_tags(PARENT, {"mlflow.note.content": to_mlflow_description(summary)})
    session.tracker.log_metrics(PARENT, {f"seconds/{name}": value for name, value in summary.stages.items()}, step=0)
    session.tracker.log_artifact(PARENT, folder)
    for file in adapter_files:
        session.tracker.log_artifact(PARENT, file, "adapters")
    register_model(plan, session, adapter_files[-1])
    session.console.print(accuracy_table(summary))
    print_notes(session, summary)
    print_outputs(plan, session, adapter_files[-1], steps)
    write_provenance(plan, [global_prompt], single_tasks)
    return folder


def _report_key(plan: Plan, grouping: Artifact, methods: Sequence[MethodArtifacts]) -> str:
    """Return a hash of all that a report is made from: config, place of the run, artifacts, and the code."""
    artifacts = {method.name: [artifact.key for artifact in method.artifacts] for method in methods}
    package = Path(__file__).resolve().parent.parent
    shown = [to_yaml(plan.config), plan.storage.display_uri(plan.folder)]
    return content_hash([plan.key, shown, grouping.key, artifacts, file_digests(package, "**/*.py")])


def _is_current(plan: Plan, key: str) -> bool:
    """Return whether the run's folder has the files of the report with this key, as they were written."""
    try:
        return read_record(plan.folder / RECORD) == {"key": key, "files": _digests(plan)}
    except (FileNotFoundError, DamagedFile):
        return False


def _digests(plan: Plan) -> dict[str, dict[str, str]]:
    return {name: file_digests(plan.folder / name) for name in ("report", "adapters")}


def _summarize(
    plan: Plan,
    session: Session,
    grouping: Artifact,
    methods: Sequence[MethodArtifacts],
    scores: Mapping[str, ScoresByTask],
) -> Summary:
    result, differences = read_grouping(grouping), strategy_differences(scores)
    return Summary(
        name=plan.config.name,
        tasks=plan.tasks,
        groups=result["groups"],
        stages=dict(session.stage_seconds),
        methods={method.name: merge_results(method.results(), plan.num_test_images) for method in methods},
        shots=plan.config.data.shots,
        seed=plan.config.seed,
        clip=f"{plan.config.clip.model}, weights {plan.config.clip.pretrained or 'random'}",
        warnings=[*result_warnings(scores), *result["warnings"]],
        num_test_images=plan.num_test_images,
        differences={
            name: {rival: estimate._asdict() for rival, estimate in row.items()} for name, row in differences.items()
        },
        recommended=recommended_strategy(differences, result["groups"]),
        conclusion=recommendation(differences, result["groups"]),
        grouping=describe_candidates(result["candidates"]),
    )


def write_scores(plan: Plan, methods: Sequence[MethodArtifacts], folder: Path) -> dict[str, ScoresByTask]:
    """Return method → task → scores, and write all predictions, the accuracy of each class and the confusions (or with
    data.multi_label the average precision of each class) to a report as Parquet."""
    description = plan.split_description
    class_names = {task: [split_synonyms(name)[0] for name in description.class_names_for(task)] for task in plan.tasks}
    files = {method.name: [artifact.download() / PREDICTIONS for artifact in method.artifacts] for method in methods}
    scores = {name: read_scores(method_files, class_names) for name, method_files in files.items()}
    write_run_predictions(folder / PREDICTIONS, files, class_names)
    if plan.dataset_index.multi_label:
        write_class_precision(folder / "class_precision.parquet", scores)
    else:
        write_class_accuracy(folder / "class_accuracy.parquet", scores)
        write_confusions(folder / "confusions.parquet", scores)
    return scores


def write_run_page(
    plan: Plan,
    summary: Summary,
    scores: Mapping[str, ScoresByTask],
    steps: Sequence[NextStep],
    comparison: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the HTML page of a report and the figure of its accuracies; the report has the figures of the grouping.

    Args:
        comparison: see RunDetails, as `notes`.
    """
    from pipeline.report.summary_figures import accuracy_figure  # matplotlib

    folder = plan.folder / "report"
    accuracy_figure(summary.tasks, summary.methods).savefig(folder / ACCURACY_FIGURE, dpi=150)
    reader = SplitReader(plan.splits.download())
    counts = {split: sum(by_task.values()) for split, by_task in reader.description.counts.items()}
    findings_file = plan.folder / DATA_CHECK / FINDINGS
    findings = read_record(findings_file)["findings"] if findings_file.is_file() else []
    details = RunDetails(
        title_facts=(
            datetime.now().strftime("%Y-%m-%d %H:%M"),
            f"CLIP {summary.clip}",
            f"{counts['train']:,} training and {counts['test']:,} test images of {pluralize(len(plan.tasks), 'task')}",
            f"seed {summary.seed}",
        ),
        accuracy_figure=(folder / ACCURACY_FIGURE).read_bytes(),
        grouping_figures={
            name.removesuffix(".png").replace("_", " "): (folder / name).read_bytes() for name in FIGURES
        },
        skipped=unused_images(reader),
        findings=[f"{finding['severity']}: {finding['title']}" for finding in findings],
        data_page=f"../{DATA_CHECK}/{DATA_PAGE}",
        next_steps=steps,
        command=without_password(run_command()),
        config=without_password(to_yaml(plan.config)),
        versions=run_environment(),
        comparison=comparison,
        notes=notes,
    )
    write_file(plan.folder / REPORT_PAGE, run_page(summary, scores, find_mistakes(reader, summary, scores), details))


def find_mistakes(
    reader: SplitReader, summary: Summary, scores: Mapping[str, ScoresByTask]
) -> dict[tuple[str, str], list[Mistake]]:
    """Return (task, method) → its most confident mistakes, with thumbnails, for the methods that the page shows; none
    where images may have several labels."""
    methods = shown_methods(summary)
    tasks = list(scores[methods[0]])
    limit = mistakes_per_task(len(tasks), len(methods))
    mistakes = {}
    for task in tasks:
        scores_by_method = {
            method: value for method in methods if isinstance(value := scores[method][task], TaskScores)
        }
        positions = {method: task_scores.worst_mistakes(limit) for method, task_scores in scores_by_method.items()}
        rows = reader.rows_at("test", task, sorted(set(chain(*positions.values()))), ("path", "image"))
        thumbnails = {position: _thumbnail(row["image"]) for position, row in rows.items()}
        for method, task_scores in scores_by_method.items():
            names = task_scores.class_names
            mistakes[task, method] = [
                Mistake(
                    rows[position]["path"],
                    names[task_scores.labels[position]],
                    names[task_scores.predicted[position]],
                    float(task_scores.probabilities[position]),
                    thumbnails[position],
                )
                for position in positions[method]
            ]
    return mistakes


def _thumbnail(image: bytes) -> bytes:
    try:
        return thumbnail(decode_rgb(image), THUMBNAIL)
    except BrokenImage:  # by the limits of this version, where a cached evaluation is of an older one
        return b""


def next_steps_after(plan: Plan, session: Session) -> list[NextStep]:
    """Return what a user may do with the run."""
    session.tracker.flush(timeout_s=5)  # the experiment's id is known when MLflow was reached
    experiment_id = session.tracker.experiment_id
    root, task = plan.dataset_index.root, plan.tasks[0]
    images = None
    if isinstance(root, Path):  # no stage but the first two needs a bucket
        images = root / task if (root / task).is_dir() else root / plan.dataset_index.images[0].path
    return next_steps(
        plan.storage.display_uri(plan.folder),
        plan.config.name,
        task,
        [str(images) if images and images.exists() else "IMAGES"],
        resolve_tracking_uri(plan.config.tracking.uri, plan.storage.folder),
        methods_table_path(experiment_id) if experiment_id else None,
        takes_tasks=not plan.dataset_index.multi_label,
    )


def print_notes(session: Session, summary: Summary) -> None:
    """Print what the table does not say: how sure the numbers are, and what is wrong with them."""
    session.console.print(
        "± is the standard error of the test set; differences are compared image by image", style="dim", highlight=False
    )
    for sentence in (summary.conclusion, summary.grouping):
        if sentence:
            session.console.print(sentence, markup=False, highlight=False)
    for warning in summary.warnings:
        session.console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def print_outputs(plan: Plan, session: Session, adapter_file: Path, steps: Sequence[NextStep]) -> None:
    """Print where the report and the main adapter are, and what a user may do with them."""
    display_uri = plan.storage.display_uri
    lines = [f"report: {display_uri(plan.folder / REPORT_PAGE)}", f"adapter: {display_uri(adapter_file)}"]
    session.console.print("\n".join([*lines, "", format_next_steps(steps)]), markup=False, highlight=False)


def copy_grouping_pages(grouping: Artifact, folder: Path) -> None:
    """Copy figures and page of the grouping to a report."""
    for name in output_files(grouping):
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
        results: method → `method_result`.
        groups: method → the tasks that trained together.
    """
    for method, result in results.items():
        metric_name = metric_of(result)
        values = {
            metric_name: {**result[metric_name], "average": result["average"]},
            "test_loss": {**result["test_loss"], "average": result["average_test_loss"]},
        }
        parameters = result["trained_parameters"]
        session.tracker.log_metrics(
            PARENT,
            {
                f"{metric}/{method}/{task}": value
                for metric, by_task in values.items()
                for task, value in by_task.items()
            }
            | {f"trained_parameters/{method}": parameters},
            step=0,
        )
        title, config, kind = method_title(method), plan.config, VARIANTS[method].method
        shots = pluralize(config.data.shots, "shot")
        name = f"method: {title}"
        session.tracker.start_run(
            name,
            tags={
                "mlflow.runName": f"{title} ({shots}, seed {config.seed}, {plan.key[:6]})",
                "mlflow.source.name": source_name(),
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
                "learning_rate": training_config(kind, config).learning_rate if get_method(kind).takes_steps else 0,
            },
        )
        session.tracker.log_metrics(
            name,
            {f"{metric}/{task}": value for metric, by_task in values.items() for task, value in by_task.items()}
            | {"trained_parameters": parameters},
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


def _merge_adapters(plan: Plan, methods: Sequence[MethodArtifacts]) -> None:
    """Write one adapter file per trained method, with all its groups."""
    create_folder(plan.folder / "adapters")
    for method, file in _adapter_files(plan, methods):
        parts = [artifact.download() / ADAPTER for artifact in method.artifacts]
        save_adapter(file, merge_adapters([load_adapter(part) for part in parts]))


def _adapter_files(plan: Plan, methods: Sequence[MethodArtifacts]) -> list[tuple[MethodArtifacts, Path]]:
    """Return the trained methods, each with its adapter file."""
    trained = [method for method in methods if get_method(VARIANTS[method.name].method).has_parameters()]
    return [(method, plan.folder / "adapters" / f"{method.name}.safetensors") for method in trained]
