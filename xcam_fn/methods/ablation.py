"""Methods that remove a channel or a position of the features, or a part of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import Count, Positive, Share
from xcam_fn.maps import minmax, precise, ratio, resize
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.methods.options import Channels, Score
from xcam_fn.methods.perturbation import in_budget, masking, projected, without
from xcam_fn.perturb import Baseline, baseline_images, distinct_maps, scatter_scores
from xcam_fn.scoring.running import Running, RunningOptions
from xcam_fn.targets import Classes
from xcam_fn.targets.classes import logits
from xcam_fn.targets.outputs import describe
from xcam_fn.weights import Projection

__all__ = ["ablationcam", "occlusion", "reciprocam", "sidu"]

Lengths = Count | Sequence[Count] | None


@method(
    "Occlusion", family="perturbation", paper="arXiv:1311.2901",
    summary="the drop of the score when a sliding window hides the image; needs no layer",
)  # fmt: skip
def occlusion(
    call: Call,
    *,
    window: Lengths = None,
    stride: Lengths = None,
    baseline: Baseline = 0.0,
    score: Score = "probability",
    **options: Unpack[RunningOptions],
) -> Tensor:
    """Occlusion: each pixel's value is the score's mean drop over the windows that hide it.

    d_m = p(x) − p(x with x₀ inside window m); the map is Σ_m [i ∈ m] d_m / Σ_m [i ∈ m] at pixel i. The first
    window lies at the start of each axis, the next one a stride further, the last is cut off at the end. One
    forward pass for each: 169 for 224 × 224 pixels by default. The layer is not used, and the model may be
    None if `scorer` replaces it.

    Args:
        window: its length along each axis in pixels, one int for all axes or one per axis, no more than the
            image's; None for a quarter of the image's.
        stride: the distance between windows in pixels, given in the same way, no more than the window's
            length; None for a quarter of that.

    References:
        Zeiler and Fergus, Visualizing and Understanding Convolutional Networks (arXiv:1311.2901).
    """
    x, size = call.x, tuple(call.x.shape[2:])
    lengths = _lengths("window", window, size, "the image")
    steps = _lengths("stride", stride, lengths, "the window")
    spans = [_spans(*of_axis).to(x.device) for of_axis in zip(size, lengths, steps, strict=True)]
    scoring = call.scoring(score, Running(**options))
    places = torch.cartesian_prod(*[torch.arange(len(one), device=x.device) for one in spans])
    places = places.reshape(-1, len(size)).unbind(1)
    inside = [span[place] for span, place in zip(spans, places, strict=True)]
    hidden = scoring.every(_hide, *inside, beside=(baseline_images(baseline, x),))
    hidden = hidden.unflatten(1, [len(span) for span in spans]).movedim(-1, 1)
    own = scoring.explained.own
    maps = precise(own).reshape(*own.shape, *[1] * len(size)) - precise(hidden)
    for span in spans:  # each axis in turn becomes the last
        share = span.to(maps) / span.sum(0)
        maps = torch.einsum("bnm...,mp->bn...p", maps, share)
    return maps


def _lengths(name: str, given: Lengths, most: Sequence[int], of: str) -> list[int]:
    """A length for each axis, no more than the axis's own."""
    if given is None:
        return [math.ceil(length / 4) for length in most]
    lengths = [given] * len(most) if isinstance(given, int) else list(given)
    if len(lengths) != len(most) or any(own > length for own, length in zip(lengths, most, strict=False)):
        raise ValueError(
            f"{name}={given!r}; expected an int or {len(most)} ints, at most {of}'s size {tuple(most)}"
        )
    return lengths


def _spans(size: int, length: int, stride: int) -> Tensor:
    """Whether each window along an axis contains each pixel, (windows, size)."""
    first = torch.arange(math.ceil((size - length) / stride) + 1)[:, None] * stride
    pixel = torch.arange(size)
    return (pixel >= first) & (pixel < first + length)


def _hide(image: Tensor, base: Tensor, *inside: Tensor) -> Tensor:
    hidden = torch.ones((), dtype=torch.bool, device=image.device)
    for along in inside:
        hidden = hidden[..., None] & along
    return torch.where(hidden, base, image)


@method(
    "SIDU", family="perturbation", paper="arXiv:2101.10710",
    summary="channels weighted by how similar and how unique the outputs of their masked images are",
    needs="one output per class", cost=lambda channels: channels,
)  # fmt: skip
def sidu(
    call: Call, *, threshold: Share = 0.5, std: Positive = 0.25, **options: Unpack[RunningOptions]
) -> Tensor:
    """SIDU: binary masks weighted by their outputs' similarity to the image's and difference from each other.

    B_k = [n(A_k) > τ], M_k = U(B_k); P_k are the probabilities of all classes for x ⊙ M_k, P those for x;
    SD_k = exp(−|P − P_k|² / 2σ²), U_k = Σ_j |P_k − P_j|; the map is Σ SD_k U_k M_k, the same for every class.
    One forward pass for each distinct binary mask.

    Args:
        threshold: τ, the fraction of a channel's range above which its mask shows the image, 0 to 1.
        std: σ, how fast a mask loses weight when it changes the probabilities, > 0.

    Raises:
        StructureError: a ValueError; the network's output is not one number per class.

    References:
        Muddamsetty et al. (arXiv:2101.10710).
    """
    x, A = call.x, precise(call.features)
    try:
        classes = logits(call.output).shape[1]
    except ValueError as error:
        raise checks.StructureError(
            f"sidu compares all classes, but the model's output is {describe(call.output)}; expected logits "
            "(B, classes); for another target, use scorecam"
        ) from error
    every = torch.arange(classes, device=x.device).expand(len(x), -1)
    scoring = call.asking(every).scoring("probability", Running(**options))
    B = (minmax(A, A.ndim - 2) > threshold).to(A)
    found = distinct_maps(B)
    base = torch.zeros_like(x)
    scores = scoring.perturbed(
        masking(resize, tuple(x.shape[2:])), found.which, (found.maps,), beside=(base,)
    )
    P = precise(scatter_scores(scores, found, scoring.each(base)))
    change = (precise(scoring.explained.own)[:, None] - P).square().sum(2)
    # Without matrix products, whose rounding would make equal outputs differ.
    distances = torch.cdist(P, P, compute_mode="donot_use_mm_for_euclid_dist")
    w = torch.exp(-change / (2 * std**2)) * distances.sum(2)
    return call.for_each_class(torch.einsum("bk,bk...->b...", w.to(B), B)[:, None])


# -- of the features ----------------------------------------------------------------------------------------


@method(
    "Ablation-CAM", family="perturbation", paper="WACV 2020, doi:10.1109/WACV45572.2020.9093360",
    summary="each channel weighted by the fraction of the score lost without it",
    variants={"xplaincam": {}, "pytorch-grad-cam": {}},
)  # fmt: skip
def ablationcam(
    call: Call,
    *,
    score: Score = "logit",
    projection: Projection | None = None,
    channels: Channels = None,
    chunk_size: Count = 64,
    progress: bool = False,
) -> Tensor:
    """Ablation-CAM: each channel weighted by the fraction of the score that is lost without it.

    w_k = (s − s_k) / s, where s_k is the score with A_k set to zero (0 where s is 0); the map is Σ w_k A_k.
    The trunk runs once, and the head once for each channel that is not already zero.

    Args:
        channels: how many channels to ablate: None for all, an int, or a fraction, a float in (0, 1]. Those
            with the largest Σ |G ⊙ A| are ablated, which takes a gradient; the others have weight 0, and
            channels with equal rank are ablated or left out together.

    References:
        Ramaswamy, Ablation-CAM, WACV 2020 (doi:10.1109/WACV45572.2020.9093360).
    """
    explained = call.explained(score)
    is_scored = in_budget(call, explained.logit_of, channels, _influence)
    s, A = explained.own, call.features
    which, channel = _channels_to_ablate(without(A, is_scored))
    ablated = call.head_scores(
        _without_channel, which, channel, score=score, chunk_size=chunk_size, progress=progress
    )
    every = s[:, None].expand(-1, A.shape[1], -1)
    s_k = every.index_put((which, channel), ablated) if len(which) else every
    share = ratio(every - s_k, every)
    # If the score does not depend on the layer, rounding alone would make a map.
    is_lost = is_scored & (share.abs() > 16 * torch.finfo(share.dtype).eps)
    return projected(A, torch.where(is_lost, share, 0.0), projection)


def _influence(call: Call, cls: Classes) -> Tensor:
    """How much each channel moves the logit of each class, to first order: Σ |G ⊙ A|, (B, K, n)."""
    G = precise(call.gradient(cls))  # before the features: one forward serves both
    return (G * precise(call.features)[:, None]).abs().flatten(3).sum(3).movedim(1, 2)


def _channels_to_ablate(A: Tensor) -> tuple[Tensor, Tensor]:
    """The image and channel indices, (P,) each, of all channels that are not zero already."""
    B, K = A.shape[:2]
    image = torch.arange(B, device=A.device).repeat_interleave(K)
    channel = torch.arange(K, device=A.device).repeat(B)
    if not checks.is_readable(A):
        return image, channel
    alive = (A.detach() != 0).flatten(2).any(-1).flatten()
    return image[alive], channel[alive]


def _without_channel(features: Tensor, channel: Tensor) -> Tensor:
    kept = torch.arange(len(features), device=features.device) != channel
    return features * kept.reshape(-1, *[1] * (features.ndim - 1)).to(features.dtype)


@method(
    "Recipro-CAM", family="perturbation", paper="arXiv:2209.14074", returns="scores",
    summary="the score of each position of the features alone",
)  # fmt: skip
def reciprocam(
    call: Call,
    *,
    gaussian: bool = True,
    score: Score = "probability",
    chunk_size: Count = 64,
    progress: bool = False,
) -> Tensor:
    """Recipro-CAM: each position's value is the score of the features with all other positions masked.

    S(p) = p(A ⊙ M_p), M_p the 3 × 3 Gaussian (1/4 at p, 1/8 next to it, 1/16 at the corners) and zero
    elsewhere, or 1 only at p. The trunk runs once, and the head once per position. Since the zero of a score
    is arbitrary, the heatmap is scaled from the map's minimum to its maximum.

    Args:
        gaussian: also show the neighbors of a position, weighted by the Gaussian.

    References:
        Byun and Lee (arXiv:2209.14074).
    """
    A = call.features
    axes = [torch.arange(length, device=A.device) for length in A.shape[2:]]
    places = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    which = torch.arange(len(A), device=A.device).repeat_interleave(len(places))
    shown = call.head_scores(
        _only_around(1 if gaussian else 0), which, places.repeat(len(A), 1), score=score,
        chunk_size=chunk_size, progress=progress,
    )  # fmt: skip
    return shown.reshape(len(A), *A.shape[2:], -1).movedim(-1, 1)


def _only_around(reach: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The mask of the features around a position: half the weight for each step away along an axis."""

    def shown(features: Tensor, place: Tensor) -> Tensor:
        for axis, center in enumerate(place.unbind(), start=1):
            steps = (torch.arange(features.shape[axis], device=features.device) - center).abs()
            line = torch.where(steps <= reach, 0.5 ** (steps + reach), 0.0).to(features.dtype)
            features = features * line.reshape(-1, *[1] * (features.ndim - 1 - axis))
        return features

    return shown
