"""Grouping study: train every possible group, and compare the results of all partitions with what predicts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.config import Config, content_hash
from pipeline.data.names import pluralize
from pipeline.errors import UserError
from pipeline.files import create_folder, write_file
from pipeline.grouping.affinities import AFFINITIES, SIMILARITIES, Gradient
from pipeline.grouping.study import SIGNS, GroupingStudy, study_grouping
from pipeline.report.grouping_study import (
    FIGURES,
    pair_gains_figure,
    pair_gains_to_csv,
    study_figure,
    study_to_csv,
    study_to_html,
    study_to_markdown,
)
from pipeline.runtime.session import PARENT, Session
from pipeline.stages.flow import run_stages
from pipeline.stages.group_trainings import train_every_group
from pipeline.stages.grouping_sources import GroupingSources
from pipeline.stages.measures import MEASURES
from pipeline.stages.plan import Plan, check_single_label
from pipeline.stages.run import connect_cluster
from pipeline.workflows.many_runs import make_plans, map_concurrently

MAX_TASKS = 8
"""255 trainings per seed, and 4,140 partitions."""


def run_grouping_study(configs: Sequence[Config], console: Console) -> Path:
    """Write the study of all seeds; return its folder.

    Raises:
        UserError: a single task, or more than MAX_TASKS; and the errors of the pipeline.
    """
    check_single_label(configs[0], "mmap-clip grouping-study")
    name, plans = configs[0].name, make_plans(configs, console)
    tasks, storage = plans[0].tasks, plans[0].storage
    trainings = pluralize(2 ** len(tasks) - 1, "training")
    if not 2 <= len(tasks) <= MAX_TASKS:
        raise UserError(
            f"a study of {pluralize(len(tasks), 'task')} takes {trainings} per seed; "
            f"choose 2 to {MAX_TASKS} tasks with data.tasks"
        )
    console.print(
        f"every group of {pluralize(len(tasks), 'task')} for {pluralize(len(plans), 'seed')}: {trainings} per seed, "
        f"{len(plans) * (2 ** len(tasks) - 1):,} in all; those that the storage has are not repeated",
        highlight=False,
    )
    key = content_hash([plan.key for plan in plans])
    folder = create_folder(storage.folder / "grouping_studies" / f"{name}-{key}")
    with connect_cluster(plans[0], console) as connect:
        studies = {}
        for plan, outcome in map_concurrently(plans, connect, _study):
            if isinstance(outcome, BaseException):
                raise outcome
            studies[plan.config.seed] = outcome
    markdown = write_study(folder, plans[0].config, tasks, studies)
    console.print(markdown, markup=False, highlight=False)
    storage.upload(folder)
    console.print(f"report: {storage.display_uri(folder / 'grouping_study.html')}", markup=False, highlight=False)
    return folder


def write_study(folder: Path, config: Config, tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> str:
    """Write page, Markdown, tables and figures; return the Markdown."""
    grouping = config.grouping
    config_title = f"{_title(grouping.affinity, grouping.gradient_similarity)}, {grouping.objective}"
    for file, figure in zip(FIGURES, (study_figure(studies), pair_gains_figure(tasks, studies)), strict=True):
        for path in (folder / file, (folder / file).with_suffix(".svg")):
            figure.savefig(path, dpi=150)
    markdown = study_to_markdown(config.name, tasks, studies, config_title)
    figures = {file: (folder / file).read_bytes() for file in FIGURES}
    write_file(folder / "grouping_study.md", markdown)
    write_file(folder / "grouping_study.html", study_to_html(config.name, tasks, studies, config_title, figures))
    write_file(folder / "grouping_study.csv", study_to_csv(tasks, studies))
    write_file(folder / "pair_gains.csv", pair_gains_to_csv(tasks, studies))
    return markdown


def _study(plan: Plan, session: Session) -> GroupingStudy:
    affinities = _affinities(plan, session)
    trained = train_every_group(plan, session)
    task_to_index = {task: index for index, task in enumerate(plan.tasks)}
    results: dict[str, dict[tuple[int, ...], list[float]]] = {measure: {} for measure in SIGNS}
    for group, result in zip(trained.groups, trained.results()):
        indices = tuple(task_to_index[task] for task in group)
        for measure, by_group in results.items():
            by_group[indices] = [result[measure][task] for task in group]
    study = study_grouping(affinities, results)
    metrics = {}
    for criterion in study.criteria:
        name = f"{criterion.affinity}_{criterion.objective}".replace(" ", "_")
        for measure in SIGNS:
            metrics[f"rank_correlation/{measure}/{name}"] = study.correlations(criterion.scores, measure)[0]
    session.tracker.log_metrics(PARENT, metrics, step=0)
    return study


def _affinities(plan: Plan, session: Session) -> dict[str, np.ndarray]:
    """Return the name of every affinity, and of every similarity of gradients → (T, T)."""
    outputs = run_stages(plan, session, "single_tasks")
    sources = GroupingSources.of(outputs["global_prompt"], outputs["single_tasks"])
    affinities = {}
    for name in AFFINITIES:
        similarities = SIMILARITIES if name == Gradient.name else [plan.config.grouping.gradient_similarity]
        for similarity in similarities:
            options = plan.config.grouping.model_copy(update={"gradient_similarity": similarity})
            affinities[_title(name, similarity)] = MEASURES[name](plan.tasks, sources, options).affinity
    return affinities


def _title(affinity: str, similarity: str) -> str:
    return f"{affinity} {similarity}" if affinity == Gradient.name else affinity
