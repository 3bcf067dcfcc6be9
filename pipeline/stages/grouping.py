"""Stage 3: gradient snapshots → affinities → the best partition and its stability (JSON, figures, HTML)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import GroupingConfig, values_affecting
from pipeline.files import read_json, write_record
from pipeline.grouping.text import format_groups
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artifact
from pipeline.stages.finished_run import GROUPING
from pipeline.stages.flow import stage_title
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.plan import Plan

NAME = "grouping"
FORMAT = 2
"""Of grouping.json and the page."""
FIGURES = ("affinity_heat_map.png", "affinity_graph.png")
STABILITY_FIGURES = ("co_assignment_map.png", "affinity_over_training.png", "ranked_partitions.png")
PAGE = "grouping.html"


def solve_grouping(plan: Plan, session: Session, global_prompt: Artifact) -> Artifact:
    """Group the tasks, unless a grouping of these snapshots with this config is cached."""
    artifact = grouping_artifact(plan, global_prompt)
    with Stage(session, NAME, stage_title(NAME)) as stage:
        stage.computed = compute_grouping(plan, global_prompt, artifact)
        track_grouping(session, artifact, plan.config.grouping)
    return artifact


def assign_task(
    plan: Plan,
    session: Session,
    snapshots: Mapping[tuple[str, ...], Artifact],
    groups: Sequence[Sequence[str]],
    options: GroupingConfig,
) -> Artifact:
    """Assign the run's only task to one of the fixed `groups` of the existing tasks, or to a group by itself.

    Args:
        snapshots: tasks → artifact with their gradients, at the same steps; including the new task.
        options: options of the grouping, without the constraints from `groups`.
    """
    tasks = sorted(task for names in snapshots for task in names)
    options = with_fixed_groups(options, groups)
    artifact = plan.artifact(
        NAME,
        {
            "snapshots": [snapshot.key for snapshot in snapshots.values()],
            "tasks": tasks,
            "format": FORMAT,
            "config": values_affecting(plan.config.model_copy(update={"grouping": options}), "grouping"),
        },
    )
    with Stage(session, NAME, stage_title(NAME, "group assignment")) as stage:
        if not artifact.is_complete():
            from pipeline.stages.grouping_solution import write_grouping

            stage.computed = True
            files = {snapshot.download() / SNAPSHOTS: names for names, snapshot in snapshots.items()}
            with artifact.writer() as writer:
                write_grouping(tasks, files, options, writer.folder)
        track_grouping(session, artifact, options)
    return artifact


def with_fixed_groups(options: GroupingConfig, groups: Sequence[Sequence[str]]) -> GroupingConfig:
    """Return options with constraints that keep each of the groups intact and separate."""
    must_link = [*options.must_link, *(tuple(group) for group in groups if len(group) > 1)]
    cannot_link = [*options.cannot_link, *([tuple(group[0] for group in groups)] if len(groups) > 1 else [])]
    return options.model_copy(update={"must_link": tuple(must_link), "cannot_link": tuple(cannot_link)})


def track_grouping(session: Session, artifact: Artifact, config: GroupingConfig) -> None:
    """Log a grouping and its options to the stage's MLflow run, copy it to the run's folder, and print it."""
    from rich.markup import escape

    options, result = config.model_dump(mode="json"), read_grouping(artifact)
    session.tracker.log_params(NAME, {**options, "groups": format_groups(result["groups"])})
    session.tracker.log_metrics(NAME, {"score": result["score"], "num_groups": len(result["groups"])}, step=0)
    session.tracker.log_params(PARENT, {"groups": format_groups(result["groups"])})
    write_record(session.folder / GROUPING, result)
    for name in (GROUPING, PAGE, *FIGURES, *STABILITY_FIGURES):
        session.tracker.log_artifact(NAME, artifact.download() / name)
    for warning in result["warnings"]:
        session.console.print(f"  [yellow]warning:[/] {escape(warning)}", highlight=False)
    summary = escape(f"{format_groups(result['groups'])} · {describe_search(result)}")
    session.console.print(f"  {summary}", highlight=False)


def grouping_artifact(plan: Plan, global_prompt: Artifact) -> Artifact:
    config = values_affecting(plan.config, "grouping")
    return plan.artifact(
        NAME, {"snapshots": global_prompt.key, "tasks": plan.tasks, "format": FORMAT, "config": config}
    )


def compute_grouping(plan: Plan, global_prompt: Artifact, artifact: Artifact) -> bool:
    """Group the tasks; return False if the result was cached."""
    if artifact.is_complete():
        return False

    from pipeline.stages.grouping_solution import write_grouping

    with artifact.writer() as writer:
        write_grouping(
            plan.tasks, {global_prompt.download() / SNAPSHOTS: plan.tasks}, plan.config.grouping, writer.folder
        )
    return True


def read_grouping(artifact: Artifact) -> dict[str, Any]:
    grouping: dict[str, Any] = read_json(artifact.download() / GROUPING)
    return grouping


def describe_search(result: dict[str, Any]) -> str:
    """Return a sentence part about optimality and algorithm, from the contents of grouping.json."""
    count = result["num_candidates"]
    among = (
        "" if count is None else f" among {count:,} partitions" if count < 10**15 else f" among {count:.1e} partitions"
    )
    return f"{'optimal' if result['is_optimal'] else 'not proven optimal'}{among} · {result['method']}"
