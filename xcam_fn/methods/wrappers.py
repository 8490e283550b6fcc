"""Wrappers of methods: smoothing, projection, several layers, and sliding windows at several scales."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from xcam_fn import checks
from xcam_fn.arguments import Count, NonNegative, Positive, ReadableSignature, Share
from xcam_fn.maps import heatmap, own_size, precise, ratio, resize
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import as_method, enter_wrapper, heatmaps_of, method, name_of
from xcam_fn.methods.gradient import gradcam_pp
from xcam_fn.methods.method import Method, Postprocess, options_of
from xcam_fn.methods.options import Score
from xcam_fn.network.calls import run_model
from xcam_fn.network.copies import unwrap
from xcam_fn.network.places import pools
from xcam_fn.network.split import default_layer
from xcam_fn.network.split import layers as layers_of
from xcam_fn.network.target_layer import Layer, find
from xcam_fn.perturb import blurred, normal
from xcam_fn.projections import principal_component
from xcam_fn.scoring.score import TARGETS, explained_score

__all__ = ["eigen_smooth", "multi_layer", "refinecam", "sess", "smooth", "smoothgrad"]

P = ParamSpec("P")
Images = Float[Tensor, "B C *size"]
Run = Callable[..., Tensor]
Explain = Callable[..., Tensor]  # maps a call and options to the heatmaps of the wrapped method
Layers = Sequence[str | nn.Module]
Pool = Literal["mean", "max"]

_COMBINATIONS: dict[str, Any] = {"mean": torch.mean, "max": torch.amax, "product": torch.prod}
Combine = Literal["mean", "max", "product"] | Callable[[Tensor], Tensor]


Formula = Callable[Concatenate[Call, Explain, P], Tensor]
Wrapping = Callable[Concatenate[str | Run, P], Method[...]]


def wrapper(how: str, *, finishes: bool = False, raw: bool = False) -> Callable[[Formula[P]], Wrapping[P]]:
    """Turn a formula over a call and a method's heatmaps into a wrapper, from a method to a method.

    `how` is part of the title. If the formula `finishes`, its maps are not postprocessed again. A formula of
    raw maps gets the values that the method's own formula returns, and returns the same kind.
    """

    def entered(formula: Callable[..., Tensor]) -> Any:
        own, (call, _, *after) = options_of(formula, 2), inspect.signature(formula).parameters.values()
        method = call.replace(name="method", annotation="str | Method")
        signature = ReadableSignature([method, *after], return_annotation=Method)

        def run(call: Call, **options: Any) -> Tensor:
            inner, mine = options.pop("inner"), {name: options.pop(name) for name in own if name in options}
            if raw:
                return formula(call, lambda other: _raw_of(inner, call, other, options), **mine)
            explain = lambda call, **more: heatmaps_of(inner, call, options | more)  # noqa: E731
            maps = formula(call, explain, **mine)
            call.many = maps.ndim == call.x.ndim
            return maps

        @functools.wraps(formula)
        def wrapping(*args: Any, **options: Any) -> Method[...]:
            given = signature.bind(*args, **options).arguments
            inner = as_method(given.pop("method"))
            keywords = inner.own_options if isinstance(inner, Method) else options_of(inner, 4)
            about: Any = {key: getattr(inner, key, "") for key in ("family", "paper", "summary", "needs")}
            returned = getattr(inner, "returns", "maps")
            kind = returned if raw and returned in ("scores", "attributions") else "maps"
            about["returns"] = "heatmaps" if finishes else kind
            name, title = name_of(inner), getattr(inner, "title", name_of(inner))
            return Method(
                run, f"{formula.__name__}({name})", f"{title}, {how}", **about, options={"inner": inner},
                keywords=own | keywords | own, explains=(formula, inner), made=(wrapping, inner),
            ).with_options(**given)  # fmt: skip

        vars(wrapping)["__signature__"] = signature
        return enter_wrapper(wrapping)

    return entered


def _raw_of(method: Any, call: Call, other: Call, options: dict[str, Any]) -> Tensor:
    """The raw maps (B, n, ...) of a method for another call; sets `call.many`."""
    if isinstance(method, Method) and method.returns != "heatmaps":
        maps = method.with_options(**options).raw(other)
        call.many = other.many
        return maps
    maps = heatmaps_of(method, other, options | {"postprocess": None})
    call.many = maps.ndim == call.x.ndim
    return maps if call.many else maps[:, None]


# -- test-time augmentation ----------------------------------------------------------------------------------


@wrapper("smoothed", finishes=True)
def smooth(
    call: Call, explain: Explain, *, flips: bool = True, scales: Sequence[float] = (0.9, 1.0, 1.1)
) -> Tensor:
    """The method with its maps averaged over mirrored and brightened inputs, each mirrored back.

    Args:
        method: a method, or its name.
        flips: also use every input mirrored along its last axis.
        scales: factors for the input, one or more numbers.

    Returns:
        A method, "smooth(gradcam)" for example; the class is that of the original input.

    Raises:
        ValueError: scales is empty, or the name is not known. When called, StructureError (a ValueError) if
            flips is True and the target is a box or pixels of the image.
        TypeError: a scale is no number.
    """
    if flips:
        call.check_unmoved("smooth: flips=True mirrors the inputs", "pass flips=False")
    maps = [
        _flipped(explain(call.of(_flipped(call.x * scale, flip), call.fixed)), flip)
        for flip in (False, True)[: 1 + flips]
        for scale in scales
    ]
    return torch.stack(maps).mean(0)


def _flipped(values: Tensor, flip: bool) -> Tensor:
    return values.flip(-1) if flip else values


@wrapper("averaged over noise", raw=True)
def smoothgrad(
    call: Call,
    explain: Explain,
    *,
    num_samples: Count = 50,
    std: NonNegative = 0.15,
    statistic: Literal["mean", "square", "variance"] = "mean",
    seed: int = 0,
) -> Tensor:
    """SmoothGrad around any method: its raw maps averaged over noisy inputs.

    The mean over j of R(x + δ_j), δ_j ~ N(0, (σ (max x − min x))²), R the method's raw map or attributions;
    of R² for SmoothGrad², or the variance of R for VarGrad. The class is that of x itself. The noise is a
    function of the seed and j, the same for every image up to the image's range.

    Args:
        method: a method, or its name; the papers use "integrated_gradients" and "input_x_gradient".
        num_samples: noisy inputs, ≥ 1.
        std: σ of the noise, ≥ 0, as a fraction of the image's range.
        statistic: statistic of the raw maps: "mean", "square" (the mean square) or "variance".

    Returns:
        A method, "smoothgrad(gradcam)" for example.

    Raises:
        ValueError: an option is out of range, or the name is not known.
        TypeError: an option has the wrong type.

    References:
        Smilkov et al. (arXiv:1706.03825) and, for the variance, Adebayo et al. (arXiv:1810.03307).
    """
    x, fixed = call.x, call.fixed
    axes = tuple(range(1, x.ndim))
    scale = std * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True))
    mean = spread = torch.zeros(()).to(x)
    for j in range(num_samples):
        raw = precise(explain(call.of(x + scale * normal(seed, j, tuple(x.shape[1:]), like=x), fixed)))
        step = raw - mean
        mean = mean + step / (j + 1)
        spread = spread + step * (raw - mean)
    variance = spread / num_samples
    return {"mean": mean, "square": variance + mean**2, "variance": variance}[statistic]


# -- the first component in place of the sum -----------------------------------------------------------------


@enter_wrapper
def eigen_smooth(method: str | Run) -> Method[...]:
    """The method with the first principal component of its weighted features instead of their sum.

    Args:
        method: a method that weights channels, or its name.

    Returns:
        A method, "eigen_smooth(gradcam)" for example.

    Raises:
        ValueError: the method does not add up weighted channels, or its name is not known.
    """
    inner = as_method(method)
    name = name_of(inner)
    if not isinstance(inner, Method) or "projection" not in inner.own_options:
        raise ValueError(
            f"eigen_smooth: {name!r} is not a weighted sum of channels; expected a method with "
            "the keyword `projection`, such as 'gradcam' or 'scorecam'"
        )
    return inner.with_options(
        name=f"eigen_smooth({name})", title=f"{inner.title}, first component", projection=principal_component
    )


# -- several layers ------------------------------------------------------------------------------------------


@wrapper("several layers")
def multi_layer(
    call: Call,
    explain: Explain,
    layers: Layers | None = None,
    combine: Combine | None = None,
    *,
    each: Postprocess | None = heatmap,
) -> Tensor:
    """The method's maps at several layers, combined into one.

    With the default layers and combine, a detection is explained at the pyramid levels that its score is read
    from, and their raw maps are summed, each resized so that it keeps its sum:
    Σ_l (|Ω_l| / |Ω|) U(cam_l), with |Ω_l| the number of positions of a level. A level counts by its
    contribution to the score.

    Args:
        method: a method, or its name.
        layers: their names or modules; None for the last layer of each of the last three resolutions, the
            deepest being the layer that the method is called with, or for a detection's levels.
        combine: "mean", "max" or "product", or a callable from the maps, (L, B, *size), to one, (B, *size);
            None for the mean, or for the sum of a detection's levels.
        each: applied to each layer's map first, `(cam, size) -> map`; None leaves it raw. Maps of different
            sizes are resized to the largest. Not for the sum of levels.

    Returns:
        A method, "multi_layer(gradcam)" for example; its `postprocess` is applied to the combined map.

    Raises:
        ValueError: an option is invalid, or the name is not known. When called, StructureError (a ValueError)
            if the network has only one resolution.
        TypeError: layers is a single name.
    """
    levels = call.levels if layers is None and call.layer is None and combine is None else None
    if layers is None:
        layers = levels or last_layers(call.model, call.x, call.target_layer)
    maps = [explain(call.at(one), postprocess=each if levels is None else None) for one in layers]
    axes = call.x.ndim - 2
    largest = tuple(map(max, zip(*(cam.shape[-axes:] for cam in maps), strict=True)))
    stacked = torch.stack([resize(cam, largest) for cam in maps])
    if levels is not None:
        places = stacked.new_tensor([cam[0].numel() for cam in maps]) / stacked[0, 0].numel()
        return torch.einsum("l,l...->...", places, stacked)
    if not callable(combine):
        return _COMBINATIONS[combine or "mean"](stacked, 0)
    fits = lambda found: found.shape == stacked.shape[1:]  # noqa: E731
    return checks.check_returned("combine", combine(stacked), f"maps {tuple(stacked.shape[1:])}", fits)


def last_layers(model: nn.Module, x: Images, layer: Layer = None, *, count: int = 3) -> list[str]:
    """The last layer of each of the last resolutions, shallow to deep, without pooling and padding."""
    root, found = unwrap(model), layers_of(model, x)
    deepest = default_layer(model, x) if layer is None else find(root, layer)[0]
    shown = [name for name in found if deepest in (name, name.partition("#")[0])]
    if not shown:
        raise ValueError(
            f"layer {deepest!r} has no spatial maps; choose one that xcam_fn.layers(model, x) lists"
        )
    names = list(found)
    of_size: dict[int, str] = {}
    for name in names[: names.index(shown[-1])]:
        module = root.get_submodule(name.partition("#")[0])
        if not pools(module) and "Pad" not in type(module).__name__:
            of_size[math.prod(found[name][2:])] = name
    own = math.prod(found[shown[-1]][2:])
    before = [of_size[size] for size in sorted(of_size) if size > own][: count - 1]
    if not before:
        raise checks.StructureError(
            f"layer {deepest!r}: {type(root).__name__} has no earlier layer with a higher resolution to "
            "combine it with; name the layers with layers=[...]"
        )
    return [*reversed(before), shown[-1]]


@method(
    "RefineCAM", family="fusion", paper="arXiv:2605.14641",
    summary="Grad-CAM++ at several layers, multiplied", needs="layers of several resolutions",
    variants={
        "torchcam": {"method": gradcam_pp.variant("torchcam"), "each": own_size},
        "pytorch-grad-cam": {"method": gradcam_pp.variant("pytorch-grad-cam")},
    },
)  # fmt: skip
def refinecam(
    call: Call,
    *,
    method: str | Run = gradcam_pp,
    layers: Layers | None = None,
    each: Postprocess | None = heatmap,
) -> Tensor:
    """RefineCAM: the product of the heatmaps of several layers, from fine to deep.

    Π_l n(U(ReLU(cam_l))): each layer's map scaled to [0, 1] and resized to the input, then multiplied.

    Args:
        method: the method, or its name.
        layers: names or modules; None for the last layer of each of the last three resolutions, `layer` being
            the deepest.
        each: applied to each layer's map before the product, `(cam, size) -> map`.

    Raises:
        StructureError: a ValueError; layers=None, and the network has only one resolution.

    References:
        Domeniconi et al., How to Evaluate and Refine your CAM (arXiv:2605.14641).
    """
    return multi_layer(method, layers, "product", each=each).raw(call)


# -- scaling and sliding -------------------------------------------------------------------------------------


@wrapper("SESS")
def sess(
    call: Call,
    explain: Explain,
    *,
    num_scales: Count = 12,
    growth: Positive = 2 / 7,
    window: Count | None = None,
    step: Count | None = None,
    drop: Share = 0.0,
    theta: NonNegative = 0.0,
    pool: Pool = "mean",
    blur: bool = True,
    score: Score = "probability",
) -> Tensor:
    """The method's heatmaps of windows that slide over the scaled input, weighted by the windows' scores.

    The input is resized so that its shorter side is w, w + ⌊gw⌉, w + 2⌊gw⌉ …; a window of w pixels slides
    over each. A window's heatmap times its score (relative to the highest score) is placed at the window's
    position, and every pixel is the mean (or maximum) of the values there that exceed theta.

    Args:
        method: a method, or its name.
        num_scales: number of input sizes, ≥ 1.
        growth: g, the step between sizes as a fraction of the window, > 0.
        window: w, pixels, no more than the shorter side of the input; None for that side.
        step: stride of the window, pixels; None for w.
        drop: the fraction of windows to leave out, those with the lowest scores, 0 to 1; the best one is
            always kept.
        theta: the value at or below which a window does not count at a pixel, ≥ 0.
        pool: "mean" or "max".
        blur: blur the result by a Gaussian of 11 pixels, σ = 5.
        score: the weight of a window, the class's "probability" or "logit" (0 if negative).

    Returns:
        A method, "sess(gradcam)" for example, with one forward pass and one heatmap per window.

    Raises:
        ValueError: an option is out of range, or the name is not known. When called, StructureError (a
            ValueError) if the target is a box or pixels of the image.
        TypeError: an option has the wrong type.

    References:
        Tursun et al. (arXiv:2207.01769).
    """
    call.check_unmoved(
        "sess: its windows are parts of scaled inputs", "use the method itself, or multi_layer"
    )
    x, fixed = call.x, call.fixed
    side = min(x.shape[2:])
    length = side if window is None else window
    if length > side:
        raise ValueError(f"window={length} exceeds the input's shorter side; expected at most {side} pixels")
    shorter = [length + i * round(length * growth) for i in range(num_scales)]
    sizes = [tuple(int(one * size / side) for size in x.shape[2:]) for one in shorter]
    views = functools.partial(_views, x, sizes, length, step or length)
    explained = explained_score(run_model(call.model, x), len(x), fixed, TARGETS[score])
    every = torch.arange(len(x), device=x.device)
    scores = torch.stack([explained.of(run_model(call.model, seen), every) for seen, _, _ in views()]).relu()
    shares, kept = _shares(scores, drop)
    total = count = torch.zeros_like(_per_map(scores[0], x))
    for (seen, corner, size), share, keep in zip(views(), shares, kept, strict=True):
        if checks.is_readable(keep) and not keep.any():
            continue
        cam = explain(call.of(seen, fixed))
        cam = cam if explained.many else cam[:, None]
        # Put the window back at its corner; `F.pad` takes the last axis first.
        ends = [(start, s - start - length) for start, s in zip(corner, size, strict=True)]
        margins = [margin for pair in reversed(ends) for margin in pair]
        there = resize(F.pad(cam * _per_map(share, x), margins), x.shape[2:])
        counts = (there > theta) & _per_map(keep, x)
        there = torch.where(counts, there, 0.0)
        total = total + there if pool == "mean" else torch.maximum(total, there)
        count = count + counts.to(there)
    fused = ratio(total, count) if pool == "mean" else total
    fused = blurred(fused, width=11, std=5.0) if blur else fused
    return fused if explained.many else fused.squeeze(1)


def _shares(scores: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Each window's score relative to the highest, and whether to keep it (not lowest), both (V, B, n)."""
    highest = scores.amax(0)
    shares = torch.where(highest > 0, scores / torch.where(highest > 0, highest, 1.0), 1.0)
    rank = scores.argsort(dim=0, stable=True).argsort(dim=0)
    return shares, rank >= min(int(len(scores) * drop), len(scores) - 1)


def _views(
    x: Tensor, sizes: Sequence[tuple[int, ...]], window: int, step: int
) -> Iterator[tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Yield for each window its part of the input, its corner, and the size of the scaled input."""
    for size in sizes:
        scaled = resize(x, size)
        for corner in itertools.product(*([*range(0, s - window, step), s - window] for s in size)):
            yield scaled[(..., *(slice(start, start + window) for start in corner))], corner, size


def _per_map(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (images.ndim - 2))
