"""The full gradient: the contributions of the input and of every bias to the score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn.arguments import NonNegative
from xcam_fn.maps import minmax, resize
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.network.calls import ModuleCall, module_calls, run_changed
from xcam_fn.network.copies import unwrap
from xcam_fn.network.modes import StepByStep
from xcam_fn.network.split import checked_scores
from xcam_fn.network.vjp import pulled_back, records_nothing, vjp
from xcam_fn.targets import Classes
from xcam_fn.torch_state import BatchNorm, Convolution

__all__ = ["fullgrad"]


class FullGradient(NamedTuple):
    """The terms that sum to the score in a network of linear layers and ReLUs, for one class or several."""

    input: Tensor  # x ⊙ ∂s/∂x, (B, n, C, *size)
    biases: list[Tensor]  # b ⊙ ∂s/∂b of each layer that has one, (B, n, K, *spatial) or (B, n, K)
    many: bool


def full_gradient(model: nn.Module, x: Float[Tensor, "B C *size"], cls: Classes = None) -> FullGradient:
    """The contributions of the input and of every bias; in a network of ReLUs they sum to the score."""
    score, root, detached = checked_scores(cls, len(x)), unwrap(model), records_nothing(x)
    biased = [
        (call, bias)
        for call in module_calls(root, x)
        if isinstance(call.module, _BIASED) and (bias := _bias_of(call.module)) is not None
    ]
    shapes = [tuple(x.shape), *((len(x), *call.shape[1:]) for call, _ in biased)]
    lengths = [math.prod(shape[1:]) for shape in shapes]

    def run(values: Tensor) -> Tensor:
        parts = values.split(lengths, 1)
        images, *zeros = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        change = {call.key: _adding(zero) for (call, _), zero in zip(biased, zeros, strict=True)}
        return score(run_changed(root, images, change, detached=detached))

    # One tensor with the images and a zero for every bias, so one backward pass gives all gradients.
    values = torch.cat([x.flatten(1), x.new_zeros(len(x), sum(lengths[1:]))], 1)
    scores, pullback = vjp(run, values)
    pulled = pulled_back(pullback, scores)
    pulled = (pulled if scores.ndim == 2 else pulled[:, None]).split(lengths, 2)
    parts = [part.reshape(len(x), -1, *shape[1:]) for part, shape in zip(pulled, shapes, strict=True)]
    along = [_along_channels(bias, call) for call, bias in biased]
    of_biases = [part * bias for bias, part in zip(along, parts[1:], strict=True)]
    return FullGradient(parts[0] * x[:, None], of_biases, many=scores.ndim == 2)


def _adding(zero: Tensor) -> Callable[..., Tensor]:
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) + zero


_BIASED = (Convolution, BatchNorm, nn.Linear)


def _bias_of(module: nn.Module) -> Tensor | None:
    """The constant that a layer adds: its bias, or for batch norm its total shift."""
    bias: Any = getattr(module, "bias", None)
    if not isinstance(module, BatchNorm) or module.running_mean is None:
        return bias
    assert module.running_var is not None
    scale = torch.rsqrt(module.running_var + module.eps)
    scale = scale if module.weight is None else scale * module.weight
    return (0 if bias is None else bias) - module.running_mean * scale


def _along_channels(bias: Tensor, call: ModuleCall) -> Tensor:
    """The bias with the axes of the layer's output; after a linear layer, channels are last."""
    return bias if isinstance(call.module, nn.Linear) else bias.reshape(-1, *[1] * (len(call.shape) - 2))


@method(
    "FullGrad", family="gradient", paper="arXiv:1905.00780",
    summary="the gradients of the input and of all biases; needs no layer",
    variants={"pytorch-grad-cam": {"eps": 1e-7}},
)  # fmt: skip
def fullgrad(
    call: Call, *, rescale: Literal["channel", "layer"] = "channel", eps: NonNegative = 0.0
) -> Tensor:
    """FullGrad: the input times its gradient, and each bias times its gradient, in one map.

    The map is ψ(x ⊙ ∂s/∂x) + Σ over layers and channels of ψ(b ⊙ ∂s/∂b), ψ the absolute value scaled to
    [0, 1] and resized to the input; a batch norm's bias is its total shift. Every convolution and batch norm
    contributes; the layer is not used.

    Args:
        rescale: ψ scales each "channel" separately, as in the paper's formula, or each "layer", as in its
            authors' code.
        eps: added to the maximum that ψ divides by, ≥ 0, as pytorch-grad-cam does.

    References:
        Srinivas and Fleuret (arXiv:1905.00780), equation 6.
    """
    x = call.x
    size, axes = tuple(x.shape[2:]), x.ndim - 2
    with StepByStep():
        found = full_gradient(call.model, x, call.cls)
    call.many = found.many
    parts = [found.input, *(part for part in found.biases if part.ndim == x.ndim + 1)]
    scaled = (minmax(part.abs(), axes + (rescale == "layer"), eps=eps) for part in parts)
    total: Any = sum(resize(part.sum(2), size) for part in scaled)  # resizing is linear: once per layer
    return total
