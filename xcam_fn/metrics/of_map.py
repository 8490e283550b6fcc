"""How good a heatmap is: what the score does when the heatmap decides what the network sees."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.methods.catalog import find_method
from xcam_fn.network.split import Layer
from xcam_fn.perturb import Baseline, baseline_images, blurred, normal, uniform
from xcam_fn.scoring.running import Running, Scoring, scoring_of
from xcam_fn.targets import Classes

Images = Float[Tensor, "B C *size"]
Heatmap = Tensor | np.ndarray
Values = Float[Tensor, " B"]
Similarity = Callable[[Tensor, Tensor], Tensor]

STEPS = 112  # 448 of 224 × 224 pixels a step, as in the papers
_OWN = ("score", *Running._fields)


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


class Road(NamedTuple):
    """What the score does when pixels are removed and their values imputed.

    Attributes:
        fractions: (T,), the share of pixels that were removed, 0 to 1.
        most_relevant_first: (B, T), the scores.
        least_relevant_first: (B, T), the scores.
        value: (B,), half the mean difference of the two, the higher the better.
    """

    fractions: Tensor
    most_relevant_first: Tensor
    least_relevant_first: Tensor
    value: Tensor


_ARGS = """Args:
        model: the network, in evaluation mode; it is never touched.
        x: (B, C, *size), prepared images.
        heatmap: (B, *size), a tensor or an array, from here or from elsewhere{range}.
        cls: None for the predicted class of each image, an int, B ints, or a target, a callable from the
            output to one score for each image it is given. It is fixed once, on the images as they are."""
_HOW = """**how: how the model is run, as for every perturbation method: score, chunk_size, precision,
compile,
            scorer, progress."""
_RAISES = """Raises:
        ValueError: a value is out of range or does not fit the model or the batch.
        TypeError: an argument is of the wrong kind."""


def _documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what the docstrings here share filled in."""
    doc = function.__doc__ or ""
    shared = {
        "{unit}": _ARGS.format(range=", in [0, 1]"),
        "{any}": _ARGS.format(range=": its order counts"),
        "{how}": _HOW,
        "{raises}": _RAISES,
    }
    for key, text in shared.items():
        doc = doc.replace(key, text)
    function.__doc__ = doc
    return function


# -- what an image scores where its heatmap shows it --------------------------------------------------------


@_documented
def average_drop(
    model: nn.Module,
    x: Images,
    heatmap: Heatmap,
    cls: Classes = None,
    *,
    baseline: Baseline = 0.0,
    **how: Any,
) -> Values:
    """The share of the score that is lost where only the heatmap shows the image, the lower the better.

    max(0, p(x) − p(x ⊙ heatmap)) / p(x), and 0 where p(x) is 0.

    {unit}
        baseline: what is seen where the heatmap hides: a number, a tensor or a callable of x.
        {how}

    Returns:
        (B,), in [0, 1].

    {raises}

    References:
        Chattopadhyay et al., Grad-CAM++ (arXiv:1710.11063), section 4.1.
    """
    with _scoring(model, x, cls, how) as scoring:
        return drop(*confidence(scoring, heatmap, baseline))


@_documented
def increase_in_confidence(
    model: nn.Module,
    x: Images,
    heatmap: Heatmap,
    cls: Classes = None,
    *,
    baseline: Baseline = 0.0,
    **how: Any,
) -> Values:
    """1 where the score is higher with only what the heatmap shows, else 0; the more often the better.

    {unit}
        baseline: what is seen where the heatmap hides: a number, a tensor or a callable of x.
        {how}

    Returns:
        (B,), 0 or 1.

    {raises}

    References:
        Chattopadhyay et al., Grad-CAM++ (arXiv:1710.11063), section 4.1.
    """
    with _scoring(model, x, cls, how) as scoring:
        return increase(*confidence(scoring, heatmap, baseline))


def confidence(scoring: Scoring, heatmap: Heatmap, baseline: Baseline = 0.0) -> tuple[Tensor, Tensor]:
    """The scores (B,) of the images, and of what their heatmaps show of them."""
    maps = _checked(heatmap, scoring.x, unit=True)
    shown = scoring.shown(maps[None, :, None], baseline_images(baseline, scoring.x))
    return scoring.explained.own[:, 0], shown[0, :, 0]


def drop(own: Tensor, shown: Tensor) -> Tensor:
    """The share of the score that is lost, (B,)."""
    return torch.where(own != 0, (own - shown).clamp(min=0) / torch.where(own != 0, own, 1.0), 0.0)


def increase(own: Tensor, shown: Tensor) -> Tensor:
    """1 where the score is higher, else 0, (B,)."""
    return (shown > own).to(own.dtype)


# -- what the score does while pixels come and go -----------------------------------------------------------


@_documented
def insertion(
    model: nn.Module,
    x: Images,
    heatmap: Heatmap,
    cls: Classes = None,
    *,
    baseline: Baseline = blurred,
    steps: int | None = None,
    pixels_per_step: int | None = None,
    **how: Any,
) -> Curve:
    """The score while the most relevant pixels are shown first, from a blurred image to the image itself.

    {any} Equal values are
            shown in the order of their places.
        baseline: where it begins: a number, a tensor or a callable of x; `blurred` by default.
        steps: how many, ≥ 1; by default 112, which is 448 pixels each at 224 × 224.
        pixels_per_step: in place of steps, ≥ 1.
        {how}

    Returns:
        `Curve(fractions, scores, auc)`; the higher the area the better.

    {raises}

    References:
        Petsiuk et al., RISE (arXiv:1806.07421), section 4.1.
    """
    with _scoring(model, x, cls, how) as scoring:
        return inserted(scoring, heatmap, baseline, step_pixels(x, steps, pixels_per_step))


@_documented
def deletion(
    model: nn.Module,
    x: Images,
    heatmap: Heatmap,
    cls: Classes = None,
    *,
    baseline: Baseline = 0.0,
    steps: int | None = None,
    pixels_per_step: int | None = None,
    **how: Any,
) -> Curve:
    """The score while the most relevant pixels are taken away first, from the image to a baseline.

    {any} Equal values go
            in the order of their places.
        baseline: where it ends: a number, a tensor or a callable of x; 0, the mean color of most networks, by
            default.
        steps: how many, ≥ 1; by default 112, which is 448 pixels each at 224 × 224.
        pixels_per_step: in place of steps, ≥ 1.
        {how}

    Returns:
        `Curve(fractions, scores, auc)`; the lower the area the better.

    {raises}

    References:
        Petsiuk et al., RISE (arXiv:1806.07421), section 4.1.
    """
    with _scoring(model, x, cls, how) as scoring:
        return deleted(scoring, heatmap, baseline, step_pixels(x, steps, pixels_per_step))


def inserted(scoring: Scoring, heatmap: Heatmap, baseline: Baseline, pixels: int) -> Curve:
    """The insertion curve of a call whose class is fixed already."""
    base = baseline_images(baseline, scoring.x)
    return _curve(scoring, heatmap, base, scoring.x, (scoring.each(base), scoring.explained.own), pixels)


def deleted(scoring: Scoring, heatmap: Heatmap, baseline: Baseline, pixels: int) -> Curve:
    """The deletion curve of a call whose class is fixed already."""
    base = baseline_images(baseline, scoring.x)
    return _curve(scoring, heatmap, scoring.x, base, (scoring.explained.own, scoring.each(base)), pixels)


def _curve(
    scoring: Scoring, heatmap: Heatmap, start: Tensor, end: Tensor, known: tuple[Tensor, Tensor], pixels: int
) -> Curve:
    """The scores from start to end, whose own are known: the steps between are perturbations."""
    x = scoring.x
    rank = relevance_rank(_checked(heatmap, x))
    total = rank[0].numel()
    counts = torch.arange(1, math.ceil(total / pixels), device=x.device) * pixels
    which = torch.arange(len(x), device=x.device).repeat_interleave(len(counts))
    between = scoring.perturbed(_replaced, which, (counts.repeat(len(x)),), beside=(start, end, rank))
    scores = torch.cat([known[0], between.reshape(len(x), -1), known[1]], 1)
    ends = counts.new_tensor([0]), counts.new_tensor([total])
    fractions = (torch.cat([ends[0], counts, ends[1]]).double() / total).to(scores)
    return Curve(fractions, scores, torch.trapezoid(scores, fractions))


def _replaced(_: Tensor, start: Tensor, end: Tensor, rank: Tensor, count: Tensor) -> Tensor:
    return torch.where(rank < count, end, start)


def relevance_rank(heatmap: Float[Tensor, "B *size"]) -> Int[Tensor, "B *size"]:
    """The place of each pixel when they are sorted by relevance, the most relevant first.

    Args:
        heatmap: (B, *size).

    Returns:
        (B, *size), whole numbers from 0; equal values are in the order of their places.
    """
    order = heatmap.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.zeros_like(places).scatter(1, order, places).reshape(heatmap.shape)


def step_pixels(x: Tensor, steps: int | None = None, pixels_per_step: int | None = None) -> int:
    """How many pixels each step of a curve changes.

    Args:
        x: (B, C, *size).
        steps: how many there are, ≥ 1; 112 by default.
        pixels_per_step: in place of steps, ≥ 1.
    """
    total = math.prod(x.shape[2:])
    if pixels_per_step is not None:
        if steps is not None:
            raise ValueError(
                f"steps={steps} and pixels_per_step={pixels_per_step}: expected one of them, the other "
                f"follows"
            )
        checks.check_count("pixels_per_step", pixels_per_step)
        return pixels_per_step
    checks.check_count("steps", STEPS if steps is None else steps)
    return math.ceil(total / (STEPS if steps is None else steps))


# -- remove and debias -------------------------------------------------------------------------------------


@_documented
def road(
    model: nn.Module,
    x: Float[Tensor, "B C H W"],
    heatmap: Heatmap,
    cls: Classes = None,
    *,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    std: float = 0.01,
    seed: int = 0,
    **how: Any,
) -> Road:
    """The score while pixels are removed by imputing them, the most and the least relevant first.

    A removed pixel becomes the weighted mean of its neighbors (1/6 beside it, 1/12 across), which is one
    sparse linear system for all of them, and some noise: what is left does not tell where pixels were
    removed.

    {any}
        fractions: the shares of pixels to remove, each in (0, 1).
        std: of the noise, ≥ 0, in units of x.
        seed: of the noise.
        {how}

    Returns:
        `Road(fractions, most_relevant_first, least_relevant_first, value)`.

    {raises}

    References:
        Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods
        (arXiv:2202.00449).
    """
    with _scoring(model, x, cls, how) as scoring:
        return removed(scoring, heatmap, fractions, std, seed)


def removed(
    scoring: Scoring,
    heatmap: Heatmap,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    std: float = 0.01,
    seed: int = 0,
) -> Road:
    """The ROAD scores of a call whose class is fixed already."""
    x = scoring.x
    checks.check_number("std", std, at_least=0)
    checks.check_seed(seed)
    if x.ndim != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (B, C, H, W): pixels have neighbors in two axes"
        )
    if not fractions or not all(0 < f < 1 for f in fractions):
        raise ValueError(
            f"fractions={fractions!r}; expected one or more numbers between 0 and 1, both excluded"
        )
    rank = relevance_rank(_checked(heatmap, x))
    total = rank[0].numel()
    scores = []
    for most_first in (True, False):
        for i, fraction in enumerate(fractions):
            count = round(fraction * total)
            gone = rank < count if most_first else rank >= total - count
            noise = normal(seed, i, tuple(x.shape[1:]), like=x) * std
            images = torch.stack([_imputed(*pair, noise) for pair in zip(x, gone, strict=True)])
            scores.append(scoring.each(images)[:, 0])
    both = torch.stack(scores, 1).reshape(len(x), 2, -1)
    value = (both[:, 1] - both[:, 0]).mean(1) / 2
    return Road(torch.tensor(list(fractions)).to(x), both[:, 0], both[:, 1], value)


_NEIGHBORS = {
    (i, j): 1 / 6 if 0 in (i, j) else 1 / 12 for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)
}


def _imputed(image: Tensor, gone: Tensor, noise: Tensor) -> Tensor:
    """The image (C, H, W) with the pixels that are gone solved for, and noise where they were."""
    from scipy.sparse import coo_array  # noqa: PLC0415, slow to import, and needed here alone
    from scipy.sparse.linalg import spsolve  # noqa: PLC0415

    mask = gone.cpu().numpy()
    values = image.detach().double().cpu().numpy()
    unknown = np.full(mask.shape, -1)
    unknown[mask] = np.arange(mask.sum())
    places = np.argwhere(mask)
    rows, columns, entries = [], [], []
    right, weight = np.zeros((len(places), len(values))), np.zeros(len(places))
    for offset, share in _NEIGHBORS.items():
        near = places + offset
        inside = ((near >= 0) & (near < mask.shape)).all(1)
        row, near = np.flatnonzero(inside), near[inside]
        weight[row] += share
        neighbor = unknown[near[:, 0], near[:, 1]]
        known = neighbor < 0
        right[row[known]] += share * values[:, near[known, 0], near[known, 1]].T
        rows.append(row[~known])
        columns.append(neighbor[~known])
        entries.append(np.full((~known).sum(), -share))
    diagonal = np.arange(len(places))
    matrix = coo_array(
        (np.concatenate([*entries, weight]),
         (np.concatenate([*rows, diagonal]), np.concatenate([*columns, diagonal]))),
        shape=(len(places), len(places)),
    ).tocsc()  # fmt: skip
    solved = torch.from_numpy(spsolve(matrix, right).reshape(len(places), -1).T).to(image)
    return image.masked_scatter(gone, solved) + noise * gone


# -- what the map itself is like ---------------------------------------------------------------------------


def complexity(heatmap: Heatmap) -> Values:
    """How much of the image a heatmap covers: its mean, the lower the better.

    Args:
        heatmap: (B, *size), in [0, 1].

    Returns:
        (B,), in [0, 1].

    References:
        Poppi et al., Revisiting the Evaluation of Class Activation Mapping (arXiv:2104.10252).
    """
    return _tensor(heatmap, unit=True).flatten(1).mean(1)


def coherency(
    method: str | Callable[..., Tensor],
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    heatmap: Heatmap | None = None,
    **options: Any,
) -> Values:
    """How alike the heatmap of an image and of what it shows are: the correlation, scaled to [0, 1].

    (1 + r) / 2 with r Pearson's correlation of CAM(x) and CAM(x ⊙ CAM(x)); r is 0 where one is constant.

    Args:
        method: by name or as a function.
        model: the network, in evaluation mode.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, or a target. It is fixed once.
        heatmap: CAM(x) where it is there already.
        **options: passed to the method.

    Returns:
        (B,), in [0, 1], the higher the better.

    Raises:
        ValueError: a value is out of range or does not fit the model or the batch.
        TypeError: an argument is of the wrong kind.

    References:
        Poppi et al. (arXiv:2104.10252).
    """
    run = functools.partial(find_method(method) if isinstance(method, str) else method, **options)
    fixed = _fixed(model, x, cls)
    first = run(model, layer, x, fixed) if heatmap is None else _checked(heatmap, x, unit=True)
    again = run(model, layer, x * first[:, None], fixed)
    return (1 + pearson(first, again)) / 2


def adcc(
    method: str | Callable[..., Tensor],
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    heatmap: Heatmap | None = None,
    **options: Any,
) -> Values:
    """One number for a method: the harmonic mean of coherency, 1 − complexity and 1 − average drop.

    Args:
        method: by name or as a function.
        model: the network, in evaluation mode.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, or a target. It is fixed once.
        heatmap: the method's heatmap where it is there already.
        **options: passed to the method.

    Returns:
        (B,), in [0, 1], the higher the better; 0 where one of the three is 0.

    Raises:
        ValueError: a value is out of range or does not fit the model or the batch.
        TypeError: an argument is of the wrong kind.

    References:
        Poppi et al. (arXiv:2104.10252), equation 6.
    """
    run = functools.partial(find_method(method) if isinstance(method, str) else method, **options)
    fixed = _fixed(model, x, cls)
    maps = run(model, layer, x, fixed) if heatmap is None else _checked(heatmap, x, unit=True)
    coherent = coherency(run, model, layer, x, fixed, heatmap=maps)
    return harmonic_mean(coherent, 1 - complexity(maps), 1 - average_drop(model, x, maps, fixed))


def harmonic_mean(*parts: Tensor) -> Tensor:
    """The harmonic mean of parts (B,) in [0, 1]; 0 where one of them is 0."""
    stacked = torch.stack(parts)
    positive = (stacked > 0).all(0)
    inverse = (1 / torch.where(positive, stacked, 1.0)).mean(0)
    return torch.where(positive, 1 / inverse, 0.0)


def pointing_game(heatmap: Heatmap, region: Tensor | Sequence[Any], *, tolerance: int = 0) -> Values:
    """1 where the heatmap's highest value is in the object's region, else 0.

    Args:
        heatmap: (B, H, W); of equal highest values the first counts.
        region: boxes (B, 4) in pixels as (left, top, right, bottom), the last two excluded, or masks (B, H,
            W).
        tolerance: pixels by which the region is widened; the paper allows 15 at 224 pixels.

    Returns:
        (B,), 0 or 1. A heatmap that is zero everywhere points at nothing.

    Raises:
        ValueError: the region does not fit the heatmap.

    References:
        Zhang et al., Top-down Neural Attention by Excitation Backprop (arXiv:1608.00507).
    """
    maps = _tensor(heatmap)
    checks.check_count("tolerance", tolerance, at_least=0)
    inside = _region(region, maps)
    if tolerance:
        wide = 2 * tolerance + 1
        inside = nn.functional.max_pool2d(inside[:, None].float(), wide, 1, tolerance)[:, 0] > 0
    top = maps.flatten(1).argmax(1, keepdim=True)
    hit = inside.flatten(1).gather(1, top)[:, 0] & (maps.flatten(1) != 0).any(1)
    return hit.to(maps.dtype)


def energy_pointing_game(heatmap: Heatmap, region: Tensor | Sequence[Any]) -> Values:
    """The share of the heatmap's sum that is in the object's region.

    Args:
        heatmap: (B, H, W), in [0, 1].
        region: boxes (B, 4) in pixels as (left, top, right, bottom), the last two excluded, or masks (B, H,
            W).

    Returns:
        (B,), in [0, 1]; 0 for a heatmap that is zero everywhere.

    Raises:
        ValueError: the region does not fit the heatmap.

    References:
        Wang et al., Score-CAM (arXiv:1910.01279), section 4.3.
    """
    maps = _tensor(heatmap, unit=True)
    inside = _region(region, maps)
    total = maps.flatten(1).sum(1)
    within = (maps * inside).flatten(1).sum(1)
    return torch.where(total > 0, within / torch.where(total > 0, total, 1.0), 0.0)


def _region(region: Any, maps: Tensor) -> Tensor:
    given = torch.as_tensor(
        np.asarray(region) if not isinstance(region, Tensor) else region, device=maps.device
    )
    if maps.ndim == 3 and given.shape == maps.shape:
        return given != 0
    if maps.ndim != 3 or given.shape != (len(maps), 4):
        raise ValueError(
            f"region has shape {tuple(given.shape)} for heatmaps of shape {tuple(maps.shape)}; expected "
            f"boxes "
            f"({len(maps)}, 4) or masks of the heatmaps' shape"
        )
    left, top, right, bottom = (edge[:, None, None] for edge in given.T)
    if bool(((right <= left) | (bottom <= top)).any()):
        raise ValueError(
            f"region={given.tolist()}: expected boxes (left, top, right, bottom) that hold a pixel"
        )
    rows = torch.arange(maps.shape[1], device=maps.device)[None, :, None]
    columns = torch.arange(maps.shape[2], device=maps.device)[None, None, :]
    return (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)


# -- whether it depends on what was learned ----------------------------------------------------------------


def parameter_randomization(
    method: str | Callable[..., Tensor],
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    cascading: bool = True,
    seed: int = 0,
    similarity: Similarity | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """How alike the heatmap stays as the network forgets what it learned, from the output down.

    Each parameter is drawn anew from a normal distribution with its own mean and deviation, in a copy of the
    model. A heatmap that stays the same does not explain the network.

    Args:
        method: by name or as a function.
        model: the network, in evaluation mode; it is never touched.
        layer: a name or None for `default_layer`; a module is looked for by its name in the copies.
        x: (B, C, *size), prepared images.
        cls: None for the class that the model as it is predicts, an int, B ints, or a target.
        cascading: keep what was randomized before; else randomize one layer at a time.
        seed: of the parameters.
        similarity: `(heatmaps, heatmaps) -> (B,)`; Spearman's rank correlation by default.
        **options: passed to the method.

    Returns:
        {name of the module randomized last: (B,)}, in the order of randomization.

    Raises:
        ValueError: a value is out of range or does not fit the model or the batch.
        TypeError: an argument is of the wrong kind.

    References:
        Adebayo et al., Sanity Checks for Saliency Maps (arXiv:1810.03292).
    """
    checks.check_seed(seed)
    run = functools.partial(find_method(method) if isinstance(method, str) else method, **options)
    alike = spearman if similarity is None else similarity
    if isinstance(layer, nn.Module):
        layer = next((name for name, module in model.named_modules() if module is layer), layer)
    fixed = _fixed(model, x, cls)
    expected = run(model, layer, x, fixed)
    names = [
        name for name, module in model.named_modules() if next(module.parameters(False), None) is not None
    ]
    twin, found = copy.deepcopy(model), {}
    for number, name in enumerate(reversed(names)):
        if not cascading:
            twin = copy.deepcopy(model)
        for index, parameter in enumerate(twin.get_submodule(name).parameters(False)):
            values = parameter.detach()
            spread = values.std() if values.numel() > 1 else values.abs().squeeze()
            draws = normal(seed, number * 64 + index, tuple(values.shape), like=values)
            parameter.data = values.mean() + spread * draws
        found[name] = alike(expected, run(twin, layer, x, fixed))
    return found


def max_sensitivity(
    method: str | Callable[..., Tensor],
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    radius: float = 0.02,
    num_samples: int = 10,
    seed: int = 0,
    **options: Any,
) -> Values:
    """How far the heatmap moves, at most, when the image is changed a little; the lower the better.

    max over δ of ‖CAM(x + δ) − CAM(x)‖ / ‖CAM(x)‖, with each value of δ uniform in [−radius, radius]. For how
    far it moves along one direction, and not by chance, see `torch.func.jvp` of the method.

    Args:
        method: by name or as a function.
        model: the network, in evaluation mode.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of the image as it is, an int, B ints, or a target. Fixed once.
        radius: of the changes, > 0, in units of x.
        num_samples: how many changes are tried, ≥ 1.
        seed: of the changes.
        **options: passed to the method.

    Returns:
        (B,), ≥ 0; 0 where the heatmap is zero and stays so, infinite where it is zero and does not.

    Raises:
        ValueError: a value is out of range or does not fit the model or the batch.
        TypeError: an argument is of the wrong kind.

    References:
        Yeh et al., On the (In)fidelity and Sensitivity of Explanations (arXiv:1901.09392), definition 2.
    """
    checks.check_number("radius", radius, above=0)
    checks.check_count("num_samples", num_samples)
    checks.check_seed(seed)
    run = functools.partial(find_method(method) if isinstance(method, str) else method, **options)
    fixed = _fixed(model, x, cls)
    first = run(model, layer, x, fixed)
    worst = torch.zeros_like(first.flatten(1)[:, 0])
    for number in range(num_samples):
        change = radius * (2 * uniform(seed, number, tuple(x.shape[1:]), like=x) - 1)  # of every image alike
        moved = run(model, layer, x + change, fixed)
        worst = torch.maximum(worst, (moved - first).flatten(1).norm(dim=1))
    size = first.flatten(1).norm(dim=1)
    return torch.where(worst > 0, worst / size, 0.0)


def pearson(first: Tensor, second: Tensor) -> Values:
    """Pearson's correlation of maps (B, ...), (B,) in [−1, 1]; 0 where one is constant."""
    one, other = (
        m.flatten(1).double() - m.flatten(1).double().mean(1, keepdim=True) for m in (first, second)
    )
    norm = one.norm(dim=1) * other.norm(dim=1)
    varies = (first.flatten(1).amax(1) > first.flatten(1).amin(1)) & (
        second.flatten(1).amax(1) > second.flatten(1).amin(1)
    )
    r = (one * other).sum(1) / torch.where(norm > 0, norm, 1.0)
    return torch.where(varies & (norm > 0), r, 0.0).clamp(-1, 1).to(first.dtype)


def spearman(first: Tensor, second: Tensor) -> Values:
    """Spearman's rank correlation of maps (B, ...), (B,) in [−1, 1]; equal values share their mean rank."""
    return pearson(_mean_rank(first), _mean_rank(second)).to(first.dtype)


def _mean_rank(maps: Tensor) -> Tensor:
    rows = []
    for values in maps.flatten(1):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rows.append((count.cumsum(0) - (count - 1) / 2.0)[place])
    return torch.stack(rows).double()


# -- arguments ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scoring(model: nn.Module, x: Tensor, cls: Classes, how: dict[str, Any]) -> Iterator[Scoring]:
    for name in how:
        if name not in _OWN:
            raise TypeError(f"there is no option {name!r}; the options are {', '.join(sorted(_OWN))}")
    running = Running(**{name: value for name, value in how.items() if name != "score"})
    with scoring_of(model, x, cls, how.get("score", "probability"), running) as scoring:
        if scoring.explained.many:
            raise ValueError(f"cls={cls!r}: expected one class for each image, as there is one heatmap")
        yield scoring


def _fixed(model: nn.Module, x: Tensor, cls: Classes) -> Classes:
    """The class of each image as it is, so that other images are scored for it."""
    with _scoring(model, x, cls, {}) as scoring:
        return scoring.explained.cls


def _tensor(heatmap: Heatmap, *, unit: bool = False) -> Tensor:
    if not isinstance(heatmap, (Tensor, np.ndarray)):
        raise TypeError(f"heatmap is a {type(heatmap).__name__}; expected a tensor or an array (B, *size)")
    maps = torch.as_tensor(heatmap)
    maps = maps if maps.is_floating_point() else maps.float()
    if maps.ndim < 2 or maps.numel() == 0:
        raise ValueError(
            f"heatmap has shape {tuple(maps.shape)}; expected (B, *size), as heatmap[None] of one"
        )
    if checks.is_readable(maps):
        if not torch.isfinite(maps.detach()).all():
            raise ValueError("heatmap holds NaN or infinite values; expected finite ones")
        low, high = (float(end) for end in maps.detach().aminmax())
        if unit and not (low >= 0 and high <= 1):
            raise ValueError(
                f"heatmap has values from {low:.4g} to {high:.4g}; expected [0, 1] "
                "(xcam_fn.heatmap(cam, size) makes that of a raw map)"
            )
    return maps


def _checked(heatmap: Heatmap, x: Tensor, *, unit: bool = False) -> Tensor:
    maps = _tensor(heatmap, unit=unit).to(x.device)
    expected = (len(x), *x.shape[2:])
    if tuple(maps.shape) != expected:
        raise ValueError(
            f"heatmap has shape {tuple(maps.shape)}; expected {expected}, one for each image at its size "
            "(xcam_fn.heatmap(cam, size) resizes a raw map)"
        )
    return maps.to(x.dtype) if unit else maps
