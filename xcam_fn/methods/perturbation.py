"""Methods that mask the image, and score it with parts hidden or shown alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Unpack

import torch
from torch import Tensor

from xcam_fn import checks, weights
from xcam_fn.arguments import Count, NonNegative, unchecked
from xcam_fn.maps import corners_minmax, heatmap, minmax, minmax_resized, precise, resize, resized_minmax
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.methods.method import comparable
from xcam_fn.methods.options import MASKING, Channels, MaskOf, MaskOptions, Score
from xcam_fn.names import needed
from xcam_fn.perturb import (
    Baseline,
    baseline_images,
    blurred,
    distinct_maps,
    grid_mask,
    normal,
    scatter_scores,
)
from xcam_fn.scoring.running import Running, RunningOptions
from xcam_fn.targets import Classes
from xcam_fn.targets.detections import Detection
from xcam_fn.weights import Projection

__all__ = ["drise", "groupcam", "gscorecam", "iscam", "rise", "scorecam", "sscam"]

_RESIZE_FIRST = functools.partial(heatmap, resize_first=True)
_CUMULATIVE: dict[str, Any] = {"scales": "cumulative"}
_TORCHCAM: dict[str, Any] = {"score": "logit", "softmax": True, "mask": minmax_resized}

# The image masked by a channel's map, `(image, baseline, map) -> image`.
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]
# How much each channel matters to each class, (B, K, n), or (B, K, 1) where all classes share it.
Rank = Callable[[Call, Classes], Tensor]


def masking(mask: MaskOf, size: Sequence[int], share: float = 1.0) -> Mask:
    """Show the image through a map's mask times a share, and the baseline elsewhere."""
    return lambda image, base, one: base + share * _mask_of(mask, one, size).to(image) * (image - base)


def _mask_of(mask: MaskOf, one: Tensor, size: Sequence[int]) -> Tensor:
    """The mask of one map, by the library's or a user's function."""
    expected = f"masks (n, {', '.join(map(str, size))})"
    found = unchecked(mask)(one[None], size)
    return checks.check_returned("mask", found, expected, lambda found: found.shape == (1, *size))[0]


def _spread(call: Call, _: Classes) -> Tensor:
    """The standard deviation of each channel over the positions."""
    return precise(call.features).flatten(2).std(2, correction=0)[..., None]


def _mean_gradient(call: Call, cls: Classes) -> Tensor:
    return precise(call.gradient(cls)).flatten(3).mean(3).movedim(1, 2)


def budget(K: int, channels: Channels) -> int:
    """The number of channels to score, of K."""
    return min(K, math.ceil(channels * K) if isinstance(channels, float) else channels or K)


def in_budget(call: Call, cls: Classes, channels: Channels, rank: Rank) -> Tensor:
    """Whether each channel is among the most important ones, (B, K, n) or (B, K, 1).

    Args:
        call: the network, the layer and the images.
        cls: the class whose gradient ranks the channels, if any.
        channels: the number of channels, as in `MaskOptions`.
        rank: computes each channel's importance.
    """
    if channels is None:
        return torch.ones((), dtype=torch.bool, device=call.x.device).expand(*call.features.shape[:2], 1)
    ranks = rank(call, cls)
    # Channels of equal rank are treated alike: otherwise their order would decide.
    return ranks >= ranks.topk(budget(ranks.shape[1], channels), 1).values[:, -1:]


def without(A: Tensor, is_scored: Tensor) -> Tensor:
    """The features (B, K, *spatial), with zeros in channels that no class scores, by (B, K, n)."""
    return torch.where(is_scored.any(2).reshape(*A.shape[:2], *[1] * (A.ndim - 2)), A, 0.0)


def _masked_map(
    call: Call,
    masks: Sequence[tuple[Any, Mask]],
    options: MaskOptions,
    *,
    zero_mask_hides: bool = True,
    rank: Rank = _spread,
) -> Tensor:
    """The maps (B, n, *spatial) of Score-CAM and its variants: channels weighted by the masked image's score.

    A channel's score is the mean over the masks. Each mask has a key, under which methods with equal masks
    share scores, or None. If a mask of zeros hides the image, constant channels need no forward.
    """
    how: Any = {**MASKING, **options}
    running = Running(**{name: how[name] for name in Running._fields if name in how})
    if how["summed"] == "masks" and how["projection"] is not None:
        raise ValueError("summed='masks' cannot be combined with a projection; use summed='features'")
    scoring = call.scoring(how["score"], running)
    is_scored = in_budget(call, scoring.explained.logit_of, how["channels"], rank)
    x, A = call.x, call.features
    base = baseline_images(how["baseline"], x)
    found = distinct_maps(without(A, is_scored))
    of_baseline = scoring.each(base)
    # Subtract before averaging: equal scores then cancel exactly.
    reference = of_baseline if how["increase"] else torch.zeros_like(of_baseline)
    alike = tuple(comparable(how[name]) for name in ("score", "baseline", "mask"))
    alike += (running._replace(progress=False), how["channels"], how["channels"] and rank)

    def scored(key: Any, mask: Mask) -> Tensor:
        compute = lambda: scoring.perturbed(mask, found.which, (found.maps,), beside=(base,))  # noqa: E731
        return compute() if key is None else call.once(("masked", key, alike), compute)

    shown: Any = sum(scored(key, mask) - reference[found.which] for key, mask in masks)
    constant: Any = of_baseline - reference
    if not zero_mask_hides:  # a constant map's mask changes too: score it, once per image
        every = torch.arange(len(x), device=x.device)
        zeros = (torch.zeros_like(A[:, 0]),)
        changed = [scoring.perturbed(mask, every, zeros, beside=(base,)) - reference for _, mask in masks]
        constant = sum(changed) / len(masks)
    scores = scatter_scores(shown / len(masks), found, constant)
    scores = scores.masked_fill(~is_scored, -torch.inf if how["softmax"] else 0.0)
    scores = scores.softmax(1) if how["softmax"] else scores
    if how["summed"] == "features":
        return projected(A, scores, how["projection"])
    total: Any = 0.0
    for chunk in torch.arange(A.shape[1], device=A.device).split(scoring.chunk_size):
        M = precise(how["mask"](A[:, chunk], tuple(x.shape[2:])))
        total = total + torch.einsum("bkn,bk...->bn...", precise(scores)[:, chunk], M)
    return total


def projected(A: Tensor, w: Tensor, projection: Projection | None) -> Tensor:
    """Σ_k w_k A_k, or another projection of the features weighted by (B, K, n): maps (B, n, ...)."""
    if projection is None:
        return torch.einsum("bkn,bk...->bn...", precise(w), precise(A))
    one_class = lambda w: weights.weighted_sum(A, w, projection)  # noqa: E731
    return torch.vmap(one_class, 2)(w).movedim(0, 1)


@method(
    "Score-CAM", family="perturbation", paper="arXiv:1910.01279",
    summary="each channel weighted by the score of the image seen through its mask", cost=budget,
    variants={
        "xplaincam": {"increase": False, "summed": "masks", "mask": minmax_resized},
        "torchcam": _TORCHCAM,
        "pytorch-grad-cam": {"score": "logit", "increase": False, "softmax": True, "mask": corners_minmax},
    },
)  # fmt: skip
def scorecam(call: Call, **options: Unpack[MaskOptions]) -> Tensor:
    """Score-CAM: each channel weighted by the score of the image masked by that channel.

    M_k = n(U(A_k)); w_k = p(x ⊙ M_k) − p(x₀); the map is Σ w_k A_k. One forward pass for each channel that is
    neither constant nor equal to another.

    References:
        Wang et al. (arXiv:1910.01279).
    """
    mask = masking(options.get("mask", resized_minmax), tuple(call.x.shape[2:]))
    return _masked_map(call, [(1.0, mask)], options)


@method(
    "gScoreCAM", family="perturbation", paper="ACCV 2022",
    summary="Score-CAM of the channels with the highest mean gradients", cost=budget,
    options={"channels": 300},
)  # fmt: skip
def gscorecam(call: Call, **options: Unpack[MaskOptions]) -> Tensor:
    """gScoreCAM: Score-CAM of only the channels with the highest mean gradients.

    M_k = n(U(A_k)); w_k = p(x ⊙ M_k) − p(x₀) for the k channels with the highest mean gradient of the class's
    logit, and 0 for the others; the map is Σ w_k A_k. One forward pass for each of them.

    References:
        Chen et al., gScoreCAM: What Objects Is CLIP Looking At?, ACCV 2022.
    """
    mask = masking(options.get("mask", resized_minmax), tuple(call.x.shape[2:]))
    return _masked_map(call, [(1.0, mask)], options, rank=_mean_gradient)


@method(
    "SS-CAM", family="perturbation", paper="arXiv:2006.14255",
    summary="Score-CAM with scores averaged over noisy masks",
    variants={
        "xplaincam": {"score": "logit", "softmax": True, "postprocess": _RESIZE_FIRST},
        "torchcam": {**_TORCHCAM, "noise": "mask"},
    },
    cost=lambda K, channels, num_samples: budget(K, channels) * num_samples,
)  # fmt: skip
def sscam(
    call: Call,
    *,
    num_samples: Count = 35,
    std: NonNegative = 2.0,
    seed: int = 0,
    noise: Literal["map", "mask"] = "map",
    **options: Unpack[MaskOptions],
) -> Tensor:
    """SS-CAM: Score-CAM with each channel's score averaged over noisy masks.

    M_kj = n(U(A_k) + δ_j), δ_j ~ N(0, σ²); w_k = mean_j p(x ⊙ M_kj) − p(x₀); the map is Σ w_k A_k.
    `num_samples` forward passes per channel. The noise is a function of the seed and j, the same for every
    channel and image.

    Args:
        num_samples: noisy masks per channel, ≥ 1.
        std: σ of the noise, ≥ 0, in units of the features (of the mask with noise="mask").
        noise: add the noise to the resized "map" before it is normalized, or to the "mask".

    References:
        Wang et al. (arXiv:2006.14255).
    """
    size, mask = tuple(call.x.shape[2:]), options.get("mask", resized_minmax)

    def noisy(j: int) -> Mask:
        def shown(image: Tensor, base: Tensor, feature: Tensor) -> Tensor:
            delta = normal(seed, j, size, like=image) * std
            if noise == "mask":
                M = _mask_of(mask, feature, size) + delta
            else:
                M = minmax(resize(feature[None], size)[0] + delta, len(size))
            return base + M * (image - base)

        return shown

    return _masked_map(call, [(None, noisy(j)) for j in range(num_samples)], options, zero_mask_hides=False)


@method(
    "IS-CAM", family="perturbation", paper="arXiv:2010.03023",
    summary="Score-CAM with scores averaged from faint to full masks",
    cost=lambda K, channels, num_samples: budget(K, channels) * num_samples,
    variants={
        "xplaincam": {**_CUMULATIVE, "score": "logit", "softmax": True, "postprocess": _RESIZE_FIRST},
        "torchcam": {**_CUMULATIVE, **_TORCHCAM},
    },
)  # fmt: skip
def iscam(
    call: Call,
    *,
    num_samples: Count = 10,
    scales: Sequence[float] | Literal["even", "cumulative"] = "even",
    **options: Unpack[MaskOptions],
) -> Tensor:
    """IS-CAM: Score-CAM with each channel's score averaged over its mask from faint to full.

    w_k = mean_t p(x ⊙ t M_k) − p(x₀) with t = 1/T … 1; the map is Σ w_k A_k. `num_samples` forward passes per
    channel.

    Args:
        num_samples: T, the number of scales, ≥ 1.
        scales: "even" (t = 1/T, 2/T … 1), "cumulative" (t_i = Σ_{j≤i} j/T, as in other libraries), or the
            scales themselves (`num_samples` is then not used).

    References:
        Naidu et al. (arXiv:2010.03023).
    """
    size, mask = tuple(call.x.shape[2:]), options.get("mask", resized_minmax)
    even = [(i + 1) / num_samples for i in range(num_samples)]
    named = {"even": even, "cumulative": list(itertools.accumulate(even))}
    shares = named[scales] if isinstance(scales, str) else [float(t) for t in scales]
    return _masked_map(call, [(t, masking(mask, size, t)) for t in shares], options)


@method(
    "Group-CAM", family="perturbation", paper="arXiv:2103.13859",
    summary="groups of channels weighted by their scores on a blurred image", variants={"xplaincam": {}},
    cost=lambda channels, num_groups: num_groups,  # noqa: ARG005
)  # fmt: skip
def groupcam(
    call: Call,
    *,
    num_groups: Count = 32,
    cluster: Literal["chunks", "kmeans", "agglomerative"] = "chunks",
    seed: int = 0,
    baseline: Baseline = blurred,
    score: Score = "probability",
    **options: Unpack[RunningOptions],
) -> Tensor:
    """Group-CAM: groups of channels weighted by the score of the image, sharp only inside the group's mask.

    A′ = gradcam weights ⊙ A, summed in groups; M_g = n(U(ReLU(A′_g))); w_g = ReLU(p(x ⊙ M_g + x₀ ⊙ (1 −
    M_g)) − p(x₀)) with x₀ the blurred image; the map is Σ w_g ReLU(A′_g). One forward pass per group.

    Args:
        num_groups: groups of channels, 1 … K.
        cluster: "chunks" of neighboring channels, or clusters of similar maps: "kmeans" or "agglomerative"
            (with scikit-learn, the extra `cluster`).
        seed: seed of k-means; the others are not random.

    References:
        Zhang et al. (arXiv:2103.13859).
    """
    x = call.x
    scoring = call.scoring(score, Running(**options))
    G = call.gradient(scoring.explained.logit_of)
    A = call.features
    K = A.shape[1]
    if num_groups > K:
        has = f"num_groups={num_groups}, but the layer has {K} channels"
        raise checks.StructureError(f"{has}; expected 1 to {K} groups")
    base = baseline_images(baseline, x)
    of_baseline = scoring.each(base)
    cams = []
    for n in range(G.shape[1]):
        weighted = weights.gradcam(A, G[:, n]).reshape(*A.shape[:2], *[1] * (A.ndim - 2)) * precise(A)
        grouped = torch.stack([_grouped(one, num_groups, cluster, seed) for one in weighted]).relu()
        found = distinct_maps(grouped)
        shown = masking(resized_minmax, tuple(x.shape[2:]))
        scores = scoring.perturbed(shown, found.which, (found.maps,), beside=(base,))
        w = (scatter_scores(scores, found, of_baseline) - of_baseline[:, None])[..., n].relu()
        cams.append(torch.einsum("bg,bg...->b...", w.to(grouped), grouped))
    return torch.stack(cams, 1)


def _grouped(weighted: Tensor, num_groups: int, cluster: str, seed: int) -> Tensor:
    """Sum maps (K, *spatial) in groups, (num_groups, *spatial)."""
    K = len(weighted)
    if cluster == "chunks":
        return torch.stack([group.sum(0) for group in weighted.tensor_split(num_groups)])
    remedy = "install it with pip install 'xcam-fn[cluster]', or use 'chunks'"
    clusters = needed("sklearn.cluster", f"cluster={cluster!r} needs scikit-learn; {remedy}")
    maps = weighted.detach().reshape(K, -1).double().cpu().numpy()
    kmeans = clusters.KMeans(num_groups, random_state=seed)
    found = kmeans if cluster == "kmeans" else clusters.AgglomerativeClustering(num_groups)
    label = torch.as_tensor(found.fit_predict(maps), device=weighted.device)
    return torch.stack([weighted[label == group].sum(0) for group in range(num_groups)])


@method(
    "RISE", family="perturbation", paper="arXiv:1806.07421",
    summary="random masks weighted by their scores; needs no layer",
    variants={"xplaincam": {"num_masks": 8000, "keep": 0.1, "score": "logit"}},
    cost=lambda channels, num_masks: num_masks, returns="scores",  # noqa: ARG005
)  # fmt: skip
def rise(
    call: Call,
    *,
    num_masks: Count = 4000,
    grid: Count = 7,
    keep: Annotated[float, ("above", 0), ("at_most", 1)] = 0.5,
    seed: int = 0,
    score: Score = "probability",
    **options: Unpack[RunningOptions],
) -> Tensor:
    """RISE: the sum of random masks, each weighted by the score of the masked image.

    Σ_n p(x ⊙ M_n) M_n / (N · P). `num_masks` forward passes per image; only the model's output is needed. The
    layer is not used, and the model may be None if `scorer` replaces it. Since the zero of a score is
    arbitrary, the heatmap is scaled from the map's minimum to its maximum.

    Args:
        num_masks: N, ≥ 1.
        grid: cells of a mask along each axis, ≥ 1.
        keep: P, the probability that a cell is shown, in (0, 1].
        seed: the masks are a function of it and their index.

    References:
        Petsiuk et al. (arXiv:1806.07421).
    """
    x = call.x

    def mask(index: Tensor) -> Tensor:
        return grid_mask(seed, index, tuple(x.shape[2:]), grid=grid, keep=keep, like=x)

    scoring = call.scoring(score, Running(**options))
    index = torch.arange(num_masks, device=x.device)
    scores = precise(scoring.every(lambda image, i: image * mask(i), index))
    total: Any = 0.0
    for chunk in index.split(scoring.chunk_size):
        total = total + torch.einsum("bmn,m...->bn...", scores[:, chunk], torch.vmap(mask)(chunk).to(scores))
    return total / (num_masks * keep)


@method(
    "D-RISE", family="perturbation", paper="arXiv:2006.03204",
    summary="RISE for detectors: masks weighted by how similar the masked image's detections are",
    cost=lambda channels, num_masks: num_masks, returns="scores", explains=(rise,),  # noqa: ARG005
)  # fmt: skip
def drise(
    call: Call,
    *,
    num_masks: Count = 5000,
    grid: Count = 16,
    keep: Annotated[float, ("above", 0), ("at_most", 1)] = 0.5,
    seed: int = 0,
    **options: Unpack[RunningOptions],
) -> Tensor:
    """D-RISE: the sum of random masks, each weighted by the most similar detection in the masked image.

    Σ_n s_n M_n / (N · P), s_n = max_j IoU(d, d_j) cos(p, p_j) O_j over the detections d_j in x ⊙ M_n, for the
    detection d with class probabilities p that `cls=targets.detection(box, label)` names. It is RISE of
    `detection(..., part="similarity")` with finer masks; for any other class or target it is RISE itself.

    References:
        Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps (arXiv:2006.03204).
    """
    asked = call.asking(call.cls.similar()) if isinstance(call.cls, Detection) else call
    maps = rise.run(asked, num_masks=num_masks, grid=grid, keep=keep, seed=seed, **options)
    call.many = asked.many
    return maps
