"""The notebooks run as they are, and show what they ran."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from support.quick_compile import FOR_LONG_RUNS, QUICK, flags
from support.run_notebooks import HASH_NAME, ROOT, code_cells, code_hash, execute, output_forms

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
AGAIN = "run `make notebooks`"
#: bytes; what is read in a browser has to come through a network first
LARGEST = 400_000
#: those that start engines for minutes: `make test-peers` runs them
LONG = (
    "02_parameters",
    "03_prefix_caching_and_chunked_prefill",
    "08_quantization_and_memory",
    "09_speculative_decoding",
)

#: those that `make test` runs, too
QUICK_ONES = ("05_kernels",)
#: those of models that fetched weights make large: they run for longer than they compile
LARGE_MODELS = ("01_quickstart", *LONG, "04_logprobs_and_structured_output", "11_lora")


def marks(path: Path) -> list[pytest.MarkDecorator]:
    if path.stem in LONG:
        return [pytest.mark.large]
    return [] if path.stem in QUICK_ONES else [pytest.mark.thorough]


def test_all_notebooks_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 13)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_are_of_the_committed_code(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.get(HASH_NAME) == code_hash(notebook), f"{path.name} has changed since it ran: {AGAIN}"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"{path.name}: {AGAIN}"
    assert not any(cell.metadata for cell in notebook.cells), f"{path.name} tells of the machine that ran it: {AGAIN}"
    forms = [form for cell in cells for form in output_forms(cell)]
    assert not [form for form in forms if form[0] == "error" or form == ("stream", "stderr")]
    assert any("image/png" in form for form in forms)
    assert path.stat().st_size <= LARGEST


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=marks(path)) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_and_shows_what_it_showed(path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    committed = nbformat.read(path, as_version=4)
    options = FOR_LONG_RUNS if path.stem in LARGE_MODELS else QUICK
    monkeypatch.setenv("XLA_FLAGS", flags(options, os.environ["XLA_FLAGS"]))
    fresh = execute(path)
    assert code_hash(fresh) == code_hash(committed)
    for number, (now, then) in enumerate(zip(code_cells(fresh), code_cells(committed), strict=True), start=1):
        assert output_forms(now) == output_forms(then), f"cell {number} of {path.name} shows something else: {AGAIN}"


def test_an_error_in_a_cell_is_an_error(tmp_path: Path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(tmp_path / "wrong.ipynb")


def test_code_that_has_changed_is_noticed():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1"), nbformat.v4.new_markdown_cell("text")])
    before = code_hash(notebook)
    notebook.cells[1].source = "other text"
    assert code_hash(notebook) == before
    notebook.cells[0].source = "2"
    assert code_hash(notebook) != before
