"""Methods that look further into the backward pass: its curvature, its biases, and a rule of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn import checks, weights
from xcam_fn.maps import heatmap, minmax, resize
from xcam_fn.methods.gradient import finish, map_of
from xcam_fn.methods.method import Postprocess, method_of
from xcam_fn.network.attention import StepByStep
from xcam_fn.network.split import (
    Layer,
    ModuleCall,
    checked_scores,
    module_calls,
    prepare,
    pulled_back,
    recording,
    run_changed,
    run_head,
    run_model,
    trunk_of,
)
from xcam_fn.targets import Classes
from xcam_fn.weights import Projection

Images = Float[Tensor, "B C *size"]


def _shapleycam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    projection: Projection | None = None,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Shapley-CAM: Grad-CAM with the gradient corrected by the curvature of the score.

    w_k = mean_ij (G − ½ H·A), H the second derivative of the score with respect to the features: Shapley
    values of the channels, to second order. H·A is the gradient of ⟨G, A⟩, A held fixed, through the head:
    H is symmetric. On a head that is linear in the features H is zero and the map Grad-CAM's.

    {arguments}{projection}
    {returns}

    References:
        Cai (arXiv:2501.06261), equation 19.
    """
    parts = prepare(model, layer, x)
    score = checked_scores(cls, len(x))
    with recording(x, create_graph), checks.explained(model, x), StepByStep():
        A, residual = trunk_of(layer, parts, x)

        def gradient(a: Tensor) -> Tensor:
            found: Any = torch.func.vjp(lambda a: score(run_head(parts, a, residual)), a)
            scores, pullback = found
            return pulled_back(pullback, scores)

        # Reverse over reverse: forward mode has one level for all threads of a process.
        found: Any = torch.func.vjp(gradient, A)
        G, pullback = found
        if G.ndim == A.ndim:
            (HA,) = pullback(A)
        else:
            of_class = torch.eye(G.shape[1]).to(A).reshape(-1, 1, G.shape[1], *[1] * (A.ndim - 1))
            HA = torch.stack([pullback(one * A[:, None])[0] for one in of_class], 1)
        return finish(map_of(weights.gradcam, A, G - HA / 2, {}, projection), x, postprocess)


# -- guided backpropagation ----------------------------------------------------------------------------------


class _GuidedReLU(torch.autograd.Function):
    """ReLU, cut off at a ceiling, through which only positive gradients pass back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, ceiling: float) -> Tensor:
        return x.clamp(0, ceiling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        x, ceiling = inputs
        ctx.save_for_backward((x > 0) & (x < ceiling))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (is_open,) = ctx.saved_tensors
        return grads[0].relu() * is_open, None


_CEILINGS: dict[Any, float] = {
    F.relu: torch.inf,
    torch.relu: torch.inf,
    Tensor.relu: torch.inf,
    torch.relu_: torch.inf,
    Tensor.relu_: torch.inf,
    F.relu6: 6.0,
}
_IN_PLACE = (torch.relu_, Tensor.relu_)


class _Guided(TorchFunctionMode):
    """While it is entered, by this thread alone, every ReLU passes back positive gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ceiling = _CEILINGS.get(func)
        if func is F.hardtanh and _bounds(args, kwargs)[0] == 0:
            ceiling = _bounds(args, kwargs)[1]
        if ceiling is None:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        output: Any = _GuidedReLU.apply(x, ceiling)
        in_place = func in _IN_PLACE or kwargs.get("inplace") or (func is not F.hardtanh and True in args[1:])
        return x.copy_(output) if in_place else output


def _bounds(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, float]:
    """The two bounds of a call of hardtanh."""
    given = dict(zip(("input", "min_val", "max_val"), args, strict=False)) | kwargs
    return given.get("min_val", -1.0), given.get("max_val", 1.0)


def _guided_backprop(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Guided backpropagation: the input's gradient, of which each ReLU passes back the positive part alone.

    The map is the sum over the input's channels of the absolute value; the raw map is their signed sum. It
    shows edges that the network uses, for whatever class: see `parameter_randomization`. Activations other
    than ReLU (and those cut off above, such as ReLU6) keep their own gradient. The layer is not used.

    {arguments}
    {returns}

    References:
        Springenberg et al., Striving for Simplicity (arXiv:1412.6806).
    """
    checks.check_call(model, x)
    checks.check_model(model, x)
    score = checked_scores(cls, len(x))
    guided = _Guided()
    with recording(x, create_graph), checks.explained(model, x):
        with guided:
            found: Any = torch.func.vjp(lambda x: score(run_model(model, x)), x)
        scores, pullback = found
        if guided.count == 0:
            raise checks.StructureError(
                f"guided_backprop changes how ReLUs are differentiated, and {type(model).__name__} runs "
                "none; use integrated_gradients"
            )
        G = pulled_back(pullback, scores)
        cam = (G if postprocess is None else G.abs()).sum(-x.ndim + 1)
        return finish(cam, x, postprocess)


# -- the full gradient ---------------------------------------------------------------------------------------


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


def full_gradient(model: nn.Module, x: Images, cls: Classes = None) -> FullGradient:
    """The parts of the score: of the input and of every bias. In a network of ReLUs they add up to it.

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
    score = checked_scores(cls, len(x))
    biased = [
        (call, bias)
        for call in module_calls(model, x)
        if isinstance(call.module, _BIASED) and (bias := _bias_of(call.module)) is not None
    ]
    zeros = [x.new_zeros(len(x), *call.shape[1:]) for call, _ in biased]

    def run(x: Tensor, zeros: list[Tensor]) -> Tensor:
        calls = [(call.name, call.number) for call, _ in biased]
        return score(run_changed(model, x, dict(zip(calls, map(_adding, zeros), strict=True))))

    found: Any = torch.func.vjp(run, x, zeros)
    scores, pullback = found
    rows = scores if scores.ndim == 2 else scores[:, None]
    classes = torch.eye(rows.shape[1]).to(rows)
    pulled = [pullback((one * torch.ones_like(rows)).reshape(scores.shape)) for one in classes]
    of_input = torch.stack([of_x for of_x, _ in pulled], 1) * x[:, None]
    of_biases = [
        torch.stack([of_zeros[i] for _, of_zeros in pulled], 1) * _along_channels(bias, call)
        for i, (call, bias) in enumerate(biased)
    ]
    return FullGradient(of_input, of_biases, many=scores.ndim == 2)


def _adding(zero: Tensor) -> Callable[..., Tensor]:
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) + zero


def _along_channels(bias: Tensor, call: ModuleCall) -> Tensor:
    """The bias with the axes of the layer's output, whose channels are last after a linear layer."""
    return bias if isinstance(call.module, nn.Linear) else bias.reshape(-1, *[1] * (len(call.shape) - 2))


def _fullgrad(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    rescale: Literal["channel", "layer"] = "channel",
    eps: float = 0.0,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """FullGrad: the input's gradient times the input, and each bias's gradient times the bias, as one map.

    The map is ψ(x ⊙ ∂s/∂x) + Σ over layers and channels of ψ(b ⊙ ∂s/∂b), ψ the absolute value scaled to
    [0, 1] and resized to the input; batch norm's bias is the shift that it amounts to. Every convolution and
    batch norm takes part; the layer is not used.

    {arguments}    rescale: ψ scales each "channel" by itself, as the paper's formula says, or each "layer",
            as its authors' program does.
        eps: added to the largest value that ψ divides by, ≥ 0, as a library does.

    {returns}

    References:
        Srinivas and Fleuret (arXiv:1905.00780), equation 6.
    """
    checks.check_call(model, x)
    checks.check_model(model, x)
    checks.check_choice("rescale", rescale, ("channel", "layer"))
    checks.check_number("eps", eps, at_least=0)
    size, axes = tuple(x.shape[2:]), x.ndim - 2
    with recording(x, create_graph), checks.explained(model, x), StepByStep():
        found = full_gradient(model, x, cls)
        parts = [found.input, *(part for part in found.biases if part.ndim == x.ndim + 1)]
        scaled = (_scaled(part.abs(), axes + (rescale == "layer"), eps) for part in parts)
        cam: Any = sum(resize(part.sum(2), size) for part in scaled)  # resizing is linear: once for a layer
        return finish(cam if found.many else cam.squeeze(1), x, postprocess)


def _scaled(values: Tensor, axes: int, eps: float) -> Tensor:
    if eps == 0:
        return minmax(values, axes)
    over = tuple(range(-axes, 0))
    values = values - values.amin(over, keepdim=True)
    return values / (eps + values.amax(over, keepdim=True))


shapleycam = method_of(
    _shapleycam,
    family="gradient",
    title="Shapley-CAM",
    paper="arXiv:2501.06261",
    summary="each channel weighted by its mean gradient, corrected by the curvature",
)
guided_backprop = method_of(
    _guided_backprop,
    family="gradient",
    title="Guided Backprop",
    paper="arXiv:1412.6806",
    summary="the input's gradient, of which ReLUs pass back the positive part; needs no layer",
    needs="ReLUs",
)
fullgrad = method_of(
    _fullgrad,
    family="gradient",
    title="FullGrad",
    paper="arXiv:1905.00780",
    summary="the gradients of the input and of all biases; needs no layer",
)
