"""What a run holds, read in one pass: scores as one array, curves as means, files of a sample."""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from PIL import Image
from scipy import stats

from xcam_fn.evaluate.comparison import LEVEL, intervals, sign_flips
from xcam_fn.evaluate.store import ImageRow, Store, reading
from xcam_fn.metrics.judged import pearson
from xcam_fn.metrics.table import METRICS

_SAMPLE = 300  # photographs whose heatmaps are compared
_SEED = 0


class Mean(NamedTuple):
    """A mean over photographs.

    Attributes:
        value: the mean; NaN where there are no photographs.
        low: the lower end of its 95 % interval, NaN for fewer than two photographs.
        high: the upper end.
        photographs: number of photographs.
    """

    value: float
    low: float
    high: float
    photographs: int


class Pair(NamedTuple):
    """Two methods compared on the photographs for which both have scores.

    Attributes:
        metric: the metric's name.
        first: a method's name.
        second: the other method's name.
        difference: mean of first − second.
        p: the p-value of a sign-flip test that the two are equal, corrected for the number of pairs
            (Benjamini and Hochberg).
        photographs: number of photographs.
        better: the better method if the difference is significant (p < 0.05), else None.
    """

    metric: str
    first: str
    second: str
    difference: float
    p: float
    photographs: int
    better: str | None


class Failure(NamedTuple):
    """A photograph that could not be read (no method), or on which a method failed."""

    number: int
    method: str | None
    error: str


class MeanCurve(NamedTuple):
    """A mean of curves over photographs.

    Attributes:
        fractions: (T,), the fraction of pixels that were changed.
        mean: (T,).
        error: (T,), one standard error, 0 for one photograph.
        photographs: number of photographs.
    """

    fractions: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    photographs: int


class Files(NamedTuple):
    """The files that a run keeps for a photograph: the network's input as JPEG, and a PNG per method."""

    picture: bytes | None
    heatmaps: dict[str, bytes]


@dataclass(frozen=True, eq=False)
class Found:
    """The results of a run.

    Attributes:
        folder: its folder.
        settings: its settings.
        images: the photographs, without their pictures.
        scores: scores of each photograph, method and metric, NaN if missing.
        failures: photographs that could not be read and methods that failed.
        curves: the mean curve of each method in each metric with curves.
        files: the files kept for a sample of at most 300 photographs, by number.
    """

    folder: Path
    settings: dict[str, Any]
    images: list[ImageRow]
    scores: Float64[np.ndarray, "photographs methods metrics"]
    failures: list[Failure]
    curves: dict[str, dict[str, MeanCurve]]
    files: dict[int, Files]

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

    def of(self, metric: str) -> Float64[np.ndarray, "photographs methods"]:
        """The scores in a metric."""
        return self.scores[:, :, self.metrics.index(metric)]

    def values(self, method: str, metric: str) -> dict[int, float]:
        """The score of each photograph that has one, by its number."""
        column = self.of(metric)[:, self.methods.index(method)].tolist()
        return {image.number: v for image, v in zip(self.images, column, strict=True) if v == v}  # noqa: PLR0124

    @functools.cached_property
    def means(self) -> dict[str, dict[str, Mean]]:
        """The mean of each metric by method."""
        found = intervals(self.scores.reshape(len(self.images), len(self.methods) * len(self.metrics)))
        rows = itertools.starmap(Mean, zip(*(column.tolist() for column in found), strict=True))
        return {method: {metric: next(rows) for metric in self.metrics} for method in self.methods}

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """Each pair of methods in each metric."""
        return [pair for metric in self.metrics for pair in self._pairs(metric)]

    def _pairs(self, metric: str) -> list[Pair]:
        values, rows = self.of(metric), []
        two = list(itertools.combinations(enumerate(self.methods), 2))
        corrected = stats.false_discovery_control(sign_flips(values)) if two else []
        for ((i, first), (j, second)), p in zip(two, corrected, strict=True):
            each = values[:, i] - values[:, j]
            each = each[~np.isnan(each)]
            mean = float(each.mean()) if len(each) else np.nan
            winner = first if (mean > 0) == (METRICS[metric].best == "highest") else second
            rows.append(Pair(metric, first, second, mean, float(p), len(each), winner if p < LEVEL else None))
        return rows


def agreement(found: Found) -> dict[int, float]:
    """How similar the methods' heatmaps of each photograph are: the mean correlation of all pairs.

    Args:
        found: the results, from `read`.

    Returns:
        By the photograph's number, for a sample of at most 300; photographs with fewer than two heatmaps are
        left out. A constant heatmap has correlation 0.
    """
    return {n: _alike(files.heatmaps) for n, files in found.files.items() if len(files.heatmaps) > 1}


def read(folder: str | os.PathLike[str]) -> Found:
    """Read the results of a run, finished or not.

    Args:
        folder: the folder that `evaluate.run` wrote to.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file is not one of a run, or is damaged.
    """
    with reading(folder) as store:
        settings, images = store.settings(), store.images()
        scores, curves = _results(store, settings, images)
        failures = [Failure(image.number, None, image.error) for image in images if image.error]
        failures += itertools.starmap(Failure, store.failures())
        readable = [image.number for image in images if not image.error]
        order = np.random.default_rng(_SEED).permutation(len(readable))[:_SAMPLE]
        numbers = [readable[i] for i in sorted(order)]
        files = {number: Files(store.picture(number), store.heatmaps(number)) for number in numbers}
    return Found(Path(folder), settings, images, scores, failures, curves, files)


def _results(
    store: Store, settings: dict[str, Any], images: list[ImageRow]
) -> tuple[np.ndarray, dict[str, dict[str, MeanCurve]]]:
    """The scores and the mean curves."""
    methods, metrics = list(settings.get("methods", ())), settings.get("metrics", ())
    numbers = np.array([image.number for image in images])
    scores = np.full((len(images), len(methods), len(metrics)), np.nan)
    sums: dict[str, dict[str, _Sums]] = {}
    for method, of, values, curves in store.blocks():
        scores[np.searchsorted(numbers, of), methods.index(method)] = values
        for metric, (fractions, each) in curves.items():
            of_metric = sums.setdefault(metric, {})
            grid = next((one.fractions for one in of_metric.values()), fractions)
            of_metric.setdefault(method, _Sums(grid)).add(fractions, each)
    scores.setflags(write=False)
    return scores, {metric: {m: one.mean() for m, one in of.items()} for metric, of in sums.items()}


@dataclass
class _Sums:
    """Sums of curves and of their squares, at the fractions of the first."""

    fractions: np.ndarray
    count: int = 0
    total: Any = field(default=0.0)
    squares: Any = field(default=0.0)

    def add(self, fractions: np.ndarray, curves: np.ndarray) -> None:
        """Add curves (n, T)."""
        values = curves.astype(np.float64)
        if not np.array_equal(fractions, self.fractions):
            values = np.stack([np.interp(self.fractions, fractions, curve) for curve in values])
        self.count += len(values)
        self.total += values.sum(0)
        self.squares += (values**2).sum(0)

    def mean(self) -> MeanCurve:
        """The mean and its standard error."""
        n, mean = self.count, self.total / self.count
        variance = np.maximum(self.squares / n - mean**2, 0.0) / max(n - 1, 1)
        return MeanCurve(self.fractions, mean, variance**0.5, n)


def _alike(heatmaps: dict[str, bytes]) -> float:
    maps = torch.from_numpy(np.stack([pixels(file) for file in heatmaps.values()]))
    first, second = torch.triu_indices(len(maps), len(maps), 1)
    return float(pearson(maps[first], maps[second]).mean())


def pixels(file: bytes) -> np.ndarray:
    """A heatmap in [0, 1] from its PNG file."""
    with Image.open(io.BytesIO(file)) as opened:
        return np.asarray(opened, np.float64) / 255


def labels(found: Sequence[Found]) -> list[str]:
    """The labels of runs: their networks, or if these are the same, their folders."""
    models = [run.settings["model"] for run in found]
    names = [f"{model} ({run.folder.resolve().name})" for model, run in zip(models, found, strict=True)]
    paths = [f"{model} ({run.folder})" for model, run in zip(models, found, strict=True)]
    numbered = [f"{i}: {path}" for i, path in enumerate(paths, 1)]
    return next(each for each in (models, names, paths, numbered) if len(set(each)) == len(each))


def metric_label(metric: str) -> str:
    """A metric's title, with an arrow to its best."""
    about = METRICS[metric]
    return f"{about.title} {'↑' if about.best == 'highest' else '↓'}"
