"""Heatmaps over pictures, as arrays and as matplotlib figures; nothing is shown and no state is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, Unpack

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float64, UInt8
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.metrics import Curve, relevance_rank
from xcam_fn.models.images import unit_floats
from xcam_fn.names import nearest
from xcam_fn.perturb import baseline_images, blurred
from xcam_fn.plot import inputs
from xcam_fn.plot.figures import COLUMNS, Panel, curve_figure, curves_figure, panels_figure
from xcam_fn.plot.inputs import Map, Picture

Numbers = Sequence[float] | np.ndarray | Tensor
Color = float | Numbers


class Style(TypedDict, total=False):
    """How heatmaps are laid over a picture: the keywords of `overlay`."""

    colormap: str
    alpha: float
    alpha_follows_heatmap: bool


COLORMAP = "inferno"
_ALPHA = 0.75
_CONCEPTS = "Set1"  # colors that are told apart
_MEAN_COLOR = (0.485, 0.456, 0.406)  # of ImageNet; zero once it is normalized


def overlay(
    image: Picture,
    heatmap: Map,
    *,
    colormap: str = COLORMAP,
    alpha: float = _ALPHA,
    alpha_follows_heatmap: bool = True,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the picture with the heatmap overlaid in color.

    Args:
        image: the picture: a PIL image, an array (H, W), (H, W, 1) or (H, W, 3), or a tensor (H, W),
            (1, H, W) or (3, H, W), of uint8 or of floats in [0, 1]; a batch of one is accepted.
        heatmap: (h, w) or (1, h, w), in [0, 1]; resized to the picture (bilinear) if its size differs.
        colormap: a matplotlib colormap: "inferno" is perceptually uniform, "jet" is common in papers.
        alpha: opacity of the color, in [0, 1].
        alpha_follows_heatmap: an opacity of alpha times the heatmap, which leaves irrelevant parts of the
            picture unchanged; False for the same opacity everywhere, as in many papers.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: a shape or a value is out of range, or the colormap is unknown.
        TypeError: an argument has the wrong type.
    """
    check_style(colormap=colormap, alpha=alpha, alpha_follows_heatmap=alpha_follows_heatmap)
    picture = inputs.picture_of(image)
    relevance = inputs.resized(inputs.relevance_of(heatmap, "heatmap"), picture.shape[:2]).clip(0, 1)
    colors = _colormap(colormap)(relevance)[..., :3]
    cover = (alpha * relevance if alpha_follows_heatmap else np.full_like(relevance, alpha))[..., None]
    return _blended(picture, colors, cover)


def heatmaps(
    image: Picture,
    maps: Mapping[str, Map],
    *,
    caption: str | None = None,
    notes: Mapping[str, str] | None = None,
    columns: int = COLUMNS,
    **style: Unpack[Style],
) -> Figure:
    """A figure of the picture and of the picture under each heatmap.

    Args:
        image: the picture, as for `overlay`.
        maps: titles to heatmaps, as for `overlay`; the title of a map that is zero everywhere says so.
        caption: a line below the pictures.
        notes: titles to notes below their pictures, such as scores.
        columns: pictures per row, ≥ 1.
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The figure, not registered with pyplot: `figure.savefig("name.png")` writes it.

    Raises:
        ValueError: there are no maps, a shape or a value is out of range, or the colormap is unknown.
        TypeError: an argument has the wrong type.
    """
    inputs.check_titled("maps", maps, "titles to heatmaps", "map")
    check("notes", notes, Mapping | None)
    checks.check_count("columns", columns)
    notes = notes or {}
    for title, note in notes.items():
        check(f"notes[{title!r}]", note, str)
    if not notes.keys() <= maps.keys():
        unknown = sorted(notes.keys() - maps.keys())
        raise ValueError(f"notes has titles {unknown} that maps does not have; expected titles of maps")
    picture = inputs.picture_of(image)
    shown = zip(maps, _overlaid(picture, maps, "maps", style), strict=True)
    panels = [_photograph(picture), *(panel._replace(note=notes.get(title, "")) for title, panel in shown)]
    return panels_figure(panels, caption, colormap=style.get("colormap", COLORMAP), columns=columns)


def grid(
    image: Picture, rows: Sequence[Mapping[str, Map]], *, caption: str | None = None, **style: Unpack[Style]
) -> Figure:
    """A figure of rows of the picture under heatmaps, for comparing methods, classes or layers.

    Args:
        image: the picture, as for `overlay`.
        rows: for each row, titles to heatmaps, as for `overlay`; the same number in every row.
        caption: a line below the pictures.
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: there are no maps, rows differ in length, a shape or a value is out of range, or the
            colormap is unknown.
        TypeError: an argument has the wrong type.
    """
    check("rows", rows, Sequence[Mapping])
    counts = [len(row) for row in rows]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"rows have {counts} maps; expected at least one row, all of the same length")
    picture = inputs.picture_of(image)
    panels = [p for i, row in enumerate(rows) for p in _overlaid(picture, row, f"rows[{i}]", style)]
    return panels_figure(panels, caption, colormap=style.get("colormap", COLORMAP), columns=counts[0])


def detections(
    image: Picture,
    boxes: Mapping[str, Numbers],
    maps: Mapping[str, Map],
    *,
    caption: str | None = None,
    columns: int = COLUMNS,
    **style: Unpack[Style],
) -> Figure:
    """A figure of the picture with boxes and of the picture under each box's heatmap.

    Args:
        image: the picture, as for `overlay`.
        boxes: titles to boxes, x1, y1, x2, y2 in pixels of their heatmaps, which are those of x.
        maps: the same titles to heatmaps, as for `overlay`.
        caption: a line below the pictures.
        columns: pictures per row, ≥ 1.
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: there are no maps, boxes has other titles, a shape or a value is out of range, or the
            colormap is unknown.
        TypeError: an argument has the wrong type.
    """
    inputs.check_titled("maps", maps, "titles to heatmaps", "map")
    inputs.check_titled("boxes", boxes, "titles to boxes", "box")
    checks.check_count("columns", columns)
    if boxes.keys() != maps.keys():
        raise ValueError(f"boxes has the titles {list(boxes)}; expected those of maps, {list(maps)}")
    picture = inputs.picture_of(image)
    drawn = []
    for title, values in maps.items():
        height, width = inputs.map_of(values, f"maps[{title!r}]").shape
        box = inputs.numbers_of(boxes[title], f"boxes[{title!r}]")
        if box.shape != (4,) or not (box[2:] > box[:2]).all():
            expected = "x1, y1, x2, y2 with x1 < x2 and y1 < y2"
            raise ValueError(f"boxes[{title!r}]={boxes[title]!r}; expected {expected}")
        drawn.append(box * np.array([picture.shape[1] / width, picture.shape[0] / height] * 2))
    numbered = enumerate(zip(_overlaid(picture, maps, "maps", style), drawn, strict=True))
    panels = [_photograph(picture)._replace(boxes=dict(enumerate(drawn)))]
    panels += [panel._replace(boxes={number: box}) for number, (panel, box) in numbered]
    return panels_figure(panels, caption, colormap=style.get("colormap", COLORMAP), columns=columns)


def concepts(
    image: Picture,
    maps: Sequence[Map] | Mapping[str, Map],
    *,
    caption: str | None = None,
    alpha: float = 0.65,
) -> Figure:
    """A figure of the picture colored by its concepts, and of each concept separately.

    Each pixel has the color of its strongest concept, with an opacity that follows the concept's strength.

    Args:
        image: the picture, as for `overlay`.
        maps: one map per concept, (h, w), ≥ 0, of any size, such as `Concepts.maps[i]` from
            `xcam_fn.concepts`; with titles if it is a mapping, else numbered.
        caption: a line below the pictures.
        alpha: opacity of the colors, in [0, 1].

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: there are no maps, a map is negative or not finite, or alpha is out of range.
        TypeError: an argument has the wrong type.
    """
    named = maps if isinstance(maps, Mapping) else {f"concept {i + 1}": each for i, each in enumerate(maps)}
    if not named:
        raise ValueError("maps is empty; expected one map for each concept")
    check_style(colormap=_CONCEPTS, alpha=alpha)
    picture = inputs.picture_of(image)
    given = {title: inputs.map_of(values, f"maps[{title!r}]") for title, values in named.items()}
    for title, values in given.items():
        if not (np.isfinite(values).all() and values.min() >= 0):
            raise ValueError(f"maps[{title!r}] has negative or non-finite values; expected finite values ≥ 0")
    highest = max(values.max() for values in given.values()) or 1.0
    size = picture.shape[:2]
    strength = np.stack([inputs.resized(values / highest, size).clip(0, 1) for values in given.values()])
    palette = _colormap(_CONCEPTS)
    colors = palette(np.arange(len(given)) % palette.N)[:, :3]

    def painted(which: slice, title: str) -> Panel:
        cover = alpha * strength[which].max(0)[..., None]
        return Panel(_blended(picture, colors[which][strength[which].argmax(0)], cover), title)

    alone = [painted(slice(i, i + 1), title) for i, title in enumerate(given)]
    return panels_figure([_photograph(picture), painted(slice(None), "all concepts"), *alone], caption)


def curves(
    curves: Mapping[str, Curve],
    image: Picture | None = None,
    heatmap: Map | None = None,
    *,
    best: str = "highest",
    title: str | None = None,
    xlabel: str = "share of pixels changed",
    ylabel: str = "probability",
    **style: Unpack[Style],
) -> Figure:
    """A figure of insertion or deletion curves.

    The area under a single curve is shaded, and the overlay is drawn next to it if its image and heatmap are
    given. Several curves share one axes, with the best one first in the legend. For a batch, the line is the
    mean over its images, with a band of one standard error. Colors and dashes follow the order of `curves`,
    so a method looks the same in two figures; up to 28 curves are distinguishable.

    Args:
        curves: names to curves, as `xcam_fn.insertion` and `xcam_fn.deletion` return them.
        image: the picture of a single curve, as for `overlay`.
        heatmap: the heatmap of a single curve, as for `overlay`.
        best: which area comes first: "highest", as for insertion, or "lowest", as for deletion.
        title: the figure's title.
        xlabel: label of the horizontal axis.
        ylabel: label of the vertical axis.
        **style: colormap, alpha and alpha_follows_heatmap, as for `overlay`.

    Returns:
        The figure, not registered with pyplot; the curves are in its last axes.

    Raises:
        ValueError: there are no curves, one's parts do not fit each other, a value is out of range, or an
            image comes without a heatmap, with many curves or with the curve of many images.
        TypeError: an argument has the wrong type.
    """
    lines = inputs.lines_of(curves)
    for name, words in {"title": title, "xlabel": xlabel, "ylabel": ylabel}.items():
        check(name, words, str | None)
    checks.check_choice("best", best, ("highest", "lowest"))
    check_style(**style)
    if (image is None) != (heatmap is None):
        given, missing = ("heatmap", "image") if image is None else ("image", "heatmap")
        raise ValueError(f"{given} is given without {missing}; pass both, or neither for curves alone")
    beside: list[Panel] = []
    if image is not None and heatmap is not None:
        if len(lines) > 1:
            raise ValueError(f"image and heatmap go with one curve, got {len(lines)}; leave them out")
        name, images = lines[0].name, lines[0].images
        if images > 1:
            remedy = "pass Curve(fractions, scores[:1], auc[:1]), or leave image and heatmap out"
            raise ValueError(f"curves[{name!r}] has {images} images, and image is one; {remedy}")
        beside = _overlaid(inputs.picture_of(image), {name: heatmap}, None, style)
    one = len(lines) == 1
    figure = curve_figure(lines[0], title, *beside) if one else curves_figure(lines, best, title)
    axis = figure.axes[-1]
    axis.set_xlabel(xlabel, parse_math=False)
    axis.set_ylabel(ylabel, parse_math=False)
    return figure


def frames(
    image: Picture,
    heatmap: Map,
    *,
    mode: str = "insertion",
    baseline: Color | Callable[[Tensor], Tensor] | None = None,
    fractions: Numbers = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0),
    scores: Numbers | None = None,
    caption: str | None = None,
) -> Figure:
    """A figure of the images that the network sees along an insertion or deletion curve.

    Args:
        image: the picture, as for `overlay`.
        heatmap: (h, w) or (1, h, w), finite: only its order counts, as for `xcam_fn.insertion`, with ties
            broken by position. Resized to the picture (bilinear) if its size differs, which changes the
            order: the curve uses the heatmap that it was given.
        mode: "insertion", to reveal the most relevant pixels first, or "deletion", to remove them first.
        baseline: the value used for hidden pixels: a number or three (red, green, blue) in [0, 1], in the
            picture's units rather than normalized ones, or a callable of the picture as a tensor
            (1, 3, H, W). By default `xcam_fn.perturb.blurred` for insertion, and for deletion the mean color
            of ImageNet, which is 0 in the normalized units of most networks; for others use `preset.mean`.
        fractions: fractions of pixels, each in [0, 1], one frame each.
        scores: the score of each frame, shown above it.
        caption: a line below the frames.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: there are no fractions, scores are not as many, or a shape or a value is out of range.
        TypeError: an argument has the wrong type.
    """
    checks.check_choice("mode", mode, ("insertion", "deletion"))
    picture = inputs.picture_of(image)
    order = inputs.map_of(heatmap, "heatmap")
    if not np.isfinite(order).all():
        raise checks.not_finite("heatmap")
    rank = relevance_rank(torch.tensor(inputs.resized(order, picture.shape[:2]))[None])[0].numpy()
    shares = inputs.numbers_of(fractions, "fractions")
    if shares.size == 0 or shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"fractions={fractions!r}; expected at least one number, each from 0 to 1")
    unseen = _unseen(baseline, mode, picture)
    start, end = (unseen, picture) if mode == "insertion" else (picture, unseen)
    pictures = [_bytes(np.where((rank < round(f * rank.size))[..., None], end, start)) for f in shares]
    titles = [f"{100 * f:.4g} %" for f in shares]
    if scores is not None:
        values = inputs.numbers_of(scores, "scores")
        if len(values) != len(shares):
            raise ValueError(f"scores has {len(values)} entries; expected {len(shares)}, one per fraction")
        titles = [f"{title}\np = {p:.2f}" for title, p in zip(titles, values, strict=True)]
    return panels_figure(list(map(Panel, pictures, titles)), caption, columns=6)


def check_style(
    *, colormap: str = COLORMAP, alpha: float = _ALPHA, alpha_follows_heatmap: bool = True
) -> None:
    """Raise what `overlay` and `heatmaps` would raise for these, before any heatmap is computed."""
    checks.check_number("alpha", alpha, at_least=0, at_most=1)
    check("alpha_follows_heatmap", alpha_follows_heatmap, bool)
    _colormap(colormap)


def _colormap(name: str) -> Colormap:
    if not isinstance(name, str):
        raise TypeError(f"colormap must be a name, such as 'inferno', got {type(name).__name__}")
    if name not in mpl.colormaps:
        hint = nearest(name, mpl.colormaps, "expected one such as 'inferno' or 'jet'")
        raise ValueError(f"colormap={name!r} is not one of matplotlib's; {hint}")
    return mpl.colormaps[name]


def _unseen(
    baseline: Color | Callable[[Tensor], Tensor] | None, mode: str, picture: np.ndarray
) -> Float64[np.ndarray, "H W 3"]:
    """What is seen in place of each pixel."""
    if baseline is None:
        baseline = blurred if mode == "insertion" else _MEAN_COLOR
    if callable(baseline):
        x = torch.tensor(picture).permute(2, 0, 1)[None]
        values = np.moveaxis(inputs.array_of(baseline_images(baseline, x)[0], "baseline"), 0, -1)
    else:
        values = inputs.numbers_of(baseline, "baseline", None)
        if values.shape not in {(), (3,)}:
            wanted = "three (red, green, blue), or a callable of the picture as a tensor (1, 3, H, W)"
            raise ValueError(f"baseline has shape {values.shape}; expected a number, {wanted}")
    values = np.broadcast_to(values, picture.shape)
    return unit_floats(values, "baseline", "in units of the picture, not normalized")


def _overlaid(
    picture: np.ndarray, maps: Mapping[str, Map], argument: str | None, style: Style
) -> list[Panel]:
    """The picture under each of the maps, titled."""
    panels = []
    for title, values in maps.items():
        relevance = inputs.relevance_of(values, f"{argument}[{title!r}]" if argument else "heatmap")
        empty = "" if relevance.any() else "\n(empty: zero everywhere)"
        panels.append(Panel(overlay(picture, relevance, **style), title + empty))
    return panels


def _photograph(picture: np.ndarray) -> Panel:
    return Panel(_bytes(picture), "photograph")


def _blended(picture: np.ndarray, colors: np.ndarray, cover: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    return _bytes(picture * (1 - cover) + colors * cover)


def _bytes(picture: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    return np.round(picture * 255).astype(np.uint8)
