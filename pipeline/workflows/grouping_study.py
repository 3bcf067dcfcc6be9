"""Grouping study: train every possible group, and compare the partitions' scores with their accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.config import Config, content_hash
from pipeline.data.names import pluralize
from pipeline.errors import UserError
from pipeline.files import create_folder, write_file
from pipeline.grouping.study import GroupingStudy, study_grouping
from pipeline.report.grouping_study import study_figure, study_to_csv, study_to_markdown
from pipeline.runtime.session import PARENT, Session
from pipeline.stages.flow import run_stages
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.group_trainings import train_every_group
from pipeline.stages.plan import Plan
from pipeline.stages.run import connect_cluster
from pipeline.training.snapshots import read_gradients
from pipeline.workflows.many_runs import make_plans, map_concurrently

MAX_TASKS = 8
"""255 trainings per seed, and 4,140 partitions."""


def run_grouping_study(configs: Sequence[Config], console: Console) -> Path:
    """Write the study of all seeds; return its folder.

    Raises:
        UserError: a single task, or more than MAX_TASKS; and the errors of the pipeline.
    """
    name, plans = configs[0].name, make_plans(configs, console)
    tasks, storage = plans[0].tasks, plans[0].storage
    if not 2 <= len(tasks) <= MAX_TASKS:
        raise UserError(
            f"a study of {pluralize(len(tasks), 'task')} takes {pluralize(2 ** len(tasks) - 1, 'training')} per seed; "
            f"choose 2 to {MAX_TASKS} tasks with data.tasks"
        )
    key = content_hash([plan.key for plan in plans])
    folder = create_folder(storage.folder / "grouping_studies" / f"{name}-{key}")
    with connect_cluster(plans[0], console) as resources:
        studies = {}
        for plan, outcome in map_concurrently(plans, resources, _study):
            if isinstance(outcome, BaseException):
                raise outcome
            studies[plan.config.seed] = outcome
    markdown = study_to_markdown(name, tasks, studies)
    write_file(folder / "grouping_study.md", markdown)
    write_file(folder / "grouping_study.csv", study_to_csv(tasks, studies))
    for kind in ("png", "svg"):
        study_figure(studies).savefig(folder / f"grouping_study.{kind}", dpi=150)
    console.print(markdown, markup=False, highlight=False)
    storage.upload(folder)
    console.print(f"report: {storage.display_uri(folder / 'grouping_study.md')}", markup=False, highlight=False)
    return folder


def _study(plan: Plan, session: Session) -> GroupingStudy:
    global_prompt = run_stages(plan, session, "global_prompt")["global_prompt"]
    trained = train_every_group(plan, session)
    task_to_index = {task: index for index, task in enumerate(plan.tasks)}
    accuracies_by_group = {
        tuple(task_to_index[task] for task in group): [result["accuracy"][task] for task in group]
        for group, result in zip(trained.groups, trained.results())
    }
    gradients = read_gradients(global_prompt.download() / SNAPSHOTS, plan.tasks)
    study = study_grouping(gradients, accuracies_by_group)
    session.tracker.log_metrics(
        PARENT,
        {f"rank_correlation/{item.affinity}_{item.objective}": item.rank_correlation for item in study.criteria},
        step=0,
    )
    return study
