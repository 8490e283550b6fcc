"""The score as pixels are revealed or removed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import Count, NonNegative, checked
from xcam_fn.methods.method import comparable
from xcam_fn.metrics.judged import (
    Images,
    Judged,
    ScoringOptions,
    StepOptions,
    Values,
    metric,
    relevance_rank,
    shares_of,
)
from xcam_fn.perturb import Baseline, baseline_images, blurred, normal

STEPS = 112  # 448 pixels per step at 224 × 224, as in the papers


class Curve(NamedTuple):
    """The score along a path from one image to another.

    Attributes:
        fractions: (T,), the fraction of pixels that were changed, 0 to 1.
        scores: (B, T).
        auc: (B,), the area under each curve by the trapezoid rule.
    """

    fractions: Tensor
    scores: Tensor
    auc: Tensor


@metric("Insertion", best="highest")
def insertion(judged: Judged, *, baseline: Baseline = blurred, **options: Unpack[StepOptions]) -> Curve:
    """The score as pixels are revealed, most relevant first, from a blurred image to the image itself.

    Ties are broken by position.

    Args:
        baseline: the starting image: a number, a tensor or a callable of x; `blurred` by default.

    Returns:
        `Curve(fractions, scores, auc)`; a larger area is better.

    References:
        Petsiuk et al., RISE (arXiv:1806.07421), section 4.1.
    """
    start, pixels = baseline_images(baseline, judged.x), _pixels(judged, options)
    return _curve(judged, start, judged.x, judged.rank, pixels)


@metric("Deletion", best="lowest")
def deletion(judged: Judged, *, baseline: Baseline = 0.0, **options: Unpack[StepOptions]) -> Curve:
    """The score as pixels are removed, most relevant first, from the image to a baseline.

    Ties are broken by position.

    Returns:
        `Curve(fractions, scores, auc)`; a smaller area is better.

    References:
        Petsiuk et al., RISE (arXiv:1806.07421), section 4.1.
    """
    return _removal(judged, baseline, _pixels(judged, options))


@metric("Relevance gain", best="highest")
def symmetric_relevance_gain(
    judged: Judged, *, baseline: Baseline = 0.0, **options: Unpack[StepOptions]
) -> Values:
    """How much longer the score lasts if the least relevant pixels are removed first instead of the most.

    The area under the curve with the least relevant pixels first minus that with the most relevant first,
    `deletion`: an effect of the baseline itself lowers both.

    Returns:
        (B,), in [−1, 1] for a probability, higher is better; 0 on average for a random order.

    References:
        Blücher et al., Decoupling Pixel Flipping and Occlusion Strategy for Consistent XAI Benchmarks
        (arXiv:2401.06654), section 4.
    """
    pixels = _pixels(judged, options)
    most, least = (_removal(judged, baseline, pixels, least_first=first) for first in (False, True))
    return least.auc - most.auc


@metric("IROF", best="highest")
def irof(
    judged: Judged, *, baseline: Baseline = 0.0, grid: Count = 14, **_: Unpack[ScoringOptions]
) -> Values:
    """The area over the score's curve as regions are removed, the most relevant on average first.

    1 − ∫ p(x without the first regions) / p(x), by the trapezoid rule; the regions are the cells of a regular
    grid instead of the paper's superpixels.

    Args:
        grid: cells along each axis, ≥ 1; at most one per pixel.

    Returns:
        (B,), at most 1 for a probability, higher is better; 0 if p(x) is not positive.

    References:
        Rieger and Hansen, IROF (arXiv:2003.08747), section 3.
    """
    cell = cells(tuple(judged.x.shape[2:]), grid).to(judged.x.device)
    means = cell_sums(judged.relevance.double(), cell) / cell.flatten().bincount()
    rank = relevance_rank(means)[:, cell]
    curve = _curve(judged, judged.x, baseline_images(baseline, judged.x), rank, 1)
    own = judged.own
    return torch.where(own > 0, 1 - curve.auc / torch.where(own > 0, own, 1.0), 0.0)


def cells(size: tuple[int, ...], grid: int | None) -> Int[Tensor, " *size"]:
    """Return the index of the cell that each pixel is in.

    Args:
        size: the image's size in pixels.
        grid: cells along each axis, ≥ 1, at most one per pixel; None for one per pixel.
    """
    numbers = torch.zeros((), dtype=torch.int64)
    for length in size:
        along = length if grid is None else min(grid, length)
        numbers = numbers[..., None] * along + torch.arange(length) * along // length
    return numbers


def cell_sums(maps: Tensor, cell: Tensor) -> Tensor:
    """The sums of maps (B, *size) over the pixels of each cell, (B, cells)."""
    flat = maps.flatten(1)
    return flat.new_zeros(len(flat), int(cell.max()) + 1).index_add(1, cell.flatten(), flat)


def _removal(judged: Judged, baseline: Baseline, pixels: int, *, least_first: bool = False) -> Curve:
    """The curve from the image to the baseline."""

    def found() -> Curve:
        rank = judged.rank
        rank = rank[0].numel() - 1 - rank if least_first else rank
        return _curve(judged, judged.x, baseline_images(baseline, judged.x), rank, pixels)

    return judged.once(("removal", comparable(baseline), pixels, least_first), found)


def _curve(judged: Judged, start: Tensor, end: Tensor, rank: Tensor, each: int) -> Curve:
    """The scores from start to end, with a number of ranks per step; the steps between are perturbations."""
    x, scoring = judged.x, judged.scoring
    total = int(rank[0].max()) + 1
    counts = torch.arange(1, math.ceil(total / each), device=x.device) * each
    between = scoring.every(_replaced, counts, beside=(start, end, rank))[..., 0]
    first, last = (judged.own[:, None] if image is x else scoring.each(image) for image in (start, end))
    scores = torch.cat([first, between, last], 1)
    changed = torch.cat([counts.new_tensor([0]), counts, counts.new_tensor([total])])
    fractions = (changed.double() / total).to(scores)
    return Curve(fractions, scores, torch.trapezoid(scores, fractions))


def _replaced(_: Tensor, start: Tensor, end: Tensor, rank: Tensor, count: Tensor) -> Tensor:
    return torch.where(rank < count, end, start)


def _pixels(judged: Judged, options: StepOptions) -> int:
    return step_pixels(judged.x, options.get("steps"), options.get("pixels_per_step"))


@checked
def step_pixels(x: Images, steps: Count | None = None, pixels_per_step: Count | None = None) -> int:
    """Return how many pixels each step of a curve changes.

    Args:
        x: (B, C, *size).
        steps: the number of steps, ≥ 1; 112 by default.
        pixels_per_step: instead of steps, ≥ 1.
    """
    if pixels_per_step is None:
        return math.ceil(math.prod(x.shape[2:]) / (steps or STEPS))
    if steps is not None:
        both = f"steps={steps} and pixels_per_step={pixels_per_step}"
        raise ValueError(f"{both}: pass only one of them")
    return pixels_per_step


# -- pixels whose values are imputed ------------------------------------------------------------------------


class Road(NamedTuple):
    """The score as pixels are removed and their values imputed.

    Attributes:
        fractions: (T,), the fraction of pixels that were removed, 0 to 1.
        most_relevant_first: (B, T), the scores.
        least_relevant_first: (B, T), the scores.
        value: (B,), half the mean difference of the two, higher is better.
    """

    fractions: Tensor
    most_relevant_first: Tensor
    least_relevant_first: Tensor
    value: Tensor


@metric("ROAD", best="highest")
def road(
    judged: Judged,
    *,
    fractions: Iterable[float] = (0.2, 0.4, 0.6, 0.8),
    std: NonNegative = 0.01,
    seed: int = 0,
    **_: Unpack[ScoringOptions],
) -> Road:
    """The score as pixels are removed by imputation, with the most and with the least relevant first.

    A removed pixel becomes the weighted mean of its neighbors (1/6 for adjacent, 1/12 for diagonal ones), a
    sparse linear system for all removed pixels, plus noise: the result does not reveal which pixels were
    removed.

    Args:
        fractions: the fractions of pixels to remove, each in (0, 1).
        std: standard deviation of the noise, ≥ 0, in units of x.

    Returns:
        `Road(fractions, most_relevant_first, least_relevant_first, value)`.

    References:
        Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods
        (arXiv:2202.00449).
    """
    x = judged.x
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; road expects images (B, C, H, W)")
    shares = shares_of(fractions)
    total = judged.rank[0].numel()
    scores = []
    for rank in (judged.rank, total - 1 - judged.rank):
        for i, share in enumerate(shares):
            noise = normal(seed, i, tuple(x.shape[1:]), like=x) * float(std)
            gone = rank < round(share * total)
            images = torch.stack([imputed(*pair, noise) for pair in zip(x, gone, strict=True)])
            scores.append(judged.scoring.each(images)[:, 0])
            checks.check_finite(scores[-1], "the score")
    most, least = torch.stack(scores, 1).reshape(len(x), 2, -1).unbind(1)
    return Road(torch.tensor(shares).to(x), most, least, (least - most).mean(1) / 2)


def imputed(
    image: Float[Tensor, "C H W"], gone: Bool[Tensor, "H W"], noise: Float[Tensor, "C H W"]
) -> Float[Tensor, "C H W"]:
    """Return the image with the removed pixels imputed (a linear solve), plus noise there."""
    from scipy import sparse  # noqa: PLC0415, slow to import, and needed here alone
    from scipy.sparse.linalg import spsolve  # noqa: PLC0415

    mask = gone.flatten().cpu().numpy()
    values = image.detach().double().flatten(1).cpu().numpy()
    lines = [sparse.csr_array(np.eye(n, k=-1) + 2 * np.eye(n) + np.eye(n, k=1)) for n in gone.shape]
    near = sparse.csr_array(sparse.kron(*lines) - 4 * sparse.eye_array(mask.size))[mask] / 12
    known, weights = near[:, ~mask] @ values[:, ~mask].T, sparse.diags_array(near.sum(1))
    solved = spsolve((weights - near[:, mask]).tocsc(), known).reshape(len(known), -1)
    return image.masked_scatter(gone, torch.from_numpy(solved.T).to(image)) + noise * gone
