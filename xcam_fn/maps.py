"""A raw map to a heatmap: ReLU, resize, min–max."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from xcam_fn import checks
from xcam_fn.arguments import Count, NonNegative, Positive, checked, unchecked

Maps = Float[Tensor, "..."]
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@checked
def heatmap(
    cam: Maps,
    size: Sequence[int],
    *,
    resize_first: bool = False,
    scale: Literal["image", "batch"] | Positive = "image",
) -> Maps:
    """The heatmap of a raw map: ReLU, resized to the input, scaled to [0, 1].

    Args:
        cam: (B, *spatial) or (B, n, *spatial), signed; as many spatial axes as `size` has entries.
        size: the input's spatial size, 1 to 3 entries, pixels.
        resize_first: resize before the ReLU, as some libraries do.
        scale: the value that becomes 1. "image": the maximum of each map, whose minimum becomes 0. "batch":
            the maximum of all given maps. A number > 0: that value; larger values are clipped. The latter
            two keep 0 at 0, so maps can be compared across images, classes and times.

    Returns:
        (B, *size) or (B, n, *size), in [0, 1]; with scale="image" a constant map gives zeros.

    Raises:
        ValueError: `size` or the shape of `cam` is not as above.
        TypeError: an argument has the wrong type, such as an array or a complex map.
    """
    size = tuple(size)
    if cam.ndim <= len(size):
        wanted = f"(B, ...) with {len(size)} spatial axes, as in size={size}"
        raise ValueError(f"cam has shape {tuple(cam.shape)}; expected {wanted}; try cam.unsqueeze(0)")
    cam = cam if resize_first else cam.relu()
    resized = _resized(cam, size).relu()
    if scale == "image":
        return _scaled(cam, resized, len(size))
    largest = resized.amax().clamp(min=torch.finfo(cam.dtype).tiny) if scale == "batch" else scale
    return (resized / largest).clamp(max=1)


@checked
def resized_minmax(cam: Maps, size: Sequence[int]) -> Maps:
    """Each map resized and scaled to [0, 1], (..., *size); a constant map gives zeros, whatever rounds."""
    return _scaled(cam, _resized(cam, size), len(size))


@checked
def minmax_resized(cam: Maps, size: Sequence[int]) -> Maps:
    """Each map scaled to [0, 1] and then resized, (..., *size): the order of some libraries for masks."""
    return _resized(_unit(cam, len(size)), size)


@checked
def own_size(cam: Maps, size: Sequence[int]) -> Maps:
    """Each map's positive part scaled to [0, 1] at the map's own size, as a library keeps it."""
    return _unit(cam.relu(), len(size))


@checked
def corners_minmax(cam: Maps, size: Sequence[int]) -> Maps:
    """Each map resized, its corners on the input's, and scaled to [0, 1], (..., *size), as a library does."""
    return _scaled(cam, _resized(cam, size, align_corners=True), len(size))


def _scaled(cam: Tensor, resized: Tensor, axes: int) -> Tensor:
    low, high = _ends(cam, axes)
    return torch.where(high > low, _unit(resized, axes), 0.0)


@checked
def resize(cam: Maps, size: Sequence[int], *, align_corners: bool = False) -> Maps:
    """The maps (..., *spatial) at another size, (..., *size), (bi-, tri-)linear, by areas or by corners."""
    axes = len(size)
    if axes not in _MODES or any(length < 1 for length in size):
        given = tuple(size)
        raise ValueError(f"size={given!r}; expected 1 to 3 lengths of at least 1 pixel, such as (224, 224)")
    maps = cam.shape[: last_axes(cam, axes)[0]]
    checks.check_amount("size", tuple(size), *maps, *size)
    flat = cam.reshape(-1, 1, *cam.shape[-axes:])
    if tuple(flat.shape[2:]) != tuple(size):
        flat = F.interpolate(flat, size=tuple(size), mode=_MODES[axes], align_corners=align_corners)
    return flat.reshape(*maps, *size)


_resized = unchecked(resize)


@checked
def minmax(cam: Maps, axes: Count, *, eps: NonNegative = 0.0) -> Maps:
    """Each map, the last axes, scaled to [0, 1] by its own ends; a constant map gives zeros, never NaN.

    `eps` is added to the denominator, as libraries do.
    """
    low, high = _ends(cam, axes)
    spread = high - low
    return torch.where(spread > 0, (cam - low) / torch.where(spread > 0, spread + eps, 1.0), 0.0)


_unit = unchecked(minmax)


def _ends(cam: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each map, its axes kept as axes of length 1."""
    over = last_axes(cam, axes)
    return cam.amin(over, keepdim=True), cam.amax(over, keepdim=True)


def last_axes(maps: Tensor, axes: int) -> tuple[int, ...]:
    """The last axes, which are one map each."""
    if maps.ndim < axes:
        raise ValueError(
            f"axes={axes}, but the maps have shape {tuple(maps.shape)}; expected at most {maps.ndim}"
        )
    return tuple(range(-axes, 0))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 with a finite derivative where the denominator is 0."""
    is_there = denominator != 0
    return torch.where(is_there, numerator / torch.where(is_there, denominator, 1.0), 0.0)


def precise(values: Tensor) -> Tensor:
    """The values in float32 at least, for sums and powers that leave the range of half precision."""
    return values if values.dtype == torch.float64 else values.float()
