"""docs/paper_figures.ipynb: as it is committed, and with stores that lack what it needs.

With a benchmark in its store tests/test_benchmark.py executes it.
"""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
import pytest
from mlflow import MlflowClient
from notebooks import NOTEBOOK, executed, pictures, printed, tables
from pipelines import REPOSITORY

from docs.mlflow_results import open_experiment
from pipeline.errors import UserError


def test_the_committed_notebook_shows_a_run_of_itself_and_no_machine():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert pictures(shown) == 6 and "MmAP, grouped" in tables(shown) and "demo, 8 shots" in printed(shown)
    assert {output.output_type for output in shown} == {"stream", "display_data"}
    text = printed(shown) + tables(shown) + "".join(cell.source for cell in cells)
    assert not re.findall(r"(?<![\w:/])/(?:home|root|tmp|work|Users|mnt|data)/\S*", text)
    assert NOTEBOOK.stat().st_size < 600_000


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda command: command[0])
def test_its_code_is_as_clean_as_the_rest(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, NOTEBOOK], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_of_an_empty_experiment_it_says_what_to_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri).create_experiment("mmap-clip")
    outputs = executed(uri, tmp_path)
    said = printed(outputs.pop("read"))
    assert "has no benchmark with a report; it has: none. To make one: python jobs/benchmark.py --methods paper" in said
    assert "has no finished grouping. To make one: python jobs/full_pipeline.py" in said
    assert not any(outputs.values())


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///{folder}/other.db", "there is no MLflow database {folder}/other.db: give the address of yours"),
        ("sqlite:///{folder}/text.db", "the MLflow store cannot be read: .* file is not a database"),
        ("sqlite:///{folder}/mlflow.db", "has no experiment 'mine'; it has: 'theirs', 'Default'. Choose one of them"),
        ("http://127.0.0.1:9", "MLflow at http://127.0.0.1:9 cannot be used: .*Start the server"),
        ("/folder", "Tracking URI '/folder' is neither sqlite"),
    ],
    ids=["missing", "text", "experiment", "server", "folder"],
)
def test_a_store_that_cannot_be_read_is_told_of_with_the_remedy(tmp_path, uri, message):
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header\n" * 10)
    if "experiment" in message:
        MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment("theirs")
    with pytest.raises(UserError, match=message.format(folder=tmp_path)) as told:
        open_experiment(uri.format(folder=tmp_path), "mine")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "other.db").exists()
