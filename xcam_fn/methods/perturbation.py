"""The perturbation family: what the score does when parts of image or features are taken away."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks, weights
from xcam_fn.maps import heatmap, minmax, resize, resized_minmax
from xcam_fn.methods.gradient import finish
from xcam_fn.methods.method import Method, Postprocess, comparable, method
from xcam_fn.network.attention import mappable
from xcam_fn.network.split import (
    Layer,
    Parts,
    Same,
    feature_and_grad,
    features,
    guarded,
    in_transform,
    once,
    prepare,
    recording,
    residual_rows,
    run_head,
    run_trunk,
    trunk_of,
)
from xcam_fn.perturb import (
    Baseline,
    baseline_images,
    blurred,
    distinct_maps,
    grid_mask,
    normal,
    perturbation_scores,
    scatter_scores,
)
from xcam_fn.scoring.running import (
    TARGETS,
    Explained,
    Precision,
    Run,
    Running,
    Scoring,
    check_running,
    check_score,
    class_of,
    explained_score,
)
from xcam_fn.targets import Classes
from xcam_fn.weights import Projection

Images = Float[Tensor, "B C *size"]
MaskOf = Callable[[Tensor, Sequence[int]], Tensor]


def _without_class_axis(cam: Tensor, explained: Explained) -> Tensor:
    """Maps (B, n, ...) as (B, ...) where one class of each image was asked for."""
    return cam if explained.many else cam.squeeze(1)


def _masking(mask: MaskOf, size: Sequence[int]) -> Callable[..., Tensor]:
    def shown(image: Tensor, base: Tensor, feature: Tensor) -> Tensor:
        M = mask(feature[None], size)[0]
        return base + M * (image - base)

    return shown


def _region_map(
    model: nn.Module,
    layer: Layer,
    x: Tensor,
    cls: Classes,
    *,
    ways: Sequence[tuple[Any, Callable[..., Tensor]]],
    zero_mask_is_baseline: bool,
    baseline: Baseline,
    score: str,
    increase: bool,
    softmax: bool,
    summed: str,
    mask: MaskOf,
    projection: Projection | None,
    how: Running,
    postprocess: Postprocess | None,
    create_graph: bool,
) -> Tensor:
    """The map that Score-CAM, SS-CAM and IS-CAM share: channels weighted by the score of what they show.

    `ways` are those in which a channel's mask is tried, `(image, base, feature) -> image`; a channel's score
    is their mean. A way with a key is the same for all methods that use the key with the same mask.
    """
    checks.check_call(model, x)
    check_running(how, x)
    check_score(score)
    checks.check_choice("summed", summed, ("features", "masks"))
    if summed == "masks" and projection is not None:
        raise ValueError("summed='masks' with a projection: masks are only added up; use summed='features'")
    A = features(model, layer, x) if not create_graph else _features_with_graph(model, layer, x)
    with recording(x, create_graph), checks.explained(model, x):
        scoring = Scoring(model, x, cls, score, how)
        base = baseline_images(baseline, x)
        found = distinct_maps(A)
        of_baseline = scoring.each(base)
        # Each score is compared before they are averaged: equal scores then cancel exactly.
        reference = of_baseline if increase else torch.zeros_like(of_baseline)

        def scored(key: Any, way: Callable[..., Tensor]) -> Tensor:
            compute = lambda: scoring.perturbed(way, found.which, (found.maps,), beside=(base,))  # noqa: E731
            if key is None:
                return compute()
            asked = (score, how._replace(progress=False), comparable(baseline), comparable(mask))
            return once(layer, ("masked", key, Same(A), Same(cls), *asked), compute)

        shown: Any = sum(scored(key, way) - reference[found.which] for key, way in ways)
        constant: Any = of_baseline - reference
        if not zero_mask_is_baseline:  # a constant map's mask is changed as well: it is scored, once an image
            every = torch.arange(len(x), device=x.device)
            zeros = torch.zeros_like(A[:, 0])
            changed: Any = sum(
                scoring.perturbed(way, every, (zeros,), beside=(base,)) - reference for _, way in ways
            )
            constant = changed / len(ways)
        scores = scatter_scores(shown / len(ways), found, constant)
        if softmax:
            scores = scores.softmax(1)
        if summed == "features":
            cam = _projected(A, scores, projection)
        else:
            cam = _summed_masks(A, scores, mask, tuple(x.shape[2:]), scoring.chunk_size)
        return finish(_without_class_axis(cam, scoring.explained), x, postprocess)


def _features_with_graph(model: nn.Module, layer: Layer, x: Tensor) -> Tensor:
    return trunk_of(layer, prepare(model, layer, x), x)[0]


def _projected(A: Tensor, w: Tensor, projection: Projection | None) -> Tensor:
    """Σ_k w_k A_k, or another projection of the weighted features: weights (B, K, n) to maps (B, n, ...)."""
    if projection is None:
        return torch.einsum("bkn,bk...->bn...", w, A)
    one_class = lambda w: weights.weighted_sum(A, w, projection)  # noqa: E731
    return torch.vmap(one_class, in_dims=2, out_dims=1)(w)


def _summed_masks(A: Tensor, w: Tensor, mask: MaskOf, size: tuple[int, ...], chunk_size: int) -> Tensor:
    """Σ_k w_k M_k at the input's size: weights (B, K, n) to maps (B, n, ...)."""
    total: Any = 0.0
    for chunk in torch.arange(A.shape[1], device=A.device).split(chunk_size):
        M = mask(A[:, chunk], size)
        total = total + torch.einsum("bkn,bk...->bn...", w[:, chunk], M)
    return total


def _scorecam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    baseline: Baseline = 0.0,
    score: str = "probability",
    increase: bool = True,
    softmax: bool = False,
    summed: Literal["features", "masks"] = "features",
    mask: MaskOf = resized_minmax,
    projection: Projection | None = None,
    chunk_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    scorer: Run | None = None,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Score-CAM: each channel weighted by what the image scores where only that channel's mask shows it.

    M_k = n(U(A_k)); w_k = p(x ⊙ M_k) − p(x₀); the map is Σ w_k A_k. One forward for each channel that is not
    constant and not equal to another.
    {arguments}{returns}

    References:
        Wang et al. (arXiv:1910.01279).
    """
    how = Running(precision, compile, scorer, chunk_size, progress)
    return _region_map(
        model, layer, x, cls, ways=[(1.0, _masking(mask, tuple(x.shape[2:])))], zero_mask_is_baseline=True,
        baseline=baseline, score=score, increase=increase, softmax=softmax, summed=summed, mask=mask,
        projection=projection, how=how, postprocess=postprocess, create_graph=create_graph,
    )  # fmt: skip


def _sscam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    num_samples: int = 35,
    std: float = 2.0,
    seed: int = 0,
    noise: Literal["map", "mask"] = "map",
    baseline: Baseline = 0.0,
    score: str = "probability",
    increase: bool = True,
    softmax: bool = False,
    summed: Literal["features", "masks"] = "features",
    mask: MaskOf = resized_minmax,
    projection: Projection | None = None,
    chunk_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    scorer: Run | None = None,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """SS-CAM: Score-CAM with each channel's score averaged over noisy masks.

    M_kj = n(U(A_k) + δ_j), δ_j ~ N(0, σ²); w_k = mean_j p(x ⊙ M_kj) − p(x₀); the map is Σ w_k A_k.
    `num_samples` forwards for each channel. The noise is a function of the seed and j, the same for every
    channel and image.
    {arguments}        num_samples: noisy masks for each channel, ≥ 1.
        std: σ of the noise, ≥ 0, in units of the features (of the mask with noise="mask").
        seed: of the noise.
        noise: where it is added: to the resized "map" before it is normalized, or to the "mask".
    {returns}

    References:
        Wang et al. (arXiv:2006.14255).
    """
    checks.check_count("num_samples", num_samples)
    checks.check_number("std", std, at_least=0)
    checks.check_seed(seed)
    checks.check_choice("noise", noise, ("map", "mask"))
    size = tuple(x.shape[2:])

    def noisy(j: int) -> Callable[..., Tensor]:
        def shown(image: Tensor, base: Tensor, feature: Tensor) -> Tensor:
            delta = normal(seed, j, size, like=image) * std
            if noise == "mask":
                M = mask(feature[None], size)[0] + delta
            else:
                M = minmax(resize(feature[None], size)[0] + delta, len(size))
            return base + M * (image - base)

        return shown

    how = Running(precision, compile, scorer, chunk_size, progress)
    return _region_map(
        model, layer, x, cls, ways=[(None, noisy(j)) for j in range(num_samples)],
        zero_mask_is_baseline=False, baseline=baseline, score=score, increase=increase, softmax=softmax,
        summed=summed, mask=mask, projection=projection, how=how, postprocess=postprocess,
        create_graph=create_graph,
    )  # fmt: skip


def _iscam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    num_samples: int = 10,
    scales: Sequence[float] | Literal["even", "cumulative"] = "even",
    baseline: Baseline = 0.0,
    score: str = "probability",
    increase: bool = True,
    softmax: bool = False,
    summed: Literal["features", "masks"] = "features",
    mask: MaskOf = resized_minmax,
    projection: Projection | None = None,
    chunk_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    scorer: Run | None = None,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """IS-CAM: Score-CAM with each channel's score averaged over its mask from faint to full.

    w_k = mean_t p(x ⊙ t M_k) − p(x₀) with t = 1/T … 1; the map is Σ w_k A_k. `num_samples` forwards for each
    channel.
    {arguments}        num_samples: T, the number of scales, ≥ 1.
        scales: "even" (t = 1/T, 2/T … 1), "cumulative" (t_i = Σ_{j≤i} j/T, as in other libraries), or the
            scales themselves (`num_samples` is then not used).
    {returns}

    References:
        Naidu et al. (arXiv:2010.03023).
    """
    size = tuple(x.shape[2:])

    def scaled(t: float) -> Callable[..., Tensor]:
        def shown(image: Tensor, base: Tensor, feature: Tensor) -> Tensor:
            return base + t * mask(feature[None], size)[0] * (image - base)

        return shown

    how = Running(precision, compile, scorer, chunk_size, progress)
    return _region_map(
        model, layer, x, cls, ways=[(t, scaled(t)) for t in _checked_scales(scales, num_samples)],
        zero_mask_is_baseline=True, baseline=baseline, score=score, increase=increase, softmax=softmax,
        summed=summed, mask=mask, projection=projection, how=how, postprocess=postprocess,
        create_graph=create_graph,
    )  # fmt: skip


def _checked_scales(scales: Sequence[float] | str, num_samples: int) -> list[float]:
    checks.check_count("num_samples", num_samples)
    even = [(i + 1) / num_samples for i in range(num_samples)]
    if isinstance(scales, str):
        checks.check_choice("scales", scales, ("even", "cumulative"))
        return even if scales == "even" else list(itertools.accumulate(even))
    found = [float(t) for t in scales]
    if not found or not all(math.isfinite(t) for t in found):
        raise ValueError(f"scales={scales!r}; expected 'even', 'cumulative' or at least one finite number")
    return found


def _ablationcam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    score: str = "logit",
    projection: Projection | None = None,
    chunk_size: int = 64,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Ablation-CAM: each channel weighted by the share of the score that is lost without it.

    w_k = (s − s_k) / s, where s_k is the score with A_k set to zero (0 where s is 0); the map is Σ w_k A_k.
    The trunk runs once, the head once for each channel that is not zero already.

    {call}        score: what is explained of a class, "logit" or "probability".
    {projection}        chunk_size: ablated copies of the features in one run of the head, ≥ 1; it changes the
            memory, not the map.
        progress: show a bar that counts runs of the head.
    {returns}

    References:
        Ramaswamy, Ablation-CAM, WACV 2020 (doi:10.1109/WACV45572.2020.9093360).
    """
    checks.check_count("chunk_size", chunk_size)
    check_score(score)
    parts = prepare(model, layer, x)
    with recording(x, create_graph), checks.explained(model, x), _scored_alike(parts):
        A, residual = trunk_of(layer, parts, x)
        explained = explained_score(lambda a: run_head(parts, a, residual), A, cls, TARGETS[score])
        which, channel = _channels_to_ablate(A)
        s = explained.own
        head = _Head(parts, x, A, residual, explained, chunk_size, progress)
        ablated = _scores_of_changed_features(head, _without_channel, which, channel)
        every = s[:, None].expand(-1, A.shape[1], -1)
        s_k = every.index_put((which, channel), ablated) if len(which) else every
        share = (every - s_k) / torch.where(every != 0, every, 1.0)
        cam = _projected(A, torch.where(every != 0, share, 0.0), projection)
        return finish(_without_class_axis(cam, explained), x, postprocess)


def _channels_to_ablate(A: Tensor) -> tuple[Tensor, Tensor]:
    """Which image and which channel, (P,) each: all channels but those that are zero already."""
    B, K = A.shape[:2]
    image = torch.arange(B, device=A.device).repeat_interleave(K)
    channel = torch.arange(K, device=A.device).repeat(B)
    if not checks.is_readable(A):
        return image, channel
    alive = (A.detach() != 0).flatten(2).any(-1).flatten()
    return image[alive], channel[alive]


def _without_channel(features: Tensor, channel: Tensor) -> Tensor:
    kept = torch.arange(len(features), device=features.device) != channel
    return features * kept.reshape(-1, *[1] * (features.ndim - 1)).to(features.dtype)


class _Head(NamedTuple):
    """A head ready to score changed features of the images of x."""

    parts: Parts
    x: Tensor
    A: Tensor
    residual: Any
    explained: Explained
    chunk_size: int
    progress: bool


def _scores_of_changed_features(
    head: _Head, change: Callable[[Tensor, Tensor], Tensor], which: Tensor, parameter: Tensor
) -> Tensor:
    """The scores (P, n) of the features of the images `which`, changed by `(features, parameter)`."""
    parts, explained = head.parts, head.explained
    if not parts.takes_any_batch:
        return _scored_one_by_one(head, change, which, parameter)

    def score(changed: Tensor, images: Tensor) -> Tensor:
        residual = residual_rows(parts, head.residual, images)
        return explained.of(run_head(parts, changed, residual), images)

    return perturbation_scores(
        score, head.A, change, which, (parameter,), chunk_size=head.chunk_size, progress=head.progress
    )


def _scored_one_by_one(
    head: _Head, change: Callable[[Tensor, Tensor], Tensor], which: Tensor, parameter: Tensor
) -> Tensor:
    """The same where the head reads more of its own image than the features.

    A chunk is then mapped over the features of one image; what else the head reads stays as it was.
    """
    parts, x, explained = head.parts, head.x, head.explained
    scores = []
    for image in range(len(x)):
        A, residual = run_trunk(parts, guarded(x[image : image + 1]))
        own = parameter[which == image] if checks.is_readable(x) else parameter[: len(parameter) // len(x)]
        if not len(own):
            continue
        here = torch.zeros(len(own), dtype=torch.int64, device=x.device)

        def score(changed: Tensor, images: Tensor, residual: Any = residual, image: int = image) -> Tensor:
            index = images.new_tensor([image])
            return _mapped(lambda a: explained.of(run_head(parts, a[None], residual), index)[0], changed)

        found = perturbation_scores(
            score, A, change, here, (own,), chunk_size=head.chunk_size, progress=head.progress
        )
        scores.append(found)
    return torch.cat(scores) if scores else x.new_zeros(0, explained.own.shape[-1])


def _scored_alike(parts: Parts) -> contextlib.AbstractContextManager[Any]:
    """Attention as it can be mapped, also for the score that the mapped ones are compared with."""
    return contextlib.nullcontext() if parts.takes_any_batch else mappable()


def _mapped(score: Callable[[Tensor], Tensor], changed: Tensor) -> Tensor:
    """The scores of changed features, mapped over them where the model allows it.

    A detector finds as many boxes as there are, which cannot be mapped: it runs on one after the other.
    """
    try:
        return torch.vmap(score)(changed)
    except RuntimeError as error:
        if in_transform() or "vmap" not in str(error):
            raise
        return torch.stack([score(a) for a in changed])


def _reciprocam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    gaussian: bool = True,
    score: str = "probability",
    chunk_size: int = 64,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Recipro-CAM: each position's value is the score of the features with all but that position masked.

    S(p) = p(A ⊙ M_p), M_p the 3 × 3 Gaussian (1/4 at p, 1/8 beside it, 1/16 at the corners) and zero
    elsewhere, or 1 at p alone. The trunk runs once, the head once for each position.

    {call}        gaussian: show the neighbors of a position too, by the Gaussian; else the position alone.
        score: what is explained of a class, "probability" or "logit".
        chunk_size: masked copies of the features in one run of the head, ≥ 1; it changes the memory, not the
            map.
        progress: show a bar that counts runs of the head.
    {returns}

    References:
        Byun and Lee (arXiv:2209.14074).
    """
    checks.check_count("chunk_size", chunk_size)
    check_score(score)
    parts = prepare(model, layer, x)
    with recording(x, create_graph), checks.explained(model, x), _scored_alike(parts):
        A, residual = trunk_of(layer, parts, x)
        explained = explained_score(lambda a: run_head(parts, a, residual), A, cls, TARGETS[score])
        B, spatial = len(A), A.shape[2:]
        axes = [torch.arange(length, device=A.device) for length in spatial]
        places = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        which = torch.arange(B, device=A.device).repeat_interleave(len(places))
        head = _Head(parts, x, A, residual, explained, chunk_size, progress)
        reach = 1 if gaussian else 0
        shown = _scores_of_changed_features(head, _only_around(reach), which, places.repeat(B, 1))
        cam = shown.reshape(B, *spatial, -1).movedim(-1, 1)
        return finish(_without_class_axis(cam, explained), x, postprocess)


def _only_around(reach: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What shows the features around a place, weighted by half for each step away from it along an axis."""

    def shown(features: Tensor, place: Tensor) -> Tensor:
        for axis, center in enumerate(place.unbind(), start=1):
            steps = (torch.arange(features.shape[axis], device=features.device) - center).abs()
            line = torch.where(steps <= reach, 0.5 ** (steps + reach), 0.0).to(features.dtype)
            features = features * line.reshape(-1, *[1] * (features.ndim - 1 - axis))
        return features

    return shown


def _groupcam(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    num_groups: int = 32,
    cluster: Literal["chunks", "kmeans", "agglomerative"] = "chunks",
    seed: int = 0,
    baseline: Baseline = blurred,
    score: str = "probability",
    chunk_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    scorer: Run | None = None,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """Group-CAM: groups of channels weighted by what the image scores where only the group's mask is sharp.

    A′ = gradcam weights ⊙ A, summed in groups; M_g = n(U(ReLU(A′_g))); w_g = ReLU(p(x ⊙ M_g + x₀ ⊙ (1 −
    M_g)) − p(x₀))
    with x₀ the blurred image; the map is Σ w_g ReLU(A′_g). One forward for each group.
    {arguments}        num_groups: groups of channels, 1 … K.
        cluster: "chunks" of neighboring channels, or by the likeness of their maps: "kmeans" or
            "agglomerative" (with scikit-learn, the extra `cluster`).
        seed: of k-means; the others draw nothing.
        baseline: x₀, what is seen where a group's mask hides: a number, a tensor or a callable of x.
    {returns}

    References:
        Zhang et al. (arXiv:2103.13859).
    """
    checks.check_call(model, x)
    how = Running(precision, compile, scorer, chunk_size, progress)
    check_running(how, x)
    check_score(score)
    checks.check_count("num_groups", num_groups)
    checks.check_seed(seed)
    checks.check_choice("cluster", cluster, ("chunks", "kmeans", "agglomerative"))
    with recording(x, create_graph), checks.explained(model, x):
        scoring = Scoring(model, x, cls, score, how)
        A, G, _ = feature_and_grad(model, layer, x, class_of(scoring.explained), create_graph=create_graph)
        K = A.shape[1]
        if num_groups > K:
            raise ValueError(
                f"num_groups={num_groups}, but the layer has {K} channels; expected 1 to {K} groups"
            )
        G = G if G.ndim > A.ndim else G[:, None]
        base = baseline_images(baseline, x)
        of_baseline = scoring.each(base)
        cams = []
        for n in range(G.shape[1]):
            weighted = weights.gradcam(A, G[:, n]).reshape(*A.shape[:2], *[1] * (A.ndim - 2)) * A
            grouped = torch.stack([_grouped(one, num_groups, cluster, seed) for one in weighted]).relu()
            found = distinct_maps(grouped)
            shown = _masking(resized_minmax, tuple(x.shape[2:]))
            scores = scoring.perturbed(shown, found.which, (found.maps,), beside=(base,))
            w = (scatter_scores(scores, found, of_baseline) - of_baseline[:, None])[..., n].relu()
            cams.append(torch.einsum("bg,bg...->b...", w, grouped))
        return finish(_without_class_axis(torch.stack(cams, 1), scoring.explained), x, postprocess)


def _grouped(weighted: Tensor, num_groups: int, cluster: str, seed: int) -> Tensor:
    """Maps (K, *spatial) summed in groups, (num_groups, *spatial)."""
    K = len(weighted)
    if cluster == "chunks":
        return torch.stack([group.sum(0) for group in weighted.tensor_split(num_groups)])
    try:
        from sklearn.cluster import AgglomerativeClustering, KMeans  # an extra
    except ImportError:
        raise ValueError(
            f"cluster={cluster!r} needs scikit-learn; install it with pip install 'xcam-fn[cluster]', "
            "or use 'chunks'"
        ) from None
    maps = weighted.detach().reshape(K, -1).double().cpu().numpy()
    kmeans = KMeans(num_groups, random_state=seed)
    found = kmeans if cluster == "kmeans" else AgglomerativeClustering(num_groups)
    label = torch.as_tensor(found.fit_predict(maps), device=weighted.device)
    return torch.stack([weighted[label == group].sum(0) for group in range(num_groups)])


def _rise(
    model: nn.Module | None,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    num_masks: int = 4000,
    grid: int = 7,
    keep: float = 0.5,
    seed: int = 0,
    score: str = "probability",
    chunk_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    scorer: Run | None = None,
    progress: bool = False,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """RISE: random masks added up, each weighted by what the image scores where it shows.

    Σ_n p(x ⊙ M_n) M_n / (N · P). `num_masks` forwards for each image; nothing is needed of the model but
    its output.

    Args:
        model: the network, in evaluation mode; None where `scorer` stands in for it.
        layer: not used; there so that all methods are called alike.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, (B, n) ints, or a target, a
            callable from the output to one score for each image.
        to_spatial: not used, as the layer.
        num_masks: N, ≥ 1.
        grid: cells of a mask along each axis, ≥ 1.
        keep: P, the probability that a cell is shown, in (0, 1].
        seed: of the masks, which are a function of it and their number.
    {scoring}        postprocess: `heatmap`, a callable `(cam, size) -> map`, or None for the raw map.
        create_graph: record the computation.
    {returns}

    References:
        Petsiuk et al. (arXiv:1806.07421).
    """
    checks.check_count("num_masks", num_masks)
    checks.check_count("grid", grid)
    checks.check_number("keep", keep, above=0, at_most=1)
    checks.check_seed(seed)
    check_score(score)
    how = Running(precision, compile, scorer, chunk_size, progress)
    if model is None:
        if scorer is None:
            raise ValueError(
                "model=None: expected a model, or a scorer=callable from images to outputs in its place"
            )
        model = nn.Identity().eval()
    checks.check_call(model, x)
    checks.check_model(model, x)
    check_running(how, x)
    size = tuple(x.shape[2:])

    def mask(index: Tensor) -> Tensor:
        return grid_mask(seed, index, size, grid=grid, keep=keep, like=x)

    with recording(x, create_graph), checks.explained(model, x):
        scoring = Scoring(model, x, cls, score, how)
        index = torch.arange(num_masks, device=x.device)
        which = torch.arange(len(x), device=x.device).repeat_interleave(num_masks)
        scores = scoring.perturbed(lambda image, i: image * mask(i), which, (index.repeat(len(x)),))
        scores = scores.reshape(len(x), num_masks, -1)
        total: Any = 0.0
        for chunk in index.split(scoring.chunk_size):
            total = total + torch.einsum("bmn,m...->bn...", scores[:, chunk], torch.vmap(mask)(chunk))
        return finish(_without_class_axis(total / (num_masks * keep), scoring.explained), x, postprocess)


CALL = """    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, (B, n) ints for n classes of each
            image at once, or a target, a callable from the output to one score for each perturbed image.
        to_spatial: where the layer returns tokens (B, T, K) or channels last, the function that selects and
            arranges them as (B, K, *spatial); None finds it.
        postprocess: `heatmap`, a callable `(cam, size) -> map`, or None for the raw map.
        create_graph: record the computation, so that the result can be differentiated with respect to the
            parameters.
"""
SCORING = """        score: what is explained of a class, "probability" or "logit".
        chunk_size: perturbed images in one forward, ≥ 1; it changes speed and memory, not the map.
        precision: "float32", exact, or "bfloat16" for scoring.
        compile: compile the scoring model, once.
        scorer: a callable from images to outputs that scores in the model's place.
        progress: show a bar that counts forwards.
"""
_SUMMING = """        baseline: what is seen where a mask hides: a number, a tensor or a callable of x.
        increase: subtract the baseline's score.
        softmax: take the softmax over channels of what is left.
        summed: "features" adds up w_k A_k, "masks" adds up w_k M_k.
        mask: `(maps, size) -> masks`, what makes a mask of a map; `heatmap.resized_minmax` is n(U(A)).
"""
_PROJECTION = """        projection: what is made of the weighted features w_k A_k in place of their sum,
            `(B, K, *spatial) -> (B, *spatial)`, such as `projections.principal_component`.
"""
RETURNS = """
    Returns:
        (B, *size) in [0, 1], or (B, n, *size) for n classes; with postprocess=None the raw map, signed.

    Raises:
        ValueError: a value is out of range or does not fit the model, the batch, the layer or the machine.
        TypeError: an argument is of the wrong kind.
        MemoryError: a chunk does not fit; it says which chunk_size to try.
"""


def _method(run: Callable[..., Tensor], title: str, paper: str, summary: str) -> Method:
    parts = {"    {call}": CALL, "    {scoring}": SCORING, "    {projection}": _PROJECTION}
    parts["{returns}"] = RETURNS
    group = SCORING if run is _groupcam else SCORING + _SUMMING + _PROJECTION
    parts["{arguments}"] = "\n" + CALL + group
    doc = run.__doc__ or ""
    for key, text in parts.items():
        doc = doc.replace(key, text)
    return method(
        run, name=run.__name__.lstrip("_"), title=title, family="perturbation", paper=paper, summary=summary,
        module=__name__, doc=doc,
    )  # fmt: skip


scorecam = _method(
    _scorecam, "Score-CAM", "arXiv:1910.01279", "each channel weighted by what its mask alone scores"
)
sscam = _method(_sscam, "SS-CAM", "arXiv:2006.14255", "Score-CAM with scores averaged over noisy masks")
iscam = _method(
    _iscam, "IS-CAM", "arXiv:2010.03023", "Score-CAM with scores averaged from faint to full masks"
)
ablationcam = _method(
    _ablationcam,
    "Ablation-CAM",
    "WACV 2020, doi:10.1109/WACV45572.2020.9093360",
    "each channel weighted by the share of the score lost without it",
)
reciprocam = _method(
    _reciprocam, "Recipro-CAM", "arXiv:2209.14074", "what each position of the features scores alone"
)
groupcam = _method(
    _groupcam,
    "Group-CAM",
    "arXiv:2103.13859",
    "groups of channels weighted by what they score on a blurred image",
)
rise = _method(_rise, "RISE", "arXiv:1806.07421", "random masks weighted by what they score; needs no layer")
