"""(A, G) to weights: one function per method. A are the features, G is the gradient of the score to them.

Both are (B, K, *spatial), with any number of spatial axes. Weights are one number per channel, (B, K), or per
position, (B, K, *spatial); the map is the sum over channels of weight × feature. Sums and powers leave the
range of half precision, so they are computed, and returned, in float32. Other arguments raise TypeError,
numbers out of range ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import Count, NonNegative, Percentile, checked
from xcam_fn.maps import last_axes, precise, ratio

Maps = Float[Tensor, "B K *spatial"]
Projection = Callable[[Tensor], Tensor]
ChannelWeights = Float[Tensor, "B K"]


@checked
def gradcam(A: Maps, G: Maps) -> ChannelWeights:
    """The weights of Grad-CAM's map Σ_k w_k A_k, (B, K): w_k = mean_ij G_kij, the gradient's mean.

    References:
        Selvaraju et al. (arXiv:1610.02391), equation 1.
    """
    return reduce(precise(G), "b k ... -> b k", "mean")


@checked
def gradcam_pp(
    A: Maps, G: Maps, eps: NonNegative = 0.0, *, local: bool = False, divide: bool = True
) -> ChannelWeights:
    """Grad-CAM++'s weights, (B, K): the positive gradient, each position weighted by its coefficient α.

    w_k = Σ_ij α_kij ReLU(G_kij); the map is Σ_k w_k A_k. α = G² / (2 G² + Σ A G³), 0 where the denominator
    is 0. The paper's factor exp(score) is left out: it cancels when the map is normalized.

    Args:
        eps: added to the denominator, ≥ 0, as other libraries do; it is not small compared with G².
        local: use Σ A · G³ with each position's own G³ instead of Σ (A G³), another reading of equation 19;
            the two agree if the gradient is the same at every position.
        divide: False leaves α at its numerator, G², as TorchCAM does.

    References:
        Chattopadhyay et al. (arXiv:1710.11063), equations 10 and 19.
    """
    A, G = precise(A), precise(G)
    if not divide:
        return reduce(G**2 * G.relu(), "b k ... -> b k", "sum")
    # Divided by max|G|² above and below, α is the same, and G² does not underflow.
    scale = reduce(G.abs(), "b k ... -> b k", "max").amax(1)
    scale = torch.where(scale > 0, scale, 1.0).reshape(-1, *[1] * (G.ndim - 1))
    g = G / scale
    third = _total(A) * g**3 if local else _total(A * g**3)
    denominator = 2 * g**2 + third * scale + eps / scale / scale
    return reduce(ratio(g**2, denominator) * G.relu(), "b k ... -> b k", "sum")


@checked
def smoothgradcam_pp(
    A: Maps, first: Maps, second: Maps, third: Maps, eps: NonNegative = 0.0
) -> ChannelWeights:
    """Smooth Grad-CAM++'s weights, (B, K): each power of the gradient averaged over noisy inputs.

    α = D² / (2 D² + Σ A D³), 0 where the denominator is 0, and the weight is Σ α ReLU(D¹).

    Args:
        A: features of the input without noise, (B, K, *spatial).
        first: D¹, the mean of the gradient over the noisy inputs, (B, K, *spatial).
        second: D², the mean of its square.
        third: D³, the mean of its cube.
        eps: added to the denominator, ≥ 0, as TorchCAM does.

    References:
        Omeiza et al. (arXiv:1908.01224). D² in the numerator, so that without noise it equals Grad-CAM++.
    """
    A, first, second, third = map(precise, (A, first, second, third))
    denominator = 2 * second + _total(A * third) + eps
    return reduce(ratio(second, denominator) * first.relu(), "b k ... -> b k", "sum")


def _total(values: Maps) -> Tensor:
    """The sum over positions, kept as axes of length 1."""
    return values.sum(tuple(range(2, values.ndim)), keepdim=True)


@checked
def xgradcam(A: Maps, G: Maps, eps: NonNegative = 0.0) -> ChannelWeights:
    """XGrad-CAM's weights, (B, K): the gradient averaged with the features as weights, 0 if Σ A is 0.

    w_k = Σ_ij A_kij G_kij / Σ_ij A_kij; the map is Σ_k w_k A_k.

    Args:
        eps: added to Σ A, ≥ 0, as other libraries do.

    References:
        Fu et al. (arXiv:2008.02312), equation 9.
    """
    A, G = precise(A), precise(G)
    total = reduce(A, "b k ... -> b k", "sum") + eps
    return ratio(reduce(G * A, "b k ... -> b k", "sum"), total)


@checked
def layercam(A: Maps, G: Maps) -> Maps:
    """Layer-CAM's weights, (B, K, *spatial): the positive part of the gradient, at each position.

    w_kij = ReLU(G_kij); the map is Σ_k w_kij A_kij.

    References:
        Jiang et al., LayerCAM, IEEE TIP 2021 (doi:10.1109/TIP.2021.3089943), equation 4.
    """
    return G.relu()


@checked
def hirescam(A: Maps, G: Maps) -> Maps:
    """HiResCAM's weights, (B, K, *spatial): the gradient itself, at each position.

    w_kij = G_kij; HiResCAM's map is Σ_k w_kij A_kij.

    References:
        Draelos and Carin (arXiv:2011.08891), equation 4.
    """
    return G


@checked
def liftcam(A: Maps, G: Maps) -> ChannelWeights:
    """LIFT-CAM's weights, (B, K): each channel's contribution to the score, by DeepLIFT.

    Args:
        A: features.
        G: DeepLIFT's multipliers from them to the score, with zero features as reference; for a linear head,
            the score's gradient.

    References:
        Jung and Oh (arXiv:2102.05228).
    """
    return reduce(precise(G) * precise(A), "b k ... -> b k", "sum")


@checked
def gradcam_elementwise(A: Maps, G: Maps) -> Maps:
    """Elementwise Grad-CAM's weights, (B, K, *spatial): the gradient where G · A is positive, else 0.

    The map is then Σ ReLU(G · A).

    References:
        GradCAMElementWise of pytorch-grad-cam; no paper.
    """
    return torch.where(G * A > 0, G, 0.0)


@checked
def absolute(A: Maps, G: Maps) -> Maps:
    """Seg-Eigen-CAM's weights, (B, K, *spatial): w_kij = |G_kij|, the absolute gradient.

    References:
        Chung and Ying, Seg-Eigen-CAM, Applied Sciences 2025 (doi:10.3390/app15137562), equation 10.
    """
    return G.abs()


@checked
def unioncam(A: Maps, G: Maps, theta: Percentile = 10.0) -> Maps:
    """Union-CAM's weights, (B, K, *spatial): the positive gradient above a percentile, its sum 1.

    Args:
        theta: the percentile of a channel's gradients, 0 to 100, below which they are dropped. The others are
            scaled to a sum of 1, or are zero if none is positive.

    References:
        Frontiers in Neurorobotics 2024 (doi:10.3389/fnbot.2024.1490198).
    """
    G = precise(G)
    low = percentile(G, theta, G.ndim - 2)
    positive = torch.where(low <= G, G, 0.0).relu()
    return ratio(positive, _total(positive))


@checked
def percentile(values: Float[Tensor, "..."], theta: Percentile, axes: Count) -> Float[Tensor, "..."]:
    """The θ-th percentile of each map, by linear interpolation, its axes kept as axes of length 1."""
    # torch.quantile has no batching rule.
    ordered = precise(values).flatten(last_axes(values, axes)[0]).sort(-1).values
    rank = round(theta / 100 * (ordered.shape[-1] - 1), 9)
    found = torch.lerp(ordered[..., math.floor(rank)], ordered[..., math.ceil(rank)], rank - math.floor(rank))
    return found.to(values.dtype).reshape(*values.shape[:-axes], *[1] * axes)


@checked
def weighted_sum(
    A: Maps, weights: Tensor, projection: Projection | None = None
) -> Float[Tensor, "B *spatial"]:
    """The map, (B, *spatial): the sum over channels of weight × feature, or another projection of these.

    Args:
        A: features.
        weights: (B, K), or (B, K, *spatial).
        projection: (B, K, *spatial) to (B, *spatial); None sums over channels.

    Raises:
        ValueError: the weights are neither one per channel nor one per position.
    """
    checks.check_returned("weighting", weights, "(B, K) or (B, K, *spatial) weights")
    if weights.shape == A.shape[:2]:
        weights = weights.reshape(*weights.shape, *[1] * (A.ndim - 2))
    elif weights.shape != A.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} for features of shape {tuple(A.shape)}; expected "
            f"{tuple(A.shape[:2])}, one per channel, or {tuple(A.shape)}, one per position"
        )
    weighted = precise(weights) * precise(A)
    if projection is None:
        return weighted.sum(1)
    fits = lambda found: found.ndim == A.ndim - 1 and len(found) == len(A)  # noqa: E731
    return checks.check_returned("projection", projection(weighted), f"({len(A)}, *spatial) maps", fits)
