"""The results of runs as tables and files: means with intervals, pairwise tests, rankings, and a page."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xcam_fn.arguments import checked
from xcam_fn.evaluate import page
from xcam_fn.evaluate.found import (
    Failure,
    Files,
    Found,
    Mean,
    MeanCurve,
    Pair,
    agreement,
    labels,
    metric_label,
    read,
)  # fmt: skip
from xcam_fn.evaluate.page import figures
from xcam_fn.evaluate.ranking import Board, Ranking, advice, board
from xcam_fn.names import needed

__all__ = [
    "Board", "Failure", "Files", "Found", "Mean", "MeanCurve", "Pair", "Ranking", "advice", "agreement",
    "board", "figures", "markdown", "means", "pairs", "read", "table", "write", "write_scores",
]  # fmt: skip


def means(found: Found) -> dict[str, dict[str, Mean]]:
    """The mean of each metric by method, with a 95 % bootstrap interval.

    Args:
        found: the results, from `read`.

    Returns:
        {method: {metric: mean}}, in the order of the run.
    """
    return found.means


def pairs(found: Found) -> list[Pair]:
    """Each pair of methods in each metric, and which one is significantly better, if any.

    Args:
        found: the results, from `read`.
    """
    return found.pairs


# -- tables -------------------------------------------------------------------------------------------------


def table(*found: Found) -> list[list[str]]:
    """The table of runs as text: a header, then a row per method with each metric's mean and interval.

    Args:
        *found: results of one or several runs, from `read`.
    """
    metrics = _metrics(found)
    rows = [["method", "model", "photographs", *map(metric_label, metrics)]]
    for run, label in zip(found, labels(found), strict=True):
        for method, row in run.means.items():
            count = max((mean.photographs for mean in row.values()), default=0)
            rows.append([run.title(method), label, str(count), *(_shown(row.get(m)) for m in metrics)])
    return rows


def _metrics(found: Iterable[Found]) -> list[str]:
    """The metrics of all runs."""
    return list(dict.fromkeys(metric for run in found for metric in run.metrics))


def _shown(mean: Mean | None) -> str:
    if mean is None or not mean.photographs:
        return "–"
    return f"{mean.value:.4f}" + ("" if np.isnan(mean.low) else f" ({mean.low:.4f} to {mean.high:.4f})")


@checked
def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown.

    Args:
        rows: the header and the rows; characters that would end a cell or begin HTML are escaped.
    """
    cells = [[re.sub(r"([\\|<])", r"\\\1", " ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in cells]
    return "".join(f"| {line} |\n" for line in lines)


def _plain_table(found: Sequence[Found]) -> Iterator[Sequence[Any]]:
    """Yield the table with one number per cell, in full precision."""
    metrics, none = _metrics(found), Mean(np.nan, np.nan, np.nan, 0)
    yield ["method", "model", *(f"{m} {part}" for m in metrics for part in ("mean", *Mean._fields[1:]))]
    for run, label in zip(found, labels(found), strict=True):
        for method, row in run.means.items():
            yield [method, label, *itertools.chain.from_iterable(row.get(m, none) for m in metrics)]


def _plain_pairs(found: Sequence[Found]) -> Iterator[Sequence[Any]]:
    several = len(found) > 1
    yield [*["run"] * several, *Pair._fields]
    for run, label in zip(found, labels(found), strict=True):
        yield from ([*[label] * several, *pair] for pair in run.pairs)


def _plain_ranks(ranked: Board) -> Iterator[Sequence[Any]]:
    yield ["run", "metric", "method", "mean rank", "leads", "critical difference", "p", "photographs"]
    for run, metric, ranks, p, critical, photographs, leaders in ranked.rankings:
        for method, rank in ranks.items():
            yield [run, metric, method, rank, int(method in leaders), critical, p, photographs]


# -- files --------------------------------------------------------------------------------------------------


def write(found: Found | Sequence[Found], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the tables, the figures and the page, and return their paths.

    Args:
        found: results of one or several runs, from `read`.
        folder: the folder to write to; it is created if missing.

    Raises:
        OSError: the folder cannot be written to.
    """
    runs = [found] if isinstance(found, Found) else list(found)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    ranked, drawn = board(*runs), [page.pictures(figures(run)) for run in runs]
    ranks = page.pictures({"ranks": page.ranks_figure(ranked)} if ranked.rankings else {})
    files: dict[str, bytes] = {
        "table.md": markdown(table(*runs)).encode(),
        "table.csv": _csv(_plain_table(runs)),
        "pairs.csv": _csv(_plain_pairs(runs)),
        "ranks.csv": _csv(_plain_ranks(ranked)),
        "report.html": page.page(runs, ranked, [table(run) for run in runs], drawn, ranks).encode(),
    }
    for i, pngs in enumerate(drawn, 1):
        files |= {f"{metric}{f'_{i}' * (len(runs) > 1)}.png": png for metric, png in pngs.items()}
    files |= {f"{name}.png": png for name, png in ranks.items()}
    for name, content in files.items():
        (place / name).write_bytes(content)
    return [place / name for name in files]


def write_scores(
    found: Found | Sequence[Found], folder: str | os.PathLike[str], kind: Literal["parquet", "csv"]
) -> Path:
    """Write all scores into one table with the columns run, image, method, metric and value.

    Args:
        found: results of one or several runs, from `read`.
        folder: the folder for scores.parquet or scores.csv; it is created if missing.
        kind: "parquet" for pandas, DuckDB or Spark, which needs `pip install "xcam-fn[parquet]"`, or "csv".

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be written to.
        ImportError: pyarrow is not installed.
    """
    runs = [found] if isinstance(found, Found) else list(found)
    file = Path(folder) / f"scores.{kind}"
    file.parent.mkdir(parents=True, exist_ok=True)
    header = ["run", "image", "method", "metric", "value"]
    if kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(header)
            for columns, values in _long(runs):
                rows = zip(*([names[i] for i in which] for names, which in columns), values, strict=True)
                writer.writerows(map(_cell, row) for row in rows)
        return file
    without = 'pyarrow is not installed; pip install "xcam-fn[parquet]"'
    pa, parquet = (needed(module, without, ImportError) for module in ("pyarrow", "pyarrow.parquet"))
    parts = []
    for columns, values in _long(runs):
        arrays = [pa.DictionaryArray.from_arrays(which.astype(np.int32), names) for names, which in columns]
        parts.append(pa.Table.from_arrays([*arrays, pa.array(values)], header))
    parquet.write_table(pa.concat_tables(parts).unify_dictionaries(), file)
    return file


def _long(runs: Sequence[Found]) -> Iterator[tuple[list[tuple[list[str], np.ndarray]], np.ndarray]]:
    """Yield for each run the columns of the long table, each as (names, indices), and the values."""
    for run, label in zip(runs, labels(runs), strict=True):
        images, *which = np.nonzero(~np.isnan(run.scores))
        names = [[image.name for image in run.images], run.methods, run.metrics]
        columns = [([label], np.zeros_like(images)), *zip(names, [images, *which], strict=True)]
        yield columns, run.scores[images, *which]


def _csv(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return a CSV cell: empty for NaN, and no text that a spreadsheet would run as a formula."""
    if isinstance(value, str):
        return "'" * value.startswith(("=", "+", "-", "@", "\t", "\r")) + value
    return None if value != value else value  # noqa: PLR0124  (NaN)
