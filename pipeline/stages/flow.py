"""The stages in their order, as jobs/full_pipeline.py runs them."""

from __future__ import annotations

from pathlib import Path

from pipeline.runtime.run import Run
from pipeline.stages.global_prompt import train_global_prompt
from pipeline.stages.group_trainings import train_groups
from pipeline.stages.grouping import solve_grouping
from pipeline.stages.report import make_report
from pipeline.stages.splits import build_splits
from pipeline.workflows.finished_run import record_artefacts


def run_all_stages(run: Run) -> Path:
    """Data check, few-shot splits, global prompt, grouping, group trainings, report, as far as they are not done;
    returns the report's folder."""
    build_splits(run)
    global_prompt = train_global_prompt(run)
    grouping = solve_grouping(run, global_prompt)
    methods = train_groups(run, grouping)
    report = make_report(run, grouping, methods)
    record_artefacts(run, [global_prompt])
    return report
