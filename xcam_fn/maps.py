"""A raw map to a heatmap: ReLU, resize, min–max."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def heatmap(
    cam: Float[Tensor, "*batch_and_spatial"], size: Sequence[int], *, resize_first: bool = False
) -> Float[Tensor, "..."]:
    """A raw map made into a heatmap: negative parts dropped, resized to the input, each map scaled to [0, 1].

    Args:
        cam: (B, *spatial) or (B, n, *spatial), signed; as many spatial axes as `size` has entries.
        size: the input's spatial size, 1 to 3 entries, pixels.
        resize_first: resize before the negative parts are dropped, as some libraries do.

    Returns:
        (B, *size) or (B, n, *size), in [0, 1]; a constant map gives zeros.

    Raises:
        ValueError: `size` or the shape of `cam` is not as above.
    """
    size = tuple(size)
    if len(size) not in _MODES or any(length < 1 for length in size):
        raise ValueError(f"size={size!r}; expected 1 to 3 lengths of at least 1 pixel, such as (224, 224)")
    if cam.ndim <= len(size):
        wanted = f"(B, ...) with the {len(size)} spatial axes that size={size} has"
        raise ValueError(
            f"cam has shape {tuple(cam.shape)}; expected {wanted}; cam.unsqueeze(0) adds a batch"
        )
    if resize_first:
        return torch.where(_varies(cam, len(size)), minmax(resize(cam, size).relu(), len(size)), 0.0)
    return resized_minmax(cam.relu(), size)


def resized_minmax(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Each map resized and scaled to [0, 1], (..., *size); a constant map gives zeros, whatever rounds.

    Args:
        cam: (..., *spatial), with as many spatial axes as `size` has entries.
        size: the new spatial size, pixels.
    """
    return torch.where(_varies(cam, len(size)), minmax(resize(cam, size), len(size)), 0.0)


def minmax_resized(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Each map scaled to [0, 1] and then resized, (..., *size): the order of some libraries for masks.

    Args:
        cam: (..., *spatial), with as many spatial axes as `size` has entries.
        size: the new spatial size, pixels.
    """
    return resize(minmax(cam, len(size)), size)


def own_size(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Each map's positive part scaled to [0, 1] at the map's own size, as a library keeps it.

    Args:
        cam: (..., *spatial), with as many spatial axes as `size` has entries.
        size: the input's spatial size; only how many axes it has matters.
    """
    return minmax(cam.relu(), len(size))


def corners_minmax(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Each map resized, its corners on the input's, and scaled to [0, 1], (..., *size), as a library does.

    Args:
        cam: (..., *spatial), with as many spatial axes as `size` has entries.
        size: the new spatial size, pixels.
    """
    return torch.where(_varies(cam, len(size)), minmax(resize(cam, size, align_corners=True), len(size)), 0.0)


def _varies(cam: Tensor, axes: int) -> Tensor:
    over = tuple(range(-axes, 0))
    return cam.amax(over, keepdim=True) > cam.amin(over, keepdim=True)


def resize(cam: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """The maps at another size, (..., *size), (bi-, tri-)linear.

    Args:
        cam: (..., *spatial), with as many spatial axes as `size` has entries.
        size: the new spatial size, pixels.
        align_corners: put the corner values on the corner pixels; else the map's area on the input's.
    """
    axes = len(size)
    flat = cam.reshape(-1, 1, *cam.shape[-axes:])
    if tuple(flat.shape[2:]) != tuple(size):
        flat = F.interpolate(flat, size=tuple(size), mode=_MODES[axes], align_corners=align_corners)
    return flat.reshape(*cam.shape[:-axes], *size)


def minmax(cam: Tensor, axes: int) -> Tensor:
    """Each map scaled to [0, 1] by its own minimum and maximum; a constant map gives zeros, never NaN.

    Args:
        cam: (..., *spatial).
        axes: how many of the last axes are one map.
    """
    over = tuple(range(-axes, 0))
    low, high = cam.amin(over, keepdim=True), cam.amax(over, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (cam - low) / torch.where(spread > 0, spread, 1.0), 0.0)
