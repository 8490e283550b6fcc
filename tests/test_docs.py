"""What the documentation says exists: methods, pictures, messages, tests, pages."""

import ast
import re
from pathlib import Path

import pytest

import hooks
import make_tables
import networks
import xcam_fn as xf

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CODE = r"^```.*?^```$|<!--.*?-->"
LARGEST = 300_000  # bytes of a committed picture
WITHOUT_PICTURE = set(networks.OF_ATTENTION)  # the network of the pictures is convolutional
LITERAL = 12  # letters of a message that have to stand in the code as they are


def test_every_method_has_its_prose():
    prose = hooks.prose()
    assert list(prose) == list(xf.METHODS)
    for name, about in prose.items():
        more = {"no_picture", "call", "model"} if name in WITHOUT_PICTURE else set()
        assert set(about) == {"idea", "formula", "use", "avoid", "cost"} | more, name
        assert all(text.strip() for text in about.values()), name
        sentences = re.findall(r"[.?!](?:\s|$)", about["idea"])
        assert len(sentences) == 2, f"{name}: the idea takes {len(sentences)} sentences"


def test_every_method_has_its_picture():
    drawn = {path.stem for path in (DOCS / "pictures" / "methods").glob("*.webp")}
    for name in set(xf.METHODS) - WITHOUT_PICTURE:
        assert name in drawn, f"no picture of {name}; python docs/make_pictures.py {name}"
    assert drawn == set(xf.METHODS) - WITHOUT_PICTURE


def test_pictures_are_small():
    for path in (DOCS / "pictures").rglob("*.*"):
        assert path.stat().st_size < LARGEST, path


def test_every_option_of_a_method_is_described():
    for name, method in xf.METHODS.items():
        for option in hooks.options_of(method):
            assert option.description, f"{name}: {option.name}"


def test_every_command_has_its_help():
    help_text = make_tables.command_help()
    for name in (
        "explain",
        "compare",
        "gallery",
        "evaluate",
        "merge",
        "report",
        "latency",
        "export",
        "app",
        "methods",
        "layers",
    ):
        assert f"## xcam {name}\n" in help_text
        assert f"Usage: xcam {name}" in help_text


def templates() -> list[re.Pattern[str]]:
    """Every text in the code, with anything in the place of what is filled in.

    What begins or ends with something filled in is one part of a longer text, or has a remedy that depends.
    """
    found = []
    for path in (ROOT / "xcam_fn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [str(v.value) if isinstance(v, ast.Constant) else None for v in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces = [node.value]
            else:
                continue
            if sum(len(piece or "") for piece in pieces) >= LITERAL:
                found.append(re.compile("".join(".*" if p is None else re.escape(p) for p in pieces), re.S))
    return found


def test_every_message_that_is_explained_is_one_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    assert len(messages) > 10
    known = templates()
    for message in messages:
        assert any(template.fullmatch(message.strip()) for template in known), message
    assert not any(template.fullmatch("layer 'x' is nowhere to be found") for template in known)


def test_every_test_that_is_named_exists():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for page in (DOCS / "exactness.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


def test_cells_of_a_notebook():
    percent = (
        "# ---\n# jupyter:\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\na = 1\n\n\n# %%\nb = 2\n"
    )
    assert list(hooks.cells(percent)) == [
        ("markdown", "# Title\n\nText."),
        ("code", "a = 1"),
        ("code", "b = 2"),
    ]


def test_a_part_that_is_missing_is_an_error():
    assert "Grad-CAM" in make_tables.part("README.md evaluation-table")
    with pytest.raises(ValueError, match="has no part <!-- nothing -->"):
        make_tables.part("README.md nothing")


@pytest.mark.parametrize("page", [page for page in make_tables.PAGES if "<!-- include" in page.read_text()])
def test_what_a_page_includes_is_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert make_tables.filled(text) == text, "python docs/make_tables.py writes it"
    assert make_tables.filled(re.sub(r"(<!-- include: .+? -->\n)", r"\1stale\n", text)) == text


def test_links_lead_to_files_of_the_repository():
    pages = [*make_tables.PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks/results").glob("*.md")]
    named = set(re.findall(r'<a id="(\w+)"', (DOCS / "methods" / "index.md").read_text(encoding="utf-8")))
    assert named == set(xf.METHODS)
    texts = {page: page.read_text(encoding="utf-8") for page in (*pages, *NOTEBOOKS)}
    texts |= {
        page: "".join(t for kind, t in hooks.cells(texts[page]) if kind == "markdown") for page in NOTEBOOKS
    }
    for page, text in texts.items():
        for link in re.findall(r"\]\(([^)\s:]+)\)", re.sub(CODE, "", text, flags=re.M | re.S)):
            path, _, anchor = link.partition("#")
            assert (page.parent / path).exists(), f"{page.name}: {link}"
            assert not path.endswith("methods/index.md") or anchor in named | {""}, f"{page.name}: {link}"


def test_formulas_and_links():
    assert "<mfrac>" in hooks.formula(r"\frac{1}{2}")
    assert "arxiv.org/abs/1610.02391" in hooks.method_page("gradcam")


def test_the_readme_lists_every_method():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"All {len(xf.METHODS)}, in the order of" in text
    assert "[arXiv:1610.02391](https://arxiv.org/abs/1610.02391)" in text


def test_the_reference_is_a_page_for_each_section():
    pages = hooks.api_pages()
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert len(pages) == 1 + len(re.findall(r"^## ", text, re.M))
    assert sorted(re.findall(r"^::: (\S+)", "\n".join(pages.values()), re.M)) == sorted(
        re.findall(r"^::: (\S+)", text, re.M)
    )
    assert "[Metrics](metrics.md)" in pages["api/index.md"]
