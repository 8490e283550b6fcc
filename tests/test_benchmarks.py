"""The benchmark program runs, writes what it reads again, and its check tells slower from noise."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from benchmarks import cases, check, libraries, records, report
from benchmarks.libraries import BARE, LOOP, OURS
from benchmarks.records import Record

ROOT = Path(__file__).parent.parent


def record(library: str, seconds: float, **options) -> Record:
    quartiles = tuple(round(share * seconds, 3) for share in (0.9, 1.0, 1.1))
    return Record(
        "gradcam", "lite0", 1, 224, 1, "", 1280, library, rounds=3,
        seconds=quartiles,
        in_forwards=quartiles,
        to_ours=(1.0, 1.0, 1.0), **options,
    )  # fmt: skip


def some() -> list[Record]:
    one = [
        record(BARE, 1.0),
        record(OURS, 1.1, setup=0.5),
        record("grad-cam", 3.0, correlation=0.99, memory=12.0),
    ]
    failed = record("torchcam", 0.0)._replace(error="ValueError: no, thanks", seconds=(), in_forwards=())
    loop = record(LOOP, 9.0, share=0.25)._replace(task="scorecam")
    fast = record(OURS, 3.0, to_loop=3.0)._replace(task="scorecam")
    return [*one, failed, loop, fast]


def test_records_are_written_and_read(tmp_path):
    records.save(some(), tmp_path / "some.csv")
    assert records.read(tmp_path / "some.csv") == some()


def test_the_report_says_what_was_measured():
    text = report.markdown(some(), "a machine", "the command")
    assert "3.00 (2.70–3.30)" in text
    assert "ValueError" in text
    assert "no, thanks" not in text
    assert "9 s [25%]" in text
    assert "3 s, 3 ×" in text
    assert "0.9900" in text


def test_figures_are_drawn():
    for figure in (report.figure(some()), report.growth_figure({"maps": [(1.0, r) for r in some()]})):
        assert figure.axes
        plt.close(figure)


def test_slower_is_told_from_noise():
    then = record(OURS, 1.0)
    assert check.lost(then, record(OURS, 1.2)) < check.ALLOWED
    assert check.lost(then, record(OURS, 1.5)) > check.ALLOWED


def test_a_case_goes_to_another_process_and_back():
    for case in (*cases.default(), *cases.quick()):
        assert cases.Case.loads(case.dumps()) == case
    assert set(cases.quick()) <= set(cases.default())


# What the program calls of XplainCAM, which has no release.
XPLAINCAM = """
import torch
class GradCAM:
    def __init__(self, model, target_layer): model.get_submodule(target_layer)
    def __enter__(self): return self
    def __exit__(self, *exception): pass
    def __call__(self, x): return torch.zeros(1, 1, 224, 224)
"""


def test_the_program_with_a_library_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "NAME = 'mine'\n"
        "def build(task, model, layer, x, cls):\n"
        "    return (lambda: x.mean(1)) if task == 'gradcam' else None\n"
    )
    (tmp_path / "xplaincam" / "cam").mkdir(parents=True)
    (tmp_path / "xplaincam" / "cam" / "__init__.py").write_text(XPLAINCAM)
    command = ["-m", "benchmarks", "--tasks", "gradcam", "--libraries", OURS]
    command += ["--library", tmp_path / "mine.py", "--xplaincam", tmp_path]
    done = subprocess.run(
        [sys.executable, *command, "--seconds", "0", "--no-memory", "--output", tmp_path],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = records.read(tmp_path / "selection.csv")
    assert [r.library for r in found] == [OURS, BARE, "mine", "XplainCAM"]
    assert found[-1].difference == 1  # of a map of zeros from ours, which reaches 1
    assert all(r.error == "" and r.seconds for r in found)
    assert (tmp_path / "selection.md").read_text() in done.stdout
    assert (tmp_path / "selection.png").stat().st_size > 1000


def test_a_checkout_without_the_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a checkout of Xplain-CAM"):
        libraries.xplaincam(tmp_path)
