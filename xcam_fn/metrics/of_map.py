"""How good a heatmap is: what an image scores where it shows it, and what the map itself is like."""

from __future__ import annotations

from typing import Unpack

import torch

from xcam_fn.metrics.judged import (
    Heatmap,
    Judged,
    ScoringOptions,
    Values,
    checked,
    entered,
    metric,
)
from xcam_fn.perturb import Baseline


@metric("Average drop", best="lowest", forwards=2)
def average_drop(judged: Judged, *, baseline: Baseline = 0.0, **_: Unpack[ScoringOptions]) -> Values:
    """The share of the score that is lost where only the heatmap shows the image, the lower the better.

    max(0, p(x) − p(x ⊙ heatmap)) / p(x), and 0 where p(x) is 0.

    {images}
        {shown}
        {scoring}

    Returns:
        (B,), in [0, 1].

    {raises}

    References:
        Chattopadhyay et al., Grad-CAM++ (arXiv:1710.11063), section 4.1.
    """
    own = judged.own
    lost = (own - judged.shown(baseline)).clamp(min=0)
    return torch.where(own != 0, lost / torch.where(own != 0, own, 1.0), 0.0)


@metric("Increase in confidence", best="highest", forwards=2)
def increase_in_confidence(
    judged: Judged, *, baseline: Baseline = 0.0, **_: Unpack[ScoringOptions]
) -> Values:
    """1 where the score is higher with only what the heatmap shows, else 0; the more often the better.

    {images}
        {shown}
        {scoring}

    Returns:
        (B,), 0 or 1.

    {raises}

    References:
        Chattopadhyay et al., Grad-CAM++ (arXiv:1710.11063), section 4.1.
    """
    return (judged.shown(baseline) > judged.own).to(judged.own.dtype)


def complexity(heatmap: Heatmap) -> Values:
    """How much of the image a heatmap covers: its mean, the lower the better.

    Args:
        heatmap: (B, *size), in [0, 1].

    Returns:
        (B,), in [0, 1].

    References:
        Poppi et al., Revisiting the Evaluation of Class Activation Mapping (arXiv:2104.10252).
    """
    return checked(heatmap, unit=True).flatten(1).mean(1)


entered(complexity, lambda judged: complexity(judged.heatmap), "Complexity", "lowest")
