"""Methods that use the score's gradient with respect to the features: one forward, one weighting function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor

from xcam_fn import checks, projections, weights
from xcam_fn.arguments import Count, NonNegative, Positive, check, unchecked
from xcam_fn.maps import heatmap, precise, resize
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import enter, method, with_raw_maps
from xcam_fn.methods.method import Method, Postprocess, method_of
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.target_layer import Layer
from xcam_fn.perturb import Baseline, baseline_images, normal
from xcam_fn.targets import Classes, contrast
from xcam_fn.weights import Projection

__all__ = [
    "cameras", "eigengradcam", "finercam", "from_gradients", "gradcam", "gradcam_elementwise", "gradcam_pp",
    "hirescam", "integrated_gradcam", "layercam", "liftcam", "normgrad", "segeigencam", "shapleycam",
    "smoothgradcam_pp", "xgradcam",
]  # fmt: skip

P = ParamSpec("P")
_AT_ONCE = 64  # channels at the input's size
_ALIKE: dict[str, dict[str, Any]] = {"xplaincam": {}, "torchcam": {}, "pytorch-grad-cam": {}}


if TYPE_CHECKING:

    class GradientMethod(Method[P]):
        """A method that weights features by their gradients, with a choice of projections besides the sum."""

        def __call__(
            self, model: Any, layer: Layer, x: Tensor, cls: Classes = None,
            to_spatial: ToSpatial | None = None, postprocess: Postprocess | None = heatmap,
            create_graph: bool = False, projection: Projection | None = None,
            *args: P.args, **options: P.kwargs,
        ) -> Tensor: ...  # fmt: skip

else:
    GradientMethod = Method


def from_gradients(
    weighting: Callable[Concatenate[Tensor, Tensor, P], Tensor],
    *,
    name: str | None = None,
    title: str | None = None,
    paper: str = "",
    summary: str = "a map weighted by the gradient of the score",
    projection: Projection | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> GradientMethod[P]:
    """Return a method from a weighting function, with batches, targets and several classes supported.

    Args:
        weighting: `(A, G, **options)` to weights, (B, K) or (B, K, *spatial), from features A and gradients
            G, both (B, K, *spatial). Its keywords become the method's keywords.
        name: the method's name; by default the function's name.
        title: the method's name in print; by default its name.
        paper: where it was published.
        summary: one line on what it computes.
        projection: the default projection of the weighted features, (B, K, *spatial) to (B, *spatial); None
            sums them over channels.
        variants: for each library with another definition, the keywords that reproduce its map.

    Returns:
        The method: `(model, layer, x, cls=None, *, projection, postprocess, create_graph, **options) ->
        heatmaps`.

    Example:
        >>> absolute = from_gradients(lambda A, G: G.abs().mean((2, 3)), name="absolute")
    """
    default = projection

    def weigh(call: Call, *, projection: Projection | None = default, **options: Any) -> Tensor:
        G = call.gradient()  # before the features: one forward serves both
        return weighted(call.features, G, weighting, projection, **options)

    check("weighting", weighting, Callable)
    check("projection", projection, Projection | None)
    maker = sys._getframe(1)
    made: Any = method_of(weighting, 2, weigh, "gradient", maker, name, title, paper, summary, variants)
    return made


def weighted(
    A: Tensor, G: Tensor, weighting: Callable[..., Tensor], projection: Projection | None, **options: Any
) -> Tensor:
    """The maps of n classes, (B, n, *spatial): the projection of the features times their weights."""
    A, G, weigh, add = precise(A), precise(G), unchecked(weighting), unchecked(weights.weighted_sum)
    project = None if projection is None else unchecked(projection)
    one_class = lambda G: add(A, weigh(A, G, **options), project)  # noqa: E731
    return one_class(G[:, 0])[:, None] if G.shape[1] == 1 else torch.vmap(one_class, 1)(G).movedim(0, 1)


gradcam = enter(from_gradients(
    weights.gradcam, title="Grad-CAM", paper="arXiv:1610.02391",
    summary="each channel weighted by its mean gradient", variants=_ALIKE,
))  # fmt: skip
gradcam_pp = enter(from_gradients(
    weights.gradcam_pp, title="Grad-CAM++", paper="arXiv:1710.11063",
    summary="each channel weighted by its positive gradients, position by position",
    variants={"xplaincam": {"eps": 1e-8}, "torchcam": {"divide": False},
              "pytorch-grad-cam": {"eps": 1e-6, "local": True}},
))  # fmt: skip


@method(
    "Smooth Grad-CAM++", family="gradient", paper="arXiv:1908.01224",
    summary="Grad-CAM++ with the gradient's powers averaged over noisy inputs",
    variants={"torchcam": {"last": True, "eps": 1e-8}},
)  # fmt: skip
def smoothgradcam_pp(
    call: Call,
    *,
    num_samples: Count = 4,
    std: NonNegative = 0.3,
    seed: int = 0,
    last: bool = False,
    eps: NonNegative = 0.0,
    projection: Projection | None = None,
) -> Tensor:
    """Smooth Grad-CAM++: Grad-CAM++ with the powers of the gradient averaged over noisy inputs.

    D^p = mean_j G_j^p, G_j the gradient at x + δ_j, δ_j ~ N(0, σ²); α = D² / (2 D² + Σ A D³); w_k =
    Σ α ReLU(D¹); the map is Σ w_k A_k, A the features of x itself. The noise is a function of the seed and j,
    the same for every image; the class is that of x itself. One forward and backward pass per sample.

    Args:
        num_samples: noisy inputs, ≥ 1.
        std: σ of the noise, ≥ 0, in units of x.
        last: take D¹ and the summed features from the last noisy input only, as TorchCAM does.
        eps: added to α's denominator, ≥ 0, as TorchCAM does.

    References:
        Omeiza et al. (arXiv:1908.01224).
    """
    x, fixed = call.x, call.explained().cls
    A = summed = call.features
    G, powers = torch.zeros(()), [torch.zeros(())] * 3
    for j in range(num_samples):
        noisy = call.of(x + std * normal(seed, j, tuple(x.shape[1:]), like=x), fixed)
        G = precise(noisy.gradient())
        powers = [total + G**p / num_samples for p, total in enumerate(powers, start=1)]
        summed = noisy.features if last else A
    powers[0] = G if last else powers[0]
    by_class = zip(*(p.unbind(1) for p in powers), strict=True)
    found = [weights.smoothgradcam_pp(A.to(G), *of_class, eps=eps) for of_class in by_class]
    return torch.stack([weights.weighted_sum(summed, w, projection) for w in found], 1)


@method(
    "CAMERAS", family="gradient", paper="arXiv:2106.10649",
    summary="features and gradients of the input at several sizes, averaged and multiplied",
    needs="inputs of any size",
)  # fmt: skip
def cameras(call: Call, *, scales: Sequence[Positive] = (1.0, 1.58, 2.15, 2.73, 3.31, 3.89, 4.46)) -> Tensor:
    """CAMERAS: features and gradients averaged over sizes of the input, multiplied at the input's own size.

    Ā = mean_t U(A(x_t)), Ḡ = mean_t U(G(x_t)), x_t the input resized to t times its size; the map is
    Σ_k Ā_k ⊙ Ḡ_k. The class is that of x itself. One forward and backward pass per size, with a cost
    proportional to the number of pixels.

    Args:
        scales: t, one or more numbers > 0; by default the paper's seven, up to 1,000 pixels for 224.

    Raises:
        StructureError: a ValueError; the network does not accept one of the sizes.

    References:
        Jalwana et al., CAMERAS (arXiv:2106.10649).
    """
    size, fixed, seen = tuple(call.x.shape[2:]), call.explained().cls, []
    for scale in scales:
        scaled = tuple(max(1, round(length * scale)) for length in size)
        if scaled != size:
            call.check_unmoved("cameras: its inputs are scaled", "pass scales=[1.0], or use hirescam")
        other = call.of(resize(call.x, scaled), fixed)
        try:
            G = other.gradient()
        except Exception as error:
            if scaled == size or checks.is_out_of_memory(error):
                raise
            raise checks.StructureError(
                f"cameras: {type(call.model).__name__} fails on the input at {scaled} pixels ({error}); pass "
                "other scales, or use hirescam"
            ) from error
        seen.append((precise(other.features), precise(G)))
    maps: Any = 0.0
    for chunk in torch.arange(seen[0][0].shape[1], device=call.x.device).split(_AT_ONCE):
        A: Any = sum(resize(A[:, chunk], size) for A, _ in seen)
        G: Any = sum(resize(G[:, :, chunk], size) for _, G in seen)
        maps = maps + (A[:, None] * G).sum(2) / len(seen) ** 2
    return maps


@method(
    "Integrated Grad-CAM", family="gradient", paper="arXiv:2102.07805",
    summary="Grad-CAM of the change from a baseline, averaged along the path from it",
)  # fmt: skip
def integrated_gradcam(call: Call, *, steps: Count = 20, baseline: Baseline = 0.0) -> Tensor:
    """Integrated Grad-CAM: Grad-CAM of the features' change from a baseline, averaged along the path to x.

    γ(t) = x₀ + t (x − x₀); the map is mean_t ReLU(Σ_k w_k(γ(t)) (A_k(γ(t)) − A_k(x₀))) with t = 1/T … 1 and
    w_k the mean gradient of Grad-CAM; the class is that of x itself. One forward and backward pass per step,
    and a forward pass of the baseline.

    Args:
        steps: T, points on the path, ≥ 1.
        baseline: x₀, the start of the path: a number, a tensor that broadcasts against x, or a callable of x.

    References:
        Sattarzadeh et al. (arXiv:2102.07805). The mean over positions replaces their sum, a constant factor.
    """
    call.gradient()  # before the features: one forward serves both
    x, fixed = call.x, call.explained().cls
    start, total = baseline_images(baseline, x), torch.zeros(()).to(x)
    A = call.of(start, fixed).features
    for i in range(1, steps + 1):
        point = call if i == steps else call.of(start + i / steps * (x - start), fixed)
        G = point.gradient()
        maps = weighted(point.features - A, G, weights.gradcam, None)
        total = total + maps.relu() / steps
    return total


xgradcam = enter(from_gradients(
    weights.xgradcam, title="XGrad-CAM", paper="arXiv:2008.02312",
    summary="each channel weighted by its gradient, averaged where the channel is active",
    variants={"xplaincam": {}, "torchcam": {"eps": 1e-8}, "pytorch-grad-cam": {"eps": 1e-7}},
))  # fmt: skip
layercam = enter(from_gradients(
    weights.layercam, title="Layer-CAM", paper="IEEE TIP 2021, doi:10.1109/TIP.2021.3089943",
    summary="each position of each channel weighted by its positive gradient", variants=_ALIKE,
))  # fmt: skip
hirescam = enter(from_gradients(
    weights.hirescam, title="HiResCAM", paper="arXiv:2011.08891",
    summary="each position of each channel weighted by its gradient", variants={"pytorch-grad-cam": {}},
))  # fmt: skip
gradcam_elementwise = enter(from_gradients(
    weights.gradcam_elementwise, title="Grad-CAM, elementwise", paper="pytorch-grad-cam",
    summary="each position of each channel weighted by its gradient, where that product is positive",
    variants={"pytorch-grad-cam": {}},
))  # fmt: skip
eigengradcam = enter(from_gradients(
    weights.hirescam, title="EigenGrad-CAM",
    paper="arXiv:2008.00299 on gradient times feature, pytorch-grad-cam",
    summary="the first principal component of the features times their gradients",
    name="eigengradcam", projection=projections.principal_component, variants={"pytorch-grad-cam": {}},
))  # fmt: skip
segeigencam = enter(from_gradients(
    weights.absolute, title="Seg-Eigen-CAM", paper="Applied Sciences 2025, doi:10.3390/app15137562",
    summary="the first principal component of features times absolute gradients, with a positive peak",
    name="segeigencam", projection=projections.peak_component, variants={"pytorch-grad-cam": {}},
))  # fmt: skip


@method(
    "Shapley-CAM", family="gradient", paper="arXiv:2501.06261",
    summary="each channel weighted by its mean gradient, corrected by the curvature",
    variants={"pytorch-grad-cam": {}},
)  # fmt: skip
def shapleycam(call: Call, *, projection: Projection | None = None) -> Tensor:
    """Shapley-CAM: Grad-CAM with the gradient corrected by the curvature of the score.

    w_k = mean_ij (G − ½ H·A), H the second derivative of the score with respect to the features: Shapley
    values of the channels, to second order. Since H is symmetric, H·A is the gradient of ⟨G, A⟩ through the
    head, with A held fixed. For a head that is linear in the features, H is zero and the map is Grad-CAM's.

    References:
        Cai (arXiv:2501.06261), equation 19.
    """
    G, HA = call.curvature()
    return weighted(call.features, G - HA / 2, weights.gradcam, projection)


@method(
    "LIFT-CAM", family="gradient", paper="arXiv:2102.05228",
    summary="each channel weighted by its contribution to the score, by DeepLIFT",
)  # fmt: skip
def liftcam(call: Call, *, projection: Projection | None = None) -> Tensor:
    """LIFT-CAM: each channel weighted by its contribution to the score, DeepLIFT's estimate of SHAP values.

    w_k = Σ_ij M_kij A_kij; the map is Σ w_k A_k. M are DeepLIFT's multipliers from the features to the score,
    with features of zero as reference: the gradient, with the slope Δout / Δin for each activation function
    (the rescale rule). If only linear layers and activation functions follow the layer, Σ w_k is the score
    lost without the features. Functions of several values (max pooling, products, attention, a norm by the
    features' own mean) keep their gradient. Three forward passes, and a backward pass through what follows
    the layer.

    Raises:
        StructureError: a ValueError; the network runs other activation functions if the features are zero.

    References:
        Jung and Oh (arXiv:2102.05228); the rescale rule is Shrikumar et al.'s (arXiv:1704.02685).
    """
    M = call.multipliers()
    return weighted(call.features, M, weights.liftcam, projection)


@method(
    "NormGrad", family="gradient", paper="arXiv:2004.02866", single=True,
    summary="the norm of the features times the norm of their gradient, at each position",
)  # fmt: skip
def normgrad(call: Call) -> Tensor:
    """NormGrad: each position's share of the gradient of a convolution's weights.

    The map is ‖G_ij‖ ‖A_ij‖, norms over the channels: the norm of their outer product, which is the
    position's term in the weight gradient of a 1 × 1 identity convolution after the layer. It has no sign.

    References:
        Rebuffi et al., There and Back Again (arXiv:2004.02866).
    """
    G = precise(call.gradient())
    return G.norm(dim=2) * precise(call.features).norm(dim=1)[:, None]


@method(
    "Finer-CAM", family="gradient", paper="arXiv:2501.11309",
    summary="a gradient method's map of what separates the class from similar ones",
    variants={"torchcam": {}, "pytorch-grad-cam": {"weight": 1.0, "weighting": "probability"}},
)  # fmt: skip
def finercam(
    call: Call,
    *,
    method: str | Method[...] = "gradcam",
    others: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    weight: float = 0.6,
    count: Count = 3,
    weighting: Literal["mean", "probability"] = "mean",
) -> Tensor:
    """Finer-CAM: what separates the class from the most similar classes.

    A gradient method's map of y_c − γ · mean of the logits of the most similar classes, `targets.contrast`.

    Args:
        method: the gradient method, a name or a function.
        others: None for the classes with the logits nearest to the class's, an int or ints for the same
            classes for all images, or (B, m) ints.
        weight: γ, the fraction of the others that is subtracted.
        count: the number of nearest classes, ≥ 1.
        weighting: "mean" as in the paper, or "probability" to weight each by its probability, as
            pytorch-grad-cam does.

    References:
        Zhang et al. (arXiv:2501.11309), equation 4.
    """
    if callable(call.cls):
        raise TypeError(
            "cls must be None, an int or ints, as finercam contrasts classes, got "
            f"{type(call.cls).__name__}, a target"
        )
    asked = call.asking(contrast(call.cls, others, weight, count=count, weighting=weighting))
    maps = with_raw_maps(method).raw(asked)
    call.many = asked.many
    return maps
