"""Methods that change the features: what the score does when a channel or a position is hidden."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import Count
from xcam_fn.maps import precise
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.methods.options import Channels, Score
from xcam_fn.methods.perturbation import in_budget, projected, without
from xcam_fn.targets import Classes
from xcam_fn.weights import Projection

__all__ = ["ablationcam", "reciprocam"]


@method(
    "Ablation-CAM", family="perturbation", paper="WACV 2020, doi:10.1109/WACV45572.2020.9093360",
    summary="each channel weighted by the share of the score lost without it",
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
    """Ablation-CAM: each channel weighted by the share of the score that is lost without it.

    w_k = (s − s_k) / s, where s_k is the score with A_k set to zero (0 where s is 0); the map is Σ w_k A_k.
    The trunk runs once, the head once for each channel that is not zero already.

    Args:
        channels: how many channels are ablated: None for all, an int, or a share of them, a float in (0, 1].
            They are those with the largest Σ |G ⊙ A|, for which a gradient is taken; the others have weight
            0, and channels that rank alike are ablated or left out together.

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
    share = (every - s_k) / torch.where(every != 0, every, 1.0)
    # Of a layer that the score does not read, rounding alone would be drawn as a map.
    is_lost = is_scored & (every != 0) & (share.abs() > 16 * torch.finfo(share.dtype).eps)
    return projected(A, torch.where(is_lost, share, 0.0), projection)


def _influence(call: Call, cls: Classes) -> Tensor:
    """How much each channel moves the logit of each class, to first order: Σ |G ⊙ A|, (B, K, n)."""
    G = precise(call.gradient(cls))  # before the features, so that one forward is for both
    return (G * precise(call.features)[:, None]).abs().flatten(3).sum(3).movedim(1, 2)


def _channels_to_ablate(A: Tensor) -> tuple[Tensor, Tensor]:
    """Which image and which channel, (P,) each: all channels but those that are zero already."""
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
    summary="what each position of the features scores alone",
)  # fmt: skip
def reciprocam(
    call: Call,
    *,
    gaussian: bool = True,
    score: Score = "probability",
    chunk_size: Count = 64,
    progress: bool = False,
) -> Tensor:
    """Recipro-CAM: each position's value is the score of the features with all but that position masked.

    S(p) = p(A ⊙ M_p), M_p the 3 × 3 Gaussian (1/4 at p, 1/8 beside it, 1/16 at the corners) and zero
    elsewhere, or 1 at p alone. The trunk runs once, the head once for each position. A score's zero is
    arbitrary, a logit's for one: the heatmap reaches from the least value of the map to the largest.

    Args:
        gaussian: show the neighbors of a position too, by the Gaussian; else the position alone.

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
    """What shows the features around a place, weighted by half for each step away from it along an axis."""

    def shown(features: Tensor, place: Tensor) -> Tensor:
        for axis, center in enumerate(place.unbind(), start=1):
            steps = (torch.arange(features.shape[axis], device=features.device) - center).abs()
            line = torch.where(steps <= reach, 0.5 ** (steps + reach), 0.0).to(features.dtype)
            features = features * line.reshape(-1, *[1] * (features.ndim - 1 - axis))
        return features

    return shown
