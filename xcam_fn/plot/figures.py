"""Figures of panels and of curves, as `xcam_fn.plot` returns them; pyplot knows nothing of them."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xcam_fn.plot.inputs import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_PANEL_INCHES = 2.6
_CURVE_INCHES = (4.4, 3.4)
_COLORBAR_INCHES = 0.85
_POINTS = 10
_TEXT: Any = {"fontsize": _POINTS, "parse_math": False}
_SMALL_TEXT: Any = {"fontsize": _POINTS - 1, "parse_math": False}
_LINE_INCHES = 0.19
_CHARACTERS_PER_INCH = 11.5
_LEGEND_CHARACTERS = 32
_KEY_INCHES = 0.8
_SHADE = 0.2
_SHADES = 0.6  # of all bands, which lie over each other
# Okabe and Ito's colors, but for yellow, which is faint on white. Neighbors differ in dashes too, with gaps
# through which a line below is seen, as of methods that agree; 7 and 4 have no common divisor: 28 looks.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_DASHES = ("-", (0, (4, 3)), (0, (7, 3, 1.5, 3)), (0, (1.2, 1.8)))


class Panel(NamedTuple):
    """A picture (H, W, 3) below its title and above its note."""

    pixels: np.ndarray
    title: str
    note: str = ""


def panels_figure(
    panels: list[Panel], caption: str | None, *, colormap: str | None = None, columns: int = _COLUMNS
) -> Figure:
    """The panels in rows, with a bar of the colors where there is a colormap."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 (slow, and not needed for an overlay)

    height, width = panels[0].pixels.shape[:2]
    columns = min(len(panels), columns)
    rows = math.ceil(len(panels) / columns)
    inches = _PANEL_INCHES * min(1.0, max(0.5, width / height))
    figure_width = columns * inches + (_COLORBAR_INCHES if colormap else 0)
    panels = [Panel(p.pixels, _wrapped(p.title, inches), _wrapped(p.note, inches)) for p in panels]
    below = _wrapped(caption or "", figure_width)
    title_lines = (2.4 if colormap else 1.6) + max(panel.title.count("\n") for panel in panels)
    note_lines = max(_lines(panel.note) for panel in panels)
    row_height = inches * height / width + _LINE_INCHES * (title_lines + note_lines)
    caption_height = _LINE_INCHES * (1 + _lines(below)) if below else 0
    figure = _figure(figure_width, rows * row_height + caption_height)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.imshow(panel.pixels)
        axis.set_title(panel.title, **_TEXT)
        if panel.note:
            below_it: dict[str, Any] = {"ha": "center", "va": "top", "transform": axis.transAxes}
            axis.text(0.5, -0.03, panel.note, **below_it, **_SMALL_TEXT)
    if colormap:
        scale = ScalarMappable(cmap=colormap)
        bar = figure.colorbar(scale, ax=axes, ticks=[0, 1], fraction=0.03, pad=0.02, aspect=20 * rows)
        bar.ax.set_yticklabels(["least", "most"])
        bar.set_label("relevance", labelpad=-12)
    if below:
        figure.supxlabel(below, **_TEXT)
    return figure


def curve_figure(line: Line, title: str | None, beside: Panel | None = None) -> Figure:
    """One curve with the area under it shaded, at the right of a panel if there is one."""
    width, height = _CURVE_INCHES
    words = [title, line.name]
    if beside is None:
        figure = _figure(width, height)
        axis: Any = figure.subplots()
    else:
        ratio = min(2.0, max(0.5, beside.pixels.shape[1] / beside.pixels.shape[0]))
        inches = (height - 4 * _LINE_INCHES) * ratio
        figure = _figure(inches + width, height)
        left, axis = figure.subplots(1, 2, width_ratios=[inches, width])
        left.set_axis_off()
        left.imshow(beside.pixels)
        left.set_anchor("N")
        left.set_title(_wrapped(beside.title, inches), **_TEXT)
        words = [title]
    axis.fill_between(line.fractions, line.mean, color=_COLORS[0], alpha=_SHADE, linewidth=0)
    _draw(axis, line, 0)
    _frame(axis, [line])
    text = ", ".join([*filter(None, words), f"AUC = {line.area}"])
    if line.images > 1:
        text += f"\nmean ± standard error of {line.images} images"
    axis.set_title(_wrapped(text, width), **_TEXT)
    return figure


def curves_figure(lines: list[Line], best: str, title: str | None) -> Figure:
    """Several curves in one axes, with a legend from the best on."""
    ranked = sorted(range(len(lines)), key=lambda i: lines[i].auc, reverse=best == "highest")
    labels = [_label(line) for line in lines]
    spread = any(line.images > 1 for line in lines)
    head = f"area under the curve{' (mean' * spread}\n{'± standard error), ' * spread}{best} first"
    words = "\n".join([head, *labels]).splitlines()
    width, height = _CURVE_INCHES
    beside = max(map(len, words)) / _CHARACTERS_PER_INCH + _KEY_INCHES
    figure = _figure(width + beside, max(height, _LINE_INCHES * (len(words) + 5)))
    axis = figure.subplots()
    shade = min(_SHADE, _SHADES / len(lines))
    handles = [_draw(axis, line, i, shade) for i, line in enumerate(lines)]
    _frame(axis, lines)
    axis.set_title(_wrapped(title or "", width), **_TEXT)
    legend = axis.legend(
        [handles[i] for i in ranked],
        [labels[i] for i in ranked],
        title=head,
        loc="upper left",
        bbox_to_anchor=(1.04, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=_POINTS - 1,
        title_fontsize=_POINTS - 1,
        alignment="left",
        handlelength=2.8,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow, and not needed for an overlay)

    return Figure(figsize=(width, height), layout="constrained")


def _label(line: Line) -> str:
    """The line's name and area, whose numbers are not torn apart."""
    whole = f"{line.name}: {line.area}"
    if len(whole) <= _LEGEND_CHARACTERS:
        return whole
    return "\n".join([*textwrap.wrap(f"{line.name}:", _LEGEND_CHARACTERS), line.area])


def _draw(axis: Any, line: Line, number: int, shade: float = _SHADE) -> Any:
    """The line with its band, as the number says; returns the line's artist."""
    color = _COLORS[number % len(_COLORS)]
    dashes = _DASHES[number % len(_DASHES)]
    if line.images > 1:
        low, high = line.mean - line.error, line.mean + line.error
        axis.fill_between(line.fractions, low, high, color=color, alpha=shade, linewidth=0)
    (drawn,) = axis.plot(
        line.fractions, line.mean, color=color, linestyle=dashes, linewidth=1.6, label=line.name
    )
    return drawn


def _frame(axis: Any, lines: list[Line]) -> None:
    """Axes from 0 to 1, or as far as the lines and bands go."""
    low = min(float((line.mean - line.error).min()) for line in lines)
    high = max(float((line.mean + line.error).max()) for line in lines)
    axis.set_xlim(0, 1)
    axis.set_ylim(min(0.0, low), max(1.0, high))
    axis.tick_params(labelsize=_POINTS - 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def _lines(text: str) -> int:
    return len(text.splitlines())


def _wrapped(text: str, inches: float) -> str:
    width = max(8, int(inches * _CHARACTERS_PER_INCH))
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width))
