"""Whether a heatmap highlights the object: in an annotated box or mask, or in its cell of a mosaic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count, check
from xcam_fn.maps import precise, ratio
from xcam_fn.metrics.judged import Function, Heatmap, Values, checked, entered, mean_ranks
from xcam_fn.metrics.mosaic import cell_masks
from xcam_fn.targets.beyond_classes import finite

Region = Tensor | np.ndarray | Sequence[Any]


class _OfRegion:
    """A metric of a heatmap and a region.

    Args:
        region: boxes (B, 4) in pixels as (left, top, right, bottom), the last two excluded, or masks (B, H,
            W).
    """


def _of_region(title: str, of_judged: Any = None) -> Callable[[Function], Function]:
    """Make a metric from a function of a heatmap and a region."""

    def made(function: Any) -> Any:
        found = of_judged or function
        formula = lambda judged: found(judged.heatmap, judged.inside)  # noqa: E731
        return entered(function, formula, title, "highest", _OfRegion)

    return made


@_of_region("Pointing game")
def pointing_game(heatmap: Heatmap, region: Region, *, tolerance: int = 0) -> Values:
    """1 if the heatmap's maximum is in the object's region, else 0.

    Args:
        heatmap: (B, H, W); the first of several equal maxima counts.
        tolerance: pixels by which the region is widened; the paper allows 15 at 224 pixels.

    Returns:
        (B,), 0 or 1; 0 for a heatmap that is zero everywhere.

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


@_of_region("Energy-based pointing game")
def energy_pointing_game(heatmap: Heatmap, region: Region) -> Values:
    """The share of the heatmap's sum inside the object's region; higher is better.

    Args:
        heatmap: (B, H, W), in [0, 1].

    Returns:
        (B,), in [0, 1]; 0 for a heatmap that is zero everywhere.

    References:
        Wang et al., Score-CAM (arXiv:1910.01279), section 4.3; the relevance mass accuracy of Arras et al.
        (arXiv:2003.07258).
    """
    maps = checked(heatmap, unit=True)
    return _share(maps, _region(region, maps))


@_of_region("Grid pointing game", energy_pointing_game)
def grid_pointing(heatmap: Heatmap, cell: Int[Tensor, " B"] | Sequence[int], *, n: Count = 2) -> Values:
    """The share of the map's positive part inside its cell of a mosaic; higher is better.

    Σ A⁺ over the cell / Σ A⁺ over the mosaic, where A is the map of the class of the image in that cell.

    Args:
        heatmap: (B, H, W), raw or scaled, H and W multiples of n; negative values are ignored.
        cell: each map's cell, 0 to n² − 1, row by row.
        n: cells per row and per column.

    Returns:
        (B,), in [0, 1]; 1/n² on average for a map that ignores the class, 0 for one that is nowhere positive.

    References:
        Rao et al., Towards Better Understanding Attribution Methods (arXiv:2205.10435); Böhle et al.,
        Convolutional Dynamic Alignment Networks (arXiv:2104.00032).
    """
    maps = checked(heatmap)
    check("n", n, Count)
    if maps.ndim != 3:
        raise ValueError(f"heatmap has shape {tuple(maps.shape)}; expected (B, H, W)")
    masks = cell_masks(n, tuple(maps.shape[1:])).to(maps.device)
    places = finite("cell", cell).to(maps.device)
    whole = places == places.round()
    if places.shape != maps.shape[:1] or not bool((whole & (places >= 0) & (places < n * n)).all()):
        wanted = f"expected {len(maps)} integers from 0 to {n * n - 1} for n={n}"
        raise ValueError(f"cell={places.tolist()}; {wanted}")
    return _share(maps.relu(), masks[places.long()])


def _share(maps: Tensor, inside: Tensor) -> Tensor:
    """The share of nonnegative maps inside the region; 0 for a zero map."""
    exact = precise(maps)
    within, total = (exact * inside).flatten(1).sum(1), exact.flatten(1).sum(1)
    return ratio(within, total).to(maps.dtype)


@_of_region("Relevance rank accuracy")
def relevance_rank_accuracy(heatmap: Heatmap, region: Region) -> Values:
    """The share of the k most relevant pixels inside a region of k pixels; higher is better.

    Ties at the k-th value count by their expected share in a random order, so a constant map scores the
    region's share of the image.

    Args:
        heatmap: (B, H, W); only the order of its values counts.

    Returns:
        (B,), in [0, 1]; 0 for an empty region.

    References:
        Arras et al., CLEVR-XAI (arXiv:2003.07258).
    """
    maps = checked(heatmap)
    inside = _region(region, maps).flatten(1)
    flat, k = maps.flatten(1), inside.sum(1, keepdim=True)
    last = flat.sort(1, descending=True).values.gather(1, (k - 1).clamp(min=0))
    above, tied = flat > last, flat == last
    count = lambda which: which.sum(1, keepdim=True).double()  # noqa: E731
    hits = count(above & inside) + (k - count(above)) * count(tied & inside) / count(tied)
    return (hits / k.clamp(min=1))[:, 0].to(maps.dtype)


@_of_region("IoU")
def mask_iou(heatmap: Heatmap, region: Region, *, threshold: float = 0.5) -> Values:
    """The intersection over union of the object's region and the thresholded heatmap.

    Args:
        heatmap: (B, H, W), in [0, 1].
        threshold: relative to the heatmap's maximum, 0 to 1; values above it count.

    Returns:
        (B,), in [0, 1]; higher is better.

    References:
        Zhou et al., Learning Deep Features for Discriminative Localization (arXiv:1512.04150), with a
        threshold of 0.2 and a box around the values above it.
    """
    maps = checked(heatmap, unit=True)
    checks.check_number("threshold", threshold, at_least=0, at_most=1)
    inside = _region(region, maps)
    high = maps > float(threshold) * maps.flatten(1).amax(1)[:, None, None]
    both, either = inside & high, inside | high
    shared, covered = (which.flatten(1).sum(1).double() for which in (both, either))
    return (shared / covered.clamp(min=1)).to(maps.dtype)


@_of_region("Pixel AUC")
def pixel_auc(heatmap: Heatmap, region: Region) -> Values:
    """The area under the ROC curve of the heatmap's values as a classifier of the region's pixels.

    It is the probability that a pixel inside is more relevant than one outside, with ties counted half.

    Args:
        heatmap: (B, H, W); only the order of its values counts.

    Returns:
        (B,), in [0, 1], higher is better; 0.5 if nothing is inside or nothing outside.

    References:
        Hanley and McNeil, The Meaning and Use of the Area under a ROC Curve
        (doi:10.1148/radiology.143.1.7063747).
    """
    maps = checked(heatmap)
    inside = _region(region, maps).flatten(1).double()
    ones = inside.sum(1)
    zeros = inside.shape[1] - ones
    above = (mean_ranks(maps) * inside).sum(1) - ones * (ones + 1) / 2
    pairs = ones * zeros
    return torch.where(pairs > 0, above / pairs.clamp(min=1), 0.5).to(maps.dtype)


def _region(region: Any, maps: Tensor) -> Tensor:
    """The objects' region as masks, (B, H, W)."""
    given = finite("region", region).to(maps.device)
    if maps.ndim == 3 and given.shape == maps.shape:
        return given != 0
    if maps.ndim != 3 or given.shape != (len(maps), 4):
        has = f"region has shape {tuple(given.shape)} for heatmaps of shape {tuple(maps.shape)}"
        raise ValueError(f"{has}; expected boxes ({len(maps)}, 4) or masks of the heatmaps' shape")
    left, top, right, bottom = (edge[:, None, None] for edge in given.T)
    if bool(((right <= left) | (bottom <= top)).any()):
        has = f"region={given.tolist()}"
        raise ValueError(f"{has}; expected boxes (left, top, right, bottom) that hold a pixel")
    rows = torch.arange(maps.shape[1], device=maps.device)[None, :, None]
    columns = torch.arange(maps.shape[2], device=maps.device)[None, None, :]
    return (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
