"""What the score does while pixels come and go."""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.metrics.judged import Images, Judged, ScoringOptions, metric
from xcam_fn.perturb import Baseline, baseline_images, blurred

STEPS = 112  # 448 of 224 × 224 pixels a step, as in the papers


class Curve(NamedTuple):
    """What the score does along a path from one image to another.

    Attributes:
        fractions: (T,), the share of pixels that were changed, 0 to 1.
        scores: (B, T).
        auc: (B,), the area under each curve by the trapezoid rule.
    """

    fractions: Tensor
    scores: Tensor
    auc: Tensor


@metric("Insertion", best="highest")
def insertion(
    judged: Judged,
    *,
    baseline: Baseline = blurred,
    steps: int | None = None,
    pixels_per_step: int | None = None,
    **_: Unpack[ScoringOptions],
) -> Curve:
    """The score while the most relevant pixels are shown first, from a blurred image to the image itself.

    Pixels of equal relevance are shown in the order of their places.

    {images}
        baseline: where it begins: a number, a tensor or a callable of x; `blurred` by default.
        {steps}
        {scoring}

    Returns:
        `Curve(fractions, scores, auc)`; the higher the area the better.

    {raises}

    References:
        Petsiuk et al., RISE (arXiv:1806.07421), section 4.1.
    """
    base = baseline_images(baseline, judged.x)
    return _curve(judged, base, judged.x, step_pixels(judged.x, steps, pixels_per_step))


@metric("Deletion", best="lowest")
def deletion(
    judged: Judged,
    *,
    baseline: Baseline = 0.0,
    steps: int | None = None,
    pixels_per_step: int | None = None,
    **_: Unpack[ScoringOptions],
) -> Curve:
    """The score while the most relevant pixels are taken away first, from the image to a baseline.

    Pixels of equal relevance go in the order of their places.

    {images}
        baseline: where it ends: a number, a tensor or a callable of x; 0, the mean color of most networks, by
            default.
        {steps}
        {scoring}

    Returns:
        `Curve(fractions, scores, auc)`; the lower the area the better.

    {raises}

    References:
        Petsiuk et al., RISE (arXiv:1806.07421), section 4.1.
    """
    base = baseline_images(baseline, judged.x)
    return _curve(judged, judged.x, base, step_pixels(judged.x, steps, pixels_per_step))


def _curve(judged: Judged, start: Tensor, end: Tensor, pixels: int) -> Curve:
    """The scores from start to end: the steps between are perturbations."""
    x, rank, scoring = judged.x, judged.rank, judged.scoring
    total = rank[0].numel()
    counts = torch.arange(1, math.ceil(total / pixels), device=x.device) * pixels
    which = torch.arange(len(x), device=x.device).repeat_interleave(len(counts))
    between = scoring.perturbed(_replaced, which, (counts.repeat(len(x)),), beside=(start, end, rank))
    first, last = (judged.own[:, None] if image is x else scoring.each(image) for image in (start, end))
    scores = torch.cat([first, between.reshape(len(x), -1), last], 1)
    changed = torch.cat([counts.new_tensor([0]), counts, counts.new_tensor([total])])
    fractions = (changed.double() / total).to(scores)
    return Curve(fractions, scores, torch.trapezoid(scores, fractions))


def _replaced(_: Tensor, start: Tensor, end: Tensor, rank: Tensor, count: Tensor) -> Tensor:
    return torch.where(rank < count, end, start)


def step_pixels(x: Tensor, steps: int | None = None, pixels_per_step: int | None = None) -> int:
    """Return how many pixels each step of a curve changes.

    Args:
        x: (B, C, *size).
        steps: how many there are, ≥ 1; 112 by default.
        pixels_per_step: in place of steps, ≥ 1.
    """
    check("x", x, Images)
    if pixels_per_step is None:
        steps = STEPS if steps is None else steps
        checks.check_count("steps", steps)
        return math.ceil(math.prod(x.shape[2:]) / steps)
    if steps is not None:
        both = f"steps={steps} and pixels_per_step={pixels_per_step}"
        raise ValueError(f"{both}: expected one of them, the other follows")
    checks.check_count("pixels_per_step", pixels_per_step)
    return pixels_per_step
