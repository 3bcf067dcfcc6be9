"""The flow: the stages in their order. Whatever runs stages walks this list, and says how far.

Names and titles are known without torch, Ray and MLflow: a stage's module is imported when its turn comes.
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
    """Also of its module here, of its folder in the storage, and of its MLflow run."""
    title: str
    output: str
    """For people."""
    function: str
    """In the module: takes plan, session, and what the functions of the stages in `depends_on` returned."""
    depends_on: tuple[str, ...] = ()


FLOW = (
    FlowStage("data_check", "data check", "what stands out in the images", "check_data"),
    FlowStage("splits", "few-shot splits", "training and test images in Parquet", "build_splits"),
    FlowStage("global_prompt", "global prompt", "snapshots of each task's gradient", "train_global_prompt"),
    FlowStage("grouping", "grouping", "the best partition of the tasks", "solve_grouping", ("global_prompt",)),
    FlowStage("group_trainings", "group trainings", "prompts and test accuracies", "train_groups", ("grouping",)),
    FlowStage(
        "report",
        "report",
        "tables, pictures, one prompts file a method",
        "make_report",
        ("global_prompt", "grouping", "group_trainings"),
    ),
)
NAMES = tuple(stage.name for stage in FLOW)


def run_stages(plan: Plan, session: Session, last_stage: str = NAMES[-1]) -> dict[str, Any]:
    """Makes what is missing of all stages up to `last_stage`; returns stage → what its function returned."""
    results: dict[str, Any] = {}
    for stage in FLOW[: NAMES.index(last_stage) + 1]:
        function = getattr(import_module(f"pipeline.stages.{stage.name}"), stage.function)
        results[stage.name] = function(plan, session, *(results[name] for name in stage.depends_on))
    return results


def stage_title(name: str, title: str | None = None) -> str:
    """A stage's number and title, or another title for what does its work elsewhere."""
    return f"{NAMES.index(name)} {title or FLOW[NAMES.index(name)].title}"


def stage_summary() -> str:
    """A line for each stage."""
    return "\n".join(f"  {number} {stage.name:<16} {stage.output}" for number, stage in enumerate(FLOW))


def check_stage(option: str, name: str) -> str:
    """Raises: UserError: there is no stage of this name."""
    if name not in NAMES:
        raise UserError(f"{option} {name} is no stage{did_you_mean(name, NAMES)} Valid: {', '.join(NAMES)}")
    return name
