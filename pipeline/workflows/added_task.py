"""A task joins a finished run: its gradients on that run's global prompt tell which group is the best for it, or that
it is better alone; then its own prompt is trained. Neither images nor prompts of the other tasks are touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.clip.class_tokens import class_tokens
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.files import create_folder, read_json, write_file, write_json
from pipeline.grouping.search.constraints import check_constraints
from pipeline.grouping.text import format_groups
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, merge_adapters, save_adapter
from pipeline.methods.mmap import SharedMmap
from pipeline.methods.registry import training_config
from pipeline.prediction.options import GROUPED, ModelOptions, read_options, write_options
from pipeline.report.added_task import AddedTask, added_task_table, added_task_to_markdown
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
from pipeline.stages.plan import Plan, make_plan
from pipeline.stages.report import NAME as REPORT
from pipeline.stages.report import copy_grouping_pages, register_model, track_results
from pipeline.stages.run import connect_cluster, run_session
from pipeline.stages.training_spec import TrainingSpec, training_inputs
from pipeline.training.batches import load_training_sets
from pipeline.training.gradient_replay import replay_gradients
from pipeline.training.snapshots import read_trajectory, write_snapshots

NAME = "task_gradients"


@dataclass(frozen=True)
class Joining:
    """The plan of the new task alone, the finished run that it joins, and, to compare, the plan of all of them."""

    plan: Plan
    finished: FinishedRun
    rerun: Plan | None

    @property
    def task(self) -> str:
        return self.plan.tasks[0]


def add_task(finished: FinishedRun, config: Config, task: str, rerun: bool, console: Console) -> Path:
    """Returns the new run's folder.

    Args:
        config: the finished run's, with where the new task's images are.
        task: its folder's name.
        rerun: whether all tasks are trained again with it, to compare.

    Raises:
        UserError: as a run; a task that is there already; options that the prompts were not trained with.
    """
    console.print(f"[bold]{config.name}[/]: checking data, model, storage, tracking and cluster", highlight=False)
    joining = check_joining(finished, config, task, rerun, console)
    with (
        connect_cluster(joining.plan, console) as worker_resources,
        run_session(joining.plan, worker_resources, console) as session,
    ):
        _add(joining, session)
    return joining.plan.folder


def check_joining(finished: FinishedRun, config: Config, task: str, rerun: bool, console: Console) -> Joining:
    """What needs no cluster."""
    if task in finished.tasks:
        raise UserError(f"--task {task}: the run has that task; its tasks are {', '.join(finished.tasks)}")
    config = config.model_copy(update={"storage": finished.storage.uri, "baselines": ()})
    _check_same_prompts(config, finished.adapter)
    plan = make_plan(
        _for_tasks(config, [task]),
        console,
        extra_key_inputs={"joins": finished.adapter.digest, "snapshots": [of.key for of in finished.snapshots]},
        other_tasks=finished.tasks,
    )
    trained_on = finished.snapshots[0].inputs["clip"]
    if trained_on != vars(plan.clip):
        raise UserError(
            f"clip.model={config.clip.model}, clip.pretrained={config.clip.pretrained} is another CLIP than the run's: "
            "give the weights that it was trained with"
        )
    check_constraints(
        sorted([*finished.tasks, task]), **with_fixed_groups(config.grouping, finished.groups).constraints
    )
    of_all = make_plan(_for_tasks(config, sorted([*finished.tasks, task])), console) if rerun else None
    return Joining(plan, finished, of_all)


def _for_tasks(config: Config, tasks: Sequence[str]) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"tasks": tuple(tasks)})})


def _check_same_prompts(config: Config, prompts: TrainedAdapter) -> None:
    """Raises: UserError: options of which the run's prompts are others."""
    for name, own, others in (
        ("mmap", config.mmap, prompts.config.mmap),
        ("clip", config.clip, prompts.config.clip),
    ):
        passing = {"pretrained", "precision", "activation_memory_gib", "task_templates"}
        told, trained_with = (section.model_dump(exclude=passing) for section in (own, others))
        for field in told:
            if told[field] != trained_with[field]:
                raise UserError(
                    f"{name}.{field}={told[field]}: the run's prompts were trained with {trained_with[field]}, and "
                    "the new task's must be like them; leave that option out"
                )
    for task in prompts.class_names:
        if (given := config.clip.template_for(task)) != (trained := prompts.config.clip.template_for(task)):
            raise UserError(
                f"clip.task_templates: {task} has {given!r}, the run's prompts were trained with {trained!r}; name the "
                "new task alone there"
            )


def _add(joining: Joining, session: Session) -> None:
    plan, finished = joining.plan, joining.finished
    session.tracker.set_tags(PARENT, {"added_task": joining.task, "joins_run": finished.folder.name})
    run_stages(plan, session, "splits")
    gradients = measure_gradients(plan, session, finished.snapshots[0])
    snapshots = {tuple(of.inputs["tasks"]): of for of in (*finished.snapshots, gradients)}
    grouping = assign_task(plan, session, snapshots, finished.groups, plan.config.grouping)
    groups = read_grouping(grouping)["groups"]
    others = next([name for name in group if name != joining.task] for group in groups if joining.task in group)
    trained = train_added_task(plan, session, finished.adapter.select_group(others[0]) if others else None)
    prompts = _merged_prompts(plan, finished, trained)
    beside = None
    if joining.rerun:
        with run_session(joining.rerun, session.worker_resources, session.console) as of_all:
            run_stages(joining.rerun, of_all)
        beside = read_json(joining.rerun.folder / SUMMARY)
    _report(joining, session, grouping, trained, prompts, beside)
    write_provenance(plan, [*finished.snapshots, gradients])


def measure_gradients(plan: Plan, session: Session, global_prompt: Artifact) -> Artifact:
    """The run's task's gradients at the points of a global prompt's snapshots."""
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
    templates = [config.clip.template_for(task) for task in spec.tasks]
    tokens = class_tokens(towers.tokenizer, templates, list(spec.class_names().values())).to(towers.device)
    points = read_trajectory(global_prompt.download() / POINTS)
    (images,) = load_training_sets(
        spec.reader(), spec.tasks, towers.image_size, towers.device, config.cluster.cpus_per_worker
    )
    with artifact.writer() as writer:
        snapshots = replay_gradients(
            towers,
            prompts,
            images,
            tokens,
            points,
            training_config(spec.method, config),
            config.seed,
            config.clip.precision,
            lambda done: reporter.update(done, len(points), "snapshots"),
        )
        write_snapshots(writer.folder / SNAPSHOTS, spec.tasks, snapshots, prompts.gradient_layout())


def _merged_prompts(plan: Plan, finished: FinishedRun, trained: Sequence[MethodArtifacts]) -> Path:
    """The finished run's prompts as they are, and the new task's as a group of its own in the file, so that nothing of
    the others is computed otherwise than before."""
    (of_task,) = (method.artifacts[0] for method in trained if method.name == "grouped")
    file = plan.folder / GROUPED
    create_folder(file.parent)
    save_adapter(file, merge_adapters([finished.adapter, load_adapter(of_task.download() / ADAPTER)]))
    if (options := read_options(finished.folder / GROUPED)) != ModelOptions():
        write_options(file, options)  # temperatures of the tasks before; they are bound to the file
    return file


def _report(
    joining: Joining,
    session: Session,
    grouping: Artifact,
    trained: Sequence[MethodArtifacts],
    prompts: Path,
    beside: dict[str, Any] | None,
) -> None:
    plan, before = joining.plan, joining.finished.summary
    folder = create_folder(plan.folder / "report")
    with Stage(session, REPORT, stage_title(REPORT)) as stage:
        stage.computed = True
        copy_grouping_pages(grouping, folder)
    results = {method.name: method.results()[0] for method in trained}
    added = AddedTask(
        before=before,
        task=joining.task,
        groups=read_grouping(grouping)["groups"],
        zero_shot=results["zero_shot"]["accuracy"][joining.task],
        accuracy=results["grouped"]["accuracy"][joining.task],
        trained_parameters=results["grouped"]["trained_parameters"],
        stages=dict(session.stage_seconds),
        rerun=beside,
    )
    summary = added.summary()
    write_json(folder / "summary.json", vars(summary))
    write_file(folder / "report.md", added_task_to_markdown(added))
    track_results(plan, session, summary.methods, {"zero_shot": [summary.tasks], "grouped": summary.groups})
    session.tracker.log_artifact(PARENT, folder)
    session.tracker.log_artifact(PARENT, prompts, "adapters")
    register_model(plan, session, prompts)
    session.console.print(added_task_table(added))
    where = plan.storage.display_uri
    session.console.print(
        f"groups: {format_groups(added.groups)}\nreport: {where(folder)}\nprompts: {where(prompts)}",
        markup=False,
        highlight=False,
    )
