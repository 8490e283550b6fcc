"""Every notebook runs from top to bottom; what it claims it asserts itself. Its .ipynb file has the same cells."""

import runpy
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

import hooks

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))
LARGEST = 3_000_000  # bytes of all, with their pictures


def test_there_are_notebooks():
    assert NOTEBOOKS
    written = [path.with_suffix(".ipynb") for path in NOTEBOOKS]
    assert sorted(NOTEBOOKS[0].parent.glob("*.ipynb")) == written
    assert sum(path.stat().st_size for path in written) < LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_ipynb_file_is_that_of_the_notebook(path):
    book = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(book)
    found = [(cell.cell_type, cell.source) for cell in book.cells]
    expected = list(hooks.cells(path.read_text(encoding="utf-8")))
    assert found == expected, f"python docs/make_notebooks.py {path.stem} writes it anew"
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert any(output.output_type == "stream" for output in outputs)
    assert any("image/" in kind for output in outputs for kind in output.get("data", ()))
    text, pictures = hooks.notebook_page(path.with_suffix(".ipynb"))
    assert all(output.text.strip() in text for output in outputs if output.output_type == "stream")
    assert all(f"![]({Path(picture).name})" in text for picture in pictures)


@pytest.mark.usefixtures("unchecked")  # as a reader runs them
@pytest.mark.filterwarnings(
    "ignore:.*non-interactive:UserWarning",
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",  # tensors that Matplotlib draws
)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(notebook), run_name="__main__")
    plt.close("all")
