"""The gradient family: one forward, one backward through the head, one weighting function."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks, projections, weights
from xcam_fn.maps import heatmap
from xcam_fn.methods.method import (
    ARGUMENTS,
    PROJECTION,
    Method,
    Postprocess,
    check_options,
    described,
    method,
    method_of,
    parameters_of,
    with_parameters,
)
from xcam_fn.network.attention import mappable
from xcam_fn.network.copies import unwrap
from xcam_fn.network.split import (
    Layer,
    feature_and_grad,
    in_transform,
    pulled_back,
    recorded_vjp,
    recording,
    traced,
    unshared,
    whole,
)
from xcam_fn.perturb import Baseline, baseline_images, normal
from xcam_fn.scoring.running import explained_score
from xcam_fn.targets import Classes, Target, contrast, logit
from xcam_fn.weights import Projection


def from_gradients(
    weighting: Callable[..., Tensor],
    *,
    name: str | None = None,
    title: str | None = None,
    paper: str = "",
    summary: str = "a map weighted by the gradient of the score",
    projection: Projection | None = None,
) -> Method:
    """A method made of a weighting function: batches, targets, many classes and the checks come with it.

    Args:
        weighting: `(A, G, **options)` to weights, (B, K) or (B, K, *spatial), from features A and gradients
            G, both (B, K, *spatial). Its keywords become the method's.
        name: the method's name; the function's own by default.
        title: the method's name in print; its name by default.
        paper: where it was published.
        summary: what it does, in one line.
        projection: what is made of the weighted features, (B, K, *spatial) to (B, *spatial), unless the
            caller says otherwise; None adds them up.

    Returns:
        The method: `(model, layer, x, cls=None, *, projection, postprocess, create_graph, **options) ->
        heatmaps`.

    Example:
        >>> absolute = from_gradients(lambda A, G: G.abs().mean((2, 3)), name="absolute")
    """
    name = name or weighting.__name__
    default = projection
    own = parameters_of(weighting, 2)
    known = [p.name for p in own]

    def run(
        model: nn.Module,
        layer: Layer,
        x: Tensor,
        cls: Classes = None,
        *,
        projection: Projection | None = default,
        postprocess: Postprocess | None = heatmap,
        create_graph: bool = False,
        **options: Any,
    ) -> Tensor:
        check_options(name, options, [*known, "projection", "postprocess", "create_graph"])
        found = feature_and_grad(model, layer, x, cls, create_graph=create_graph)
        with recording(x, create_graph):
            cam = map_of(weighting, found.features, found.grads, options, projection)
            return finish(cam, x, postprocess)

    with_parameters(run, own)
    return method(
        run,
        name=name,
        title=title or name,
        family="gradient",
        paper=paper,
        summary=summary,
        module=sys._getframe(1).f_globals.get("__name__", "__main__"),
        arguments=ARGUMENTS + PROJECTION + described(weighting, own),
    )


def map_of(
    weighting: Callable[..., Tensor],
    A: Tensor,
    G: Tensor,
    options: dict[str, Any],
    projection: Projection | None = None,
) -> Tensor:
    """The raw map (B, *spatial), or (B, n, *spatial) where G has n classes."""

    def one_class(G: Tensor) -> Tensor:
        return weights.weighted_sum(A, weighting(A, G, **options), projection)

    return one_class(G) if G.ndim == A.ndim else torch.vmap(one_class, in_dims=1, out_dims=1)(G)


def finish(cam: Tensor, x: Tensor, postprocess: Postprocess | None) -> Tensor:
    """The raw map, or what `postprocess` makes of it at the input's size."""
    return cam if postprocess is None else postprocess(cam, tuple(x.shape[2:]))


gradcam = from_gradients(
    weights.gradcam,
    title="Grad-CAM",
    paper="arXiv:1610.02391",
    summary="each channel weighted by its mean gradient",
)
gradcam_pp = from_gradients(
    weights.gradcam_pp,
    title="Grad-CAM++",
    paper="arXiv:1710.11063",
    summary="each channel weighted by its positive gradients, position by position",
)
xgradcam = from_gradients(
    weights.xgradcam,
    title="XGrad-CAM",
    paper="arXiv:2008.02312",
    summary="each channel weighted by its gradient, averaged where the channel is active",
)
layercam = from_gradients(
    weights.layercam,
    title="Layer-CAM",
    paper="IEEE TIP 2021, doi:10.1109/TIP.2021.3089943",
    summary="each position of each channel weighted by its positive gradient",
)
hirescam = from_gradients(
    weights.hirescam,
    title="HiResCAM",
    paper="arXiv:2011.08891",
    summary="each position of each channel weighted by its gradient",
)
gradcam_elementwise = from_gradients(
    weights.gradcam_elementwise,
    title="Grad-CAM, elementwise",
    paper="pytorch-grad-cam",
    summary="each position of each channel weighted by its gradient, where that product is positive",
)
eigengradcam = from_gradients(
    weights.hirescam,
    name="eigengradcam",
    title="EigenGrad-CAM",
    paper="arXiv:2008.00299 on gradient times feature, pytorch-grad-cam",
    summary="the first principal component of the features times their gradients",
    projection=projections.principal_component,
)
segeigencam = from_gradients(
    weights.absolute,
    name="segeigencam",
    title="Seg-Eigen-CAM",
    paper="Applied Sciences 2025, doi:10.3390/app15137562",
    summary="the first principal component of the features times their absolute gradients, its peak positive",
    projection=projections.peak_component,
)


def _finercam(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    *,
    method: str | Method = "gradcam",
    others: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    weight: float = 0.6,
    count: int = 3,
    weighting: Literal["mean", "probability"] = "mean",
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Finer-CAM: what tells the class from those that the network takes it for most easily.

    A gradient method's map of y_c − γ · mean of the logits of the most similar classes, `targets.contrast`.

    {arguments}    method: the gradient method, a name or a function.
        others: None for the classes whose logits are nearest to the class's, an int or ints for the same
            classes for all images, or (B, m) ints.
        weight: γ, how much of the others is taken away.
        count: how many classes are nearest, ≥ 1.
        weighting: "mean" as in the paper, or "probability", each by its probability, as a library does.

    {returns}

    References:
        Zhang et al. (arXiv:2501.11309), equation 4.
    """
    if callable(cls):
        raise TypeError(f"cls={cls!r} is a target; finercam contrasts classes: expected None, an int or ints")
    if isinstance(method, str):
        from xcam_fn.methods.catalog import find_method  # noqa: PLC0415 (which knows this method too)

        method = find_method(method)
    target = contrast(cls, others, weight, count=count, weighting=weighting)
    return method(model, layer, x, target, postprocess=postprocess, create_graph=create_graph)


def _smoothgradcam_pp(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    *,
    num_samples: int = 4,
    std: float = 0.3,
    seed: int = 0,
    last: bool = False,
    eps: float = 0.0,
    projection: Projection | None = None,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Smooth Grad-CAM++: Grad-CAM++ with the powers of the gradient averaged over noisy inputs.

    D^p = mean_j G_j^p, G_j the gradient at x + δ_j, δ_j ~ N(0, σ²); α = D² / (2 D² + Σ A D³); w_k =
    Σ α ReLU(D¹); the map is Σ w_k A_k, A the features of x itself. The noise is a function of the seed and j,
    the same for every image; the class is that of x itself. One forward and backward for each sample.

    {arguments}{projection}    num_samples: noisy inputs, ≥ 1.
        std: σ of the noise, ≥ 0, in units of x.
        seed: of the noise.
        last: take D¹, and the features that are added up, of the last noisy input alone, as a library does.
        eps: added to α's denominator, ≥ 0, as a library does.

    {returns}

    References:
        Omeiza et al. (arXiv:1908.01224).
    """
    checks.check_count("num_samples", num_samples)
    checks.check_number("std", std, at_least=0)
    checks.check_number("eps", eps, at_least=0)
    checks.check_seed(seed)
    found = feature_and_grad(model, layer, x, cls, create_graph=create_graph)
    with recording(x, create_graph):
        fixed = explained_score(lambda _: found.output, x, cls, default=logit).cls
        A = summed = found.features
        G, powers = torch.zeros(()), [torch.zeros(())] * 3
        for j in range(num_samples):
            noisy = x + std * normal(seed, j, tuple(x.shape[1:]), like=x)
            sample = feature_and_grad(model, unshared(layer), noisy, fixed, create_graph=create_graph)
            G = sample.grads if sample.grads.dtype == torch.float64 else sample.grads.float()
            powers = [total + G**p / num_samples for p, total in enumerate(powers, start=1)]
            summed = sample.features if last else A
        powers[0] = G if last else powers[0]

        def one_class(*powers: Tensor) -> Tensor:
            w = weights.smoothgradcam_pp(A.to(G), *powers, eps=eps)
            return weights.weighted_sum(summed, w.to(A), projection)

        many = G.ndim > A.ndim
        cam = torch.vmap(one_class, in_dims=1, out_dims=1)(*powers) if many else one_class(*powers)
        return finish(cam, x, postprocess)


def _integrated_gradients(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    *,
    steps: int = 50,
    baseline: Baseline = 0.0,
    chunk_size: int = 16,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Integrated gradients: where the input itself moved the score away from a baseline's.

    The attribution is (x − baseline) times the gradient averaged over the straight path between the two; the
    map is the sum over the input's channels of its absolute value.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: not used (the input is what is explained); there so that all methods are called alike.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, (B, n) ints for n classes of each
            image, or a target, a callable from the model's output to B scores.
        to_spatial: not used, as the layer.
        steps: points on the path, ≥ 2, its ends included.
        baseline: where the path begins: a number, a tensor that broadcasts against x, or a callable of x.
        chunk_size: images in one forward and backward, ≥ 1; it changes the memory, not the result.
        postprocess: `heatmap`, a callable `(cam, size) -> map`, or None for the raw attribution, signed and
            summed over channels, whose sum is the score at x minus the score at the baseline.
        create_graph: record the computation, so that the result can be differentiated with respect to the
            parameters as well.

    Returns:
        (B, *size) in [0, 1], or (B, n, *size) for n classes; with postprocess=None signed.

    Raises:
        ValueError: a value is out of range or does not fit the model or the batch.
        TypeError: an argument is of the wrong kind.

    References:
        Sundararajan et al., Axiomatic Attribution for Deep Networks (arXiv:1703.01365).
    """
    if not torch.compiler.is_dynamo_compiling():
        checks.check_call(model, x)
        checks.check_model(model, x)
    checks.check_count("steps", steps, at_least=2)
    checks.check_count("chunk_size", chunk_size)
    start = baseline_images(baseline, x)
    with recording(x, create_graph), checks.explained(model, x):
        run = whole(model, x)
        explained = explained_score(run, x, cls, default=logit)
        # A target of the user's own is handed whole batches, one step of the path at a time.
        per_forward = len(x) if callable(cls) and not isinstance(cls, Target) else chunk_size
        by_autograd = (
            not in_transform() and not torch.compiler.is_compiling() and traced(unwrap(model), x) is None
        )
        with mappable() if explained.many else contextlib.nullcontext():
            gradient = _path_gradient(run, x, start, explained.of, steps, per_forward, by_autograd)
        attribution = (x - start)[:, None] * gradient
        cam = (attribution if postprocess is None else attribution.abs()).sum(2)
        return finish(cam if explained.many else cam.squeeze(1), x, postprocess)


def _path_gradient(
    run: Callable[[Tensor], Any],
    x: Tensor,
    start: Tensor,
    score: Callable[[Any, Tensor], Tensor],
    steps: int,
    chunk_size: int,
    by_autograd: bool,
) -> Tensor:
    """The gradient of n scores of each image, averaged over the path from start to x: (B, n, C, *size)."""
    positions = torch.linspace(0, 1, steps).to(x)
    averages = []
    for images in torch.arange(len(x), device=x.device).split(chunk_size):
        first, way = start[images], (x - start)[images]
        total, owed, last = torch.zeros(()).to(x), torch.zeros(()).to(x), None
        for chunk in positions.split(max(1, chunk_size // len(images))):
            on_path = torch.stack([first + t * way for t in chunk]).flatten(0, 1)
            repeated = images.repeat(len(chunk))
            of_images = lambda y, i=repeated: score(y, i)  # noqa: E731
            found = _Nodes(*_scores_and_gradients(run, on_path, of_images, by_autograd))
            found = _Nodes(*(part.reshape(len(chunk), len(images), *part.shape[1:]) for part in found))
            nodes = found if last is None else _Nodes(*map(torch.cat, zip(last, found, strict=True)))
            part, owed = _integral(nodes, way, 1 / (steps - 1), owed)
            total = total + part
            last = _Nodes(nodes.scores[-1:], nodes.grads[-1:])
        averages.append(total)
    return torch.cat(averages)


class _Nodes(NamedTuple):
    """Points of the path: scores (T, B, n) and gradients (T, B, n, C, *size)."""

    scores: Tensor
    grads: Tensor


def _integral(nodes: _Nodes, way: Tensor, length: float, owed: Tensor) -> tuple[Tensor, Tensor]:
    """The integral of the gradient over the intervals between nodes, (B, n, C, *size), and what it owes.

    Between two nodes the gradient of a network with ReLUs jumps from one node's value to the other's. Where
    it does so follows from the score, whose change over the interval is known: it has to be the slope before
    the jump for a share of the interval, and the slope after it for the rest. An equal share (the trapezoid
    rule) is kept where the slopes do not differ. What no share can make up for, as where the gradient jumps
    to and fro within one interval, is owed, (B, n), and made up for by the next.
    """
    slopes = (nodes.grads * way[:, None]).flatten(3).sum(-1)
    total = torch.zeros_like(nodes.grads[0])
    for i in range(len(slopes) - 1):
        before, after = slopes[i], slopes[i + 1]
        change = nodes.scores[i + 1] - nodes.scores[i] + owed
        jump = before - after
        differs = jump.abs() > 1e-3 * torch.maximum(before.abs(), after.abs())
        share = (change / length - after) / torch.where(differs, jump, 1.0)
        share = torch.where(differs, share, 0.5).clamp(0, 1)
        owed = change - length * (share * before + (1 - share) * after)
        share = share.reshape(*share.shape, *[1] * (way.ndim - 1))
        total = total + length * (share * nodes.grads[i] + (1 - share) * nodes.grads[i + 1])
    return total, owed


def _scores_and_gradients(
    run: Callable[[Tensor], Any], x: Tensor, score: Callable[[Any], Tensor], by_autograd: bool
) -> tuple[Tensor, Tensor]:
    """The n scores of each image, (B, n), and their gradients with respect to the image, (B, n, C, *size)."""
    if by_autograd:

        def recorded(x: Tensor) -> tuple[Tensor, None]:
            torch.set_grad_enabled(True)  # until recorded_vjp puts the caller's own setting back
            return score(run(x)), None

        scores, pullback, _ = recorded_vjp(recorded, x)
        grads = pulled_back(pullback, scores)
        return (scores, grads) if torch.is_grad_enabled() else (scores.detach(), grads)
    found: Any = torch.func.vjp(lambda x: score(run(x)), x)
    scores, pullback = found
    return scores, pulled_back(pullback, scores)


finercam = method_of(
    _finercam,
    title="Finer-CAM",
    family="gradient",
    paper="arXiv:2501.11309",
    summary="a gradient method's map of what tells the class from those most like it",
)
smoothgradcam_pp = method_of(
    _smoothgradcam_pp,
    title="Smooth Grad-CAM++",
    family="gradient",
    paper="arXiv:1908.01224",
    summary="Grad-CAM++ with the gradient's powers averaged over noisy inputs",
)
integrated_gradients = method_of(
    _integrated_gradients,
    title="Integrated Gradients",
    family="gradient",
    paper="arXiv:1703.01365",
    summary="the input's own gradient, averaged on the path from a baseline; needs no layer",
)
