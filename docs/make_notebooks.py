"""Run the notebooks and write each, with what it prints and draws, as an .ipynb file beside it.

python docs/make_notebooks.py                  # all of them: minutes
python docs/make_notebooks.py 01_quickstart    # this one
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
from matplotlib.figure import Figure
from nbformat import v4
from PIL import Image

import hooks

INCHES = 9.5  # as wide as the site's text
DPI = 110


def main() -> None:
    """Write those that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, all by default")
    names = parser.parse_args().names or [path.stem for path in sorted(hooks.NOTEBOOKS.glob("*.py"))]
    mpl.use("agg")
    for name in names:
        print(name, flush=True)
        path = hooks.NOTEBOOKS / f"{name}.py"
        nbformat.write(executed(path), path.with_suffix(".ipynb"))


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook of a file in percent format, with the outputs of its cells."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for number, (kind, text) in enumerate(hooks.cells(path.read_text(encoding="utf-8"))):
        if kind == "markdown":
            cells.append(v4.new_markdown_cell(text, id=f"cell-{number}"))
        else:
            count = 1 + sum(cell.cell_type == "code" for cell in cells)
            outputs = _outputs(text, names)
            cells.append(v4.new_code_cell(text, id=f"cell-{number}", execution_count=count, outputs=outputs))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return v4.new_notebook(cells=cells, metadata=metadata)


def _outputs(code: str, names: dict[str, Any]) -> list[nbformat.NotebookNode]:
    """Run a cell: what it prints, then the figures that it shows, or the value of its last line."""
    tree = ast.parse(code)
    last = tree.body[-1]
    shown = ast.Expression(last.value) if isinstance(last, ast.Expr) else None
    if shown:
        tree.body.pop()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = eval(compile(shown, "<cell>", "eval"), names) if shown else None
    figures = [value] if isinstance(value, Figure) else [plt.figure(n) for n in plt.get_fignums()]
    outputs = [v4.new_output("stream", name="stdout", text=printed.getvalue())] if printed.getvalue() else []
    outputs += [v4.new_output("display_data", data=_encoded(figure)) for figure in figures]
    if value is not None and not figures:
        outputs.append(v4.new_output("display_data", data={"text/plain": repr(value)}))
    plt.close("all")
    return outputs


def _encoded(figure: Figure) -> dict[str, str]:
    """The picture by its type, in the smaller of two formats: PNG for lines, JPEG for photographs."""
    width, height = figure.get_size_inches()
    if width > INCHES:
        figure.set_size_inches(INCHES, height * INCHES / width)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    pixels = Image.open(drawn).convert("RGB")
    files = {"image/png": io.BytesIO(), "image/jpeg": io.BytesIO()}
    pixels.quantize(256, dither=Image.Dither.NONE).save(files["image/png"], format="png", optimize=True)
    pixels.save(files["image/jpeg"], format="jpeg", quality=82, optimize=True)
    kind, file = min(files.items(), key=lambda item: len(item[1].getvalue()))
    return {kind: base64.b64encode(file.getvalue()).decode()}


if __name__ == "__main__":
    main()
