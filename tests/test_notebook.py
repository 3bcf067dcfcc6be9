"""docs/paper_figures.ipynb as committed, and with stores that lack its data.

tests/test_benchmark.py executes it with a benchmark.
"""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
import pytest
from mlflow import MlflowClient
from notebooks import NOTEBOOK, execute_in_process, num_images, stdout, tables
from pipelines import REPOSITORY

from docs.mlflow_results import open_experiment
from pipeline.errors import UserError
from pipeline.runtime.tracking.database import prepare_database


def test_the_committed_notebook_was_executed_and_has_no_local_paths():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert num_images(outputs) == 6 and "MmAP, grouped" in tables(outputs) and "demo, 8 shots" in stdout(outputs)
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    text = stdout(outputs) + tables(outputs) + "".join(cell.source for cell in cells)
    assert not re.findall(r"(?<![\w:/])/(?:home|root|tmp|work|Users|mnt|data)/\S*", text)
    assert NOTEBOOK.stat().st_size < 600_000


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda command: command[0])
def test_its_code_is_linted(command):
    finished = subprocess.run([sys.executable, "-m", "ruff", *command, NOTEBOOK], cwd=REPOSITORY, capture_output=True)
    assert finished.returncode == 0, finished.stdout


@pytest.fixture
def uri(tmp_path) -> str:
    """An MLflow database without experiments."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    prepare_database(uri)
    return uri


def test_an_empty_experiment_gives_the_commands_to_run(uri, tmp_path, monkeypatch, capsys):
    MlflowClient(uri).create_experiment("mmap-clip")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.syspath_prepend(NOTEBOOK.parent)
    execute_in_process(NOTEBOOK, TRACKING_URI=uri)
    no_benchmark, no_grouping = capsys.readouterr().out.splitlines()  # and no other cell says or shows anything
    assert (
        "has no benchmark with a report; it has: none. Create one: mmap-clip benchmark --methods paper" in no_benchmark
    )
    assert "has no finished grouping. Create one: mmap-clip full-pipeline" in no_grouping


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("sqlite:///{folder}/other.db", "the MLflow database {folder}/other.db does not exist: use the URI of yours"),
        ("sqlite:///{folder}/text.db", "the tracking database {folder}/text.db is not a SQLite database: move it away"),
        ("sqlite:///{folder}/mlflow.db", "has no experiment 'mine'; it has: 'theirs', 'Default'. Choose one of them"),
        ("http://127.0.0.1:9", "MLflow at http://127.0.0.1:9 cannot be used: .*Start the server"),
        ("/folder", "the tracking URI '/folder' is neither sqlite"),
    ],
    ids=["missing", "text", "experiment", "server", "folder"],
)
def test_a_store_that_cannot_be_read_is_reported_with_a_remedy(tmp_path, store, message):
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header\n" * 10)
    if "experiment" in message:
        prepare_database(f"sqlite:///{tmp_path}/mlflow.db")
        MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment("theirs")
    with pytest.raises(UserError, match=message.format(folder=tmp_path)) as error:
        open_experiment(store.format(folder=tmp_path), "mine")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "other.db").exists()
