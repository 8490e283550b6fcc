"""The figures of a report, and its page."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from xcam_fn import plot
from xcam_fn.evaluate.comparison import LEVEL
from xcam_fn.evaluate.found import Found, agreement, labels, metric_label, pixels
from xcam_fn.evaluate.ranking import Board, advice
from xcam_fn.evaluate.seen import embedded
from xcam_fn.metrics.table import METRICS
from xcam_fn.plot.figures import curve_figure, curves_figure, look
from xcam_fn.plot.inputs import Line

_GALLERY = 3
_FAILURES = 100  # rows listed at most
_DPI = 110


# -- figures ------------------------------------------------------------------------------------------------


def figures(found: Found) -> dict[str, Figure]:
    """Return a figure with the mean curves of all methods, for each metric that has curves.

    Args:
        found: what `read` returns.
    """
    return {metric: _curves(found, metric) for metric in found.metrics if metric in found.curves}


def _curves(found: Found, metric: str) -> Figure:
    about, lines = METRICS[metric], []
    for method in found.methods:
        if curve := found.curves[metric].get(method):
            areas = np.array([*found.values(method, metric).values()])
            error = areas.std(ddof=1) / len(areas) ** 0.5 if len(areas) > 1 else 0.0
            lines.append(Line(found.title(method), *curve[:3], areas.mean(), error, curve.photographs))
    one = len(lines) == 1
    figure = curve_figure(lines[0], about.title) if one else curves_figure(lines, about.best, about.title)
    axis = figure.axes[-1]
    axis.set_xlabel(f"share of pixels {'shown' if metric == 'insertion' else 'removed'}")
    axis.set_ylabel("probability")
    return figure


def ranks_figure(board: Board) -> Figure:
    """Return a figure of the mean ranks, a line per method: where lines cross, metrics disagree.

    A metric's bar extends from the best rank by the critical difference: methods inside it are leaders.

    Args:
        board: from `ranking.board`, with at least one ranking.
    """
    names, methods = board.names(), list(board.overall)
    size = 2.8 + 1.2 * len(names), max(3.2, 1.2 + 0.24 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for i, each in enumerate(board.rankings):
        best = min(each.ranks.values())
        axis.bar(i, min(each.critical, len(methods) - best), 0.24, best, color="#dddddd", zorder=0)
    order = [m for m in board.titles if m in board.overall]
    for method in methods:
        ranks = [each.ranks[method] for each in board.rankings]
        label = f"{board.titles[method]} ({board.overall[method]:.2f})"
        axis.plot(ranks, marker="o", markersize=4, label=label, **look(order.index(method)))
    axis.set_xticks(range(len(names)), [textwrap.fill(name, 16) for name in names], fontsize=8)
    axis.set_xlim(-0.4, len(names) - 0.6)
    ends = [rank for each in board.rankings for rank in each.ranks.values()]
    axis.set_ylim(max(ends) + 0.3, min(ends) - 0.3)
    axis.set_ylabel("mean rank, 1 is best")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    legend = axis.legend(
        title="mean over metrics", loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9,
        handlelength=2.8,
    )  # fmt: skip
    for text in [*legend.get_texts(), *axis.get_xticklabels()]:
        text.set_parse_math(False)
    return figure


def pictures(drawn: Mapping[str, Figure]) -> dict[str, bytes]:
    """Return the figures as PNG files."""
    return {name: _drawn(figure) for name, figure in drawn.items()}


def _drawn(figure: Figure, kind: str = "png") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=_DPI)
    return file.getvalue()


# -- the page -----------------------------------------------------------------------------------------------


class _Shown(NamedTuple):
    """A photograph of the gallery."""

    name: str
    alike: float
    source: str


def page(
    runs: Sequence[Found],
    board: Board,
    tables: Sequence[Sequence[Sequence[str]]],
    drawn: Sequence[Mapping[str, bytes]],
    ranks: Mapping[str, bytes],
) -> str:
    """Return the page as HTML.

    Args:
        runs: results, from `read`.
        board: their rankings.
        tables: for each run, its `report.table`.
        drawn: for each run, its figures of curves, as PNG files by metric.
        ranks: the figure of the rankings, if there is one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415, needed here alone

    environment = Environment(
        loader=PackageLoader("xcam_fn.evaluate"), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    readable = sum(not image.error for run in runs for image in run.images)
    return environment.get_template("report.html").render(
        runs=[
            {
                "found": run,
                "label": label,
                "table": table,
                "best": _best(run),
                "figures": {metric: embedded(png, "png") for metric, png in pngs.items()},
                "pairs": {(p.metric, *two): p for p in run.pairs for two in itertools.permutations(p[1:3])},
                "shown": _gallery(run),
                "failures": _failures(run),
            }
            for run, label, table, pngs in zip(runs, labels(runs), tables, drawn, strict=True)
        ],
        title=f"{', '.join(labels(runs))}: {len(board.titles)} methods on {readable} photographs",
        board=board,
        names=board.names(),
        advice=advice(board),
        ranks={name: embedded(png, "png") for name, png in ranks.items()},
        about=METRICS,
        level=LEVEL,
        label=metric_label,
        zip=zip,
    )


def _best(found: Found) -> set[tuple[str, str]]:
    """Return the (method, metric) of the best mean in each metric."""
    best = set()
    for metric in found.metrics:
        values = {method: row[metric].value for method, row in found.means.items() if row[metric].photographs}
        if values:
            pick = max if METRICS[metric].best == "highest" else min
            best.add((pick(values, key=values.__getitem__), metric))
    return best


def _gallery(found: Found) -> dict[str, list[_Shown]]:
    """Return the photographs on which the methods agree most and least."""
    alike = {n: r for n, r in agreement(found).items() if found.files[n].picture is not None}
    order = sorted(alike, key=lambda number: (-alike[number], number))
    shown = {"most": order[:_GALLERY], "least": order[_GALLERY:][-_GALLERY:][::-1]}
    names = {image.number: image.name for image in found.images}
    return {k: [_Shown(names[n], alike[n], _picture(found, n)) for n in some] for k, some in shown.items()}


def _picture(found: Found, number: int) -> str:
    """Draw the heatmaps of all methods over a photograph."""
    file, heatmaps = found.files[number]
    assert file is not None
    with Image.open(io.BytesIO(file)) as opened:
        picture = np.asarray(opened.convert("RGB"))
    maps = {found.title(m): pixels(heatmaps[m]) for m in found.methods if m in heatmaps}
    (image,) = (image for image in found.images if image.number == number)
    assert image.cls is not None
    names = found.settings["categories"]  # empty where a network's own are not known
    caption = names[image.cls] if names else f"class {image.cls}"
    caption += "" if image.probability is None else f", {image.probability:.1%}"
    return embedded(_drawn(plot.heatmaps(picture, maps, caption=caption), "jpeg"), "jpeg")


def _failures(found: Found) -> list[dict[str, Any]]:
    """Return the failures, with equal ones in one row, up to the limit."""
    names, rows = {image.number: image.name for image in found.images}, {}
    for number, method, error in found.failures:
        row = rows.setdefault((method, error), {"photograph": names[number], "count": 0})
        row["count"] += 1
    titles = {None: "could not be read"} | {method: found.title(method) for method in found.methods}
    some = itertools.islice(rows.items(), _FAILURES)
    return [{"method": titles[method], "error": error, **row} for (method, error), row in some]
