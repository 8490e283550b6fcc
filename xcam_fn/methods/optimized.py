"""Methods that search for their map: a mask of the image that keeps the class or removes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from xcam_fn.arguments import Count, Positive
from xcam_fn.maps import precise, resized_minmax
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.methods.input_gradient import differentiable
from xcam_fn.methods.options import Score
from xcam_fn.network.attention import StepByStep
from xcam_fn.network.vjp import vjp
from xcam_fn.perturb import Baseline, baseline_images

__all__ = ["opticam"]

Objective = Literal["keep", "remove", "both"]

_B1, _B2, _EPS = 0.9, 0.999, 1e-8  # Adam's


@method(
    "Opti-CAM", family="optimized", paper="arXiv:2301.07002",
    summary="channels weighted so that what their map shows of the image scores highest",
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
    chunk_size: Count = 16,
) -> Tensor:
    """Opti-CAM: channels weighted so that the image scores highest where only their map shows it.

    S = Σ_k softmax(u)_k ReLU(A_k), with u the maximum of s(x ⊙ n(U(S))) that Adam climbs to from u = ½; the
    map is S. Every image and every class has its own u. Where the score depends on no pixel the map is zero.
    One forward and one backward through the whole network for each step.

    Args:
        objective: "keep", the paper's; "remove": −s(x ⊙ (1 − n(U(S)))), the score falls where the map hides
            the image; "both": their sum, with two forwards for each step.
        steps: of Adam, ≥ 1.
        rate: of Adam, > 0, in units of u.
        chunk_size: images in one forward and backward, ≥ 1; it changes the memory, not the map.

    References:
        Zhang et al., Opti-CAM (arXiv:2301.07002).
    """
    A, x = precise(call.features).relu(), call.x
    base, size = baseline_images(baseline, x), tuple(x.shape[2:])
    run, explained, per_forward = differentiable(call, chunk_size, score)
    B, n = explained.own.shape

    def found(pairs: Tensor) -> Tensor:
        images, classes = pairs // n, pairs % n
        own, start, features = x[images], base[images], A[images]
        map_of = lambda u: torch.einsum("pk,pk...->p...", u.softmax(1), features)  # noqa: E731

        def score_of(shown: Tensor) -> Tensor:
            return explained.of(run(shown), images).gather(1, classes[:, None])

        def value(mask: Tensor) -> Tensor:
            seen = mask.to(x)[:, None] * (own - start)
            if objective == "keep":
                return score_of(start + seen)
            removed = score_of(own - seen)
            return -removed if objective == "remove" else score_of(start + seen) - removed

        half = torch.full_like(features.flatten(2)[..., 0], 0.5)
        u, matters = _climbed(half, lambda u: resized_minmax(map_of(u), size), value, steps, rate)
        maps = map_of(u)
        return maps * matters.reshape(-1, *[1] * (maps.ndim - 1))

    with StepByStep():  # attention whose gradient can be differentiated
        pairs = torch.arange(B * n, device=x.device).split(per_forward)
        return torch.cat([found(some) for some in pairs]).reshape(B, n, *A.shape[2:])


def _climbed(
    u: Tensor,
    mask_of: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """The parameters after so many steps of Adam up the value of their masks, and whose value has a slope.

    Args:
        u: (P, ...), where it begins; rows do not see each other.
        mask_of: parameters to masks, (P, *size).
        value: masks to what is to rise, a number for each.
        steps: how many, ≥ 1.
        rate: of Adam.
    """
    first = second = torch.zeros_like(u)
    slopes = torch.zeros_like(u[:, 0], dtype=torch.bool)
    for step in range(1, steps + 1):
        masks, to_parameters = vjp(mask_of, u, "the map's weights")
        values, to_masks = vjp(value, masks, "the mask")
        of_masks = to_masks(torch.ones_like(values))
        slopes = slopes | (of_masks != 0).flatten(1).any(1)
        g = to_parameters(of_masks)
        first, second = _B1 * first + (1 - _B1) * g, _B2 * second + (1 - _B2) * g**2
        # Where there is no slope, the least number keeps the root's own derivative finite.
        root = (second / (1 - _B2**step)).clamp(min=torch.finfo(u.dtype).tiny).sqrt()
        u = u + rate / (1 - _B1**step) * first / (root + _EPS)
    return u, slopes
