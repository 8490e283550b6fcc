"""What MkDocs calls while it builds the site: pages made of data, and links that lead elsewhere on GitHub."""

from __future__ import annotations

import base64
import functools
import html
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "benchmarks" / "results"

FAMILIES = {
    "gradient": "gradients with respect to the features, the attention, the image or the biases",
    "perturbation": "the change of the score when something is hidden or shown alone",
    "optimized": "maps found by gradient ascent, for each image",
    "fusion": "combined maps of several methods or layers",
    "activation": "only the features and the network's own weights",
    "baseline": "what every explanation has to beat",
}
_CALL = ("model", "layer", "x", "cls")
_SHARED = (
    "to_spatial", "projection", "baseline", "score", "chunk_size", "precision", "compile", "scorer",
    "progress", "postprocess", "create_graph",
)  # fmt: skip
_LIBRARIES = {"xplaincam": "XplainCAM", "torchcam": "TorchCAM", "pytorch-grad-cam": "pytorch-grad-cam"}
# What links lead to on GitHub, and on the site.
ON_GITHUB = {
    r"(?:notebooks/)?(\d\w+)\.ipynb": r"notebooks/\1.md",
    r"benchmarks/results/(\w+)\.md": r"results/\1.md",
    r"methods/index\.md#(\w+)": r"methods/\1.md",
    r"CONTRIBUTING\.md": "contributing.md",
    r"api\.md": "api/index.md",
    r"api\.md#([\w-]+)": r"api/\1.md",
}


# -- what MkDocs calls --------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made into the navigation."""
    entries = {
        "Methods": _method_nav(),
        "Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks()],
        "API": list(api_pages()),
    }
    assert config.nav is not None
    config.nav = [{name: entries.get(name, entry) for name, entry in item.items()} for item in config.nav]
    config.watch.extend(str(path) for path in (ROOT / "xcam_fn", NOTEBOOKS, RESULTS))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for path, content in made_pages().items():
        files.append(File.generated(config, path, content=content))
    there = {f"results/{path.name}": path for path in RESULTS.glob("*.md")}
    there |= {name.lower(): ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for page, path in there.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out what is for GitHub, lead links to the site's pages, and draw formulas."""
    del config, files
    markdown = re.sub(r"<!-- on GitHub -->.*?<!-- /on GitHub -->\n", "", markdown, flags=re.S)
    markdown = markdown.replace("<!-- all methods -->", gallery())
    up = "../" * page.file.src_uri.count("/")
    for pattern, made in ON_GITHUB.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{pattern}\)", rf"]({up}{made})", markdown)
    markdown = re.sub(r"^```math\n(.*?)^```$", lambda found: formula(found[1]), markdown, flags=re.M | re.S)
    return re.sub(r"(?<![\w`])\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\w)", lambda found: mathml(found[1]), markdown)


# -- pages --------------------------------------------------------------------------------------------------


def made_pages() -> dict[str, str | bytes]:
    """Every page that has no file of its own, in Markdown, and the notebooks' pictures, by path."""
    import xcam_fn as xf

    pages: dict[str, str | bytes] = {
        **api_pages(),
        **{f"methods/{name}.md": method_page(name) for name in xf.METHODS},
    }
    for path in notebooks():
        text, pictures = notebook_page(path)
        pages |= {f"notebooks/{path.stem}.md": text, **pictures}
    return pages


def api_pages() -> dict[str, str]:
    """The reference, a page for each section of api.md, and one that lists them."""
    introduction, *rest = re.split(r"^## (.+)\n", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    slugs = {title: re.sub(r"\W+", "-", title.lower()).strip("-") for title in sections}
    listed = [f"- [{title}]({slug}.md)" for title, slug in slugs.items()]
    index = introduction.replace("](", "](../") + "\n".join(listed) + "\n"
    return {"api/index.md": index} | {
        f"api/{slugs[title]}.md": f"# {title}\n{body}" for title, body in sections.items()
    }


def notebooks() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


@functools.cache
def prose() -> dict[str, dict[str, str]]:
    """What is written about each method, by its name."""
    return tomllib.loads((DOCS / "methods.toml").read_text(encoding="utf-8"))


def families() -> dict[str, list[Any]]:
    """The methods by family."""
    import xcam_fn as xf

    found: dict[str, list[Any]] = {}
    for method in xf.METHODS.values():
        found.setdefault(method.family, []).append(method)
    return found


def _method_nav() -> list[Any]:
    by_family = [
        {f"{family.capitalize()} family": [{m.title: f"methods/{m.name}.md"} for m in methods]}
        for family, methods in families().items()
    ]
    return ["methods/index.md", *by_family]


def gallery() -> str:
    """All methods with their pictures, a section for each family."""
    parts = []
    for family, methods in families().items():
        cards = "\n".join(map(_card, methods))
        heading = f"## {family.capitalize()} family: {FAMILIES[family]}"
        parts.append(f'{heading}\n\n<div class="gallery" markdown>\n\n{cards}\n</div>\n')
    return "\n".join(parts)


def _card(method: Any) -> str:
    has_picture = "no_picture" not in prose()[method.name]
    picture = f"![](../pictures/methods/{method.name}.webp){{ loading=lazy }} " if has_picture else ""
    return f"[{picture}**{method.title}** {method.summary}]({method.name}.md)\n"


def method_page(name: str) -> str:
    """The page of one method."""
    import xcam_fn as xf

    method, about = xf.METHODS[name], prose()[name]
    call = about.get("call", f"heatmaps = xf.{name}(model, None, x)        # (B, h, w) in [0, 1]")
    network = f"--model {about['model']} " if "model" in about else ""
    return f"""# {method.title}

<div class="method" markdown>

<div markdown>

{about["idea"].strip()}

<p class="facts">{_facts(method)}</p>

</div>

{_picture(method, about)}

</div>

{formula(about["formula"])}

<div class="verdict" markdown>

<div markdown>

## When to use it

{about["use"].strip()}

</div>

<div markdown>

## When not

{about["avoid"].strip()}

</div>

<div markdown>

## Cost

In forward passes of the network: {_uncapitalized(about["cost"].strip())}

</div>

</div>

## Call

```python
{call.strip()}
```

```sh
xcam explain --example {network}--methods {name}
```

{options(method)}
{_variants(name)}
"""


def _picture(method: Any, about: dict[str, str]) -> str:
    if "no_picture" in about:
        return f'<p class="facts">{about["no_picture"]}</p>'
    return f"![{method.title} of a photograph of a cat](../pictures/methods/{method.name}.webp)"


def _uncapitalized(text: str) -> str:
    is_name = any(letter.isupper() for letter in text.split(maxsplit=1)[0][1:])
    return text if is_name else text[0].lower() + text[1:]


def _facts(method: Any) -> str:
    facts = [f"{method.family} family", f"<code>xf.{method.name}</code>"]
    if method.needs:
        facts.append(f"needs {method.needs}")
    if method.paper:
        facts.append(_linked(method.paper))
    return " · ".join(facts)


def _linked(paper: str) -> str:
    """Where the paper was published, with a link to it."""
    arxiv = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'
    doi = r'<a href="https://doi.org/\1">doi:\1</a>'
    return re.sub(r"doi:(\S+)", doi, re.sub(r"arXiv:([\d.]+)", arxiv, html.escape(paper)))


# -- options ------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """A keyword of a method."""

    name: str
    default: str
    description: str


def options(method: Any) -> str:
    """The section on a method's keywords: its own in a table, and what it shares with others folded away."""
    every = [option for option in options_of(method) if option.name not in _CALL]
    own = [option for option in every if option.name not in _SHARED]
    shared = [option for option in every if option.name in _SHARED]
    first = _table(own) if own else "None of its own."
    folded = _table(shared).replace("\n", "\n    ")
    title = "Options shared with other methods"
    return f'## Options\n\n{first}\n\n??? note "{title}"\n\n    {folded}\n'


def options_of(method: Any) -> Iterator[Option]:
    """Every keyword of a method, those that its call is made of included."""
    about = _described(method)
    for name, parameter in inspect.signature(method).parameters.items():
        yield Option(name, _shown(parameter.default), about.get(name, ""))


def _described(function: Any) -> dict[str, str]:
    """What a docstring says of each argument."""
    import griffe

    sections = griffe.Docstring(inspect.getdoc(function) or "").parse("google", warnings=False)
    return {
        argument.name: " ".join(argument.description.split())
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
        for argument in section.value
    }


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    if isinstance(default, functools.partial):
        given = ", ".join(f"{name}={_shown(value)}" for name, value in default.keywords.items())
        return f"{_shown(default.func)} with {given}"
    return getattr(default, "__name__", None) or repr(default)


def _table(rows: list[Option]) -> str:
    lines = ["| keyword | default | |", "|---|---|---|"]
    for name, default, description in rows:
        lines.append(f"| `{name}` | `{default}` | {description.replace('|', '&#124;')} |")
    return "\n".join(lines)


def _variants(name: str) -> str:
    import xcam_fn as xf

    rows = []
    for library, methods in xf.VARIANTS.items():
        if name in methods:
            given = ", ".join(f"{key}={_shown(value)}" for key, value in methods[name].items())
            rows.append(f"| {_LIBRARIES[library]} | {f'`{given}`' if given else 'the same'} |")
    if not rows:
        return ""
    table = "\n".join(["| library | keywords that reproduce its map |", "|---|---|", *rows])
    link = "[What other libraries compute](../variants.md)"
    return f"## In other libraries\n\n{table}\n\n{link} lists the differences.\n"


# -- parts --------------------------------------------------------------------------------------------------


def formula(latex: str) -> str:
    """A formula in MathML, which browsers draw themselves."""
    return f'<div class="formula">{mathml(latex.strip(), display="block")}</div>'


def mathml(latex: str, display: Literal["inline", "block"] = "inline") -> str:
    """The same within a line."""
    from latex2mathml.converter import convert

    return convert(latex, display=display)


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, with what its cells printed, and the pictures that they drew, by path."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            kind, content = next(iter(output.get("data", {"text/plain": output.get("text")}).items()))
            if kind == "text/plain":
                parts.append("```text\n" + "".join(content).rstrip() + "\n```")
            else:
                name = f"{path.stem}_{number}.{kind.removeprefix('image/')}"
                pictures[f"notebooks/{name}"] = base64.b64decode("".join(content))
                parts.append(f"![]({name})")
    parts.append(f"---\n\nThis page is `notebooks/{path.name}`, which Jupyter opens.")
    return "\n\n".join(parts), pictures


def cells(percent: str) -> Iterator[tuple[str, str]]:
    """The cells of a notebook in percent format: ("markdown" or "code", text)."""
    for cell in re.split(r"^# %%", percent, flags=re.M)[1:]:
        first, _, body = cell.partition("\n")
        if "[markdown]" in first:
            yield "markdown", re.sub(r"^# ?", "", body, flags=re.M).strip()
        elif body.strip():
            yield "code", body.strip()
