"""Maps from features and the network's own weights: principal components, k-sigma masks, CAM, Random-CAM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, cast

import torch
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks, weights
from xcam_fn.arguments import NonNegative, check, unchecked
from xcam_fn.docstrings import documented
from xcam_fn.maps import precise
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import enter, method
from xcam_fn.methods.gradient import from_gradients
from xcam_fn.methods.method import Method, method_of
from xcam_fn.perturb import normal, uniform
from xcam_fn.projections import kernel_component, principal_component
from xcam_fn.targets import Classes, ClassScore
from xcam_fn.weights import Projection

__all__ = ["cam", "eigencam", "fem", "from_features", "kpcacam", "randomcam"]

P = ParamSpec("P")
Maps = Float[Tensor, "B K *spatial"]
Map = Float[Tensor, "B *spatial"]


def from_features(
    projection: Callable[Concatenate[Tensor, P], Tensor],
    *,
    name: str | None = None,
    title: str | None = None,
    paper: str = "",
    summary: str = "a map of the features alone",
    family: str = "activation",
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Method[P]:
    """Return a method from a function of the features alone.

    The map is the same for every class; the class is only checked.

    Args:
        projection: `(A, **options)`, features (B, K, *spatial) to a map (B, *spatial). Its keywords become
            the method's keywords.
        family: "activation", or "baseline" for a map that explains nothing.

    Returns:
        The method: `(model, layer, x, cls=None, *, postprocess, create_graph, **options) -> heatmaps`.

    Example:
        >>> strongest = from_features(lambda A: A.amax(1), name="strongest")
    """

    def project(call: Call, **options: Any) -> Tensor:
        A, cam = precise(call.features), cast(Any, unchecked(projection))
        fits = lambda found: found.ndim == A.ndim - 1 and len(found) == len(A)  # noqa: E731
        expected = f"({len(A)}, *spatial) maps"
        found = checks.check_returned("projection", cam(A, **options), expected, fits)
        return call.for_each_class(found[:, None])

    check("projection", projection, Callable)
    maker = sys._getframe(1)
    return method_of(projection, 1, project, family, maker, name, title, paper, summary, variants)


documented(from_features, from_gradients)


def _fem(A: Maps, *, k: NonNegative = 2.0, summed: Literal["masks", "features"] = "masks") -> Map:
    """Σ mean(A_k) M_k with M_k = [A_k ≥ mean + k σ].

    Args:
        A: features, (B, K, *spatial).
        k: how many standard deviations above its mean a channel must be at a position to count, ≥ 0.
        summed: "masks", or "features" for Σ mean(M_k) A_k, as pytorch-grad-cam does.

    References:
        Fuad et al., Features Understanding in 3D CNNs, IPTA 2020 (hal-02963298).
    """
    rows = A.flatten(2)
    limit = rows.mean(2, keepdim=True) + k * rows.std(2, correction=0, keepdim=True)
    if summed == "masks":
        found = weights.weighted_sum((rows >= limit).to(rows), rows.mean(2))
    else:
        found = weights.weighted_sum(rows, (rows > limit).to(rows).mean(2))
    return found.reshape(A.shape[0], *A.shape[2:])


def _randomcam(A: Maps, *, seed: int = 0) -> Map:
    """Σ w_k A_k with weights from −1 to 1.

    Args:
        A: features, (B, K, *spatial).
        seed: the weights are a function of it and the channel's index.
    """
    w = 2 * uniform(seed, 0, (A.shape[1],), like=A) - 1
    return weights.weighted_sum(A, w.expand(A.shape[:2]))


eigencam = enter(from_features(
    principal_component, name="eigencam", title="Eigen-CAM", paper="arXiv:2008.00299",
    summary="the features' first principal component, for any class",
    variants={"pytorch-grad-cam": {"center": True}},
).with_options(center=False, sign="uncentered"))  # fmt: skip
kpcacam = enter(from_features(
    kernel_component, name="kpcacam", title="KPCA-CAM", paper="arXiv:2410.00267",
    summary="the features' first kernel principal component, for any class",
    variants={"pytorch-grad-cam": {}},
))  # fmt: skip
fem = enter(from_features(
    _fem, name="fem", title="FEM", paper="IPTA 2020, hal-02963298",
    summary="positions where channels exceed their mean by k standard deviations, for any class",
    variants={"pytorch-grad-cam": {"summed": "features"}},
))  # fmt: skip
randomcam = enter(from_features(
    _randomcam, name="randomcam", title="Random-CAM", family="baseline",
    summary="channels weighted at random, the baseline that every explanation has to beat",
    variants={"pytorch-grad-cam": {}},
))  # fmt: skip


@method(
    "CAM", family="activation", paper="arXiv:1512.04150",
    summary="each channel weighted by the linear layer's own weight",
    needs="global average pooling and a linear layer after it", variants={"torchcam": {}},
)  # fmt: skip
def cam(call: Call, *, projection: Projection | None = None) -> Tensor:
    """CAM: each channel weighted by the linear layer's weight from its mean to the class.

    The map is Σ w_kc A_k for a head logit_c = Σ w_kc mean(A_k) + b_c. The weights are the logit's gradient
    summed over positions, which for such a head is exactly w_kc. The form of the head is verified: the
    gradient must be the same at every position, and the same for random features (except inside a
    torch.func transform or a compilation, where values cannot be read).

    Raises:
        StructureError: a ValueError; the head is not global average pooling and a linear layer.

    References:
        Zhou et al. (arXiv:1512.04150).
    """
    asked = call.cls.cls if isinstance(call.cls, ClassScore) else call.cls  # the weights are the logit's
    G = call.gradient(asked)
    A = call.features
    if checks.is_readable(call.x):
        _check_pooled(call, asked, G)
    w = G.flatten(3).sum(-1)
    return torch.stack([weights.weighted_sum(A, of_class, projection) for of_class in w.unbind(1)], 1)


def _check_pooled(call: Call, cls: Classes, G: Tensor) -> None:
    """Raise if the logit is not affine in the mean of each channel."""
    fixed = call.asking(cls).explained().cls
    drawn = lambda own: normal(0, 0, tuple(own.shape[1:]), like=own) * (own.abs().mean() + 1)  # noqa: E731
    other = call.gradient_at(lambda own: drawn(own).expand_as(own), fixed).detach()
    G = G.detach()
    mean = G.flatten(3).mean(-1).reshape(*G.shape[:3], *[1] * (G.ndim - 3))
    bound = 8 * torch.finfo(G.dtype).eps * G.abs().max()
    if (G - mean).abs().max() > bound or (other - mean).abs().max() > bound:
        raise checks.StructureError(
            f"layer {call.shown!r}: cam needs global average pooling and one linear layer after it, but "
            f"{type(call.model).__name__} computes something else; name the layer that is pooled, or use "
            "gradcam"
        )
