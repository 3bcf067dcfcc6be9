"""Execute docs/from_python.ipynb in an empty folder, and store its outputs: `python docs/make_notebook.py`."""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("from_python.ipynb")


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=900, coalesce_streams=True, resources={"metadata": {"path": folder}})
        client.execute(env=os.environ | {"PYTHONPATH": str(NOTEBOOK.parent.parent), "IPYTHONDIR": folder})
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
        text = nbformat.writes(notebook).replace(f"{os.path.realpath(folder)}/", "").replace(f"{folder}/", "")
    NOTEBOOK.write_text(text + "\n")


if __name__ == "__main__":
    main()
