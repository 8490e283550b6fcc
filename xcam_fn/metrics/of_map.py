"""Metrics of a heatmap: the score of the image masked by it, and properties of the map itself."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.maps import ratio
from xcam_fn.metrics.judged import Heatmap, Judged, ScoringOptions, Values, checked, metric, of_heatmap
from xcam_fn.perturb import Baseline


@metric("Average drop", best="lowest", forwards=2)
def average_drop(judged: Judged, *, baseline: Baseline = 0.0, **_: Unpack[ScoringOptions]) -> Values:
    """The fraction of the score lost when the image is masked with the heatmap; lower is better.

    max(0, p(x) − p(x ⊙ heatmap)) / p(x), and 0 where p(x) is 0.

    Returns:
        (B,), in [0, 1].

    References:
        Chattopadhyay et al., Grad-CAM++ (arXiv:1710.11063), section 4.1.
    """
    own = judged.own
    return ratio((own - judged.shown(baseline)).clamp(min=0), own)


@metric("Increase in confidence", best="highest", forwards=2)
def increase_in_confidence(
    judged: Judged, *, baseline: Baseline = 0.0, **_: Unpack[ScoringOptions]
) -> Values:
    """1 if the image masked with the heatmap scores higher than the image, else 0; higher is better.

    Returns:
        (B,), 0 or 1.

    References:
        Chattopadhyay et al., Grad-CAM++ (arXiv:1710.11063), section 4.1.
    """
    return (judged.shown(baseline) > judged.own).to(judged.own.dtype)


@metric("Average gain", best="highest", forwards=2)
def average_gain(judged: Judged, *, baseline: Baseline = 0.0, **_: Unpack[ScoringOptions]) -> Values:
    """The probability gained when the image is masked with the heatmap, relative to 1 − p.

    max(0, p(x ⊙ heatmap) − p(x)) / (1 − p(x)), and 0 where p(x) is 1.

    Returns:
        (B,), in [0, 1], higher is better.

    References:
        Zhang et al., Opti-CAM (arXiv:2301.07002), section 5.1.
    """
    own, shown = judged.own, judged.shown(baseline)
    if checks.is_readable(own) and float(torch.stack([-own, own - 1, shown - 1]).max()) > 0:
        has = f"average_gain: scores from {float(own.min()):.4g} to {float(own.max()):.4g}"
        raise ValueError(f"{has}; expected [0, 1]; use score='probability' and a class as cls")
    lacks = 1 - own
    gained = (shown - own).clamp(min=0)
    return torch.where(lacks > 0, gained / torch.where(lacks > 0, lacks, 1.0), 0.0)


@of_heatmap("Complexity", best="lowest")
def complexity(heatmap: Heatmap) -> Values:
    """How much of the image a heatmap covers: its mean; lower is better.

    Args:
        heatmap: (B, *size), in [0, 1].

    Returns:
        (B,), in [0, 1].

    References:
        Poppi et al., Revisiting the Evaluation of Class Activation Mapping (arXiv:2104.10252).
    """
    return checked(heatmap, unit=True).flatten(1).mean(1)


@of_heatmap("Entropy", best="lowest")
def entropy(heatmap: Heatmap) -> Values:
    """How spread out a heatmap is: the entropy of its pixels' shares of the total; lower is better.

    −Σ s ln s with s = |h| / Σ |h|.

    Args:
        heatmap: (B, *size), of any scale.

    Returns:
        (B,), nats: 0 for a single pixel, ln(pixels) for a constant heatmap, zeros included.

    References:
        Bhatt et al., Evaluating and Aggregating Feature-based Model Explanations (arXiv:2005.00631),
        definition 4.
    """
    share = _shares(heatmap)
    return torch.special.entr(share).sum(1).to(checked(heatmap).dtype)


@of_heatmap("Sparseness", best="highest")
def sparseness(heatmap: Heatmap) -> Values:
    """How few pixels hold most of a heatmap: the Gini index of the magnitudes; higher is better.

    Σ (2k − d − 1) |h|₍ₖ₎ / (d Σ |h|), the d magnitudes in ascending order.

    Args:
        heatmap: (B, *size), of any scale.

    Returns:
        (B,), in [0, 1); 1 − 1/d for a single pixel, 0 for a constant heatmap, zeros included.

    References:
        Chalasani et al., Concise Explanations of Neural Networks using Adversarial Training
        (arXiv:1810.06583), section 3.
    """
    share = _shares(heatmap).sort(1).values
    d = share.shape[1]
    places = torch.arange(1, d + 1, dtype=share.dtype, device=share.device)
    return (share @ (2 * places - d - 1) / d).to(checked(heatmap).dtype)


def _shares(heatmap: Heatmap) -> Tensor:
    """The pixels' shares of the sum of magnitudes, (B, d) in float64; equal shares if all are zero."""
    magnitudes = checked(heatmap).double().flatten(1).abs()
    total = magnitudes.sum(1, keepdim=True)
    return torch.where(total > 0, magnitudes / torch.where(total > 0, total, 1.0), 1 / magnitudes.shape[1])
