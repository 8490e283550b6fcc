"""Heatmaps over pictures, as arrays and as matplotlib figures; nothing is shown and no state is kept."""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float64, UInt8
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Picture = Image.Image | np.ndarray | Tensor
Map = np.ndarray | Tensor

_COLUMNS = 4
_PANEL_INCHES = 2.6
_COLORBAR_INCHES = 0.85
_POINTS = 10
_LINE_INCHES = 0.19
_CHARACTERS_PER_INCH = 11.5
_ROUNDING = 1e-4


def overlay(
    image: Picture,
    heatmap: Map,
    *,
    colormap: str = "viridis",
    alpha: float = 0.5,
    alpha_follows_heatmap: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture with the heatmap laid over it in color.

    Args:
        image: the picture at its own size: a PIL image, an array (H, W), (H, W, 1) or (H, W, 3), or a tensor
            (H, W), (1, H, W) or (3, H, W), of uint8 or of floats in [0, 1]; of a batch of one its image.
        heatmap: (h, w) or (1, h, w), in [0, 1]; resized to the picture (bilinear) where it differs.
        colormap: a name of matplotlib's: "viridis" is perceptually even, "jet" is what many papers show.
        alpha: how much the color covers, in [0, 1].
        alpha_follows_heatmap: cover each pixel by alpha times the heatmap, so that the picture stays as it is
            where nothing is relevant.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: a shape or a value is out of range, or the colormap is unknown.
        TypeError: an argument is of the wrong kind.
    """
    check_style(colormap=colormap, alpha=alpha)
    picture = _picture(image)
    relevance = _resized(_relevance(heatmap, "heatmap"), picture.shape[:2])
    colors = _colormap(colormap)(relevance)[..., :3]
    cover = (alpha * relevance if alpha_follows_heatmap else np.full_like(relevance, alpha))[..., None]
    return np.round((picture * (1 - cover) + colors * cover) * 255).astype(np.uint8)


def heatmaps(
    image: Picture,
    maps: Mapping[str, Map],
    *,
    caption: str | None = None,
    colormap: str = "viridis",
    alpha: float = 0.5,
    alpha_follows_heatmap: bool = False,
) -> Figure:
    """A figure of the picture and, beside it, of the picture under each heatmap.

    Args:
        image: the picture, as for `overlay`.
        maps: titles to heatmaps, as for `overlay`; the title of a map that is zero everywhere says so.
        caption: a line below the pictures.
        colormap: as for `overlay`.
        alpha: as for `overlay`.
        alpha_follows_heatmap: as for `overlay`.

    Returns:
        The figure, the caller's alone: `figure.savefig("name.png")` writes it; pyplot knows nothing of it.

    Raises:
        ValueError: there are no maps, a shape or a value is out of range, or the colormap is unknown.
        TypeError: an argument is of the wrong kind.
    """
    if not isinstance(maps, Mapping):
        kind = type(maps).__name__
        raise TypeError(f'maps is a {kind}; expected titles to heatmaps, as {{"Grad-CAM": map}}')
    if not maps:
        raise ValueError('maps is empty; expected at least one heatmap, as {"Grad-CAM": map}')
    check_style(colormap=colormap, alpha=alpha)
    picture = _picture(image)
    panels, titles = [np.round(picture * 255).astype(np.uint8)], ["photograph"]
    for title, values in maps.items():
        relevance = _relevance(values, f"maps[{title!r}]")
        shown = overlay(
            picture,
            relevance,
            colormap=colormap,
            alpha=alpha,
            alpha_follows_heatmap=alpha_follows_heatmap,
        )
        panels.append(shown)
        titles.append(title if relevance.any() else f"{title}\n(empty: zero everywhere)")
    return _figure(panels, titles, caption, colormap)


def grid(
    image: Picture,
    rows: Sequence[Mapping[str, Map]],
    *,
    caption: str | None = None,
    colormap: str = "viridis",
    alpha: float = 0.5,
    alpha_follows_heatmap: bool = False,
) -> Figure:
    """A figure of rows of the picture under heatmaps, for comparing methods, classes or layers.

    Args:
        image: the picture, as for `overlay`.
        rows: for each row titles to heatmaps, as for `overlay`; as many in every row.
        caption: a line below the pictures.
        colormap: as for `overlay`.
        alpha: as for `overlay`.
        alpha_follows_heatmap: as for `overlay`.

    Returns:
        The figure, the caller's alone.

    Raises:
        ValueError: there are no maps, rows differ in length, a shape or a value is out of range, or the
            colormap is unknown.
        TypeError: an argument is of the wrong kind.
    """
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"rows have {[len(row) for row in rows]} maps; expected one row or more, each with the same "
            f"number"
        )
    check_style(colormap=colormap, alpha=alpha)
    picture = _picture(image)
    panels, titles = [], []
    for i, row in enumerate(rows):
        for title, values in row.items():
            relevance = _relevance(values, f"rows[{i}][{title!r}]")
            panels.append(
                overlay(
                    picture, relevance, colormap=colormap, alpha=alpha,
                    alpha_follows_heatmap=alpha_follows_heatmap,
                )
            )  # fmt: skip
            titles.append(title if relevance.any() else f"{title} (empty)")
    return _figure(panels, titles, caption, colormap, columns=len(rows[0]))


def check_style(*, colormap: str, alpha: float) -> None:
    """Raise where `overlay` and `heatmaps` would not take these, before any heatmap is computed.

    Args:
        colormap: a name of matplotlib's.
        alpha: in [0, 1].

    Raises:
        ValueError: the colormap is unknown, or alpha out of range.
        TypeError: an argument is of the wrong kind.
    """
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(f"alpha={alpha!r} is a {type(alpha).__name__}; expected a number from 0 to 1")
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha} is out of range; expected 0 (only the picture) to 1 (only the color)"
        )
    _colormap(colormap)


def _colormap(name: str) -> Colormap:
    if not isinstance(name, str):
        raise TypeError(
            f"colormap is a {type(name).__name__}; expected the name of one, as 'viridis' or 'jet'"
        )
    if name not in mpl.colormaps:
        near = difflib.get_close_matches(name, list(mpl.colormaps), n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else "expected one such as 'viridis' or 'jet'"
        )
        raise ValueError(f"colormap={name!r} is none of matplotlib's; {hint}")
    return mpl.colormaps[name]


# What comes in


def _picture(image: Picture) -> Float64[np.ndarray, "H W 3"]:
    """The picture in [0, 1], channels last."""
    if isinstance(image, Image.Image):
        if image.mode not in {"1", "L", "P", "RGB"}:
            raise ValueError(
                f"image has mode {image.mode!r}; expected 'RGB' or 'L' (xcam_fn.images.load converts it)"
            )
        values = np.asarray(image.convert("RGB"))
    elif isinstance(image, Tensor):
        values = _channels_last(image)
    elif isinstance(image, np.ndarray):
        values = image
    else:
        raise TypeError(f"image is a {type(image).__name__}; expected a PIL image, an array or a tensor")
    given = values.shape if isinstance(image, Image.Image) else image.shape
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3) or values.size == 0:
        raise ValueError(
            f"image has shape {tuple(given)}; expected an array (H, W), (H, W, 1) or (H, W, 3), or a "
            "tensor (H, W), (1, H, W) or (3, H, W)"
        )
    return np.broadcast_to(_unit(values, "image"), (*values.shape[:2], 3))


def _channels_last(image: Tensor) -> np.ndarray:
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    values = _array(image)
    return np.moveaxis(values, 0, -1) if values.ndim == 3 else values


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (values.to(torch.float64) if values.is_floating_point() else values).numpy()


def _unit(values: np.ndarray, argument: str) -> Float64[np.ndarray, "..."]:
    """The values as floats in [0, 1]."""
    if values.dtype == np.uint8:
        return values / 255
    if values.dtype == np.bool_:
        return values.astype(np.float64)
    if values.dtype.kind != "f":
        raise ValueError(f"{argument} has values of {values.dtype}; expected uint8, or floats in [0, 1]")
    return _floats(
        values, argument, "pass the picture as it was before normalization (images.prepare returns it)"
    )


def _floats(values: np.ndarray, argument: str, remedy: str) -> Float64[np.ndarray, "..."]:
    if not np.isfinite(values).all():
        raise ValueError(f"{argument} holds NaN or infinite values; expected [0, 1]")
    if values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING:
        raise ValueError(
            f"{argument} has values from {values.min():.4g} to {values.max():.4g}; expected [0, 1] ({remedy})"
        )
    return values.astype(np.float64).clip(0, 1)


def _relevance(heatmap: Map, argument: str) -> Float64[np.ndarray, "h w"]:
    if not isinstance(heatmap, (Tensor, np.ndarray)):
        raise TypeError(f"{argument} is a {type(heatmap).__name__}; expected a tensor or an array (h, w)")
    values = _array(heatmap) if isinstance(heatmap, Tensor) else heatmap
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"{argument} has shape {tuple(heatmap.shape)}; expected one map (h, w), as heatmaps[0] of a batch"
        )
    return _floats(
        np.asarray(values, np.float64), argument, "xcam_fn.heatmap(cam, size) makes that of a raw map"
    )


def _resized(relevance: np.ndarray, size: tuple[int, ...]) -> Float64[np.ndarray, "H W"]:
    if relevance.shape == size:
        return relevance
    height, width = size
    resized = Image.fromarray(relevance.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float64).clip(0, 1)


# What goes out


def _figure(
    panels: list[np.ndarray], titles: list[str], caption: str | None, colormap: str, columns: int = _COLUMNS
) -> Figure:
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 (slow, and not needed for an overlay)
    from matplotlib.figure import Figure  # noqa: PLC0415 (as slow)

    height, width = panels[0].shape[:2]
    columns = min(len(panels), columns)
    rows = math.ceil(len(panels) / columns)
    panel_width = _PANEL_INCHES * min(1.0, max(0.5, width / height))
    figure_width = columns * panel_width + _COLORBAR_INCHES
    titles = [_wrapped(title, panel_width) for title in titles]
    below = _wrapped(caption or "", figure_width)
    title_height = _LINE_INCHES * (2.4 + max(title.count("\n") for title in titles))
    caption_height = _LINE_INCHES * (2 + below.count("\n")) if below else 0
    figure_height = rows * (panel_width * height / width + title_height) + caption_height
    figure = Figure(figsize=(figure_width, figure_height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel, title in zip(axes.flat, panels, titles, strict=False):
        axis.imshow(panel)
        axis.set_title(title, fontsize=_POINTS, parse_math=False)
    scale = ScalarMappable(cmap=colormap)
    bar = figure.colorbar(scale, ax=axes, ticks=[0, 1], fraction=0.03, pad=0.02, aspect=20 * rows)
    bar.ax.set_yticklabels(["least", "most"])
    bar.set_label("relevance", labelpad=-12)
    if below:
        figure.supxlabel(below, fontsize=_POINTS, parse_math=False)
    return figure


def _wrapped(text: str, inches: float) -> str:
    width = max(8, int(inches * _CHARACTERS_PER_INCH))
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width))
