"""Stage 3: gradient snapshots → affinities → the best partition of the tasks and how sure it is, as JSON, pictures and
a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import GroupingConfig, values_affecting
from pipeline.files import read_json
from pipeline.grouping.text import format_groups
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import stage_title
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.plan import Plan

NAME = "grouping"
FIGURES = ("affinity_heat_map.png", "affinity_graph.png")
STABILITY_FIGURES = ("co_assignment_map.png", "affinity_over_training.png", "ranked_partitions.png")
PAGE = "grouping.html"


def solve_grouping(plan: Plan, session: Session, global_prompt: Artifact) -> Artifact:
    """Groups the tasks unless that was done for these snapshots and this config."""
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
    """Likewise, where the tasks that came before stay in their `groups`, and the run's only task joins one of them or
    is alone.

    Args:
        snapshots: tasks → whose gradients are in it, at the same steps; the new one's too.
        options: of the grouping, without what `groups` ask for.
    """
    tasks = sorted(task for of_file in snapshots for task in of_file)
    options = with_fixed_groups(options, groups)
    artifact = plan.artifact(
        NAME,
        {
            "snapshots": [of_file.key for of_file in snapshots.values()],
            "tasks": tasks,
            "config": values_affecting(plan.config.model_copy(update={"grouping": options}), "grouping"),
        },
    )
    with Stage(session, NAME, stage_title(NAME, "place among the groups")) as stage:
        if not artifact.is_complete():
            from pipeline.stages.grouping_solution import write_grouping

            stage.computed = True
            files = {of_file.download() / SNAPSHOTS: names for names, of_file in snapshots.items()}
            with artifact.writer() as writer:
                write_grouping(tasks, files, options, writer.folder)
        track_grouping(session, artifact, options)
    return artifact


def with_fixed_groups(options: GroupingConfig, groups: Sequence[Sequence[str]]) -> GroupingConfig:
    """With constraints that keep each of the groups whole, and apart from the others."""
    must_link = [*options.must_link, *(tuple(group) for group in groups if len(group) > 1)]
    cannot_link = [*options.cannot_link, *([tuple(group[0] for group in groups)] if len(groups) > 1 else [])]
    return options.model_copy(update={"must_link": tuple(must_link), "cannot_link": tuple(cannot_link)})


def track_grouping(session: Session, artifact: Artifact, of_run: GroupingConfig) -> None:
    """Gives a grouping to the stage's MLflow run, and tells it; `of_run`: the options it was made with."""
    from rich.markup import escape

    options, result = of_run.model_dump(mode="json"), read_grouping(artifact)
    session.tracker.log_params(NAME, {**options, "groups": format_groups(result["groups"])})
    session.tracker.log_metrics(NAME, {"score": result["score"], "num_groups": len(result["groups"])}, step=0)
    session.tracker.log_params(PARENT, {"groups": format_groups(result["groups"])})
    for name in ("grouping.json", PAGE, *FIGURES, *STABILITY_FIGURES):
        session.tracker.log_artifact(NAME, artifact.download() / name)
    for warning in result["warnings"]:
        session.console.print(f"  [yellow]note:[/] {escape(warning)}", highlight=False)
    found = escape(f"{format_groups(result['groups'])} · {describe_search(result)}")
    session.console.print(f"  {found}", highlight=False)


def grouping_artifact(plan: Plan, global_prompt: Artifact) -> Artifact:
    config = values_affecting(plan.config, "grouping")
    return plan.artifact(NAME, {"snapshots": global_prompt.key, "tasks": plan.tasks, "config": config})


def compute_grouping(plan: Plan, global_prompt: Artifact, artifact: Artifact) -> bool:
    """Groups the tasks; False if that was done before."""
    if artifact.is_complete():
        return False

    from pipeline.stages.grouping_solution import write_grouping

    with artifact.writer() as writer:
        write_grouping(
            plan.tasks, {global_prompt.download() / SNAPSHOTS: plan.tasks}, plan.config.grouping, writer.folder
        )
    return True


def read_grouping(artifact: Artifact) -> dict[str, Any]:
    grouping: dict[str, Any] = read_json(artifact.download() / "grouping.json")
    return grouping


def describe_search(result: dict[str, Any]) -> str:
    """How the groups of a grouping.json were found."""
    count = result["num_candidates"]
    among = "" if count is None else f" of {count:,} partitions" if count < 10**15 else f" of {count:.1e} partitions"
    return f"{'best' if result['is_optimal'] else 'best found'}{among} · {result['method']}"
