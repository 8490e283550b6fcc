"""Fusions of a gradient map and a perturbation map, weighted by their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks, weights
from xcam_fn.arguments import Count, Percentile, check, checked
from xcam_fn.docstrings import documented
from xcam_fn.maps import last_axes, minmax, resized_minmax
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import accepted, as_method, heatmaps_of, method
from xcam_fn.methods.gradient import weighted
from xcam_fn.methods.options import Score
from xcam_fn.methods.perturbation import scorecam
from xcam_fn.perturb import Baseline, baseline_images
from xcam_fn.scoring.running import Running, RunningOptions, Scoring, scoring_of
from xcam_fn.targets import Classes

__all__ = ["agree", "combine", "denoise", "fuse", "fusioncam", "gain", "unioncam"]

Images = Float[Tensor, "B C *size"]
Maps = Float[Tensor, "..."]
Component = str | Callable[..., Tensor] | Tensor | np.ndarray
Gain = Callable[..., Sequence[Tensor] | Tensor]


# -- the parts ---------------------------------------------------------------------------------------------


@checked
def denoise(maps: Maps, theta: Percentile = 10.0, *, axes: Count = 2) -> Maps:
    """Maps with their lowest values removed: zero at or below their own θ-th percentile.

    Args:
        maps: (..., *spatial).
        theta: the percentile, 0 to 100.
        axes: the number of trailing axes that form one map.

    Returns:
        The same shape. A constant map becomes zero.
    """
    return torch.where(maps > weights.percentile(maps, theta, axes), maps, 0.0)


@checked
def combine(first: Maps, second: Maps, gains: Sequence[Tensor] | Tensor, *, axes: Count = 2) -> Maps:
    """The sum of two maps, each weighted by its gain, scaled to [0, 1].

    Args:
        first: (..., *spatial).
        second: the same shape.
        gains: two tensors (...), signed. A map with a negative gain is subtracted.
        axes: the number of trailing axes that form one map.

    Returns:
        The same shape, in [0, 1]; zero if the sum is constant.
    """
    _check_alike("first", first, "second", second)
    of_first, of_second = (_per_map(gain, first, axes) for gain in _gains_of(gains, 2, first, axes))
    return minmax(of_first * first + of_second * second, axes)


@checked
def agree(first: Maps, second: Maps, *, axes: Count = 2) -> Maps:
    """The larger of two maps where they agree, their mean where they do not, scaled to [0, 1].

    sim = clamp(1 − |first − second|, 0, 1); n(sim · max(first, second) + (1 − sim) · (first + second) / 2).

    Args:
        first: (..., *spatial).
        second: the same shape.
        axes: the number of trailing axes that form one map.

    Returns:
        The same shape, in [0, 1]; zero if the result is constant.
    """
    _check_alike("first", first, "second", second)
    sim = (1 - (first - second).abs()).clamp(0, 1)
    return minmax(sim * torch.maximum(first, second) + (1 - sim) * (first + second) / 2, axes)


@checked
def fuse(
    gradient_map: Maps, region_map: Maps, gain: Gain, *, theta: Percentile = 10.0, axes: Count = 2
) -> Maps:
    """Fusion-CAM's map of two heatmaps, given the score gains of images masked by heatmaps.

    D is the gradient map without its lowest values; F = n(β_D·D + β_R·R); the fused map is what β_F·F and
    β_R·R agree on, see `agree`.

    Args:
        gradient_map: (B, *size) or (B, n, *size), in [0, 1].
        region_map: the same shape, in [0, 1].
        gain: `(*heatmaps) -> their gains β`, (B,) or (B, n) each, such as `xcam_fn.gain(model, x, cls)`. It
            is called twice, with two heatmaps and with one.
        theta: the percentile of the gradient map, 0 to 100, up to which values are dropped.
        axes: the number of trailing axes that form one map.

    Returns:
        The same shape, in [0, 1]. Two zero maps give zero, whatever their gains.

    Raises:
        ValueError: the shapes differ, or theta is out of range.

    References:
        Fusion-CAM (arXiv:2603.05386).
    """
    _check_alike("gradient_map", gradient_map, "region_map", region_map)
    denoised = denoise(gradient_map, theta, axes=axes)
    gains = _gains_of(gain(denoised, region_map), 2, region_map, axes)
    combined = combine(denoised, region_map, gains, axes=axes)
    (of_combined,) = _gains_of(gain(combined), 1, region_map, axes)
    of_maps = ((of_combined, combined), (gains[1], region_map))
    return agree(*(_per_map(beta, one, axes) * one for beta, one in of_maps), axes=axes)


def _check_alike(name: str, first: Tensor, other: str, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{name} has shape {tuple(first.shape)} and {other} {tuple(second.shape)}; "
            "expected the same shape, both at the input's size"
        )


def _gains_of(gains: Any, count: int, maps: Tensor, axes: int) -> list[Tensor]:
    """The gains of several maps, one number each, in a tensor or a list."""
    shape = maps.shape[: last_axes(maps, axes)[0]]
    expected = f"{count} tensor(s) {tuple(shape)}, the gains of {count} map(s)"
    if not isinstance(gains, (Tensor, list, tuple)) or (isinstance(gains, Tensor) and not gains.ndim):
        raise TypeError(f"gains must be {expected}, got {type(gains).__name__}")
    if isinstance(gains, Tensor):
        checks.check_tensor("gains", gains)
    if len(gains) != count:
        raise ValueError(f"gains has {len(gains)} entries; expected {expected}")
    fits = lambda gain: gain.numel() == math.prod(shape)  # noqa: E731
    return [checks.check_returned("gain", gain, expected, fits) for gain in gains]


def _per_map(values: Tensor, maps: Tensor, axes: int) -> Tensor:
    return values.reshape(*maps.shape[: last_axes(maps, axes)[0]], *[1] * axes)


@documented
def gain(
    model: nn.Module,
    x: Images,
    cls: Classes = None,
    *,
    baseline: Baseline = 0.0,
    score: Score = "probability",
    **options: Unpack[RunningOptions],
) -> Callable[..., Tensor]:
    """Return the function that computes the score gain of heatmaps, β = p(x ⊙ heatmap) − p(x₀), for `fuse`.

    Args:
        **options: scoring options: precision, compile, scorer, chunk_size and progress.

    Returns:
        `(*heatmaps) -> (m, B)` or `(m, B, n)`, for m heatmaps (B, *size) or (B, n, *size) at once.
    """
    with scoring_of(model, x, cls, score, Running(**options), forwards=0) as scoring:
        return _gain(scoring, baseline)


def _gain(scoring: Scoring, baseline: Baseline) -> Callable[..., Tensor]:
    base, shape = baseline_images(baseline, scoring.x), _shape_of(scoring)
    many = scoring.explained.many

    def of(*maps: Tensor) -> Tensor:
        check("heatmap", maps, Sequence[Maps])
        for one in maps:
            if one.shape != shape:
                raise ValueError(
                    f"a heatmap has shape {tuple(one.shape)}; expected {shape}, the input's size"
                )
        shown = torch.stack([torch.zeros_like(maps[0]), *maps])  # zeros show the baseline
        scores = scoring.shown(shown if many else shown[:, :, None], base)
        gains = scores[1:] - scores[:1]
        return gains if many else gains.squeeze(-1)

    return of


# -- the methods -------------------------------------------------------------------------------------------


@method(
    "Union-CAM", family="fusion", paper="doi:10.3389/fnbot.2024.1490198",
    summary="a denoised gradient map and Score-CAM's, summed with the score gains as weights",
    variants={"xplaincam": {"region": scorecam.variant("xplaincam")}}, cost=lambda channels: channels,
)  # fmt: skip
def unioncam(
    call: Call,
    *,
    region: Component = "scorecam",
    theta: Percentile = 10.0,
    baseline: Baseline = 0.0,
    score: Score = "probability",
    **options: Unpack[RunningOptions],
) -> Tensor:
    """Union-CAM: a denoised gradient map plus Score-CAM's, weighted by their gains, or the latter alone.

    D = n(U(Σ α G₊ A)) with each channel's gradient below its θ-th percentile dropped, G₊ its positive part
    and α = 1 / Σ G₊; R is Score-CAM's heatmap, with a baseline of its own; F = n(β_D·D + β_R·R) with
    β = p(x ⊙ map) − p(x₀). The map is F, or R if that gains more. If both are zero, so is the map; a map with
    a negative β is subtracted.

    Args:
        region: R: a method by name or as a function, or its heatmaps.
        theta: the percentile of a channel's gradients, 0 to 100, below which they are dropped.

    References:
        Frontiers in Neurorobotics 2024 (doi:10.3389/fnbot.2024.1490198).
    """
    scoring = call.scoring(score, Running(**options))
    size = tuple(call.x.shape[2:])
    G = call.gradient(scoring.explained.logit_of)
    D = resized_minmax(weighted(call.features, G, weights.unioncam, None, theta=theta), size).to(call.x)
    D = D if call.many else D.squeeze(1)
    R = _heatmap_of("region", region, call, scoring)
    gain = _gain(scoring, baseline)
    gains = gain(D, R)
    F = combine(D, R, gains, axes=len(size))
    is_better = _per_map(gain(F)[0] >= gains[1], F, len(size))
    return torch.where(is_better, F, R)


@method(
    "Fusion-CAM", family="fusion", paper="arXiv:2603.05386",
    summary="what a gradient map and a perturbation map agree on, weighted by their score gains",
    variants={"xplaincam": {"region": scorecam.variant("xplaincam")}}, cost=lambda channels: channels,
)  # fmt: skip
def fusioncam(
    call: Call,
    *,
    gradient: Component = "gradcam",
    region: Component = "scorecam",
    theta: Percentile = 10.0,
    baseline: Baseline = 0.0,
    score: Score = "probability",
    **options: Unpack[RunningOptions],
) -> Tensor:
    """Fusion-CAM: what the heatmaps of a gradient and a perturbation method agree on, by their gains.

    D is the gradient heatmap, zero at or below its θ-th percentile; R the region heatmap, with a baseline of
    its own; F = n(β_D·D + β_R·R) with β = p(x ⊙ map) − p(x₀); L₁ = β_F·F and L₂ = β_R·R;
    sim = clamp(1 − |L₁ − L₂|, 0, 1); the map is n(sim · max(L₁, L₂) + (1 − sim) · (L₁ + L₂) / 2).

    If both maps are zero, so is the fused one. Fusing identical maps gives nearly the same map. A constant
    gradient map is dropped entirely. A map with a negative β (it scores lower than the baseline) is
    subtracted. The result is always finite and in [0, 1].

    Args:
        gradient: D's heatmap: a method's name ("layercam"), a method as a function, with its own keywords
            (`functools.partial`), or precomputed heatmaps, (B, *size) in [0, 1].
        region: R, given in the same way.
        theta: the percentile of D, 0 to 100, up to which values are dropped.

    References:
        Fusion-CAM (arXiv:2603.05386).
    """
    scoring = call.scoring(score, Running(**options))
    D = _heatmap_of("gradient", gradient, call, scoring)
    R = _heatmap_of("region", region, call, scoring)
    return fuse(D, R, _gain(scoring, baseline), theta=theta, axes=call.x.ndim - 2)


def _shape_of(scoring: Scoring) -> tuple[int, ...]:
    """The shape of heatmaps for the scored images and classes."""
    classes = scoring.explained.own.shape[1:] if scoring.explained.many else ()
    return (len(scoring.x), *classes, *scoring.x.shape[2:])


def _heatmap_of(role: str, given: Component, call: Call, scoring: Scoring) -> Tensor:
    """The heatmaps of one part of a fusion, (B, *size) or (B, n, *size)."""
    if isinstance(given, (Tensor, np.ndarray)):
        maps = torch.as_tensor(given).to(call.x)
    else:
        made = as_method(given)
        how = {k: v for k, v in scoring.how._asdict().items() if v != Running._field_defaults[k]}
        how |= {"create_graph": True} if call.create_graph else {}
        maps = heatmaps_of(made, call.asking(scoring.explained.cls), accepted(made, how))
    expected = _shape_of(scoring)
    if maps.shape != expected:
        raise ValueError(
            f"{role}: the heatmaps have shape {tuple(maps.shape)}; expected {expected}, the input's size "
            f"({checks.FROM_RAW})"
        )
    checks.check_unit(f"{role}: the heatmaps have values", maps)
    return maps
