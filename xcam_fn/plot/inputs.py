"""Pictures, heatmaps and curves of every kind that is taken, as arrays that can be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from PIL import Image
from torch import Tensor

from xcam_fn import checks
from xcam_fn.metrics import Curve
from xcam_fn.models.images import shares_of_white, unit_floats

Picture = Image.Image | np.ndarray | Tensor
Map = np.ndarray | Tensor


def array_of(values: Tensor, argument: str) -> np.ndarray:
    """The tensor's values as an array, floats in double precision."""
    checks.check_dense(argument, values)
    values = values.detach().cpu()
    return (values.to(torch.float64) if values.is_floating_point() else values).numpy()


def picture_of(image: Picture) -> Float64[np.ndarray, "H W 3"]:
    """The picture in [0, 1], channels last."""
    if isinstance(image, Image.Image):
        if image.mode not in {"1", "L", "P", "RGB"}:
            remedy = "xcam_fn.images.load converts it"
            raise ValueError(f"image has mode {image.mode!r}; expected 'RGB' or 'L' ({remedy})")
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    wanted = "an array (H, W), (H, W, 1) or (H, W, 3), or a tensor (H, W), (1, H, W) or (3, H, W)"
    values = channels_last(image, "image", 2, wanted)
    remedy = "pass the picture before normalization, which images.prepare returns"
    return np.broadcast_to(shares_of_white(values, "image", remedy), (*values.shape[:2], 3))


def channels_last(image: Map, argument: str, axes: int, wanted: str) -> np.ndarray:
    """The values (*size, channels) of so many axes; a tensor has its channels first, and may be a batch."""
    values = array_of(image, argument) if isinstance(image, Tensor) else image
    if isinstance(image, Tensor):
        values = values[0] if values.ndim == axes + 2 and len(values) == 1 else values
        values = np.moveaxis(values, 0, -1) if values.ndim == axes + 1 else values
    values = values[..., None] if values.ndim == axes else values
    if values.ndim != axes + 1 or values.shape[-1] not in (1, 3) or values.size == 0:
        raise ValueError(f"{argument} has shape {tuple(image.shape)}; expected {wanted}")
    return values


def map_of(heatmap: Map, argument: str) -> Float64[np.ndarray, "h w"]:
    """One map, whatever its values."""
    if not isinstance(heatmap, (Tensor, np.ndarray)):
        raise TypeError(f"{argument} must be a tensor or an array (h, w), got {type(heatmap).__name__}")
    values = array_of(heatmap, argument) if isinstance(heatmap, Tensor) else heatmap
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or values.size == 0:
        wanted = "one map (h, w), such as heatmaps[0] of a batch"
        raise ValueError(f"{argument} has shape {tuple(heatmap.shape)}; expected {wanted}")
    return np.asarray(values, np.float64)


def relevance_of(heatmap: Map, argument: str) -> Float64[np.ndarray, "h w"]:
    """One map with values in [0, 1]."""
    return unit_floats(map_of(heatmap, argument), argument, checks.FROM_RAW)


def resized(values: np.ndarray, size: tuple[int, ...]) -> Float64[np.ndarray, "H W"]:
    """The map at another size (height, width), bilinear, or as it is where it has that size already."""
    if values.shape == size:
        return values
    height, width = size
    image = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float64)


class Line(NamedTuple):
    """A curve's mean over its images and its standard error, which is 0 for one image."""

    name: str
    fractions: Float64[np.ndarray, " T"]
    mean: Float64[np.ndarray, " T"]
    error: Float64[np.ndarray, " T"]
    auc: float
    auc_error: float
    images: int

    @property
    def area(self) -> str:
        """The area in words."""
        return f"{self.auc:.3f}" + (f" ± {self.auc_error:.3f}" if self.images > 1 else "")


def lines_of(curves: Mapping[str, Curve]) -> list[Line]:
    """The curves in their order, checked."""
    check_titled("curves", curves, "names to curves", "curve")
    return [_line(name, curve) for name, curve in curves.items()]


def check_titled(argument: str, given: Any, expected: str, kind: str) -> None:
    """Raise where an argument is not a mapping of titles to one map or curve or more."""
    if not isinstance(given, Mapping):
        found = type(given).__name__
        raise TypeError(f'{argument} must be {expected}, such as {{"Grad-CAM": {kind}}}, got {found}')
    if not given:
        raise ValueError(f'{argument} is empty; expected at least one {kind}, such as {{"Grad-CAM": {kind}}}')


def _line(name: str, curve: Curve) -> Line:
    argument = f"curves[{name!r}]"
    if not isinstance(curve, Curve):
        kind = type(curve).__name__
        raise TypeError(f"{argument} must be a Curve, as xcam_fn.insertion returns it, got {kind}")
    fractions, scores, auc = (numbers_of(v, f"{argument}.{k}", None) for k, v in curve._asdict().items())
    fits = fractions.ndim == auc.ndim == 1 and scores.shape == (len(auc), len(fractions))
    if not fits or scores.size == 0:
        shapes = f"fractions {fractions.shape}, scores {scores.shape} and auc {auc.shape}"
        raise ValueError(f"{argument} has {shapes}; expected (T,), (B, T) and (B,)")
    if fractions.min() < 0 or fractions.max() > 1 or (np.diff(fractions) < 0).any():
        ends = f"go from {fractions[0]:.4g} to {fractions[-1]:.4g}"
        raise ValueError(f"{argument}.fractions {ends}; expected ascending numbers from 0 to 1")
    n = len(auc)
    error, auc_error = (v.std(0, ddof=1) / n**0.5 if n > 1 else 0 * v[0] for v in (scores, auc))
    return Line(name, fractions, scores.mean(0), error, float(auc.mean()), float(auc_error), n)


def numbers_of(values: Any, argument: str, axes: int | None = 1) -> Float64[np.ndarray, "..."]:
    """The values as an array, of any number of axes where that is None."""
    try:
        found = np.asarray(array_of(values, argument) if isinstance(values, Tensor) else values, np.float64)
    except (TypeError, ValueError):
        wanted = "a tensor, an array or a sequence of numbers"
        raise TypeError(f"{argument} must be {wanted}, got {values!r}") from None
    if axes is not None and found.ndim != axes:
        raise ValueError(f"{argument} has shape {found.shape}; expected {axes} axis of numbers")
    if not np.isfinite(found).all():
        raise checks.not_finite(argument)
    return found
