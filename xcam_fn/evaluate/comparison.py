"""How methods compare over photographs: means with intervals, tests of pairs, mean ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy import stats

LEVEL = 0.05  # of an error of the first kind, as is usual: 95 % intervals, false discovery rate of pairs
RESAMPLES = 4999
_SEED = 0
_CELLS = 4_000_000  # of the matrices of resamples and photographs that are in memory at a time

Values = Float[np.ndarray, "photographs columns"]


class Intervals(NamedTuple):
    """The mean of each column, the ends of its 95 % interval, and of how many photographs it is.

    A mean of no photograph is NaN, and so are the ends of fewer than two.
    """

    mean: Float64[np.ndarray, " columns"]
    low: Float64[np.ndarray, " columns"]
    high: Float64[np.ndarray, " columns"]
    photographs: Int[np.ndarray, " columns"]


class Ranks(NamedTuple):
    """Methods ranked on each photograph, 1 being the best, with ties sharing their mean rank.

    Attributes:
        mean: mean ranks over the photographs with scores of all methods.
        p: the p-value of Friedman's test that all methods are equal.
        critical: Nemenyi's critical difference of mean ranks, p < 0.05.
        photographs: number of photographs.
    """

    mean: Float64[np.ndarray, " methods"]
    p: float
    critical: float
    photographs: int


def intervals(values: Values) -> Intervals:
    """Return the mean of each column over its photographs, with 95 % bootstrap intervals (percentiles).

    How often each photograph is drawn is one matrix for all columns, whose products with them are the means.

    Args:
        values: NaN where there is none.
    """
    values = values[~np.isnan(values).all(1)].astype(np.float64)
    is_there = ~np.isnan(values)
    sums = np.concatenate([np.where(is_there, values, 0.0), is_there], 1)
    count = is_there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.divide(*np.split(sums.sum(0), 2))
        if len(values) < 2:
            return Intervals(mean, mean * np.nan, mean * np.nan, count)
        rng, n = np.random.default_rng(_SEED), len(values)
        drawn, step = [], max(1, _CELLS // n)
        for start in range(0, RESAMPLES, step):
            rows = min(step, RESAMPLES - start)
            which = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
            drawn.append(np.bincount(which.ravel(), minlength=rows * n).reshape(rows, n) @ sums)
        resampled = np.divide(*np.split(np.concatenate(drawn), 2, axis=1))
    ends, enough = np.full((2, len(count)), np.nan), count > 1
    ends[:, enough] = np.nanquantile(resampled[:, enough], [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return Intervals(mean, ends[0], ends[1], count)


def sign_flips(values: Values) -> Float64[np.ndarray, " pairs"]:
    """Return for each two columns how likely a mean difference as large would be, were the two alike.

    The signs of the differences are flipped at random, or in all ways where these are few. A matrix of signs
    serves all pairs: of photographs that have a value in every column its product with the columns is enough.

    Args:
        values: NaN where there is none; a pair is compared on the photographs that both have.

    Returns:
        p values of two sides, in the order of `itertools.combinations`, not corrected for their number.
    """
    missing = np.isnan(values).sum(1)
    is_compared = missing < values.shape[1] - 1
    values, is_whole = values[is_compared].astype(np.float64), missing[is_compared] == 0
    first, second = np.triu_indices(values.shape[1], 1)
    values -= np.nanmean(values, 1, keepdims=True)  # their differences are small where they are alike
    parts = np.nan_to_num(values[:, first] - values[:, second])
    observed, tolerance = np.abs(parts.sum(0)), 1e-12 * np.abs(parts).sum(0)
    n = len(values)
    is_exact = 2**n <= RESAMPLES + 1
    resamples = 2**n if is_exact else RESAMPLES
    rng, sums, step = np.random.default_rng(_SEED), np.zeros((resamples, len(first))), _CELLS // resamples
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        if is_exact:
            bits = np.arange(resamples) >> np.arange(some.start, some.stop)[:, None] & 1
        else:
            size = (some.stop - some.start, -(-resamples // 8))
            bits = np.unpackbits(rng.integers(256, size=size, dtype=np.uint8), axis=1, count=resamples)
        signs, whole = 1.0 - 2.0 * bits, is_whole[some]
        of_columns = signs[whole].T @ values[some][whole]
        sums += of_columns[:, first] - of_columns[:, second]
        if not whole.all():
            sums += signs[~whole].T @ parts[some][~whole]
    beyond = (np.abs(sums) >= observed - tolerance).sum(0)
    return beyond / resamples if is_exact else (beyond + 1) / (resamples + 1)


def ranked(values: Values, best: str) -> Ranks:
    """Return the mean rank of each method, Friedman's test and the critical difference of Nemenyi.

    Args:
        values: a column a method, NaN where there is none.
        best: "highest" or "lowest".

    Returns:
        `Ranks(mean, p, critical, photographs)`; of fewer than two photographs p is 1 and the difference
        infinite.

    References:
        Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR 7, 2006), section 3.2.
    """
    whole = values[~np.isnan(values).any(1)]
    n, k = whole.shape
    if n == 0 or k < 2:
        return Ranks(np.full(k, np.nan), 1.0, np.inf, n)
    ranks = stats.rankdata(-whole if best == "highest" else whole, axis=1)
    mean = ranks.mean(0)
    if n < 2:
        return Ranks(mean, 1.0, np.inf, n)
    spread = (ranks**2).sum() - n * k * (k + 1) ** 2 / 4  # 0 where all are equal; ties make it smaller
    statistic = (k - 1) * n**2 * ((mean - (k + 1) / 2) ** 2).sum() / spread if spread else 0.0
    width = stats.studentized_range.ppf(1 - LEVEL, k, np.inf) / 2**0.5
    return Ranks(mean, float(stats.chi2.sf(statistic, k - 1)), width * (k * (k + 1) / (6 * n)) ** 0.5, n)
