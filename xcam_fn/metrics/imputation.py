"""Remove and debias: what the score does when pixels are removed and their values imputed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import NonNegative
from xcam_fn.metrics.judged import Judged, ScoringOptions, metric, shares_of
from xcam_fn.perturb import normal


class Road(NamedTuple):
    """What the score does when pixels are removed and their values imputed.

    Attributes:
        fractions: (T,), the share of pixels that were removed, 0 to 1.
        most_relevant_first: (B, T), the scores.
        least_relevant_first: (B, T), the scores.
        value: (B,), half the mean difference of the two, the higher the better.
    """

    fractions: Tensor
    most_relevant_first: Tensor
    least_relevant_first: Tensor
    value: Tensor


@metric("ROAD", best="highest")
def road(
    judged: Judged,
    *,
    fractions: Iterable[float] = (0.2, 0.4, 0.6, 0.8),
    std: NonNegative = 0.01,
    seed: int = 0,
    **_: Unpack[ScoringOptions],
) -> Road:
    """The score while pixels are removed by imputing them, the most and the least relevant first.

    A removed pixel becomes the weighted mean of its neighbors (1/6 beside it, 1/12 across), which is one
    sparse linear system for all of them, and some noise: what is left does not tell where pixels were
    removed.

    Args:
        fractions: the shares of pixels to remove, each in (0, 1).
        std: of the noise, ≥ 0, in units of x.
        seed: of the noise.

    Returns:
        `Road(fractions, most_relevant_first, least_relevant_first, value)`.

    References:
        Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods
        (arXiv:2202.00449).
    """
    x = judged.x
    if x.ndim != 4:
        wanted = "(B, C, H, W): pixels have neighbors in two axes"
        raise ValueError(f"x has shape {tuple(x.shape)}; expected {wanted}")
    shares = shares_of(fractions)
    total = judged.rank[0].numel()
    scores = []
    for rank in (judged.rank, total - 1 - judged.rank):
        for i, share in enumerate(shares):
            noise = normal(seed, i, tuple(x.shape[1:]), like=x) * float(std)
            gone = rank < round(share * total)
            images = torch.stack([imputed(*pair, noise) for pair in zip(x, gone, strict=True)])
            scores.append(judged.scoring.each(images)[:, 0])
            checks.check_finite(scores[-1], "the score")
    most, least = torch.stack(scores, 1).reshape(len(x), 2, -1).unbind(1)
    return Road(torch.tensor(shares).to(x), most, least, (least - most).mean(1) / 2)


def imputed(
    image: Float[Tensor, "C H W"], gone: Bool[Tensor, "H W"], noise: Float[Tensor, "C H W"]
) -> Float[Tensor, "C H W"]:
    """Return the image with the pixels that are gone solved for, and noise where they were."""
    from scipy import sparse  # noqa: PLC0415, slow to import, and needed here alone
    from scipy.sparse.linalg import spsolve  # noqa: PLC0415

    mask = gone.flatten().cpu().numpy()
    values = image.detach().double().flatten(1).cpu().numpy()
    lines = [sparse.csr_array(np.eye(n, k=-1) + 2 * np.eye(n) + np.eye(n, k=1)) for n in gone.shape]
    near = sparse.csr_array(sparse.kron(*lines) - 4 * sparse.eye_array(mask.size))[mask] / 12
    known, weights = near[:, ~mask] @ values[:, ~mask].T, sparse.diags_array(near.sum(1))
    solved = spsolve((weights - near[:, mask]).tocsc(), known).reshape(len(known), -1)
    return image.masked_scatter(gone, torch.from_numpy(solved.T).to(image)) + noise * gone
