"""How good a heatmap is: what an image scores where it shows it, and what the map itself is like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.metrics.judged import (
    Heatmap,
    Judged,
    ScoringOptions,
    Values,
    checked,
    documented,
    entered,
    metric,
)
from xcam_fn.perturb import Baseline
from xcam_fn.targets.beyond_classes import finite


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


@documented
def pointing_game(heatmap: Heatmap, region: Tensor | Sequence[Any], *, tolerance: int = 0) -> Values:
    """1 where the heatmap's highest value is in the object's region, else 0.

    Args:
        heatmap: (B, H, W); of equal highest values the first counts.
        region: boxes (B, 4) in pixels as (left, top, right, bottom), the last two excluded, or masks (B, H,
            W).
        tolerance: pixels by which the region is widened; the paper allows 15 at 224 pixels.

    Returns:
        (B,), 0 or 1. A heatmap that is zero everywhere points at nothing.

    {raises}

    References:
        Zhang et al., Top-down Neural Attention by Excitation Backprop (arXiv:1608.00507).
    """
    maps = checked(heatmap)
    checks.check_count("tolerance", tolerance, at_least=0)
    inside = _region(region, maps)
    if reach := min(tolerance, max(maps.shape[1:])):
        inside = nn.functional.max_pool2d(inside[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0
    top = maps.flatten(1).argmax(1, keepdim=True)
    hit = inside.flatten(1).gather(1, top)[:, 0] & (maps.flatten(1) != 0).any(1)
    return hit.to(maps.dtype)


@documented
def energy_pointing_game(heatmap: Heatmap, region: Tensor | Sequence[Any]) -> Values:
    """The share of the heatmap's sum that is in the object's region.

    Args:
        heatmap: (B, H, W), in [0, 1].
        region: boxes (B, 4) in pixels as (left, top, right, bottom), the last two excluded, or masks (B, H,
            W).

    Returns:
        (B,), in [0, 1]; 0 for a heatmap that is zero everywhere.

    {raises}

    References:
        Wang et al., Score-CAM (arXiv:1910.01279), section 4.3.
    """
    maps = checked(heatmap, unit=True)
    within = (maps * _region(region, maps)).flatten(1).sum(1)
    total = maps.flatten(1).sum(1)
    return torch.where(total > 0, within / torch.where(total > 0, total, 1.0), 0.0)


def _region(region: Any, maps: Tensor) -> Tensor:
    """Where the objects are, (B, H, W)."""
    given = finite("region", region).to(maps.device)
    if maps.ndim == 3 and given.shape == maps.shape:
        return given != 0
    if maps.ndim != 3 or given.shape != (len(maps), 4):
        has = f"region has shape {tuple(given.shape)} for heatmaps of shape {tuple(maps.shape)}"
        raise ValueError(f"{has}; expected boxes ({len(maps)}, 4) or masks of the heatmaps' shape")
    left, top, right, bottom = (edge[:, None, None] for edge in given.T)
    if bool(((right <= left) | (bottom <= top)).any()):
        has = f"region={given.tolist()}"
        raise ValueError(f"{has}: expected boxes (left, top, right, bottom) that hold a pixel")
    rows = torch.arange(maps.shape[1], device=maps.device)[None, :, None]
    columns = torch.arange(maps.shape[2], device=maps.device)[None, None, :]
    return (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
