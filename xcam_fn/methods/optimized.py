"""Methods that optimize their map: a mask of the image that keeps the class or removes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from xcam_fn.arguments import Count, NonNegative, Positive
from xcam_fn.maps import minmax, precise, resized_minmax
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method, with_raw_maps
from xcam_fn.methods.input_gradient import differentiable
from xcam_fn.methods.method import Method
from xcam_fn.methods.options import Score
from xcam_fn.network.modes import StepByStep
from xcam_fn.network.vjp import vjp
from xcam_fn.perturb import Baseline, baseline_images, blurred
from xcam_fn.weights import percentile

__all__ = ["curvecam", "opticam"]

Objective = Literal["keep", "remove", "both"]
MapOf = Callable[[Tensor], Tensor]  # maps parameters (P, ...) to maps (P, *spatial)
ScoreOf = Callable[[Tensor], Tensor]  # maps images (P, C, *size) to their scores, (P, 1)

_GOLDEN = (5**0.5 - 1) / 2
_B1, _B2, _EPS = 0.9, 0.999, 1e-8  # Adam's


@method(
    "Opti-CAM", family="optimized", paper="arXiv:2301.07002",
    summary="channels weighted to maximize the score of the image masked by their map",
    cost=lambda channels, steps: steps,  # noqa: ARG005
)  # fmt: skip
def opticam(
    call: Call,
    *,
    objective: Objective = "keep",
    steps: Count = 50,
    rate: Positive = 0.1,
    baseline: Baseline = 0.0,
    score: Score = "logit",
) -> Tensor:
    """Opti-CAM: channels weighted to maximize the score of the image masked by their map.

    S = Σ_k softmax(u)_k ReLU(A_k), where Adam maximizes s(x ⊙ n(U(S))) over u, starting from u = ½; the map
    is S. Every image and every class has its own u. If the score depends on no pixel, the map is zero. One
    forward and one backward pass through the whole network per step.

    Args:
        objective: "keep", the paper's; "remove": −s(x ⊙ (1 − n(U(S)))), the score must fall when the map's
            inverse masks the image; "both": their sum, with two forward passes per step.
        steps: steps of Adam, ≥ 1.
        rate: Adam's learning rate, > 0, in units of u.

    References:
        Zhang et al., Opti-CAM (arXiv:2301.07002).
    """
    x, A = call.x, precise(call.features).relu()
    base = baseline_images(baseline, x)

    def start(images: Tensor, _: Tensor) -> tuple[Tensor, MapOf]:
        features = A[images]
        half = torch.full_like(features.flatten(2)[..., 0], 0.5)
        return half, lambda u: torch.einsum("pk,pk...->p...", u.softmax(1), features)

    def value(mask: Tensor, images: Tensor, score_of: ScoreOf, _: int) -> Tensor:
        seen = mask * (x - base)[images]
        if objective == "keep":
            return score_of(base[images] + seen)
        removed = score_of(x[images] - seen)
        return -removed if objective == "remove" else score_of(base[images] + seen) - removed

    return _searched(call, start, value, steps, rate, score)


@method(
    "Curve-CAM", family="optimized",
    summary="a gradient map, optimized for its insertion and deletion curves",
    cost=lambda channels, steps: 3 * steps,  # noqa: ARG005
)  # fmt: skip
def curvecam(
    call: Call,
    *,
    method: str | Method[...] = "gradcam",
    keep: NonNegative = 0.5,
    area: NonNegative = 0.3,
    softness: Positive = 0.06,
    steps: Count = 40,
    rate: Positive = 0.1,
    baseline: Baseline = 0.0,
    score: Score = "probability",
) -> Tensor:
    """Curve-CAM: a gradient method's map, optimized for its insertion and deletion curves.

    M = n(U(σ(u))), with a number u for each position of the layer, 2 n(ReLU(cam)) − 1 at first. The mask
    Z = σ((M − q_f) / τ) shows the share f of the image that M ranks highest, q_f being M's (1 − f)-quantile.
    u climbs by Adam towards the mean over f of s(x ⊙ Z + x̃ ⊙ (1 − Z)) − s(x ⊙ (1 − Z)), the difference of the
    areas under the two curves, plus λ s(x ⊙ M) − μ mean(M); x̃ is the blurred image. Each step takes one f,
    the fractional part of step · (√5 − 1) / 2; these fill [0, 1] evenly. The map is σ(u), or zero if the
    score depends on no pixel. Three forward and backward passes through the whole network per step.

    It optimizes the metrics at which it is best, and localizes worse than its initial map. In float32 the
    optimization amplifies rounding: another machine's map may differ by tenths at a pixel.

    Args:
        method: the method of the initial map, or its name.
        keep: λ, the weight of the score of the image masked by the map, ≥ 0.
        area: μ, the penalty on the map's area, ≥ 0.
        softness: τ, > 0, in units of M.
        steps: steps of Adam, ≥ 1.
        rate: Adam's learning rate, > 0, in units of u.

    References:
        The curves: Petsiuk et al., RISE (arXiv:1806.07421). Optimized masks: Fong and Vedaldi
        (arXiv:1704.03296).
    """
    x, axes = call.x, call.x.ndim - 2
    base, smooth = baseline_images(baseline, x), blurred(x)
    begun = precise(with_raw_maps(method).raw(call)).relu()
    begun = 2 * minmax(begun.reshape(len(x), -1, *begun.shape[-axes:]), axes) - 1

    def start(images: Tensor, classes: Tensor) -> tuple[Tensor, MapOf]:
        return begun[images, classes], torch.sigmoid

    def value(mask: Tensor, images: Tensor, score_of: ScoreOf, step: int) -> Tensor:
        share = step * _GOLDEN % 1
        shown = ((mask - percentile(mask, 100 * (1 - share), axes)) / softness).sigmoid()
        own, of_base, of_smooth = x[images], base[images], smooth[images]
        inserted = score_of(own + (1 - shown) * (of_smooth - own))
        curves = inserted - score_of(own + shown * (of_base - own))
        kept = score_of(of_base + mask * (own - of_base))
        return curves + keep * kept - area * mask.flatten(1).mean(1, keepdim=True)

    return _searched(call, start, value, steps, rate, score)


def _searched(
    call: Call,
    start: Callable[[Tensor, Tensor], tuple[Tensor, MapOf]],
    value: Callable[[Tensor, Tensor, ScoreOf, int], Tensor],
    steps: int,
    rate: float,
    score: str,
) -> Tensor:
    """The maps of the optimized parameters, (B, n, *spatial).

    Args:
        call: the question.
        start: maps image and class indices, (P,) each, to the initial parameters and the function from
            parameters to maps.
        value: maps masks (P, 1, *size), their image indices (P,), the function that scores images
            (P, C, *size), and the step's index to the objective to maximize, (P, 1).
        steps: the number of Adam's steps.
        rate: Adam's learning rate.
        score: the kind of score of a class.
    """
    x, size = call.x, tuple(call.x.shape[2:])
    # One at a time: the optimization amplifies rounding, and a batch rounds differently from single images.
    run, explained, per_forward = differentiable(call, 1, score)
    B, n = explained.own.shape

    def found(pairs: Tensor) -> Tensor:
        images, classes = pairs // n, pairs % n
        u, map_of = start(images, classes)
        score_of = lambda shown: explained.of(run(shown), images).gather(1, classes[:, None])  # noqa: E731
        mask_of = lambda u: resized_minmax(map_of(u), size)[:, None].to(x)  # noqa: E731
        rises = lambda mask, step: value(mask, images, score_of, step)  # noqa: E731
        u, matters = _climbed(u, mask_of, rises, steps, rate)
        maps = map_of(u)
        return maps * matters.reshape(-1, *[1] * (maps.ndim - 1))

    with StepByStep():  # attention in plain operations can be differentiated twice
        pairs = torch.arange(B * n, device=x.device).split(per_forward)
        maps = torch.cat([found(some) for some in pairs])
    return maps.reshape(B, n, *maps.shape[1:])


def _climbed(
    u: Tensor,
    mask_of: Callable[[Tensor], Tensor],
    value: Callable[[Tensor, int], Tensor],
    steps: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """Maximize the objective with Adam; return the parameters, and which rows' objective had a gradient.

    Args:
        u: (P, ...), the initial parameters; rows are independent.
        mask_of: maps parameters to masks, (P, 1, *size).
        value: maps masks and the step's index to the objective, (P, 1).
        steps: the number of steps, ≥ 1.
        rate: Adam's learning rate.
    """
    first = second = torch.zeros_like(u)
    slopes = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    for step in range(1, steps + 1):
        masks, to_parameters = vjp(mask_of, u, "the map's weights")
        values, to_masks = vjp(lambda masks, step=step: value(masks, step), masks, "the mask")
        of_masks = to_masks(torch.ones_like(values))
        flat = of_masks.flatten(1)
        # A gradient equal at all pixels has no effect: min–max scaling removes it.
        slopes = slopes | (flat.amax(1) > flat.amin(1))
        g = to_parameters(of_masks)
        first, second = _B1 * first + (1 - _B1) * g, _B2 * second + (1 - _B2) * g**2
        # At a zero gradient, the clamp keeps the derivative of the root finite.
        root = (second / (1 - _B2**step)).clamp(min=torch.finfo(u.dtype).tiny).sqrt()
        u = u + rate / (1 - _B1**step) * first / (root + _EPS)
    return u, slopes
