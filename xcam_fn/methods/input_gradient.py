"""Methods that use the score's gradient with respect to the images themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from xcam_fn import checks
from xcam_fn.arguments import Count
from xcam_fn.maps import resize
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.methods.gradient import gradcam
from xcam_fn.network.calls import keeps_rows_apart
from xcam_fn.network.forward import whole
from xcam_fn.network.modes import Activations, StepByStep
from xcam_fn.network.split import checked_scores
from xcam_fn.network.vjp import pulled_back, vjp
from xcam_fn.perturb import Baseline, baseline_images, uniform
from xcam_fn.scoring.running import check_rows, is_exact, watched
from xcam_fn.scoring.score import TARGETS, Explained, check_score, explained_score
from xcam_fn.targets import Target

__all__ = [
    "expected_gradients", "guided_backprop", "guided_gradcam", "input_x_gradient", "integrated_gradients",
]  # fmt: skip


@method(
    "Integrated Gradients", family="gradient", paper="arXiv:1703.01365",
    summary="the input gradient, averaged along the path from a baseline; needs no layer",
    returns="attributions", variants={"xplaincam": {"rule": "right"}},
)  # fmt: skip
def integrated_gradients(
    call: Call,
    *,
    steps: Annotated[int, ("at_least", 2)] = 50,
    rule: Literal["jumps", "right"] = "jumps",
    baseline: Baseline = 0.0,
    chunk_size: Count = 8,
) -> Tensor:
    """Integrated gradients: how the pixels moved the score away from the baseline's.

    The attribution is (x − baseline) times the gradient averaged over the straight path between the two; the
    map is the sum over the input's channels of its absolute value. The raw map is signed, and its sum is the
    score at x minus the score at the baseline. The layer is not used.

    Args:
        steps: points on the path, ≥ 2, including its ends.
        rule: the quadrature between two points: "jumps" locates jumps of the gradient by the scores; "right"
            takes the gradient at the right end of each of `steps` intervals, as other libraries do.
        baseline: the start of the path: a number, a tensor that broadcasts against x, or a callable of x.

    References:
        Sundararajan et al., Axiomatic Attribution for Deep Networks (arXiv:1703.01365).
    """
    x = call.x
    start, nodes = baseline_images(baseline, x), differentiable(call, chunk_size)
    with StepByStep():  # vmap over classes needs attention in plain operations
        return (x - start)[:, None] * _path_gradient(nodes, x, start, steps, rule)


class Differentiable(NamedTuple):
    """Differentiable scores of other images in place of the explained ones.

    Attributes:
        run: the network, recorded.
        explained: computes the scores from the output and from the image of x that each row is a copy of.
        per_forward: images per forward.
    """

    run: Callable[[Tensor], Any]
    explained: Explained
    per_forward: int

    def of(
        self, images: Tensor, node: Callable[[int], Tensor], count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The scores (T, b, n) and gradients (T, b, n, C, *size) at nodes 0 … count − 1, T at a time.

        Args:
            images: (b,), the images of x that each node is a copy of.
            node: maps a node's index to its images (b, C, *size).
            count: the number of nodes.
        """
        length = max(1, self.per_forward // len(images))
        for first in range(0, count, length):
            chunk = range(first, min(first + length, count))
            points, repeated = torch.cat([node(i) for i in chunk]), images.repeat(len(chunk))
            scores, pullback = vjp(lambda x, i=repeated: self.explained.of(self.run(x), i), points)
            grads = pulled_back(pullback, scores)
            shape = (len(chunk), len(images))
            yield scores.reshape(*shape, -1), grads.reshape(*shape, *grads.shape[1:])


def differentiable(call: Call, chunk_size: int, score: str = "logit") -> Differentiable:
    """The network as a differentiable function of images in place of those of a call.

    Args:
        call: the question; its `many` is set.
        chunk_size: images per forward, ≥ 1.
        score: the kind of score of a class, "logit" or "probability".
    """
    x, cls = call.x, call.cls
    check_score(score)
    run = whole(call.model, x)
    output, reads = watched(run, x)
    check_rows(output, run, x, reads=reads)
    explained = explained_score(output, len(x), cls, TARGETS[score])
    call.many = explained.many
    # A user's target gets whole batches, one step of the optimization or of the path at a time.
    per_forward = len(x) if callable(cls) and not isinstance(cls, Target) else chunk_size
    if reads or (per_forward > 1 and is_exact(x) and not keeps_rows_apart(run, x[:1])):
        per_forward = 1
    return Differentiable(run, explained, per_forward)


def _path_gradient(nodes: Differentiable, x: Tensor, start: Tensor, steps: int, rule: str) -> Tensor:
    """The gradient of n scores of each image, averaged over the path from start to x: (B, n, C, *size)."""
    positions = torch.linspace(0 if rule == "jumps" else 1 / steps, 1, steps).to(x)
    averages = []
    for images in torch.arange(len(x), device=x.device).split(nodes.per_forward):
        first, way = start[images], (x - start)[images]
        total, owed, last = torch.zeros(()).to(x), torch.zeros(()).to(x), None
        for found in nodes.of(images, lambda i, a=first, b=way: a + positions[i] * b, steps):
            if rule == "right":
                total = total + found[1].sum(0) / steps
                continue
            pairs = found if last is None else [torch.cat(pair) for pair in zip(last, found, strict=True)]
            part, owed = _integral(*pairs, way, 1 / (steps - 1), owed)
            total, last = total + part, [each[-1:] for each in pairs]
        averages.append(total)
    return torch.cat(averages)


def _integral(
    scores: Tensor, grads: Tensor, way: Tensor, length: float, owed: Tensor
) -> tuple[Tensor, Tensor]:
    """The integral of gradients (T, B, n, C, *size) between T nodes with scores (T, B, n), and its error.

    Between two nodes, the gradient of a network with ReLUs jumps from one node's value to the other's. The
    known change of the score over the interval determines the location of the jump: the slope before it holds
    for a share of the interval, and the slope after it for the rest. The shares are equal (the trapezoid
    rule) if the slopes are equal up to the scores' rounding. An error that no share can correct, as when the
    gradient jumps back and forth within the interval, is returned, (B, n), and corrected in the next one.
    """
    slopes = (grads * way[:, None]).flatten(3).sum(-1)
    total = torch.zeros_like(grads[0])
    for i in range(len(slopes) - 1):
        before, after = slopes[i], slopes[i + 1]
        change = scores[i + 1] - scores[i] + owed
        jump = before - after
        noise = 512 * torch.finfo(scores.dtype).eps * torch.maximum(*scores[i : i + 2].abs()) / length
        differs = jump.abs() > torch.maximum(noise, 1e-3 * torch.maximum(before.abs(), after.abs()))
        share = (change / length - after) / torch.where(differs, jump, 1.0)
        share = torch.where(differs, share, 0.5).clamp(0, 1)
        owed = change - length * (share * before + (1 - share) * after)
        share = share.reshape(*share.shape, *[1] * (way.ndim - 1))
        total = total + length * (share * grads[i] + (1 - share) * grads[i + 1])
    return total, owed


@method(
    "Expected Gradients", family="gradient", paper="arXiv:1906.10670",
    summary="the input gradient at random points on the paths from many baselines; needs no layer",
    returns="attributions",
)  # fmt: skip
def expected_gradients(
    call: Call,
    *,
    baselines: Float[Tensor, "N C *size"] | None = None,
    num_samples: Count = 50,
    seed: int = 0,
    chunk_size: Count = 8,
) -> Tensor:
    """Expected gradients: integrated gradients, averaged over baselines that represent the data.

    The attribution is the mean over baselines x' and α ~ U(0, 1) of (x − x') ⊙ ∂s/∂x at x' + α (x − x'); the
    map is the sum over the input's channels of its absolute value. The raw map is signed, and its sum tends
    to the score at x minus the mean score of the baselines. The j-th draw uses baseline j mod N; its α is a
    function of the seed and j, the same for every image. The layer is not used.

    Args:
        baselines: (N, C, *size), prepared images, such as training images; None for one of zeros.
        num_samples: draws, ≥ N; a multiple of N weights all baselines equally.

    References:
        Erion et al., Improving performance of deep learning models with axiomatic attribution priors and
        expected gradients (arXiv:1906.10670).
    """
    x = call.x
    given = torch.zeros_like(x[:1]) if baselines is None else baselines.to(x)
    if given.shape[1:] != x.shape[1:] or len(given) > num_samples:
        expected = f"(N, {', '.join(map(str, x.shape[1:]))}) with N from 1 to num_samples={num_samples}"
        raise ValueError(f"baselines have shape {tuple(given.shape)}; expected {expected}")
    nodes, averages = differentiable(call, chunk_size), []
    shares = [uniform(seed, j, (), like=x) for j in range(num_samples)]
    with StepByStep():
        for images in torch.arange(len(x), device=x.device).split(nodes.per_forward):
            ways, total = [x[images] - start for start in given], torch.zeros(()).to(x)
            point = lambda j, ways=ways: given[j % len(given)] + shares[j] * ways[j % len(given)]  # noqa: E731
            chunks = (grads for _, grads in nodes.of(images, point, num_samples))
            for j, G in enumerate(itertools.chain.from_iterable(chunks)):
                total = total + ways[j % len(given)][:, None] * G / num_samples
            averages.append(total)
    return torch.cat(averages)


# -- one gradient --------------------------------------------------------------------------------------------


@method(
    "Input x Gradient", family="gradient", paper="arXiv:1605.01713",
    summary="the input times its gradient; needs no layer", returns="attributions",
)  # fmt: skip
def input_x_gradient(call: Call) -> Tensor:
    """Input × gradient: the input times the gradient of the score with respect to it.

    The attribution is x ⊙ ∂s/∂x; the map is the sum over the input's channels of its absolute value, the raw
    map their signed sum. If the network is linear in x, it is each value's contribution to the score. The
    layer is not used.

    References:
        Shrikumar et al., Not Just a Black Box (arXiv:1605.01713).
    """
    with StepByStep():
        return call.x[:, None] * _input_gradient(call)


def _input_gradient(call: Call) -> Tensor:
    """The gradient of n scores of each image with respect to it, (B, n, C, *size)."""
    score, run = checked_scores(call.cls, len(call.x)), whole(call.model, call.x)
    scores, pullback = vjp(lambda x: score(run(x)), call.x)
    return call.by_class(pulled_back(pullback, scores))


# -- guided backpropagation ---------------------------------------------------------------------------------


class _GuidedReLU(torch.autograd.Function):
    """ReLU, optionally with an upper bound, that passes back only positive gradients."""

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
    F.relu6: 6.0,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), torch.inf),
}


class _Guided(Activations):
    """A mode in which every ReLU passes back only positive gradients."""

    count = 0

    def changed(self, func: Any, x: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        low, high = 0.0, _CEILINGS.get(func)
        if func is F.hardtanh:
            bounds = dict(zip(("min_val", "max_val"), others, strict=False)) | named
            low, high = bounds.get("min_val", -1.0), bounds.get("max_val", 1.0)
        if high is None or low != 0:
            return None
        self.count += 1
        output: Any = _GuidedReLU.apply(x, high)
        return output


@method(
    "Guided Backprop", family="gradient", paper="arXiv:1412.6806",
    summary="the input gradient, with ReLUs passing back only positive gradients; needs no layer",
    needs="ReLUs", variants={"pytorch-grad-cam": {}}, returns="attributions",
)  # fmt: skip
def guided_backprop(call: Call) -> Tensor:
    """Guided backpropagation: the input gradient, where each ReLU passes back only positive gradients.

    R_l = [f_l > 0] [R_{l+1} > 0] R_{l+1} at each ReLU of output f. The map is the sum over the input's
    channels of the absolute value; the raw map is their signed sum. It shows edges that the network uses,
    for any class: see `parameter_randomization`. Activations other than ReLU (and bounded ones such as ReLU6)
    keep their own gradient. The layer is not used.

    References:
        Springenberg et al., Striving for Simplicity (arXiv:1412.6806).
    """
    guided = _Guided()
    with guided:
        G = _input_gradient(call)  # the backward needs the mode too: a checkpoint runs forward again
    if guided.count == 0:
        raise checks.StructureError(
            f"guided_backprop changes the gradient of ReLUs, and {type(call.model).__name__} runs none; use "
            "integrated_gradients"
        )
    return G


@method(
    "Guided Grad-CAM", family="gradient", paper="arXiv:1610.02391",
    summary="guided backpropagation times Grad-CAM", needs="ReLUs", returns="attributions",
)  # fmt: skip
def guided_gradcam(call: Call) -> Tensor:
    """Guided Grad-CAM: guided backpropagation times Grad-CAM.

    The attribution is that of `guided_backprop` ⊙ U(ReLU(Σ w_k A_k)), the map of `gradcam` resized to the
    input: the edges at the location of the class. The map is the sum over the input's
    channels of the absolute value, the raw map their signed sum.

    References:
        Selvaraju et al. (arXiv:1610.02391), section 3.2.
    """
    cam = resize(gradcam.raw(call).relu(), tuple(call.x.shape[2:]))
    return guided_backprop.raw(call) * cam[:, :, None]
