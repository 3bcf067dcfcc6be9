"""The list of stages: what is in it can be called as it says, and the jobs stop where they should."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module

import pytest
from pipelines import REPOSITORY

from jobs.__main__ import run_script
from pipeline import command_line
from pipeline.stages.flow import FLOW, NAMES, needs_weights, stage_title

LAST_STAGE = {
    "build_splits": "splits",
    "train_global_prompt": "global_prompt",
    "solve_grouping": "grouping",
    "train_groups": "group_trainings",
}


@pytest.mark.parametrize("stage", FLOW, ids=NAMES)
def test_a_stage_has_a_module_and_takes_what_was_made_before_it(stage):
    module = import_module(f"pipeline.stages.{stage.name}")
    assert module.NAME == stage.name
    assert set(stage.depends_on) <= set(NAMES[: NAMES.index(stage.name)])
    inspect.signature(getattr(module, stage.function)).bind("plan", "session", *stage.depends_on)


@pytest.mark.parametrize("job", LAST_STAGE)
def test_a_script_of_a_stage_runs_the_flow_until_it(job, monkeypatch):
    ran, weights = [], []

    def run_job(description, main, fetches_weights=True):
        ran.append(main)
        weights.append(fetches_weights)

    monkeypatch.setattr(command_line, "run_job", run_job)
    run_script(job)
    (main,) = ran
    assert main.func.__name__ == "run_stages" and main.keywords == {"last_stage": LAST_STAGE[job]}
    assert weights == [needs_weights(LAST_STAGE[job])]


@pytest.mark.parametrize(
    "arguments, lines",
    [
        (
            ["--until", "groupings"],
            ["--until groupings is not a stage; did you mean grouping? Valid: data_check,"],
        ),
        (["--help"], [f"  {stage_title(name, name)} " for name in NAMES]),
    ],
    ids=["unknown", "help"],
)
def test_help_lists_the_stages(arguments, lines, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", *arguments])
    with pytest.raises(SystemExit):
        run_script("full_pipeline")
    output = "".join(capsys.readouterr())
    assert all(line in output for line in lines)


def test_the_page_of_the_pipeline_has_a_section_for_each_stage():
    headings = re.findall(r"^## (\d .*)$", (REPOSITORY / "docs" / "pipeline.md").read_text(), re.MULTILINE)
    assert [heading.lower() for heading in headings] == list(map(stage_title, NAMES))
