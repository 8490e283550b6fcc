"""Every notebook runs from top to bottom; what it claims it asserts itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore:.*non-interactive:UserWarning", notebook],
        cwd=tmp_path, env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
