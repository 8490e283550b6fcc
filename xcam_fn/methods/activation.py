"""Maps of the features and the network's own weights: principal components, k-sigma masks, CAM, chance."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks, weights
from xcam_fn.maps import heatmap
from xcam_fn.methods.gradient import finish
from xcam_fn.methods.method import (
    ARGUMENTS,
    Method,
    Postprocess,
    check_options,
    described,
    method,
    method_of,
    parameters_of,
    with_parameters,
)
from xcam_fn.network.split import (
    FeatureAndGrad,
    Layer,
    feature_and_grad,
    prepare,
    pulled_back,
    recording,
    run_head,
    trunk_of,
)
from xcam_fn.perturb import normal, uniform
from xcam_fn.projections import Kernel, kernel_component, principal_component
from xcam_fn.scoring.running import explained_score
from xcam_fn.targets import Classes, ClassScore, logit
from xcam_fn.weights import Projection

Maps = Float[Tensor, "B K *spatial"]
Map = Float[Tensor, "B *spatial"]


def from_features(
    projection: Callable[..., Tensor],
    *,
    name: str | None = None,
    title: str | None = None,
    paper: str = "",
    summary: str = "a map of the features alone",
    family: str = "activation",
) -> Method:
    """A method made of a function of the features alone: the checks and many classes come with it.

    The map is the same for every class; a class is only checked, and the head only run where one is given.

    Args:
        projection: `(A, **options)`, features (B, K, *spatial) to a map (B, *spatial). Its keywords become
            the method's.
        name: the method's name; the function's own by default.
        title: the method's name in print; its name by default.
        paper: where it was published.
        summary: what it does, in one line.
        family: "activation", or "baseline" for a map that explains nothing.

    Returns:
        The method: `(model, layer, x, cls=None, *, postprocess, create_graph, **options) -> heatmaps`.

    Example:
        >>> strongest = from_features(lambda A: A.amax(1), name="strongest")
    """
    name = name or projection.__name__
    own = parameters_of(projection, 1)
    known = [p.name for p in own]

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
        check_options(name, options, [*known, "postprocess", "create_graph"])
        parts = prepare(model, layer, x)
        with recording(x, create_graph), checks.explained(model, x):
            A, residual = trunk_of(layer, parts, x)
            cam = projection(A, **options)
            if cls is not None:
                explained = explained_score(lambda a: run_head(parts, a, residual), A, cls, logit)
                n = explained.own.shape[1]
                cam = cam[:, None].expand(-1, n, *cam.shape[1:]) if explained.many else cam
            return finish(cam, x, postprocess)

    with_parameters(run, own)
    return method(
        run,
        name=name,
        title=title or name,
        family=family,
        paper=paper,
        summary=summary,
        module=sys._getframe(1).f_globals.get("__name__", "__main__"),
        arguments=ARGUMENTS + described(projection, own),
    )


def _eigencam(A: Maps, *, center: bool = False) -> Map:
    """The features projected on their first principal component.

    Args:
        A: features, (B, K, *spatial).
        center: subtract each channel's mean over the positions first, as a library does.
    """
    return principal_component(A, center=center)


def _kpcacam(A: Maps, *, kernel: Kernel = "sigmoid", gamma: float | None = None) -> Map:
    """The features projected on their first principal component in a kernel's space.

    Args:
        A: features, (B, K, *spatial).
        kernel: "sigmoid", "rbf" or "linear".
        gamma: γ of the kernel, > 0; 1 / K by default.
    """
    return kernel_component(A, kernel=kernel, gamma=gamma)


def _fem(A: Maps, *, k: float = 2.0, summed: Literal["masks", "features"] = "masks") -> Map:
    """Σ mean(A_k) M_k with M_k = [A_k ≥ mean + k σ].

    Args:
        A: features, (B, K, *spatial).
        k: how many standard deviations above its mean a channel has to be at a position to count, ≥ 0.
        summed: "masks", or "features" for Σ mean(M_k) A_k, as a library does.
    """
    checks.check_number("k", k, at_least=0)
    checks.check_choice("summed", summed, ("masks", "features"))
    precise = A if A.dtype == torch.float64 else A.float()
    rows = precise.flatten(2)
    limit = rows.mean(2, keepdim=True) + k * rows.std(2, correction=0, keepdim=True)
    if summed == "masks":
        found = weights.weighted_sum((rows >= limit).to(rows), rows.mean(2))
    else:
        found = weights.weighted_sum(rows, (rows > limit).to(rows).mean(2))
    return found.reshape(A.shape[0], *A.shape[2:]).to(A.dtype)


def _randomcam(A: Maps, *, seed: int = 0) -> Map:
    """Σ w_k A_k with weights from −1 to 1.

    Args:
        A: features, (B, K, *spatial).
        seed: of the weights, which are a function of it and the channel's number.
    """
    checks.check_seed(seed)
    w = 2 * uniform(seed, 0, (A.shape[1],), like=A) - 1
    return weights.weighted_sum(A, w.expand(A.shape[:2]))


eigencam = from_features(
    _eigencam,
    name="eigencam",
    title="Eigen-CAM",
    paper="arXiv:2008.00299",
    summary="the features' first principal component, whatever the class",
)
kpcacam = from_features(
    _kpcacam,
    name="kpcacam",
    title="KPCA-CAM",
    paper="arXiv:2410.00267",
    summary="the features' first principal component in a kernel's space, whatever the class",
)
fem = from_features(
    _fem,
    name="fem",
    title="FEM",
    paper="IPTA 2020, hal-02963298",
    summary="where channels exceed their mean by k standard deviations, whatever the class",
)
randomcam = from_features(
    _randomcam,
    name="randomcam",
    title="Random-CAM",
    summary="channels weighted at random, the baseline that an explanation has to beat",
    family="baseline",
)


def _cam(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    *,
    projection: Projection | None = None,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """CAM: each channel weighted by the network's own weight from its mean to the class.

    The map is Σ w_kc A_k for a head that is logit_c = Σ w_kc mean(A_k) + b_c. The weights are read off the
    head without a look at its modules, as the sum over the positions of the logit's gradient, which for such
    a head is w_kc exactly. That the head is one is checked: the gradient has to be the same at every
    position, and the same for features drawn at random (not inside a torch.func transform or a compilation,
    where values cannot be looked at).

    {arguments}{projection}
    {returns}    StructureError: a ValueError; the head is not global average pooling and a linear layer.

    References:
        Zhou et al. (arXiv:1512.04150).
    """
    asked = cls.cls if isinstance(cls, ClassScore) else cls  # the weights are the logit's
    found = feature_and_grad(model, layer, x, asked, create_graph=create_graph)
    with recording(x, create_graph), checks.explained(model, x):
        if checks.is_readable(x):
            _check_pooled(model, layer, x, asked, found)
        A = found.features
        w = found.grads.flatten(2 - A.ndim).sum(-1)

        def one_class(w: Tensor) -> Tensor:
            return weights.weighted_sum(A, w, projection)

        many = w.ndim == 3
        cam = torch.vmap(one_class, in_dims=1, out_dims=1)(w) if many else one_class(w)
        return finish(cam, x, postprocess)


def _check_pooled(model: nn.Module, layer: Layer, x: Tensor, cls: Classes, found: FeatureAndGrad) -> None:
    """Raise where the logit is not affine in the mean of each channel."""
    parts = prepare(model, layer, x)
    A, residual = trunk_of(layer, parts, x)
    explained = explained_score(lambda _: found.output, x, cls, default=logit)
    every = torch.arange(len(x), device=x.device)
    drawn = normal(0, 0, tuple(A.shape[1:]), like=A) * (A.detach().abs().mean() + 1)
    with_pullback: Any = torch.func.vjp(
        lambda a: explained.of(run_head(parts, a, residual), every), drawn.expand_as(A)
    )
    scores, pullback = with_pullback
    other = pulled_back(pullback, scores).detach()
    G = found.grads.detach() if explained.many else found.grads.detach()[:, None]
    mean = G.flatten(3).mean(-1).reshape(*G.shape[:3], *[1] * (A.ndim - 2))
    bound = 8 * torch.finfo(G.dtype).eps * G.abs().max()
    if (G - mean).abs().max() > bound or (other - mean).abs().max() > bound:
        raise checks.StructureError(
            f"layer {parts.name!r}: what {type(parts.model).__name__} computes of it is not global average "
            "pooling and a linear layer, so CAM has no weights there; name the layer that is pooled, or use "
            "gradcam, which is CAM where there is one"
        )


cam = method_of(
    _cam,
    title="CAM",
    family="activation",
    paper="arXiv:1512.04150",
    summary="each channel weighted by the linear layer's own weight",
    needs="global average pooling and a linear layer after it",
)
