"""The house: one file takes a new method, type checkers know the keywords, and help shows them."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

import xcam_fn as xf

ROOT = Path(__file__).parents[1]

NEW_METHOD = '''

def squared(A: Tensor, G: Tensor, *, power: float = 2.0) -> Tensor:
    """Weights: the mean of the gradient's power.

    Args:
        A: features, (B, K, *spatial).
        G: gradients, of the same shape.
        power: of the gradient, > 0.

    Returns:
        (B, K).
    """
    return (G.abs() ** power).mean(tuple(range(2, G.ndim)))


squared_cam = enter(from_gradients(squared, name="squared_cam", title="Squared-CAM", summary="squared gradients"))
__all__ += ["squared_cam"]
'''
PROGRAM = """
import torch, xcam_fn as xf
from xcam_fn.testing import check_method

assert "squared_cam" in xf.METHODS and "squared_cam" in dir(xf) and "squared_cam" in xf.__all__
check_method(xf.squared_cam)
check_method(xf.find_method("squared_cam", power=3.0))
print(xf.squared_cam)
"""


def test_a_new_gradient_method_is_one_code_file_and_its_page(tmp_path):
    shutil.copytree(ROOT / "xcam_fn", tmp_path / "xcam_fn")
    family = tmp_path / "xcam_fn" / "methods" / "gradient.py"
    family.write_text(family.read_text() + NEW_METHOD)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "power=2.0" in done.stdout


def test_shapes_in_signatures_are_checked_at_run_time():
    found = xf.perturb.distinct_maps(torch.rand(1, 3, 2, 2))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"scores: Float\[Tensor, 'P n'\]"):
        xf.perturb.scatter_scores(torch.ones(3), found, torch.ones(1, 1))


def test_methods_is_complete_once_it_is_imported():
    from xcam_fn.methods.catalog import enter

    with pytest.raises(TypeError, match="METHODS cannot be extended"):
        enter(xf.from_gradients(lambda A, G: G, name="mine"))


SNIPPET = """
import torch
from torch import nn

import xcam_fn as xf


def calls(model: nn.Module, x: torch.Tensor) -> None:
    xf.scorecam(model, None, x, precision="bfloat16", softmax=True)
    xf.gradcam_pp(model, None, x, 281, eps=1e-8, projection=None)
    xf.rise(model, None, x, num_masks=10, progress=True)
    xf.scorecam(model, None, x, precison="bfloat16")  # misspelt
    xf.scorecam(model, None, x, precision="bf16")  # wrong literal
    xf.rise(model, None, x, nummasks=10)  # misspelt
    xf.gradcam(model, None, x, eps=1.0)  # another method's
"""


def test_a_type_checker_completes_and_rejects(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "snippet.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = SNIPPET.splitlines()
    wrong = {lines[int(number) - 1] for number in re.findall(r"snippet\.py:(\d+):\d+ - error", done.stdout)}
    assert wrong == {line for line in lines if "  # " in line}, done.stdout


@pytest.mark.parametrize("name", xf.METHODS)
def test_help_shows_a_flat_signature_and_one_list_of_args(name):
    method = xf.METHODS[name]
    parameters = inspect.signature(method).parameters
    assert list(parameters)[:5] == ["model", "layer", "x", "cls", "to_spatial"]
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    doc = inspect.getdoc(method)
    assert doc is not None
    (args,) = re.findall(r"^Args:\n(.*?)^(?=\S)", doc, flags=re.M | re.S)
    described = re.findall(r"^    (\w+):", args, flags=re.M)
    assert sorted(described) == sorted(parameters)
    assert all(re.match(r"    \S|        \S", line) for line in args.splitlines() if line)


OTHERS = ("split", "features", "feature_and_grad", "default_layer", "layers", "concepts", "explain_all", "gain",
          "from_gradients", "from_features")  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_help_of_functions_describes_every_argument_in_order(name):
    doc = inspect.getdoc(getattr(xf, name))
    (args,) = re.findall(r"^Args:\n(.*?)^(?=\S)", doc or "", flags=re.M | re.S)
    assert re.findall(r"^    [*]*(\w+):", args, flags=re.M) == list(
        inspect.signature(getattr(xf, name)).parameters
    )
