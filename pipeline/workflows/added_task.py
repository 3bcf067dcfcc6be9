"""Addition of a task to a finished run: its gradients on that run's global prompt decide which group it joins, or that
it forms its own; then its task prompt is trained. Images and prompts of the existing tasks are not touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Config
from pipeline.data.parquet import SplitReader
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.files import create_folder, read_record, write_record
from pipeline.grouping.affinities import Features, Gradient, Transfer
from pipeline.grouping.search.constraints import check_constraints
from pipeline.grouping.text import format_groups
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, merge_adapters, save_adapter
from pipeline.methods.mmap import SharedMmap
from pipeline.methods.registry import training_config
from pipeline.prediction.options import GROUPED_ADAPTER, ModelOptions, read_options, write_options
from pipeline.report.added_task import AddedTask, added_task_cells, added_task_notes, added_task_table
from pipeline.report.summary import result_warnings
from pipeline.runtime.progress import Reporter
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.finished_run import SUMMARY, FinishedRun, write_provenance
from pipeline.stages.flow import run_stages, stage_title
from pipeline.stages.global_prompt import NAME as GLOBAL_PROMPT
from pipeline.stages.global_prompt import POINTS, SNAPSHOTS
from pipeline.stages.group_trainings import ADAPTER, MethodArtifacts, train_added_task
from pipeline.stages.grouping import assign_task, read_grouping, with_fixed_groups
from pipeline.stages.grouping_sources import GroupingSources
from pipeline.stages.plan import Plan, check_single_label, make_plan
from pipeline.stages.report import NAME as REPORT
from pipeline.stages.report import (
    copy_grouping_pages,
    next_steps_after,
    print_notes,
    print_outputs,
    register_model,
    track_results,
    write_run_page,
    write_scores,
)
from pipeline.stages.run import connect_cluster, run_session
from pipeline.stages.single_tasks import train_single_tasks
from pipeline.stages.training_spec import TrainingSpec, training_inputs
from pipeline.training.batches import load_training_sets
from pipeline.training.gradient_replay import replay_gradients
from pipeline.training.snapshots import read_trajectory, write_snapshots

NAME = "task_gradients"


@dataclass(frozen=True)
class TaskAddition:
    """Plan of the new task alone, the finished run, and, for comparison, the plan of a run with all tasks."""

    plan: Plan
    finished: FinishedRun
    rerun: Plan | None

    @property
    def task(self) -> str:
        return self.plan.tasks[0]


def add_task(finished: FinishedRun, config: Config, task: str, rerun: bool, console: Console) -> Path:
    """Add a task and return the new run's folder.

    Args:
        config: the finished run's config, with the location of the new task's images.
        task: name of its folder.
        rerun: whether to also retrain all tasks together, for comparison.

    Raises:
        UserError: as a run; the run already has the task; options differ from those of the run's prompts.
    """
    console.print(f"[bold]{config.name}[/]: checking data, model, storage, tracking and cluster", highlight=False)
    addition = plan_addition(finished, config, task, rerun, console)
    with connect_cluster(addition.plan, console) as connect:
        connect()
        with run_session(addition.plan, connect, console) as session:
            _add(addition, session)
    return addition.plan.folder


def plan_addition(finished: FinishedRun, config: Config, task: str, rerun: bool, console: Console) -> TaskAddition:
    """Plan the addition, without a cluster."""
    if task in finished.tasks:
        raise UserError(f"--task {task} is already in the run; its tasks are {', '.join(finished.tasks)}")
    check_single_label(config, "mmap-clip add-task")
    config = config.model_copy(update={"storage": finished.storage.uri, "baselines": ()})
    _check_compatible(config, finished.adapter)
    plan = make_plan(
        _for_tasks(config, [task]),
        console,
        extra_key_inputs={
            "joins": finished.adapter.digest,
            "snapshots": [artifact.key for artifact in finished.snapshots],
            "losses": [artifact.key for artifact in finished.single_tasks.losses],
        },
        other_tasks=finished.tasks,
    )
    # What is cheap, and what decides; a training of the task alone only where it does.
    measured = {Gradient.name, Features.name, config.grouping.affinity}
    plan = replace(plan, affinities=tuple(name for name in plan.affinities if name in measured))
    num_images = _check_transfer(finished) if Transfer.name in measured else 0
    trained_clip = finished.snapshots[0].inputs["clip"]
    if trained_clip != vars(plan.clip):
        raise UserError(
            f"clip.model={config.clip.model}, clip.pretrained={config.clip.pretrained} differs from the run's CLIP: "
            "use the weights that the run was trained with"
        )
    check_constraints(
        sorted([*finished.tasks, task]), **with_fixed_groups(config.grouping, finished.groups).constraints
    )
    for line in plan.grouping_costs(len(finished.tasks), num_images):
        console.print(f"  {line}", markup=False, highlight=False)
    rerun_plan = make_plan(_for_tasks(config, sorted([*finished.tasks, task])), console) if rerun else None
    return TaskAddition(plan, finished, rerun_plan)


def _check_transfer(finished: FinishedRun) -> int:
    """Check that the existing tasks' images and prompts are in the storage; return the number of their training images.

    Raises:
        UserError: a task was not trained alone, or an artifact is missing.
    """
    single = finished.single_tasks
    if missing := [task for task in finished.tasks if task not in single.adapters]:
        raise UserError(
            f"grouping.affinity=transfer needs every task trained alone, and {', '.join(missing)} was added by another "
            "affinity: set --grouping.affinity features or gradient, or run mmap-clip full-pipeline with all tasks"
        )
    finished.require([*single.adapters.values(), *single.splits], finished.storage.display_uri(finished.folder))
    descriptions = [SplitReader(splits.download("splits.json")).description for splits in single.splits]
    return sum(sum(description.counts["train"].values()) for description in descriptions)


def _for_tasks(config: Config, tasks: Sequence[str]) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"tasks": tuple(tasks)})})


def _check_compatible(config: Config, adapter: TrainedAdapter) -> None:
    """Raises: UserError: an option differs from the value that the run's prompts were trained with."""
    for name, section, trained_section in (
        ("mmap", config.mmap, adapter.config.mmap),
        ("clip", config.clip, adapter.config.clip),
    ):
        ignored = {"pretrained", "precision", "activation_memory_gib", "task_templates"}
        values, trained_values = (options.model_dump(exclude=ignored) for options in (section, trained_section))
        for field in values:
            is_recorded = field in Preprocessing.__dataclass_fields__ and values[field] is None
            if values[field] != trained_values[field] and not is_recorded:
                raise UserError(
                    f"{name}.{field}={values[field]}: the run's prompts were trained with {trained_values[field]}, "
                    "which the new task must use too; remove that option"
                )
    for task in adapter.class_names:
        if (template := config.clip.template_for(task)) != (trained := adapter.config.clip.template_for(task)):
            raise UserError(
                f"clip.task_templates: {task} has {template!r}, but the run's prompts were trained with {trained!r}; "
                "give only the new task's template"
            )


def _add(addition: TaskAddition, session: Session) -> None:
    plan, finished = addition.plan, addition.finished
    session.tracker.set_tags(PARENT, {"added_task": addition.task, "joins_run": finished.folder.name})
    run_stages(plan, session, "splits")
    gradients = measure_gradients(plan, session, finished.snapshots[0])
    added = train_single_tasks(plan, session, finished.single_tasks)
    assert added is not None  # its features are always measured
    single_tasks = finished.single_tasks + added
    snapshots = {tuple(artifact.inputs["tasks"]): artifact for artifact in (*finished.snapshots, gradients)}
    sources = GroupingSources(snapshots, single_tasks.losses)
    grouping = assign_task(plan, session, sources, finished.groups, plan.config.grouping)
    groups = read_grouping(grouping)["groups"]
    group_mates = next([name for name in group if name != addition.task] for group in groups if addition.task in group)
    trained = train_added_task(plan, session, finished.adapter.select_group(group_mates[0]) if group_mates else None)
    adapter = _merge_adapters(plan, finished, trained)
    rerun_summary = None
    if addition.rerun:
        with run_session(addition.rerun, session.connect, session.console) as rerun_session:
            run_stages(addition.rerun, rerun_session)
        rerun_summary = read_record(addition.rerun.folder / SUMMARY)
    _report(addition, session, grouping, trained, adapter, rerun_summary)
    write_provenance(plan, [*finished.snapshots, gradients], single_tasks)


def measure_gradients(plan: Plan, session: Session, global_prompt: Artifact) -> Artifact:
    """Compute the new task's gradients at each point of a global prompt's trajectory."""
    inputs = training_inputs(plan, "mmap", plan.tasks, "training")
    artifact = plan.artifact(NAME, {**inputs, "tasks": plan.tasks, "at": global_prompt.key})
    spec = TrainingSpec(plan.config, plan.splits, tuple(plan.tasks), "gradients of the new task")
    with Stage(session, NAME, stage_title(GLOBAL_PROMPT, "gradients on the global prompt")) as stage:
        arguments = (spec, global_prompt, artifact)
        stage.execute([WorkItem(spec.label, _measure, arguments, artifact, uses_gpu=True)])
    return artifact


def _measure(spec: TrainingSpec, global_prompt: Artifact, artifact: Artifact, progress: Any) -> None:
    config, towers, reporter = spec.config, spec.towers(), Reporter(progress, spec.label)
    prompts = SharedMmap.build(config, towers, spec.tasks).to(towers.device)
    tokens = SharedMmap.tokenize(config, towers.tokenizer, spec.class_names()).to(towers.device)
    points = read_trajectory(global_prompt.download() / POINTS)
    training, threads = training_config(spec.method, config), config.cluster.cpus_per_worker
    (images,) = load_training_sets(
        spec.reader(), spec.tasks, towers.preprocessing, training.augmentation.random_crop, towers.device, threads
    )
    with artifact.writer() as writer:
        snapshots = replay_gradients(
            towers,
            prompts,
            images,
            tokens,
            points,
            training,
            config.seed,
            config.clip.precision,
            lambda count: reporter.update(count, len(points), "snapshots"),
        )
        write_snapshots(writer.folder / SNAPSHOTS, spec.tasks, snapshots, prompts.gradient_layout())


def _merge_adapters(plan: Plan, finished: FinishedRun, trained: Sequence[MethodArtifacts]) -> Path:
    """Write an adapter with the finished run's groups unchanged and the new task as its own group in the file, so that
    the computation for existing tasks does not change."""
    (task_artifact,) = (method.artifacts[0] for method in trained if method.name == "grouped")
    file = plan.folder / GROUPED_ADAPTER
    create_folder(file.parent)
    save_adapter(file, merge_adapters([finished.adapter, load_adapter(task_artifact.download() / ADAPTER)]))
    if (options := read_options(finished.folder / GROUPED_ADAPTER)) != ModelOptions():
        write_options(file, options)  # temperatures of the existing tasks, which belong to the file
    return file


def _report(
    addition: TaskAddition,
    session: Session,
    grouping: Artifact,
    trained: Sequence[MethodArtifacts],
    adapter: Path,
    rerun_summary: dict[str, Any] | None,
) -> None:
    plan = addition.plan
    folder = create_folder(plan.folder / "report")
    with Stage(session, REPORT, stage_title(REPORT)) as stage:
        stage.computed = True
        copy_grouping_pages(grouping, folder)
        scores = write_scores(plan, trained, folder)
    results = {method.name: method.results()[0] for method in trained}
    added = AddedTask(
        finished=addition.finished.summary,
        task=addition.task,
        groups=read_grouping(grouping)["groups"],
        zero_shot=results["zero_shot"]["accuracy"][addition.task],
        accuracy=results["grouped"]["accuracy"][addition.task],
        zero_shot_test_loss=results["zero_shot"]["test_loss"][addition.task],
        test_loss=results["grouped"]["test_loss"][addition.task],
        trained_parameters=results["grouped"]["trained_parameters"],
        num_test_images=plan.num_test_images[addition.task],
        stages=dict(session.stage_seconds),
        warnings=result_warnings(scores),
        rerun=rerun_summary,
    )
    summary, steps = added.summary(), next_steps_after(plan, session)
    write_record(folder / "summary.json", vars(summary))
    write_run_page(plan, summary, scores, steps, added_task_cells(added), added_task_notes(added))
    track_results(plan, session, summary.methods, {"zero_shot": [summary.tasks], "grouped": summary.groups})
    session.tracker.log_artifact(PARENT, folder)
    session.tracker.log_artifact(PARENT, adapter, "adapters")
    register_model(plan, session, adapter)
    session.console.print(added_task_table(added))
    print_notes(session, summary)
    session.console.print(f"groups: {format_groups(added.groups)}", markup=False, highlight=False)
    print_outputs(plan, session, adapter, steps)
