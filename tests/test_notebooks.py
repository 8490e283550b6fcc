"""Every notebook runs from top to bottom; what it claims it asserts itself."""

import runpy
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert NOTEBOOKS


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
