"""Volumes, clips and signals under their heatmaps, with axes in the data's own units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float64
from matplotlib.animation import ArtistAnimation
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.models.images import shares_of_white, unit_floats
from xcam_fn.plot.draw import COLORMAP, Numbers, Style, check_style, overlay
from xcam_fn.plot.figures import Panel, figure_of, panels_figure, relevance_bar
from xcam_fn.plot.inputs import Map, channels_last, numbers_of

__all__ = ["animation", "signal", "video", "volume"]

Slices = np.ndarray | Tensor

_AXES = ("depth", "height", "width")
_PLANES_INCHES, _LARGEST_INCHES = 9.0, 6.0
_SIGNAL_INCHES = (8.0, 1.7)
_LINE = {"color": "white", "linewidth": 0.8, "linestyle": (0, (4, 3))}


def volume(
    image: Slices,
    heatmap: Map,
    *,
    slices: int | None = None,
    at: Sequence[int] | np.ndarray | Tensor | None = None,
    spacing: Numbers = (1.0, 1.0, 1.0),
    unit: str = "voxels",
    axes: Sequence[str] = _AXES,
    window: Numbers | None = None,
    caption: str | None = None,
    **style: Unpack[Style],
) -> Figure:
    """A figure of a volume under its heatmap: three planes through one point, or slices side by side.

    Args:
        image: the volume, an array (D, H, W), (D, H, W, 1) or (D, H, W, 3), or a tensor (D, H, W),
            (1, D, H, W) or (3, D, H, W), of any finite values; a batch of one is accepted.
        heatmap: (D, H, W) or (1, D, H, W), of the volume's size, in [0, 1].
        slices: None for three planes; a number ≥ 1 for as many evenly spaced slices along the first axis.
        at: the voxel where the planes intersect, three indices; None for the heatmap's maximum.
        spacing: a voxel's length along each axis, in `unit`, > 0; planes keep its proportions.
        unit: the unit of `spacing`.
        axes: the names of the three axes.
        window: the values drawn black and white; None for the minimum and the maximum.
        caption: a line below the pictures.
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: a shape does not fit, a value is out of range or not finite.
        TypeError: an argument has the wrong type.
    """
    check_style(**style)
    check("axes", axes, Sequence[str])
    if len(axes) != 3:
        raise ValueError(f"axes={axes!r}; expected three names")
    check("unit", unit, str)
    pictures, relevance = _both(image, heatmap, "image", window=window)
    lengths = _spacing(spacing)
    colormap = style.get("colormap", COLORMAP)
    if slices is not None:
        checks.check_count("slices", slices)
        shown = _evenly(len(pictures), slices)
        place = lambda i: f"{axes[0]} {_number((i + 0.5) * lengths[0], unit)}"  # noqa: E731
        panels = [
            Panel(_stretched(overlay(pictures[i], relevance[i], **style), lengths[1:]), place(i))
            for i in shown
        ]
        return panels_figure(panels, caption, colormap=colormap, columns=min(5, len(panels)))
    point = (
        np.unravel_index(relevance.argmax(), relevance.shape) if at is None else _voxel(at, relevance.shape)
    )
    return _planes(pictures, relevance, tuple(map(int, point)), lengths, unit, axes, caption, style)


def _planes(
    pictures: np.ndarray,
    relevance: np.ndarray,
    point: tuple[int, ...],
    lengths: tuple[float, ...],
    unit: str,
    names: Sequence[str],
    caption: str | None,
    style: Style,
) -> Figure:
    """The three planes through a voxel, with lines where the other two cross each."""
    sides = [n * length for n, length in zip(relevance.shape, lengths, strict=True)]
    across = [[axis for axis in range(3) if axis != normal] for normal in range(3)]
    widths = [sides[columns] for _, columns in across]
    scale = min(_PLANES_INCHES / sum(widths), _LARGEST_INCHES / max(sides[rows] for rows, _ in across))
    height = max(sides[rows] for rows, _ in across) * scale
    figure = figure_of(max(sum(widths) * scale, 3.0) + 2.6, height + 1.0)
    plots: Any = figure.subplots(1, 3, width_ratios=widths)
    where = [(i + 0.5) * length for i, length in zip(point, lengths, strict=True)]
    for normal, (plot, (rows, columns)) in enumerate(zip(plots, across, strict=True)):
        picture = overlay(
            pictures.take(point[normal], normal), relevance.take(point[normal], normal), **style
        )
        plot.imshow(picture, extent=(0, sides[columns], sides[rows], 0), aspect="equal")
        plot.axhline(where[rows], **_LINE)
        plot.axvline(where[columns], **_LINE)
        plot.set_title(f"{names[normal]} {_number(where[normal], unit)}", fontsize=10, parse_math=False)
        plot.set_xlabel(f"{names[columns]} ({unit})", parse_math=False)
        plot.set_ylabel(f"{names[rows]} ({unit})", parse_math=False)
    relevance_bar(figure, plots, style.get("colormap", COLORMAP))
    if caption:
        figure.supxlabel(caption, fontsize=10, parse_math=False)
    return figure


def video(
    clip: Slices,
    heatmap: Map,
    *,
    count: int = 8,
    fps: float | None = None,
    caption: str | None = None,
    **style: Unpack[Style],
) -> Figure:
    """A figure of evenly spaced frames of a clip, each under its part of the heatmap.

    Args:
        clip: an array (T, H, W), (T, H, W, 1) or (T, H, W, 3), or a tensor (T, H, W), (1, T, H, W) or
            (3, T, H, W), of uint8 or of floats in [0, 1]; a batch of one is accepted.
        heatmap: (T, H, W) or (1, T, H, W), of the clip's size, in [0, 1].
        count: number of frames, ≥ 1; all if there are fewer.
        fps: frames per second, > 0, to label times; None labels frame numbers.
        caption: a line below the pictures.
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: a shape does not fit or a value is out of range.
        TypeError: an argument has the wrong type.
    """
    check_style(**style)
    checks.check_count("count", count)
    pictures, relevance = _both(clip, heatmap, "clip", is_picture=True)
    titles = _times(len(pictures), fps)
    panels = [
        Panel(overlay(pictures[i], relevance[i], **style), titles[i]) for i in _evenly(len(pictures), count)
    ]
    return panels_figure(panels, caption, colormap=style.get("colormap", COLORMAP))


def animation(
    clip: Slices, heatmap: Map, *, fps: float = 8.0, window: Numbers | None = None, **style: Unpack[Style]
) -> ArtistAnimation:
    """An animation of a clip's frames, or of a volume's slices, under the heatmap.

    `animation.save("clip.gif", writer="pillow")` writes it; a name that ends in .webp gives a WebP.

    Args:
        clip: as for `video`, or with a `window` as for `volume`.
        heatmap: (T, H, W) or (1, T, H, W), of the clip's size, in [0, 1].
        fps: frames shown per second, > 0.
        window: the values drawn black and white, if they are not in [0, 1].
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The animation; its figure is not registered with pyplot.

    Raises:
        ValueError: a shape does not fit or a value is out of range.
        TypeError: an argument has the wrong type.
    """
    check_style(**style)
    checks.check_number("fps", fps, above=0)
    pictures, relevance = _both(clip, heatmap, "clip", window=window, is_picture=window is None)
    height, width = relevance.shape[1:]
    scale = 4.0 / max(height, width)
    figure = figure_of(max(width * scale, 1.5), height * scale + 0.4)
    plot = figure.subplots()
    plot.set_axis_off()
    place: Any = {"ha": "center", "va": "bottom", "transform": plot.transAxes, "fontsize": 10}
    shown = [
        [plot.imshow(overlay(picture, one, **style)), plot.text(0.5, 1.01, title, **place)]
        for picture, one, title in zip(pictures, relevance, _times(len(pictures), None), strict=True)
    ]
    return ArtistAnimation(figure, shown, interval=1000 / fps)


def signal(
    values: Slices,
    heatmap: Map,
    *,
    rate: float | None = None,
    names: Sequence[str] | None = None,
    spectrogram: int | None = None,
    caption: str | None = None,
    colormap: str = COLORMAP,
) -> Figure:
    """A figure of a signal's channels, each a curve colored by relevance, with optional spectrograms.

    Args:
        values: (L,) or (C, L), finite; a batch of one, (1, C, L), is accepted.
        heatmap: (L,) or (1, L), as long as the signal, in [0, 1].
        rate: samples per second, > 0, for axes in seconds and hertz; None for samples.
        names: names of the channels; None numbers them.
        spectrogram: window length in samples of the spectrogram below each curve, ≥ 2; None for none.
        caption: a line below.
        colormap: a matplotlib colormap.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: a shape does not fit, a value is out of range or not finite.
        TypeError: an argument has the wrong type.
    """
    check_style(colormap=colormap)
    check("names", names, Sequence[str] | None)
    curves, relevance = _signal(values, heatmap)
    if rate is not None:
        checks.check_number("rate", rate, above=0)
    if spectrogram is not None:
        checks.check_count("spectrogram", spectrogram, at_least=2)
        if spectrogram > curves.shape[1]:
            most = f"at most {curves.shape[1]}, the samples of the signal"
            raise ValueError(f"spectrogram={spectrogram}; expected {most}")
    titles = [f"channel {i}" for i in range(len(curves))] if names is None else list(names)
    if len(titles) != len(curves):
        raise ValueError(f"names has {len(titles)} entries; expected {len(curves)}, one for each channel")
    each = 1 if spectrogram is None else 2
    figure = figure_of(_SIGNAL_INCHES[0], 0.6 + _SIGNAL_INCHES[1] * each * len(curves))
    plots: Any = figure.subplots(each * len(curves), squeeze=False, sharex=True)[:, 0]
    times = np.arange(curves.shape[1]) / (rate or 1.0)
    for i, (curve, title) in enumerate(zip(curves, titles, strict=True)):
        plot = plots[each * i]
        points = np.stack([times, curve], 1)
        between = np.stack([points[:-1], points[1:]], 1) if len(points) > 1 else points[None]
        lines = LineCollection(list(between), cmap=colormap, linewidths=1.6, rasterized=True)
        lines.set_array((relevance[:-1] + relevance[1:]) / 2 if len(points) > 1 else relevance)
        lines.set_clim(0, 1)
        plot.add_collection(lines)
        plot.autoscale_view()
        plot.set_ylabel(title, parse_math=False)
        if spectrogram is not None:
            below, overlap = plots[each * i + 1], spectrogram // 2
            scale: Any = {"mode": "magnitude", "scale": "linear", "cmap": "gray_r"}
            below.specgram(curve, NFFT=spectrogram, Fs=rate or 1.0, noverlap=overlap, **scale)
            below.set_ylabel("frequency (Hz)" if rate else "cycles per sample")
    plots[-1].set_xlabel("time (s)" if rate else "sample")
    relevance_bar(figure, plots, colormap)
    if caption:
        figure.supxlabel(caption, fontsize=10, parse_math=False)
    return figure


def _signal(values: Slices, heatmap: Map) -> tuple[Float64[np.ndarray, "C L"], Float64[np.ndarray, " L"]]:
    found = numbers_of(values, "values", None)
    curves = found[0] if found.ndim == 3 and len(found) == 1 else found
    if curves.ndim not in (1, 2) or curves.size == 0:
        raise ValueError(f"values has shape {found.shape}; expected a signal, (L,) or (C, L)")
    return np.atleast_2d(curves), _relevance(heatmap, curves.shape[-1:], "the length of the signal")


def _both(
    image: Slices, heatmap: Map, argument: str, *, window: Numbers | None = None, is_picture: bool = False
) -> tuple[Float64[np.ndarray, "D H W 3"], Float64[np.ndarray, "D H W"]]:
    """The slices in [0, 1], channels last, and their relevance."""
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"{argument} must be an array or a tensor, got {type(image).__name__}")
    wanted = "an array (D, H, W), (D, H, W, 1) or (D, H, W, 3), or a tensor (D, H, W) or (1 or 3, D, H, W)"
    found = channels_last(image, argument, 3, wanted)
    if is_picture:
        remedy = "pass the frames before normalization"
        shown = shares_of_white(found, argument, remedy)
    else:
        shown = _windowed(numbers_of(found, argument, None), window)
    size = found.shape[:3]
    return np.broadcast_to(shown, (*size, 3)), _relevance(heatmap, size, f"the size of {argument}")


def _relevance(heatmap: Map, size: tuple[int, ...], what: str) -> Float64[np.ndarray, "..."]:
    """A heatmap of that size in [0, 1]."""
    given = numbers_of(heatmap, "heatmap", None)
    found = given[0] if given.ndim > len(size) and len(given) == 1 else given
    if found.shape != size:
        raise ValueError(f"heatmap has shape {given.shape}; expected {size}, {what} ({checks.FROM_RAW})")
    return unit_floats(found, "heatmap", checks.FROM_RAW)


def _windowed(values: np.ndarray, window: Numbers | None) -> np.ndarray:
    """The values from black, 0, to white, 1."""
    ends = numbers_of((values.min(), values.max()) if window is None else window, "window")
    if len(ends) != 2 or (window is not None and not ends[0] < ends[1]):
        raise ValueError(f"window={window!r}; expected two numbers (black, white) with black < white")
    low, high = ends
    return ((values - low) / ((high - low) or 1.0)).clip(0, 1)


def _spacing(spacing: Numbers) -> tuple[float, ...]:
    lengths = numbers_of(spacing, "spacing")
    if lengths.shape != (3,) or lengths.min() <= 0:
        raise ValueError(f"spacing={spacing!r}; expected three lengths > 0, one for each axis")
    return tuple(map(float, lengths))


def _voxel(at: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = numbers_of(at, "at")
    is_whole = found.shape == (3,) and bool((found == found.round()).all())
    if not is_whole or not ((found >= 0) & (found < shape)).all():
        raise ValueError(f"at={at!r}; expected the three indices of a voxel in shape {shape}")
    return tuple(map(int, found))


def _evenly(length: int, count: int) -> list[int]:
    """So many places of a row, or all, evenly spread: the middles of equal parts."""
    count = min(length, count)
    return [int((i + 0.5) * length / count) for i in range(count)]


def _times(count: int, fps: float | None) -> list[str]:
    if fps is None:
        return [f"frame {i}" for i in range(count)]
    checks.check_number("fps", fps, above=0)
    return [f"{i / fps:.2f} s" for i in range(count)]


def _stretched(pixels: np.ndarray, lengths: Sequence[float]) -> np.ndarray:
    """A slice with square pixels, where its voxels are not: the longer side is repeated."""
    height, width = (
        round(n * length / min(lengths)) for n, length in zip(pixels.shape, lengths, strict=False)
    )
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))


def _number(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}"
