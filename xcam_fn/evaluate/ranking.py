"""Ranks the methods by metric and run, finds where metrics disagree, and recommends a method."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import stats

from xcam_fn.evaluate.comparison import LEVEL, ranked
from xcam_fn.evaluate.found import Found, labels, metric_label
from xcam_fn.metrics.table import METRICS
from xcam_fn.names import listed

_LISTED = 5  # methods that a sentence names


class Ranking(NamedTuple):
    """The methods in one metric of one run.

    Attributes:
        run: a label that distinguishes the run from the others.
        metric: the metric's name.
        ranks: the mean rank of each method over photographs, 1 being the best, by name.
        p: the p-value of Friedman's test that all methods are equal.
        critical: Nemenyi's critical difference of mean ranks, p < 0.05.
        photographs: number of photographs with scores of all methods.
        leaders: the methods within the critical difference of the best, best first; all if p ≥ 0.05.
    """

    run: str
    metric: str
    ranks: dict[str, float]
    p: float
    critical: float
    photographs: int
    leaders: list[str]


class Board(NamedTuple):
    """Rankings of the same methods.

    Attributes:
        rankings: one for each metric of each run.
        overall: the mean of each method's ranks over these, best first, by name.
        tau: Kendall's τ of each pair of rankings: 1 for the same order, −1 for the reverse, NaN if one ranks
            all equally.
        titles: titles of all methods; those without a rank have no scores in a run.
    """

    rankings: list[Ranking]
    overall: dict[str, float]
    tau: Float64[np.ndarray, "rankings rankings"]
    titles: dict[str, str]

    def names(self) -> list[str]:
        """Return the rankings' names: the metric, and the run too if several runs have that metric."""
        runs = Counter(each.metric for each in self.rankings)
        return [metric_label(r.metric) + (f", {r.run}" if runs[r.metric] > 1 else "") for r in self.rankings]

    def listed(self, methods: Iterable[str]) -> str:
        """Return the titles of methods as a list for a sentence."""
        return listed([self.titles[m] for m in methods], _LISTED, "and")


def board(*found: Found) -> Board:
    """Rank the methods in each metric of each run, if two or more have scores.

    Args:
        *found: results of one or several runs, from `read`; only methods that all runs share are ranked.

    References:
        Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR 7, 2006), section 3.2.
    """
    shared = [m for m in found[0].methods if all(_has_scores(run, m) for run in found)]
    made = [
        ranking
        for run, label in zip(found, labels(found), strict=True)
        for metric in (run.metrics if len(shared) > 1 else ())
        if (ranking := _ranking(run, label, metric, shared)) is not None
    ]
    ranks = np.array([[*each.ranks.values()] for each in made]).reshape(len(made), len(shared))
    tau = np.eye(len(made))
    for i, j in itertools.combinations(range(len(made)), 2):
        correlated: Any = stats.kendalltau(ranks[i], ranks[j])
        tau[i, j] = tau[j, i] = correlated.statistic
    overall = dict(zip(shared, ranks.mean(0).tolist(), strict=True)) if made else {}
    titles = {m: run.title(m) for run in found for m in run.methods}
    return Board(made, dict(sorted(overall.items(), key=lambda each: each[1])), tau, titles)


def _has_scores(run: Found, method: str) -> bool:
    return method in run.methods and not np.isnan(run.scores[:, run.methods.index(method)]).all()


def _ranking(run: Found, label: str, metric: str, methods: list[str]) -> Ranking | None:
    """Return the ranking of these methods, or None if no photograph has scores of all of them."""
    columns = run.of(metric)[:, [run.methods.index(m) for m in methods]]
    mean, p, critical, photographs = ranked(columns, METRICS[metric].best)
    if not photographs:
        return None
    ranks = dict(zip(methods, mean.tolist(), strict=True))
    last = np.inf if p >= LEVEL else mean.min() + critical
    leaders = [m for m in sorted(ranks, key=ranks.__getitem__) if ranks[m] <= last]
    return Ranking(label, metric, ranks, p, critical, photographs, leaders)


def advice(board: Board) -> list[str]:
    """Return sentences that recommend a method, and say what the numbers do not show.

    Args:
        board: the rankings, from `board`.
    """
    if not board.rankings:
        return ["No two methods have scores for the same photographs: there is nothing to rank."]
    (best, rank), (second, following), *_ = board.overall.items()
    metrics = f" over {len(board.rankings)} metrics" if len(board.rankings) > 1 else ""
    first = f"{board.titles[best]} has the best mean rank{metrics}, {rank:.2f}"
    return [
        f"{first} among {len(board.overall)} methods; {board.titles[second]} is second with {following:.2f}.",
        _choice(board),
        *_by_metric(board),
        *_disagreement(board),
    ]


def _choice(board: Board) -> str:
    timed = "(`xcam latency` times them)"
    if all(len(r.leaders) == len(board.overall) for r in board.rankings):
        few = f"With {min(r.photographs for r in board.rankings)} photographs"
        return (
            f"{few}, no method differs significantly from the best in any metric: evaluate more photographs, "
            f"or use the cheapest method {timed}."
        )
    always = [m for m in board.overall if all(m in r.leaders for r in board.rankings)]
    if not always:
        return "No method is among the leaders of every metric: choose by the metric that fits your question."
    if len(always) == 1:
        return f"Use {board.listed(always)}, the only method among the leaders of every metric."
    return f"{board.listed(always)} are among the leaders of every metric: use the cheapest {timed}."


def _by_metric(board: Board) -> Iterator[str]:
    """Yield the leaders of each metric; metrics with the same leaders share a sentence."""
    by_leaders: dict[tuple[str, ...], list[str]] = {}
    for name, ranking in zip(board.names(), board.rankings, strict=True):
        is_told = len(ranking.leaders) < len(board.overall)
        by_leaders.setdefault(tuple(ranking.leaders) if is_told else (), []).append(name)
    for leaders, names in by_leaders.items():
        where = "; ".join(names)
        same = "no method differs significantly from the best"
        yield f"Leaders in {where}: {board.listed(leaders)}." if leaders else f"{where}: {same}."


def _disagreement(board: Board) -> Iterator[str]:
    """Yield which two metrics disagree most on the order of the methods."""
    two = itertools.combinations(range(len(board.tau)), 2)
    pairs = [pair for pair in two if not np.isnan(board.tau[pair])]
    if len(board.overall) < 3 or not pairs:
        return
    least = min(pairs, key=board.tau.__getitem__)
    best = [min(r.ranks, key=r.ranks.__getitem__) for r in (board.rankings[i] for i in least)]
    names = " and ".join(board.names()[i] for i in least)
    tops = " and ".join(board.titles[m] for m in dict.fromkeys(best))
    tau = f"Kendall's τ {board.tau[least]:.2f}"
    yield f"{names} disagree most on the order of the methods ({tau}; ranked first: {tops})."
