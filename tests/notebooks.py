"""docs/paper_figures.ipynb, executed, and what its cells show."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from pipelines import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "paper_figures.ipynb"


def executed(uri: str, folder: Path, **settings: object) -> dict[str, list[dict]]:
    """Cell → its outputs, of the committed notebook; an error in a cell is raised.

    Args:
        folder: for what Jupyter writes.
        settings: of the notebook's first cell, in place of what stands there.
    """
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.id == "settings":
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    variables = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(folder)}
    client.execute(env=os.environ | variables)
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def printed(outputs: list[dict]) -> str:
    assert all(output.get("name") != "stderr" for output in outputs), outputs
    return "".join(output["text"] for output in outputs if output.output_type == "stream")


def pictures(outputs: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def tables(outputs: list[dict]) -> str:
    return "\n".join(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
