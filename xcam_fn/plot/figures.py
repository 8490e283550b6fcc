"""Figures of panels and of curves, as `xcam_fn.plot` returns them; pyplot knows nothing of them."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from xcam_fn.plot.inputs import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_PANEL_INCHES = 2.6
_CURVE_INCHES = (4.4, 3.4)
_COLORBAR_INCHES = 0.85
_POINTS = 10
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


def curves_figure(lines: list[Line], best: str, title: str | None) -> Figure:
    """All curves in one axes, the area under it shaded where there is only one."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow, and not needed for an overlay)

    width, height = _CURVE_INCHES
    if len(lines) == 1:
        figure = Figure(figsize=(width, height), layout="constrained")
        _draw_only(figure.subplots(), lines[0], [title, lines[0].name], width)
        return figure
    ranked = sorted(range(len(lines)), key=lambda i: lines[i].auc, reverse=best == "highest")
    labels = [_label(line) for line in lines]
    spread = any(line.images > 1 for line in lines)
    head = f"area under the curve{' (mean' * spread}\n{'± standard error), ' * spread}{best} first"
    words = "\n".join([head, *labels]).splitlines()
    beside = max(map(len, words)) / _CHARACTERS_PER_INCH + _KEY_INCHES
    height = max(height, _LINE_INCHES * (len(words) + 5))
    figure = Figure(figsize=(width + beside, height), layout="constrained")
    axis = figure.subplots()
    shade = min(_SHADE, _SHADES / len(lines))
    handles = [_draw(axis, line, i, shade) for i, line in enumerate(lines)]
    _frame(axis, lines)
    axis.set_title(_wrapped(title or "", width), fontsize=_POINTS, parse_math=False)
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


def curve_beside(panel: np.ndarray, name: str, line: Line, title: str | None) -> Figure:
    """The named panel, and at its right the curve."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow, and not needed for an overlay)

    width, height = _CURVE_INCHES
    ratio = min(2.0, max(0.5, panel.shape[1] / panel.shape[0]))
    beside = (height - 4 * _LINE_INCHES) * ratio
    figure = Figure(figsize=(beside + width, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[beside, width])
    left.set_axis_off()
    left.imshow(panel)
    left.set_anchor("N")
    left.set_title(_wrapped(name, beside), fontsize=_POINTS, parse_math=False)
    _draw_only(right, line, [title], width)
    return figure


def _label(line: Line) -> str:
    """The line's name and area, whose numbers are not torn apart."""
    whole = f"{line.name}: {line.area}"
    if len(whole) <= _LEGEND_CHARACTERS:
        return whole
    return "\n".join([*textwrap.wrap(f"{line.name}:", _LEGEND_CHARACTERS), line.area])


def _draw_only(axis: Any, line: Line, words: list[str | None], inches: float) -> None:
    """The curve with the area under it, which the title names."""
    axis.fill_between(line.fractions, line.mean, color=_COLORS[0], alpha=_SHADE, linewidth=0)
    _draw(axis, line, 0)
    _frame(axis, [line])
    text = ", ".join([*filter(None, words), f"AUC = {line.area}"])
    if line.images > 1:
        text += f"\nmean ± standard error of {line.images} images"
    axis.set_title(_wrapped(text, inches), fontsize=_POINTS, parse_math=False)


def _draw(axis: Any, line: Line, number: int, shade: float = _SHADE) -> Any:
    """The line with its band, as the number says; returns the line's artist."""
    color = _COLORS[number % len(_COLORS)]
    dashes = _DASHES[number % len(_DASHES)]
    if line.error is not None:
        low, high = line.mean - line.error, line.mean + line.error
        axis.fill_between(line.fractions, low, high, color=color, alpha=shade, linewidth=0)
    (drawn,) = axis.plot(
        line.fractions, line.mean, color=color, linestyle=dashes, linewidth=1.6, label=line.name
    )
    return drawn


def _frame(axis: Any, lines: list[Line]) -> None:
    """Axes from 0 to 1, or as far as the lines and bands go."""
    errors = [0.0 if line.error is None else line.error for line in lines]
    low = min(float((line.mean - error).min()) for line, error in zip(lines, errors, strict=True))
    high = max(float((line.mean + error).max()) for line, error in zip(lines, errors, strict=True))
    axis.set_xlim(0, 1)
    axis.set_ylim(min(0.0, low), max(1.0, high))
    axis.tick_params(labelsize=_POINTS - 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def panels_figure(
    panels: list[np.ndarray],
    titles: list[str],
    caption: str | None,
    colormap: str | None,
    columns: int = _COLUMNS,
    notes: list[str] | None = None,
) -> Figure:
    """The panels in rows, each over its note, with a bar of the colors where there is a colormap."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 (slow, and not needed for an overlay)
    from matplotlib.figure import Figure  # noqa: PLC0415 (as slow)

    height, width = panels[0].shape[:2]
    columns = min(len(panels), columns)
    rows = math.ceil(len(panels) / columns)
    panel_width = _PANEL_INCHES * min(1.0, max(0.5, width / height))
    figure_width = columns * panel_width + (_COLORBAR_INCHES if colormap else 0)
    titles = [_wrapped(title, panel_width) for title in titles]
    notes = [_wrapped(note, panel_width) for note in notes or [""] * len(panels)]
    below = _wrapped(caption or "", figure_width)
    note_height = _LINE_INCHES * (1 + max(note.count("\n") for note in notes)) if any(notes) else 0
    title_height = _LINE_INCHES * ((2.4 if colormap else 1.6) + max(title.count("\n") for title in titles))
    caption_height = _LINE_INCHES * (2 + below.count("\n")) if below else 0
    figure_height = rows * (panel_width * height / width + title_height + note_height) + caption_height
    figure = Figure(figsize=(figure_width, figure_height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel, title, note in zip(axes.flat, panels, titles, notes, strict=False):
        axis.imshow(panel)
        axis.set_title(title, fontsize=_POINTS, parse_math=False)
        if note:
            axis.text(
                0.5, -0.03, note, transform=axis.transAxes, ha="center", va="top", fontsize=_POINTS - 1,
                parse_math=False,
            )  # fmt: skip
    if colormap:
        scale = ScalarMappable(cmap=colormap)
        bar = figure.colorbar(scale, ax=axes, ticks=[0, 1], fraction=0.03, pad=0.02, aspect=20 * rows)
        bar.ax.set_yticklabels(["least", "most"])
        bar.set_label("relevance", labelpad=-12)
    if below:
        figure.supxlabel(below, fontsize=_POINTS, parse_math=False)
    return figure


def _wrapped(text: str, inches: float) -> str:
    width = max(8, int(inches * _CHARACTERS_PER_INCH))
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width))
