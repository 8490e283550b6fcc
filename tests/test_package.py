"""The package itself: names that are there for people and type checkers, and loaded when they are used."""

import ast
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xcam_fn as xf
from conftest import refused_skip

SLOW = {"matplotlib", "scipy", "sklearn", "torch._dynamo", "torchvision"}


def typed_names() -> dict[str, str]:
    """The public names as a type checker sees them, with the module that each comes from."""
    found: dict[str, str] = {}
    for node in ast.parse(Path(xf.__file__).with_suffix(".pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            home = ".".join(filter(None, ["xcam_fn", node.module]))
            for alias in node.names:
                every = importlib.import_module(home).__all__ if alias.name == "*" else [alias.name]
                found |= dict.fromkeys(every, home)
    return found


def test_what_a_type_checker_sees_is_what_there_is():
    assert set(typed_names()) == set(xf.__all__) <= set(dir(xf))
    for name, home in typed_names().items():
        if home == "xcam_fn":
            assert getattr(xf, name) is importlib.import_module(f"{home}.{name}")
        else:
            assert getattr(xf, name) is getattr(importlib.import_module(home), name)


def test_every_method_of_the_registry_has_a_public_name():
    for name, method in xf.METHODS.items():
        assert getattr(xf, name) is method


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'xcam_fn' has no attribute 'gradcm'"):
        _ = xf.gradcm


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import xcam_fn; xcam_fn.__version__; dir(xcam_fn)", {"torch", "numpy", *SLOW}),
        ("from xcam_fn import METHODS, perturbation_scores, split", SLOW),
    ],
)
def test_nothing_is_loaded_that_is_not_used(code, absent):
    code = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


def test_a_torch_that_lacks_a_private_name_is_said():
    code = (
        "import torch._C._functorch as private\n"
        "del private.peek_interpreter_stack\n"
        "from xcam_fn import gradcam\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks a private name that xcam_fn uses" in done.stderr
    assert "install one of these, or a newer xcam-fn" in done.stderr


@pytest.mark.parametrize("before", ["", "import xcam_fn.split, xcam_fn.heatmap"])
def test_split_and_heatmap_are_the_functions(before):
    code = (
        f"{before}\n"
        "import xcam_fn as xf\n"
        "from xcam_fn import heatmap, split\n"
        "assert xf.split is split and xf.heatmap is heatmap\n"
        "print(split.__qualname__, heatmap.__qualname__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "split heatmap\n"


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("Skipped: could not import 'timm'", "failed"),
        ("Skipped: the browser chromium is not installed on this machine", "skipped"),
        ("Skipped: the folder shared/ is not beside this checkout", "skipped"),
    ],
)
def test_ci_skips_only_what_it_may_lack(reason, outcome, monkeypatch):
    report = pytest.TestReport("test_it", ("", 0, ""), {}, "skipped", ("test.py", 1, reason), "call")
    monkeypatch.setenv("CI", "true")
    assert refused_skip(report).outcome == outcome
    monkeypatch.delenv("CI")
    report.outcome = "skipped"
    assert refused_skip(report).outcome == "skipped"


@pytest.mark.parametrize("name", sorted(set(xf.__all__)))
def test_help_is_well_formed(name):
    """Sections start at the margin and all else in them is indented, which is what documentation tools parse."""
    it = getattr(xf, name)
    doc = inspect.getdoc(it) or ""
    assert doc, "no docstring"
    inside = False
    for line in doc.splitlines():
        if re.fullmatch(r" *(Args|Attributes|Returns|Raises|References|Example):", line):
            assert not line.startswith(" "), line
            inside = True
        else:
            assert not (inside and line and not line.startswith(" ")), line
        assert not re.fullmatch(r" *\{\w+\}", line), line  # a part that was not filled in
    if callable(it) and not isinstance(it, type):
        page = pydoc.plain(pydoc.render_doc(it))
        signature = page.partition("\n\n")[2].partition("\n")[0]
        assert signature.startswith(f"{it.__name__}(")
        assert " -> " in signature
        assert " at 0x" not in signature


@pytest.mark.parametrize("name", sorted(xf.METHODS))
def test_help_of_a_method_has_its_formula_and_authors(name):
    doc = inspect.getdoc(xf.METHODS[name]) or ""
    head, _, references = doc.partition("Args:")[0], *doc.partition("References:\n")[1:]
    assert re.search(r"[=Σ‖Π−∂×≥]", head), head
    authors_and_source = r"    [A-Z][\w-]+.*(arXiv:|doi:|hal-|pytorch-grad-cam|20\d\d)"
    assert re.match(authors_and_source, references, re.S) or name == "randomcam", references
