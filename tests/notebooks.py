"""Execution of the notebooks in docs/, and readers of their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from pipelines import REPOSITORY
from traitlets.config import Config

NOTEBOOK = REPOSITORY / "docs" / "paper_figures.ipynb"
FROM_PYTHON = REPOSITORY / "docs" / "from_python.ipynb"


def execute_in_process(notebook: Path, **settings: object) -> dict[str, object]:
    """Execute a notebook in this process, on its Ray, and return its variables; an error in a cell is raised.

    Args:
        settings: values that replace those of the cell `settings`.
    """
    options = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell.instance(config=options)
    try:
        for cell in nbformat.read(notebook, 4).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
            if cell.id == "settings":
                shell.push(settings)
        return dict(shell.user_ns)
    finally:
        InteractiveShell.clear_instance()


def execute_repeatedly(uri: str, folder: Path, *settings: dict[str, object]) -> list[dict[str, list[dict]]]:
    """Execute the committed notebook with each of these settings in turn, in one kernel, and return cell → outputs of
    each; an error in a cell is raised.

    Args:
        folder: folder for Jupyter's files.
        settings: values that replace those of the notebook's first cell.
    """
    notebooks = [nbformat.read(NOTEBOOK, 4) for _ in settings]
    for notebook, values in zip(notebooks, settings):
        for cell in notebook.cells:
            if cell.id == "settings":
                cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    combined = nbformat.from_dict({**notebooks[0], "cells": cells})
    client = NotebookClient(combined, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    variables = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(folder)}
    client.execute(env=os.environ | variables)
    num_cells = len(cells) // len(settings)
    return [
        {cell.id: cell.outputs for cell in combined.cells[start : start + num_cells] if cell.cell_type == "code"}
        for start in range(0, len(cells), num_cells)
    ]


def stdout(outputs: list[dict]) -> str:
    assert all(output.get("name") != "stderr" for output in outputs), outputs
    return "".join(output["text"] for output in outputs if output.output_type == "stream")


def num_images(outputs: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def tables(outputs: list[dict]) -> str:
    return "\n".join(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
