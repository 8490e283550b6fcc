"""Deep feature factorization: the features as a few concepts, and what each adds to a class's score."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.maps import heatmap
from xcam_fn.methods.gradient import finish
from xcam_fn.methods.method import Postprocess, method_of
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.split import Layer, at, features, prepare, recording, run_head, trunk_of
from xcam_fn.scoring.running import explained_score
from xcam_fn.targets import Classes, logit

Images = Float[Tensor, "B C *size"]
Init = Literal["nndsvda", "random"]


class Concepts(NamedTuple):
    """Features as a sum of concepts, A ≈ offset + Σ_i vectors_i · maps_i.

    Attributes:
        vectors: what each concept is made of, (m, K), ≥ 0.
        maps: where each concept is, (B, m, *spatial), ≥ 0, at the layer's own size.
        offset: the least value of each channel, (K,), which the concepts stand above.
    """

    vectors: Float[Tensor, "m K"]
    maps: Float[Tensor, "B m *spatial"]
    offset: Float[Tensor, " K"]


def concepts(
    model: nn.Module,
    layer: Layer,
    x: Images,
    *,
    num_concepts: int = 5,
    init: Init = "nndsvda",
    tol: float = 1e-4,
    max_iter: int = 10_000,
    seed: int = 0,
    to_spatial: ToSpatial | None = None,
) -> Concepts:
    """The concepts that a layer's features are made of, found for all images together.

    The same concept is then found in all of them: its maps show the parts that look alike to the network.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        num_concepts: m, ≥ 1, no more than there are channels or positions.
        init: where the factorization starts, as scikit-learn calls it: "nndsvda" or "random".
        tol: how little it still has to gain when it stops, > 0.
        max_iter: how many steps it takes at the most, ≥ 1.
        seed: of its random numbers.
        to_spatial: where the layer returns tokens (B, T, K) or channels last, the function that selects and
            arranges them as (B, K, *spatial); None finds it.

    Returns:
        `Concepts(vectors, maps, offset)`, by non-negative matrix factorization; `plot.concepts` draws them.

    Raises:
        ValueError: a value is out of range or does not fit the layer, or scikit-learn is not installed.
        TypeError: an argument is of the wrong kind.

    References:
        Collins et al., Deep Feature Factorization (arXiv:1806.10206).
    """
    how = _checked(num_concepts, init, tol, max_iter, seed)
    return _factorized(features(model, at(layer, to_spatial), x), how)


class _How(NamedTuple):
    """The keywords of scikit-learn's factorization."""

    n_components: int
    init: str
    tol: float
    max_iter: int
    random_state: int


def _checked(num_concepts: int, init: str, tol: float, max_iter: int, seed: int) -> _How:
    checks.check_count("num_concepts", num_concepts)
    checks.check_choice("init", init, get_args(Init))
    checks.check_number("tol", tol, above=0)
    checks.check_count("max_iter", max_iter)
    checks.check_seed(seed)
    return _How(num_concepts, init, tol, max_iter, seed % 2**32)


def _factorized(A: Float[Tensor, "B K *spatial"], how: _How) -> Concepts:
    try:
        from sklearn.decomposition import NMF  # noqa: PLC0415 (an extra)
    except ImportError:
        raise ValueError(
            "deep feature factorization needs scikit-learn; install it with pip install 'xcam-fn[cluster]'"
        ) from None
    if A.requires_grad or not checks.is_readable(A):
        raise ValueError(
            "deep feature factorization cannot be differentiated, mapped or compiled; pass x.detach(), "
            "without create_graph=True and outside torch.func's transforms"
        )
    values = A.detach().movedim(1, 0).flatten(1)
    largest = min(values.shape)
    count = how.n_components
    if count > largest:
        raise ValueError(
            f"num_concepts={count}: features of shape {tuple(A.shape)} have at most {largest} concepts"
        )
    offset = values.amin(1)
    above = (values - offset[:, None]).double()
    scale = float(above.max()) or 1.0
    factorize = NMF(**how._asdict())
    vectors = factorize.fit_transform((above / scale).cpu().numpy()) * scale
    maps = torch.as_tensor(factorize.components_).reshape(count, len(A), *A.shape[2:])
    return Concepts(torch.as_tensor(vectors.T.copy()).to(A), maps.movedim(0, 1).to(A), offset)


def _deep_feature_factorization(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    num_concepts: int = 5,
    init: Init = "nndsvda",
    tol: float = 1e-4,
    max_iter: int = 10_000,
    seed: int = 0,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Deep feature factorization: each image's concepts, weighted by what each adds to the class's score.

    A ≈ a + Σ_i v_i h_i with v, h ≥ 0 and a each channel's least value; w_i = s(a + v_i h_i) − s(a); the map
    is Σ_i w_i h_i. The trunk runs once, the head once more than there are concepts. `concepts` gives the
    factors themselves, of many images together. It cannot be differentiated.

    {arguments}    num_concepts: ≥ 1, no more than the layer has channels or positions.
        init: where the factorization starts, as scikit-learn calls it: "nndsvda" or "random".
        tol: how little it still has to gain when it stops, > 0.
        max_iter: how many steps it takes at the most, ≥ 1.
        seed: of its random numbers.

    {returns}

    References:
        Collins et al. (arXiv:1806.10206).
    """
    how = _checked(num_concepts, init, tol, max_iter, seed)
    parts = prepare(model, layer, x)
    with recording(x, create_graph), checks.explained(model, x):
        A, residual = trunk_of(layer, parts, x)
        explained = explained_score(lambda a: run_head(parts, a, residual), A, cls, logit)
        every = torch.arange(len(x), device=x.device)
        found = [_factorized(a[None], how) for a in A]
        floor = torch.stack([each.offset for each in found]).reshape(*A.shape[:2], *[1] * (A.ndim - 2))
        vectors = torch.stack([each.vectors for each in found])
        maps = torch.cat([each.maps for each in found])

        def score(a: Tensor) -> Tensor:
            return explained.of(run_head(parts, a, residual), every)

        base = score(floor.expand_as(A))
        pairs = zip(vectors.unbind(1), maps.unbind(1), strict=True)
        each = [score(floor + torch.einsum("bk,b...->bk...", *pair)) for pair in pairs]
        weights = torch.stack(each, 1) - base[:, None]
        cam: Any = torch.einsum("bmn,bm...->bn...", weights, maps)
        return finish(cam if explained.many else cam.squeeze(1), x, postprocess)


deep_feature_factorization = method_of(
    _deep_feature_factorization,
    title="Deep Feature Factorization",
    family="perturbation",
    paper="arXiv:1806.10206",
    summary="concepts of the features, each weighted by what it adds to the class's score",
)
