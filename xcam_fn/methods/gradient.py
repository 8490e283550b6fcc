"""The gradient family: one forward, one backward through the head, one weighting function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks, weights
from xcam_fn._modules import unwrap
from xcam_fn.heatmap import heatmap
from xcam_fn.methods.method import Method, Postprocess, check_options, method, option_names
from xcam_fn.perturb import Baseline, baseline_images
from xcam_fn.scoring import explained_score
from xcam_fn.split import (
    Layer,
    feature_and_grad,
    in_transform,
    pulled_back,
    recorded_vjp,
    recording,
    traced,
    whole,
)
from xcam_fn.targets import Classes, Target, logit

_COMMON = ("postprocess", "create_graph")


def from_gradients(
    weighting: Callable[..., Tensor],
    *,
    name: str | None = None,
    title: str | None = None,
    paper: str = "",
    summary: str = "a map weighted by the gradient of the score",
) -> Method:
    """A method made of a weighting function: batches, targets, many classes and the checks come with it.

    Args:
        weighting: `(A, G, **options)` to weights, (B, K) or (B, K, *spatial), from features A and gradients
            G, both (B, K, *spatial). Its keywords become the method's.
        name: the method's name; the function's own by default.
        title: the method's name in print; its name by default.
        paper: where it was published.
        summary: what it does, in one line.

    Returns:
        The method: `(model, layer, x, cls=None, *, postprocess, create_graph, **options) -> heatmaps`.

    Example:
        >>> absolute = from_gradients(lambda A, G: G.abs().mean((2, 3)), name="absolute")
    """
    name = name or weighting.__name__
    known = option_names(weighting, 2)

    def run(
        model: nn.Module,
        layer: Layer,
        x: Tensor,
        cls: Classes = None,
        *,
        postprocess: Postprocess | None = heatmap,
        create_graph: bool = False,
        **options: Any,
    ) -> Tensor:
        check_options(name, options, [*known, *_COMMON])
        found = feature_and_grad(model, layer, x, cls, create_graph=create_graph)
        with recording(x, create_graph):
            return finish(map_of(weighting, found.features, found.grads, options), x, postprocess)

    return method(
        run,
        name=name,
        title=title or name,
        family="gradient",
        paper=paper,
        summary=summary,
        module=sys._getframe(1).f_globals.get("__name__", "__main__"),
    )


def map_of(weighting: Callable[..., Tensor], A: Tensor, G: Tensor, options: dict[str, Any]) -> Tensor:
    """The raw map (B, *spatial), or (B, n, *spatial) where G has n classes."""

    def one_class(G: Tensor) -> Tensor:
        return weights.weighted_sum(A, weighting(A, G, **options))

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


integrated_gradients = method(
    _integrated_gradients,
    name="integrated_gradients",
    title="Integrated Gradients",
    family="gradient",
    paper="arXiv:1703.01365",
    summary="the input's own gradient, averaged on the path from a baseline; needs no layer",
    module=__name__,
    doc=_integrated_gradients.__doc__,
)
