"""Figures of panels and of curves, as `xcam_fn.plot` returns them; pyplot knows nothing of them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from xcam_fn.arguments import check
from xcam_fn.plot.inputs import Line

COLUMNS = 4
_PANEL_INCHES = 2.6
CURVE_INCHES = (4.4, 3.4)
_LINE_INCHES = 0.19
_TEXT: Any = {"fontsize": 10, "parse_math": False}
_SMALL = 9
_CHARACTERS_PER_INCH = 11.5
_LEGEND_CHARACTERS = 32
_SHADE = 0.2
# Okabe and Ito's colors, but for yellow, which is faint on white. Neighbors differ in dashes too, with gaps
# through which a line below is seen, as of methods that agree; 7 and 4 have no common divisor: 28 looks.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
DASHES = ("-", (0, (4, 3)), (0, (7, 3, 1.5, 3)), (0, (1.2, 1.8)))


def look(i: int) -> dict[str, Any]:
    """How the line of a method is drawn: the same in all figures."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}


class Panel(NamedTuple):
    """A picture (H, W, 3) below its title and above its note, and boxes in it by their numbers."""

    pixels: np.ndarray
    title: str
    note: str = ""
    boxes: Mapping[int, np.ndarray] = MappingProxyType({})  # x1, y1, x2, y2 in pixels of the picture

    def wrapped(self, inches: float) -> Panel:
        """The panel with its text in lines that are no wider."""
        return self._replace(title=_wrapped(self.title, inches), note=_wrapped(self.note, inches))

    def show(self, axis: Any) -> None:
        """Draw the panel in the axes."""
        axis.imshow(self.pixels)
        axis.set_title(self.title, **_TEXT)
        below = {"ha": "center", "va": "top", "transform": axis.transAxes, "fontsize": _SMALL}
        axis.text(0.5, -0.03, self.note, parse_math=False, **below)
        for number, (x1, y1, x2, y2) in self.boxes.items():
            color = COLORS[number % len(COLORS)]
            for edge, width in (("white", 3.5), (color, 2.0)):  # seen on any ground
                corner = (x1 - 0.5, y1 - 0.5)  # a pixel's center has its whole number
                axis.add_patch(
                    Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width)
                )


def panels_figure(
    panels: list[Panel], caption: str | None, *, colormap: str | None = None, columns: int = COLUMNS
) -> Figure:
    """The panels in rows, with a bar of the colors where there is a colormap."""
    check("caption", caption, str | None)
    height, width = panels[0].pixels.shape[:2]
    columns = min(len(panels), columns)
    rows = math.ceil(len(panels) / columns)
    inches = _PANEL_INCHES * min(1.0, max(0.5, width / height))
    figure_width = columns * inches + (0.85 if colormap else 0)
    panels = [panel.wrapped(inches) for panel in panels]
    below = _wrapped(caption or "", figure_width)
    title_lines = (2.4 if colormap else 1.6) + max(panel.title.count("\n") for panel in panels)
    note_lines = max(len(panel.note.splitlines()) for panel in panels)
    row_height = inches * height / width + _LINE_INCHES * (title_lines + note_lines)
    caption_height = _LINE_INCHES * (1 + len(below.splitlines())) if below else 0
    figure = figure_of(figure_width, rows * row_height + caption_height)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel.show(axis)
    if colormap:
        relevance_bar(figure, axes, colormap, aspect=20 * rows)
    if below:
        figure.supxlabel(below, **_TEXT)
    return figure


def relevance_bar(figure: Figure, axes: Any, colormap: str, aspect: int = 20) -> None:
    """Add a bar of what the colors of relevance mean beside the axes."""
    scale = ScalarMappable(cmap=colormap)
    bar = figure.colorbar(scale, ax=axes, ticks=[0, 1], fraction=0.03, pad=0.02, aspect=aspect)
    bar.ax.set_yticklabels(["least", "most"])
    bar.set_label("relevance", labelpad=-12)


def curve_figure(line: Line, title: str | None, beside: Panel | None = None) -> Figure:
    """One curve with the area under it shaded, at the right of a panel if there is one."""
    width, height = CURVE_INCHES
    if beside is None:
        figure = figure_of(width, height)
        axis: Any = figure.subplots()
    else:
        ratio = min(2.0, max(0.5, beside.pixels.shape[1] / beside.pixels.shape[0]))
        inches = (height - 4 * _LINE_INCHES) * ratio
        figure = figure_of(inches + width, height)
        left, axis = figure.subplots(1, 2, width_ratios=[inches, width])
        left.set_axis_off()
        left.set_anchor("N")
        beside.wrapped(inches).show(left)
    axis.fill_between(line.fractions, line.mean, color=COLORS[0], alpha=_SHADE, linewidth=0)
    _draw(axis, [line])
    text = ", ".join(filter(None, [title, "" if beside else line.name, f"AUC = {line.area}"]))
    if line.images > 1:
        text += f"\nmean ± standard error of {line.images} images"
    axis.set_title(_wrapped(text, width), **_TEXT)
    return figure


def curves_figure(lines: list[Line], best: str, title: str | None) -> Figure:
    """Several curves in one axes, with a legend from the best on."""
    labels = [_label(line) for line in lines]
    spread = any(line.images > 1 for line in lines)
    head = f"area under the curve{' (mean' * spread}\n{'± standard error), ' * spread}{best} first"
    words = "\n".join([head, *labels]).splitlines()
    width, height = CURVE_INCHES
    beside = max(map(len, words)) / _CHARACTERS_PER_INCH + 0.8
    figure = figure_of(width + beside, max(height, _LINE_INCHES * (len(words) + 5)))
    axis = figure.subplots()
    handles = _draw(axis, lines)
    axis.set_title(_wrapped(title or "", width), **_TEXT)
    ranked = sorted(range(len(lines)), key=lambda i: lines[i].auc, reverse=best == "highest")
    place: Any = {"loc": "upper left", "bbox_to_anchor": (1.04, 1), "borderaxespad": 0, "alignment": "left"}
    look: Any = {"frameon": False, "fontsize": _SMALL, "title_fontsize": _SMALL, "handlelength": 2.8}
    shown = [handles[i] for i in ranked], [labels[i] for i in ranked]
    legend = axis.legend(*shown, title=head, **place, **look)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _label(line: Line) -> str:
    """The line's name and area, whose numbers are not torn apart."""
    whole = f"{line.name}: {line.area}"
    if len(whole) <= _LEGEND_CHARACTERS:
        return whole
    return f"{textwrap.fill(f'{line.name}:', _LEGEND_CHARACTERS)}\n{line.area}"


def _draw(axis: Any, lines: list[Line]) -> list[Any]:
    """Draw lines and bands in axes from 0 to 1, or as far as they go; return the lines' artists."""
    shade = min(_SHADE, 0.6 / len(lines))  # bands lie over each other
    bands = [(line.mean - line.error, line.mean + line.error) for line in lines]
    drawn = []
    for i, (line, band) in enumerate(zip(lines, bands, strict=True)):
        of_line = look(i)
        if line.images > 1:
            axis.fill_between(line.fractions, *band, color=of_line["color"], alpha=shade, linewidth=0)
        drawn += axis.plot(line.fractions, line.mean, label=line.name, **of_line)
    axis.set_xlim(0, 1)
    axis.set_ylim(min(0.0, *(low.min() for low, _ in bands)), max(1.0, *(high.max() for _, high in bands)))
    axis.tick_params(labelsize=_SMALL)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return drawn


def _wrapped(text: str, inches: float) -> str:
    width = max(8, int(inches * _CHARACTERS_PER_INCH))
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width))
