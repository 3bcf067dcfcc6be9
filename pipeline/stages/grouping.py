"""Stage 4: gradients, losses and features → affinities → the best partition and its stability (JSON, figures, HTML)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import GroupingConfig, values_affecting
from pipeline.files import read_json, write_record
from pipeline.grouping.text import describe_candidates, format_groups
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Artifact
from pipeline.stages.finished_run import GROUPING
from pipeline.stages.flow import stage_title
from pipeline.stages.grouping_sources import GroupingSources, SingleTasks
from pipeline.stages.plan import Plan

NAME = "grouping"
FORMAT = 3
"""Of grouping.json and the page."""
FIGURES = ("affinity_heat_map.png", "affinity_graph.png")
STABILITY_FIGURES = ("co_assignment_map.png", "ranked_partitions.png")
GRADIENT_FIGURES = ("affinity_over_training.png",)
"""Only of gradient affinities."""
PAGE = "grouping.html"


def solve_grouping(
    plan: Plan, session: Session, global_prompt: Artifact | None, single_tasks: SingleTasks | None
) -> Artifact:
    """Group the tasks, unless a grouping of these artifacts with this config is cached."""
    sources = GroupingSources.of(global_prompt, single_tasks)
    artifact = grouping_artifact(plan, sources)
    with Stage(session, NAME, stage_title(NAME)) as stage:
        stage.computed = compute_grouping(plan, sources, artifact)
        track_grouping(session, artifact, plan.config.grouping)
    return artifact


def assign_task(
    plan: Plan,
    session: Session,
    sources: GroupingSources,
    groups: Sequence[Sequence[str]],
    options: GroupingConfig,
) -> Artifact:
    """Assign the run's only task to one of the fixed `groups` of the existing tasks, or to a group by itself.

    Args:
        sources: of the existing tasks and the new one.
        options: options of the grouping, without the constraints from `groups`.
    """
    tasks = sorted([*plan.tasks, *(task for group in groups for task in group)])
    plan = replace(plan, config=plan.config.model_copy(update={"grouping": with_fixed_groups(options, groups)}))
    artifact = grouping_artifact(plan, sources, tasks)
    with Stage(session, NAME, stage_title(NAME, "group assignment")) as stage:
        stage.computed = compute_grouping(plan, sources, artifact)
        track_grouping(session, artifact, plan.config.grouping)
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
    chosen = {f"groups/{item['affinity']}": format_groups(item["groups"]) for item in result["candidates"]}
    session.tracker.log_params(NAME, chosen)
    session.tracker.log_metrics(NAME, {"score": result["score"], "num_groups": len(result["groups"])}, step=0)
    session.tracker.log_params(PARENT, {"groups": format_groups(result["groups"])})
    write_record(session.folder / GROUPING, result)
    for name in (GROUPING, *output_files(artifact)):
        session.tracker.log_artifact(NAME, artifact.download() / name)
    for warning in result["warnings"]:
        session.console.print(f"  [yellow]warning:[/] {escape(warning)}", highlight=False)
    lines = [
        f"{format_groups(result['groups'])} · {describe_search(result)}",
        describe_candidates(result["candidates"]),
    ]
    session.console.print("\n".join(f"  {escape(line)}" for line in lines), highlight=False)


def grouping_artifact(plan: Plan, sources: GroupingSources, tasks: Sequence[str] | None = None) -> Artifact:
    """Return the artifact of a grouping of these tasks, by default all of the run."""
    inputs = {
        **sources.key_inputs,
        "tasks": list(tasks or plan.tasks),
        "format": FORMAT,
        "config": values_affecting(plan.config, "grouping"),
    }
    return plan.artifact(NAME, inputs)


def compute_grouping(plan: Plan, sources: GroupingSources, artifact: Artifact) -> bool:
    """Group the tasks; return False if the result was cached."""
    if artifact.is_complete():
        return False

    from pipeline.stages.grouping_solution import write_grouping

    with artifact.writer() as writer:
        write_grouping(artifact.inputs["tasks"], sources, plan.config.grouping, writer.folder)
    return True


def gradient_affinity(plan: Plan, global_prompt: Artifact) -> list[list[float]]:
    """Return the affinities (T, T) of the gradients on the global prompt, for a method that takes those."""
    from pipeline.stages.measures import measure_gradients

    measure = measure_gradients(plan.tasks, GroupingSources.of(global_prompt, None), plan.config.grouping)
    affinities: list[list[float]] = measure.affinity.tolist()
    return affinities


def output_files(grouping: Artifact) -> list[str]:
    """Return the names of the figures and the page of a grouping."""
    folder = grouping.download()
    return [name for name in (*FIGURES, *STABILITY_FIGURES, *GRADIENT_FIGURES, PAGE) if (folder / name).is_file()]


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
