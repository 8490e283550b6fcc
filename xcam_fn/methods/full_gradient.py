"""The full gradient: what the input and every bias add to the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.maps import minmax, resize
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.network.attention import StepByStep
from xcam_fn.network.calls import ModuleCall, module_calls, run_changed
from xcam_fn.network.copies import unwrap
from xcam_fn.network.split import checked_scores
from xcam_fn.network.vjp import by_autograd
from xcam_fn.targets import Classes

__all__ = ["fullgrad"]


class FullGradient(NamedTuple):
    """What a network of linear layers and ReLUs adds its score up from.

    Attributes:
        input: x ⊙ ∂s/∂x, (B, n, C, *size).
        biases: b ⊙ ∂s/∂b of each layer with a bias, (B, n, K, *spatial), or (B, n, K) for a linear one.
        many: whether n classes of each image were asked for; n is 1 otherwise.
    """

    input: Tensor
    biases: list[Tensor]
    many: bool


def full_gradient(model: nn.Module, x: Float[Tensor, "B C *size"], cls: Classes = None) -> FullGradient:
    """Return the parts of the score: of the input and of every bias. In a network of ReLUs they add up to it.

    Args:
        model: the network, in evaluation mode; it is never touched.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, (B, n) ints for n classes of each
            image, or a target, a callable from the model's output to B scores.

    Returns:
        `FullGradient(input, biases, many)`.

    References:
        Srinivas and Fleuret (arXiv:1905.00780), proposition 1.
    """
    score, root, wanted = checked_scores(cls, len(x)), unwrap(model), torch.is_grad_enabled()
    biased = [
        (call, bias)
        for call in module_calls(root, x)
        if isinstance(call.module, _BIASED) and (bias := _bias_of(call.module)) is not None
    ]
    zeros = [x.new_zeros(len(x), *call.shape[1:]) for call, _ in biased]

    def run(x: Tensor, *zeros: Tensor) -> Tensor:
        change = {call.key: _adding(zero) for (call, _), zero in zip(biased, zeros, strict=True)}
        return score(run_changed(root, x, change, detached=by_autograd(x) and not wanted))

    scores, pulled = _gradients(run, (x, *zeros), wanted=wanted)
    of_biases = [
        of_zero * _along_channels(bias, call)
        for (call, bias), of_zero in zip(biased, pulled[1:], strict=True)
    ]
    return FullGradient(pulled[0] * x[:, None], of_biases, many=scores.ndim == 2)


def _gradients(
    run: Callable[..., Tensor], at: tuple[Tensor, ...], *, wanted: bool
) -> tuple[Tensor, list[Tensor]]:
    """Scores (B,) or (B, n), and their gradients with respect to several tensors, (B, n, ...) each."""
    if by_autograd(at[0]):
        at = tuple(t if wanted and t.requires_grad else t.detach().requires_grad_() for t in at)
        with torch.enable_grad():
            scores = run(*at)
            rows = scores.reshape(len(scores), -1).sum(0).unbind() if scores.requires_grad else ()
        keep: dict[str, Any] = {"retain_graph": True, "create_graph": wanted, "materialize_grads": True}
        pulled = [torch.autograd.grad(row, at, **keep) for row in rows]
        pulled = pulled or [tuple(torch.zeros_like(t) for t in at)] * (scores[0].numel())
    else:
        found: Any = torch.func.vjp(run, *at)
        scores, pullback = found
        rows = scores.reshape(len(scores), -1)
        classes = torch.eye(rows.shape[1]).to(scores)
        pulled = [pullback((one * torch.ones_like(rows)).reshape(scores.shape)) for one in classes]
    return scores, [torch.stack(of_one, 1) for of_one in zip(*pulled, strict=True)]


def _adding(zero: Tensor) -> Callable[..., Tensor]:
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) + zero


_BIASED = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)


def _bias_of(module: nn.Module) -> Tensor | None:
    """What a layer adds whatever its input is: its bias; of batch norm, the shift that it amounts to."""
    bias: Any = getattr(module, "bias", None)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
        return bias
    assert module.running_var is not None
    scale = torch.rsqrt(module.running_var + module.eps)
    scale = scale if module.weight is None else scale * module.weight
    return (0 if bias is None else bias) - module.running_mean * scale


def _along_channels(bias: Tensor, call: ModuleCall) -> Tensor:
    """The bias with the axes of the layer's output, whose channels are last after a linear layer."""
    return bias if isinstance(call.module, nn.Linear) else bias.reshape(-1, *[1] * (len(call.shape) - 2))


@method(
    "FullGrad",
    family="gradient",
    paper="arXiv:1905.00780",
    summary="the gradients of the input and of all biases; needs no layer",
    variants={"pytorch-grad-cam": {"eps": 1e-7}},
)
def fullgrad(call: Call, *, rescale: Literal["channel", "layer"] = "channel", eps: float = 0.0) -> Tensor:
    """FullGrad: the input's gradient times the input, and each bias's gradient times the bias, as one map.

    The map is ψ(x ⊙ ∂s/∂x) + Σ over layers and channels of ψ(b ⊙ ∂s/∂b), ψ the absolute value scaled to
    [0, 1] and resized to the input; batch norm's bias is the shift that it amounts to. Every convolution and
    batch norm takes part; the layer is not used.

    Args:
        rescale: ψ scales each "channel" by itself, as the paper's formula says, or each "layer", as its
            authors' program does.
        eps: added to the largest value that ψ divides by, ≥ 0, as a library does.

    References:
        Srinivas and Fleuret (arXiv:1905.00780), equation 6.
    """
    checks.check_choice("rescale", rescale, ("channel", "layer"))
    checks.check_number("eps", eps, at_least=0)
    x = call.x
    size, axes = tuple(x.shape[2:]), x.ndim - 2
    with StepByStep():
        found = full_gradient(call.model, x, call.cls)
    call.many = found.many
    parts = [found.input, *(part for part in found.biases if part.ndim == x.ndim + 1)]
    scaled = (_scaled(part.abs(), axes + (rescale == "layer"), eps) for part in parts)
    total: Any = sum(resize(part.sum(2), size) for part in scaled)  # resizing is linear: once for a layer
    return total


def _scaled(values: Tensor, axes: int, eps: float) -> Tensor:
    if eps == 0:
        return minmax(values, axes)
    over = tuple(range(-axes, 0))
    values = values - values.amin(over, keepdim=True)
    return values / (eps + values.amax(over, keepdim=True))
