"""Execute notebooks: `python tests/support/run_notebooks.py notebooks/*.ipynb` writes the outputs into the files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
#: seconds that one cell may take; cold caches and busy machines are slow
CELL_TIMEOUT = 1200
#: what a notebook's metadata says of its outputs
HASH_NAME = "jaxllm_code_sha256"


def execute(path: Path) -> NotebookNode:
    """Run a notebook in a fresh kernel, in an empty folder.

    The kernel has this process's environment, and so its caches. Nothing of an earlier run goes in.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the text has the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    # a kernel looks for packages where it is started, which is no longer the repository
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env={**os.environ, "PYTHONPATH": search})
    return _without_churn(notebook)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that run, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: NotebookNode) -> str:
    """Of the code, cell by cell: whoever changes it has to run it again."""
    sources = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def output_forms(cell: NotebookNode) -> list[tuple[str, ...]]:
    """The kinds of a cell's outputs, without what differs from run to run: ("display_data", "image/png"), ..."""
    forms: list[tuple[str, ...]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            form = ("stream", output.name)
        elif output.output_type == "error":
            form = ("error", output.ename)
        else:
            form = (output.output_type, *sorted(output.data))
        # a stream is cut into pieces wherever the kernel happened to flush it
        if not (form[0] == "stream" and forms and forms[-1] == form):
            forms.append(form)
    return forms


def _without_churn(notebook: NotebookNode) -> NotebookNode:
    """Leave out what says more about the machine than about the notebook; note which code made the outputs."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        HASH_NAME: code_hash(notebook),
    }
    for cell in notebook.cells:
        cell.metadata = {}
    for cell in code_cells(notebook):
        joined: list[NotebookNode] = []
        for output in cell.outputs:
            last = joined[-1] if joined else None
            if last is not None and last.output_type == output.output_type == "stream" and last.name == output.name:
                last.text += output.text
            else:
                joined.append(output)
        cell.outputs = joined
    return notebook


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        began = time.monotonic()
        nbformat.write(execute(path), path)
        print(f"{path}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
