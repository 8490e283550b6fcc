"""Metrics that compare the score lost without random parts of the image with the heatmap of those parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Bool
from torch import Tensor

from xcam_fn.arguments import unchecked
from xcam_fn.maps import ratio
from xcam_fn.methods.method import comparable
from xcam_fn.metrics.curves import cell_sums, cells
from xcam_fn.metrics.judged import (
    SUBSETS,
    Judged,
    SubsetOptions,
    Values,
    is_share,
    metric,
    pearson,
    shares_of,
)
from xcam_fn.perturb import baseline_images, uniform


class SensitivityN(NamedTuple):
    """Correlations of the heatmap's sums over random subsets with the lost scores.

    Attributes:
        fractions: (T,), the fraction of the image that the subsets remove.
        correlations: (B, T), Pearson's, in [−1, 1].
        value: (B,), their mean, higher is better.
    """

    fractions: Tensor
    correlations: Tensor
    value: Tensor


@metric("Faithfulness correlation", best="highest")
def faithfulness_correlation(
    judged: Judged, *, fraction: float = 0.2, **options: Unpack[SubsetOptions]
) -> Values:
    """The correlation of the heatmap's sums over random subsets with the score lost without them.

    Pearson's correlation over subsets S of one size of Σ h over S and p(x) − p(x without S).

    Args:
        fraction: the fraction of the cells that a subset removes, in (0, 1).

    Returns:
        (B,), in [−1, 1], higher is better; 0 if the sums or the scores are all equal.

    References:
        Bhatt et al., Evaluating and Aggregating Feature-based Model Explanations (arXiv:2005.00631),
        definition 3.
    """
    removed = Removed(judged, fraction, options)
    return pearson(removed.sums(judged.relevance), removed.lost)


@metric("Sensitivity-n", best="highest")
def sensitivity_n(
    judged: Judged, *, fractions: Iterable[float] = (0.05, 0.2, 0.5, 0.8), **options: Unpack[SubsetOptions]
) -> SensitivityN:
    """The correlation of the heatmap's sums and the lost scores for subsets of several sizes n.

    Args:
        fractions: for each n, the fraction of the cells that a subset removes, in (0, 1).

    Returns:
        `SensitivityN(fractions, correlations, value)`, see `faithfulness_correlation`.

    References:
        Ancona et al., Towards Better Understanding of Gradient-based Attribution Methods (arXiv:1711.06104),
        section 4.
    """
    shares = shares_of(fractions)
    every = [Removed(judged, share, options) for share in shares]
    found = torch.stack([pearson(each.sums(judged.relevance), each.lost) for each in every], 1)
    return SensitivityN(torch.tensor(shares).to(judged.x), found, found.mean(1))


@metric("Infidelity", best="lowest")
def infidelity(
    judged: Judged,
    *,
    gradient: bool = False,
    scaled: bool = True,
    fraction: float = 0.2,
    **options: Unpack[SubsetOptions],
) -> Values:
    """The mean squared error of the heatmap as a linear model of the lost score; lower is better.

    The mean over random subsets S of (β I·h − (p(x) − p(x without S)))², where I is 1 on S and 0 elsewhere.

    Args:
        gradient: the heatmap is a gradient, so I is x − baseline on S, the paper's perturbation. False if it
            holds each pixel's contribution, as class activation maps do.
        scaled: choose β to minimize the error, since heatmaps in [0, 1] have no scale of their own; False
            for β = 1.
        fraction: the fraction of the cells that a subset removes, in (0, 1).

    Returns:
        (B,), ≥ 0, in the score's unit squared; with `scaled` at most the mean square of the lost score.

    References:
        Yeh et al., On the (In)fidelity and Sensitivity of Explanations (arXiv:1901.09392), definition 1.
    """
    removed = Removed(judged, fraction, options)
    factor = (judged.x - removed.base).sum(1) if gradient else 1.0
    said, lost = removed.sums(judged.relevance * factor), removed.lost
    if scaled:
        said = ratio(said * (said * lost).sum(1, keepdim=True), said.square().sum(1, keepdim=True))
    return (said - lost).square().mean(1)


class Removed:
    """Random subsets of the cells of a grid, all of one size, and the score lost without each.

    Subset i is the first cells in an order that depends only on the seed and i, so smaller subsets are parts
    of larger ones. The lost score does not depend on the heatmap: it is computed once for all heatmaps.
    """

    def __init__(self, judged: Judged, fraction: float, options: SubsetOptions) -> None:
        if not is_share(fraction):
            raise ValueError(f"fraction={fraction!r}; expected a number > 0 and < 1")
        how: Any = SUBSETS | {**options}
        self._judged, self._seed, self._baseline = judged, how["seed"], how["baseline"]
        self._cell = cells(tuple(judged.x.shape[2:]), how["grid"]).to(judged.x.device)
        self._units = int(self._cell.max()) + 1
        self._count = max(1, round(float(fraction) * self._units))
        self._indices = torch.arange(how["num_subsets"], device=judged.x.device)

    @property
    def base(self) -> Tensor:
        """The replacement of a removed subset, (B, C, *size)."""
        return baseline_images(self._baseline, self._judged.x)

    @property
    def lost(self) -> Tensor:
        """The score lost without each subset, (B, P)."""
        key = ("lost", self._count, len(self._indices), self._units, comparable(self._baseline), self._seed)
        return self._judged.scoring.once(key, self._losses)

    def _losses(self) -> Tensor:
        without = lambda image, base, index: torch.where(self._taken(index)[self._cell], base, image)  # noqa: E731
        scores = self._judged.scoring.every(without, self._indices, beside=(self.base,))
        return self._judged.own[:, None] - scores[..., 0]

    def sums(self, maps: Tensor) -> Tensor:
        """The sums of maps (B, *size) over each subset, (B, P)."""
        of_cells = cell_sums(maps, self._cell).T
        summed = lambda index: self._taken(index).to(of_cells) @ of_cells  # noqa: E731
        return torch.vmap(summed, chunk_size=self._judged.scoring.chunk_size)(self._indices).T

    def _taken(self, index: Tensor) -> Bool[Tensor, " cells"]:
        like = self._cell.new_empty(0, dtype=torch.float32)
        draws = unchecked(uniform)(self._seed, index, (self._units,), like=like)
        chosen = draws.argsort(stable=True)[: self._count]
        taken = torch.zeros(self._units, dtype=torch.bool, device=draws.device)
        return taken.scatter(0, chosen, torch.ones_like(chosen, dtype=torch.bool))
