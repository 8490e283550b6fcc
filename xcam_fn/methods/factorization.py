"""Deep feature factorization: the features as a few concepts, and their contributions to a class's score."""

from __future__ import annotations

import threading
import warnings
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count, Positive, checked
from xcam_fn.docstrings import documented
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.names import needed
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.split import features
from xcam_fn.network.target_layer import Layer

__all__ = ["Concepts", "concepts", "deep_feature_factorization"]

Images = Float[Tensor, "B C *size"]
Init = Literal["nndsvda", "random"]
_FILTERS = threading.Lock()  # warning filters belong to the whole process


class Concepts(NamedTuple):
    """Features as a sum of concepts, A ≈ offset + Σ_i vectors_i · maps_i.

    Attributes:
        vectors: each concept's channel pattern, (m, K), ≥ 0.
        maps: each concept's location, (B, m, *spatial), ≥ 0, at the layer's size.
        offset: the minimum of each channel, (K,), to which the concepts are added.
    """

    vectors: Float[Tensor, "m K"]
    maps: Float[Tensor, "B m *spatial"]
    offset: Float[Tensor, " K"]


@documented
@checked
def concepts(
    model: nn.Module,
    layer: Layer,
    x: Images,
    *,
    num_concepts: Count = 5,
    init: Init = "nndsvda",
    tol: Positive = 1e-4,
    max_iter: Count = 10_000,
    seed: int = 0,
    to_spatial: ToSpatial | None = None,
) -> Concepts:
    """Return the concepts of a layer's features, shared by all images.

    A concept is the same in all images: its maps show parts that look alike to the network.

    Args:
        num_concepts: m, ≥ 1, no more than the number of channels or positions.
        init: scikit-learn's initialization of the factorization: "nndsvda" or "random".
        tol: tolerance of the stopping criterion, > 0.
        max_iter: the maximum number of iterations, ≥ 1.

    Returns:
        `Concepts(vectors, maps, offset)`, by non-negative matrix factorization; `plot.concepts` draws them.

    Raises:
        ValueError: scikit-learn is not installed.

    References:
        Collins et al., Deep Feature Factorization (arXiv:1806.10206).
    """
    A = features(model, layer, x, to_spatial=to_spatial)
    return _factorized(A, num_concepts, init=init, tol=tol, max_iter=max_iter, random_state=seed % 2**32)


def _factorized(A: Tensor, count: int, **how: Any) -> Concepts:
    """The concepts of features (B, K, *spatial), by scikit-learn's factorization with its keywords."""
    needs = "deep feature factorization needs scikit-learn; install it with pip install 'xcam-fn[cluster]'"
    decomposition, exceptions = (needed(f"sklearn.{part}", needs) for part in ("decomposition", "exceptions"))
    if A.requires_grad or not checks.is_readable(A):
        raise ValueError(
            "deep feature factorization cannot be differentiated, vmapped or compiled; call it outside of "
            "torch.func and torch.compile, with x.detach() and create_graph=False"
        )
    values = A.detach().movedim(1, 0).flatten(1)
    largest = min(values.shape)
    if count > largest:
        raise checks.StructureError(
            f"num_concepts={count}: features of shape {tuple(A.shape)} have at most {largest} concepts"
        )
    offset = values.amin(1)
    above = (values - offset[:, None]).double()
    scale = float(above.max()) or 1.0
    factorize = decomposition.NMF(n_components=count, **how)
    with _FILTERS, warnings.catch_warnings():  # the caller chose max_iter: no warning when it is reached
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        vectors = factorize.fit_transform((above / scale).cpu().numpy()) * scale**0.5
    maps = torch.as_tensor(factorize.components_ * scale**0.5).reshape(count, len(A), *A.shape[2:])
    return Concepts(torch.as_tensor(vectors.T.copy()).to(A), maps.movedim(0, 1).to(A), offset)


@method(
    "Deep Feature Factorization", family="perturbation", paper="arXiv:1806.10206",
    summary="concepts of the features, each weighted by its contribution to the class's score",
    variants={"pytorch-grad-cam": {"init": "random", "max_iter": 200}}, explains=(concepts,),
)  # fmt: skip
def deep_feature_factorization(
    call: Call,
    *,
    num_concepts: Count = 5,
    init: Init = "nndsvda",
    tol: Positive = 1e-4,
    max_iter: Count = 10_000,
    seed: int = 0,
) -> Tensor:
    """Deep feature factorization: concepts of an image, weighted by their contribution to the class's score.

    A ≈ a + Σ_i v_i h_i with v, h ≥ 0 and a each channel's minimum; w_i = s(a + v_i h_i) − s(a); the map is
    Σ_i w_i h_i. The trunk runs once, and the head once per concept plus once. `concepts` returns the factors
    themselves, for many images together. The map is not differentiable.

    References:
        Collins et al. (arXiv:1806.10206).
    """
    A = call.features
    how: Any = {"init": init, "tol": tol, "max_iter": max_iter, "random_state": seed % 2**32}
    found = [_factorized(a[None], num_concepts, **how) for a in A]
    vectors, maps = torch.stack([each.vectors for each in found]), torch.cat([each.maps for each in found])
    floor = torch.stack([each.offset for each in found]).reshape(len(A), 1, -1, *[1] * (A.ndim - 2))
    added = torch.einsum("bmk,bm...->bmk...", vectors, maps)
    features = floor + torch.cat([torch.zeros_like(added[:, :1]), added], 1)  # the floor alone comes first
    which = torch.arange(len(A), device=A.device).repeat_interleave(num_concepts + 1)
    scores = call.head_scores(
        lambda _, changed: changed, which, features.flatten(0, 1), score="logit", chunk_size=_AT_ONCE
    )
    scores = scores.reshape(len(A), num_concepts + 1, -1)
    return torch.einsum("bmn,bm...->bn...", scores[:, 1:] - scores[:, :1], maps)


_AT_ONCE = 64  # features in one run of the head
