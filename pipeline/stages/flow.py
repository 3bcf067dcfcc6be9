"""The stages of the pipeline, in order.

Names and titles need no torch, Ray or MLflow: the module of a stage is imported when the stage runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.config import did_you_mean
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.runtime.session import Session
    from pipeline.stages.plan import Plan


@dataclass(frozen=True)
class FlowStage:
    name: str
    """Also the name of its module here, of its folder in the storage, and of its MLflow run."""
    title: str
    output: str
    """Description for the user."""
    function: str
    """Function of the module; its arguments are plan, session, and the results of the stages in `depends_on`."""
    depends_on: tuple[str, ...] = ()


FLOW = (
    FlowStage("data_check", "data check", "issues of the images", "check_data"),
    FlowStage("splits", "few-shot splits", "training and test images in Parquet", "build_splits"),
    FlowStage("global_prompt", "global prompt", "snapshots of the gradient of each task", "train_global_prompt"),
    FlowStage("single_tasks", "single tasks", "what each task gains from each other's prompts", "train_single_tasks"),
    FlowStage(
        "grouping",
        "grouping",
        "the best partition of the tasks",
        "solve_grouping",
        ("global_prompt", "single_tasks"),
    ),
    FlowStage(
        "group_trainings",
        "group trainings",
        "adapters and test accuracies",
        "train_groups",
        ("global_prompt", "single_tasks", "grouping"),
    ),
    FlowStage(
        "report",
        "report",
        "tables, figures, one adapter file per method",
        "make_report",
        ("global_prompt", "single_tasks", "grouping", "group_trainings"),
    ),
)
NAMES = tuple(stage.name for stage in FLOW)


def run_stages(plan: Plan, session: Session, last_stage: str = NAMES[-1]) -> dict[str, Any]:
    """Run all stages up to `last_stage`, using cached artifacts; return stage → result of its function."""
    if NAMES.index(last_stage) >= NAMES.index("single_tasks"):
        for line in plan.grouping_costs():
            session.console.print(f"  {line}", markup=False, highlight=False)
    results: dict[str, Any] = {}
    for stage in FLOW[: NAMES.index(last_stage) + 1]:
        function = getattr(import_module(f"pipeline.stages.{stage.name}"), stage.function)
        results[stage.name] = function(plan, session, *(results[name] for name in stage.depends_on))
    return results


def needs_weights(last_stage: str) -> bool:
    """Return whether a stage up to `last_stage` uses CLIP's weights: the first two only read images."""
    return NAMES.index(last_stage) >= NAMES.index("global_prompt")


def stage_title(name: str, title: str | None = None) -> str:
    """Return a stage's number and title, or another title for a variant of the stage."""
    return f"{NAMES.index(name)} {title or FLOW[NAMES.index(name)].title}"


def stage_summary() -> str:
    """Return a line for each stage."""
    return "\n".join(f"  {number} {stage.name:<16} {stage.output}" for number, stage in enumerate(FLOW))


def check_stage(option: str, name: str) -> str:
    """Return the name of a stage. Raises: UserError: There is no such stage."""
    if name not in NAMES:
        raise UserError(f"{option} {name} is not a stage{did_you_mean(name, NAMES)} Valid: {', '.join(NAMES)}")
    return name
