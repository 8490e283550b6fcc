"""Maps of K channels to one map: their first principal component, of the features or of a kernel."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import Positive, checked, unchecked
from xcam_fn.maps import precise

Maps = Float[Tensor, "B K L *spatial"]  # at least one axis of places
Map = Float[Tensor, "B L *spatial"]
Kernel = Literal["sigmoid", "rbf", "linear"]


@checked
def principal_component(A: Maps, *, center: bool = True, sign: Literal["mean", "uncentered"] = "mean") -> Map:
    """The positions projected onto the first principal component of the channels.

    With X of positions × channels and v its first right singular vector, the map is X v.

    Args:
        A: features, or weighted features, (B, K, *spatial); half precision is computed in float32.
        center: subtract each channel's mean over the positions first.
        sign: sign of a centered component: correlated positively with the "mean" of the channels, or with
            the "uncentered" component.

    Returns:
        (B, *spatial); the sign does not depend on the order of the channels, and without centering the sum
        is positive. Zero if every channel is constant.

    References:
        Muhammad and Yeasin, Eigen-CAM (arXiv:2008.00299).
    """
    rows = _centered(A) if center else precise(A).flatten(2)
    if rows.shape[1] > rows.shape[2]:
        found = _scores(rows.mT @ rows)
    else:
        _, vector = _leading(rows @ rows.mT)
        found = torch.einsum("bk,bkp->bp", vector, rows)
    if not center:
        return _finished(found, A)
    return _finished(found, A, precise(A).mean(1) if sign == "mean" else _uncentered(A))


@checked
def kernel_component(A: Maps, *, kernel: Kernel = "sigmoid", gamma: Positive | None = None) -> Map:
    """The positions projected onto the first kernel principal component.

    The kernel of two positions' features a and b, each channel centered, is tanh(γ a·b + 1) for "sigmoid",
    exp(−γ |a − b|²) for "rbf" and a·b for "linear". Its matrix is centered; the map is the eigenvector of the
    largest eigenvalue λ times √λ, with the sign that correlates positively with the uncentered component of
    the features, and zero if every channel is constant. The matrix has a row and a column per position, so
    choose a late layer.

    Args:
        A: features, (B, K, *spatial); half precision is computed in float32.
        kernel: "sigmoid", "rbf" or "linear" (which is `principal_component(A, sign="uncentered")`).
        gamma: γ, > 0; 1 / K by default.

    Raises:
        ValueError: an option is out of range.

    References:
        KPCA-CAM (arXiv:2410.00267).
    """
    gamma = 1 / A.shape[1] if gamma is None else gamma
    rows = _centered(A)
    products = rows.mT @ rows
    if kernel == "sigmoid":
        products = torch.tanh(gamma * products + 1)
    elif kernel == "rbf":
        squares = products.diagonal(dim1=1, dim2=2)
        products = torch.exp(-gamma * (squares[:, :, None] + squares[:, None] - 2 * products))
    by_row = products - products.mean(2, keepdim=True)
    return _finished(_scores(by_row - by_row.mean(1, keepdim=True)), A, _uncentered(A))


@checked
def peak_component(A: Maps) -> Map:
    """The first principal component with the sign that makes the value furthest from zero positive.

    Args:
        A: features, or weighted features, (B, K, *spatial).
    """
    found = principal_component(A)
    values = found.flatten(1)
    sign = torch.where(-values.amin(1) > values.amax(1), -1.0, 1.0).to(found)
    return found * sign.reshape(-1, *[1] * (found.ndim - 1))


def _uncentered(A: Tensor) -> Tensor:
    """The uncentered component, which says how a centered one is turned."""
    return unchecked(principal_component)(precise(A).detach(), center=False)


def _centered(A: Tensor) -> Tensor:
    """(B, K, positions); exactly zero for a constant channel, whose mean may be rounded."""
    rows = precise(A).flatten(2)
    varies = rows.amax(2, keepdim=True) > rows.amin(2, keepdim=True)
    return torch.where(varies, rows - rows.mean(2, keepdim=True), 0.0)


def _scores(gram: Tensor) -> Tensor:
    """The positions' coordinates along the leading component, (B, P), from their products (B, P, P)."""
    value, vector = _leading(gram)
    root = torch.where(value > 0, torch.where(value > 0, value, 1.0).sqrt(), 0.0)
    return root[:, None] * vector


def _leading(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue (B,) and its eigenvector (B, M) of symmetric matrices (B, M, M).

    What is added to the eigenvector is zero but for rounding; its derivative is the eigenvector's own. That
    of `torch.linalg.eigh` is NaN where any two eigenvalues are equal, as those of dead channels are.
    """
    checks.check_finite(gram, "the products of the features")
    values, vectors = torch.linalg.eigh(gram.detach())
    first, others = vectors[..., -1], vectors[..., :-1]
    largest = values[..., -1:]
    gaps = largest - values[..., :-1]
    is_apart = gaps > torch.finfo(gram.dtype).eps ** 0.5 * largest
    image = torch.einsum("bmn,bn->bm", gram, first)
    turn = torch.einsum("bmi,bm->bi", others, image) / torch.where(is_apart, gaps, 1.0)
    vector = first + torch.einsum("bmi,bi->bm", others, torch.where(is_apart, turn, 0.0))
    return torch.einsum("bm,bm->b", first, image), vector


def _finished(found: Tensor, A: Tensor, grows_with: Tensor | None = None) -> Tensor:
    """The component (B, P) with its sign and A's shape and dtype; zero where no channel varies.

    It is turned so that it grows with another map, (B, *spatial), or so that its sum is positive.
    """
    rows = precise(A).flatten(2)
    if grows_with is None:
        agreement = found.sum(1)
    else:
        other = grows_with.flatten(1)
        agreement = (found * (other - other.mean(1, keepdim=True))).sum(1)
    varies = (rows.amax(2) > rows.amin(2)).any(1)
    sign = torch.where(varies, torch.where(agreement < 0, -1.0, 1.0), 0.0).to(found)
    return (sign[:, None] * found).reshape(A.shape[0], *A.shape[2:]).to(A.dtype)
