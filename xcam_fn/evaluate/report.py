"""What a run found: tables with intervals, pairs of methods, curves, and a page that holds it all."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import stats

from xcam_fn import plot
from xcam_fn.arguments import checked
from xcam_fn.evaluate.store import ImageRow, Result, Score, reading
from xcam_fn.metrics.curves import Curve
from xcam_fn.metrics.judged import pearson
from xcam_fn.metrics.table import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.05  # of an error of the first kind, as is usual: 95 % intervals, false discovery rate of pairs
_RESAMPLES = 4999
_GALLERY = 3
_DPI = 110
_SEED = 0


class Found(NamedTuple):
    """What a run holds.

    Attributes:
        settings: what it was begun with.
        images: the photographs.
        results: what the methods made of them.
    """

    settings: dict[str, Any]
    images: list[ImageRow]
    results: list[Result]

    @property
    def methods(self) -> list[str]:
        """The names of the methods."""
        return list(self.settings["methods"])

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics."""
        return self.settings["metrics"]

    def title(self, method: str) -> str:
        """The title of a method."""
        return self.settings["methods"][method]

    def scores(self, method: str, metric: str) -> dict[int, Score]:
        """What a metric found of each photograph, by its number."""
        return {r.number: r.scores[metric] for r in self.results if r.method == method and r.error is None}

    def values(self, method: str, metric: str) -> dict[int, float]:
        """The score of each photograph, by its number."""
        return {number: score.value for number, score in self.scores(method, metric).items()}


class Mean(NamedTuple):
    """A mean over photographs.

    Attributes:
        value: the mean; NaN where there are no photographs.
        low: the lower end of its 95 % interval, NaN for fewer than two photographs.
        high: the upper end.
        photographs: how many.
    """

    value: float
    low: float
    high: float
    photographs: int


class Pair(NamedTuple):
    """Two methods compared on the photographs that both have scores of.

    Attributes:
        metric: by name.
        first: a method, by name.
        second: the other.
        difference: mean of first − second.
        p: the chance of such a difference or a greater one, were the two alike: signs flipped at random,
            corrected for the number of pairs (Benjamini and Hochberg).
        photographs: how many.
        better: the better method where that is beyond chance (p < 0.05), else None.
    """

    metric: str
    first: str
    second: str
    difference: float
    p: float
    photographs: int
    better: str | None


def read(folder: str | os.PathLike[str]) -> Found:
    """What a run has found so far.

    Args:
        folder: that `evaluate.run` wrote to.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file there is not of a run.
    """
    with reading(folder) as store:
        return Found(store.settings(), store.images(), store.results())


def means(found: Found) -> dict[str, dict[str, Mean]]:
    """The mean of each metric by method, with a 95 % bootstrap interval.

    Args:
        found: what `read` returns.

    Returns:
        {method: {metric: mean}}, in the order of the run.
    """
    return {
        method: {metric: _mean(list(found.values(method, metric).values())) for metric in found.metrics}
        for method in found.methods
    }


def _mean(values: Sequence[float]) -> Mean:
    if not values:
        return Mean(np.nan, np.nan, np.nan, 0)
    mean = float(np.mean(values))
    if len(values) == 1:
        return Mean(mean, np.nan, np.nan, 1)
    interval = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=_RESAMPLES, confidence_level=1 - LEVEL,
        method="percentile", rng=np.random.default_rng(_SEED), batch=100,
    ).confidence_interval  # fmt: skip
    return Mean(mean, float(interval.low), float(interval.high), len(values))


def pairs(found: Found) -> list[Pair]:
    """Each pair of methods in each metric, and which is better where that is beyond chance.

    Args:
        found: what `read` returns.
    """
    return [pair for metric in found.metrics for pair in _pairs(found, metric)]


def _pairs(found: Found, metric: str) -> list[Pair]:
    values = {method: found.values(method, metric) for method in found.methods}
    compared = list(itertools.combinations(found.methods, 2))
    differences = [
        np.array([values[first][n] - values[second][n] for n in values[first] if n in values[second]])
        for first, second in compared
    ]
    corrected = stats.false_discovery_control([_chance(each) for each in differences]) if compared else []
    rows = []
    for (first, second), each, p in zip(compared, differences, corrected, strict=True):
        mean = float(each.mean()) if len(each) else np.nan
        winner = first if (mean > 0) == (METRICS[metric].best == "highest") else second
        rows.append(Pair(metric, first, second, mean, float(p), len(each), winner if p < LEVEL else None))
    return rows


def _chance(differences: np.ndarray) -> float:
    """The p value of a mean difference under random signs."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    return float(stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, vectorized=True,
        axis=0, batch=100, rng=np.random.default_rng(_SEED),
    ).pvalue)  # fmt: skip


# -- tables -------------------------------------------------------------------------------------------------


def table(found: Found) -> list[list[str]]:
    """The table of a run as text: a header, then a row a method with each metric's mean and interval.

    Args:
        found: what `read` returns.
    """
    arrows = {"highest": "↑", "lowest": "↓"}
    about = [METRICS[metric] for metric in found.metrics]
    rows = [["method", "model", "photographs", *(f"{m.title} {arrows[m.best]}" for m in about)]]
    for method, row in means(found).items():
        count = max((mean.photographs for mean in row.values()), default=0)
        rows.append([found.title(method), found.settings["model"], str(count), *map(_shown, row.values())])
    return rows


def _shown(mean: Mean) -> str:
    if not mean.photographs:
        return "–"
    return f"{mean.value:.4f}" + ("" if np.isnan(mean.low) else f" ({mean.low:.4f} to {mean.high:.4f})")


@checked
def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown.

    Args:
        rows: a header and what is below it; what would end a cell is escaped.
    """
    cells = [[re.sub(r"([\\|])", r"\\\1", " ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in cells]
    return "".join(f"| {line} |\n" for line in lines)


# -- files --------------------------------------------------------------------------------------------------


def write(found: Found, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the tables, the figures and the page, and return which files these are.

    Args:
        found: what `read` returns.
        folder: where they go; it is made where it is missing.

    Raises:
        OSError: the folder cannot be written to.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    compared = pairs(found)
    drawn = {metric: _drawn(figure) for metric, figure in figures(found).items()}
    files: dict[str, bytes] = {
        "table.md": markdown(table(found)).encode(),
        "table.csv": _csv(_plain_table(found)),
        "pairs.csv": _csv([Pair._fields, *compared]),
        **{f"{metric}.png": png for metric, png in drawn.items()},
        "report.html": _page(found, compared, drawn).encode(),
    }
    for name, content in files.items():
        (place / name).write_bytes(content)
    return [place / name for name in files]


def _plain_table(found: Found) -> Iterator[Sequence[Any]]:
    """One number a cell, in full."""
    parts = ("mean", *Mean._fields[1:])
    yield ["method", "model", *(f"{metric} {part}" for metric in found.metrics for part in parts)]
    for method, row in means(found).items():
        yield [method, found.settings["model"], *itertools.chain(*row.values())]


def _csv(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """A cell of a CSV file: nothing for NaN, and no text that a spreadsheet would compute."""
    if isinstance(value, str):
        return "'" * value.startswith(("=", "+", "-", "@", "\t", "\r")) + value
    return None if value != value else value  # noqa: PLR0124  (NaN)


def figures(found: Found) -> dict[str, Figure]:
    """The curves of all methods in one figure for each metric that has curves.

    Args:
        found: what `read` returns.
    """
    drawn = {}
    for metric in found.metrics:
        scores = {found.title(method): [*found.scores(method, metric).values()] for method in found.methods}
        curves = {title: _curve(some) for title, some in scores.items() if some and some[0].curve is not None}
        if curves:
            label = f"share of pixels {'shown' if metric == 'insertion' else 'taken away'}"
            about = METRICS[metric]
            drawn[metric] = plot.curves(curves, best=about.best, title=about.title, xlabel=label)
    return drawn


def _curve(scores: Sequence[Score]) -> Curve:
    parts = scores[0].fractions, [score.curve for score in scores], [score.value for score in scores]
    return Curve(*(torch.from_numpy(np.array(part)) for part in parts))


def _drawn(figure: Figure, kind: str = "png") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=_DPI)
    return file.getvalue()


# -- the page -----------------------------------------------------------------------------------------------


def agreement(found: Found) -> dict[int, float]:
    """How alike the methods' heatmaps of each photograph are: the mean correlation of all pairs.

    Args:
        found: what `read` returns.

    Returns:
        By the photograph's number; those of fewer than two methods are left out. A constant heatmap
        correlates with nothing.
    """
    maps: dict[int, list[np.ndarray]] = {}
    for result in found.results:
        if result.heatmap is not None:
            maps.setdefault(result.number, []).append(_pixels(result.heatmap))
    return {number: _alike(torch.from_numpy(np.stack(m))) for number, m in maps.items() if len(m) > 1}


def _alike(maps: torch.Tensor) -> float:
    first, second = torch.triu_indices(len(maps), len(maps), 1)
    return float(pearson(maps[first], maps[second]).mean())


def _pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as opened:
        return np.asarray(opened, np.float64) / 255


def _page(found: Found, compared: Sequence[Pair], drawn: dict[str, bytes]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415, needed here alone

    environment = Environment(
        loader=PackageLoader("xcam_fn.evaluate"), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    alike = agreement(found)
    order = sorted(alike, key=lambda number: (-alike[number], number))
    shown = {"most": order[:_GALLERY], "least": order[_GALLERY:][-_GALLERY:][::-1]}
    images = {image.number: image for image in found.images}
    return environment.get_template("report.html").render(
        found=found,
        table=table(found),
        best=_best(found),
        about=METRICS,
        figures={metric: _embedded(png, "png") for metric, png in drawn.items()},
        pairs={(pair.metric, *two): pair for pair in compared for two in itertools.permutations(pair[1:3])},
        images=images,
        alike=alike,
        shown=shown,
        pictures={n: _picture(found, images[n]) for some in shown.values() for n in some},
        level=LEVEL,
        zip=zip,
    )


def _best(found: Found) -> set[tuple[str, str]]:
    """Method and metric of the best mean of each metric."""
    rows, best = means(found), set()
    for metric in found.metrics:
        values = {method: row[metric].value for method, row in rows.items() if row[metric].photographs}
        if values:
            pick = max if METRICS[metric].best == "highest" else min
            best.add((pick(values, key=values.__getitem__), metric))
    return best


def _picture(found: Found, image: ImageRow) -> str:
    """A photograph under the heatmaps of all methods."""
    assert image.picture is not None
    assert image.cls is not None
    with Image.open(io.BytesIO(image.picture)) as opened:
        picture = np.asarray(opened.convert("RGB"))
    of_image = {r.method: r.heatmap for r in found.results if r.number == image.number and r.heatmap}
    maps = {found.title(m): _pixels(of_image[m]) for m in found.methods if m in of_image}
    caption = f"{found.settings['categories'][image.cls]}, {image.probability:.1%}"
    return _embedded(_drawn(plot.heatmaps(picture, maps, caption=caption), "jpeg"), "jpeg")


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
