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
    (outputs,) = executed_in_turn(uri, folder, settings)
    return outputs


def executed_in_turn(uri: str, folder: Path, *settings: dict[str, object]) -> list[dict[str, list[dict]]]:
    """`executed` with each of these settings, one after another, as by somebody who changes them and runs all cells
    again."""
    notebooks = [nbformat.read(NOTEBOOK, 4) for _ in settings]
    for notebook, of_notebook in zip(notebooks, settings):
        for cell in notebook.cells:
            if cell.id == "settings":
                cell.source += "".join(f"\n{name} = {value!r}" for name, value in of_notebook.items())
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    together = nbformat.from_dict({**notebooks[0], "cells": cells})
    client = NotebookClient(together, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    variables = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(folder)}
    client.execute(env=os.environ | variables)
    each = len(cells) // len(settings)
    return [
        {cell.id: cell.outputs for cell in together.cells[at : at + each] if cell.cell_type == "code"}
        for at in range(0, len(cells), each)
    ]


def printed(outputs: list[dict]) -> str:
    assert all(output.get("name") != "stderr" for output in outputs), outputs
    return "".join(output["text"] for output in outputs if output.output_type == "stream")


def pictures(outputs: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def tables(outputs: list[dict]) -> str:
    return "\n".join(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
