"""Overlays are the blend they claim to be, and figures hold what they were given."""

import itertools
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch.nn import functional as F

from xcam_fn import plot

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (12, 20, 3), np.uint8)
MAP = RNG.random((12, 20))


def colors(values: np.ndarray, name: str) -> np.ndarray:
    return mpl.colormaps[name](values)[..., :3] * 255


@pytest.mark.parametrize("colormap", ["viridis", "jet"])
def test_an_overlay_is_the_weighted_mean_of_picture_and_color(colormap):
    found = plot.overlay(PICTURE, MAP, colormap=colormap, alpha=0.3)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, 0.7 * PICTURE + 0.3 * colors(MAP, colormap), atol=0.51)


def test_the_extremes_of_alpha_are_the_picture_and_the_color():
    np.testing.assert_array_equal(plot.overlay(PICTURE, MAP, alpha=0.0), PICTURE)
    np.testing.assert_allclose(plot.overlay(PICTURE, MAP, alpha=1.0), colors(MAP, "viridis"), atol=0.51)


def test_alpha_that_follows_the_heatmap_leaves_the_irrelevant_as_it_is():
    relevance = np.zeros((12, 20))
    relevance[3:6, 4:9] = 1
    found = plot.overlay(PICTURE, relevance, alpha=0.5, alpha_follows_heatmap=True)
    np.testing.assert_array_equal(found[relevance == 0], PICTURE[relevance == 0])
    np.testing.assert_array_equal(
        found[relevance == 1], plot.overlay(PICTURE, relevance, alpha=0.5)[relevance == 1]
    )


@pytest.mark.parametrize("size", [(3, 5), (12, 20), (7, 20)])
def test_a_smaller_heatmap_is_resized_as_torch_does(size):
    small = torch.rand(size, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(small[None, None], PICTURE.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    resized = plot.overlay(PICTURE, small).astype(int)
    assert np.abs(resized - plot.overlay(PICTURE, large)).max() <= 1


def test_every_kind_of_picture_gives_the_same_overlay():
    expected = plot.overlay(PICTURE, MAP)
    channels_first = np.moveaxis(PICTURE, -1, 0).copy()
    for image in (
        Image.fromarray(PICTURE),
        PICTURE / 255,
        (PICTURE / 255).astype(np.float32),
        torch.from_numpy(channels_first),
        torch.from_numpy(channels_first)[None].float() / 255,
    ):
        np.testing.assert_array_equal(plot.overlay(image, MAP), expected)
    for heatmap in (torch.from_numpy(MAP), MAP[None], torch.from_numpy(MAP)[None].requires_grad_()):
        np.testing.assert_array_equal(plot.overlay(PICTURE, heatmap), expected)


def test_a_gray_picture_is_its_three_equal_channels():
    gray = PICTURE[..., 0]
    expected = plot.overlay(np.repeat(gray[..., None], 3, 2), MAP)
    for image in (
        gray,
        gray[..., None],
        Image.fromarray(gray),
        torch.from_numpy(gray),
        torch.from_numpy(gray)[None],
    ):
        np.testing.assert_array_equal(plot.overlay(image, MAP), expected)


def test_half_precision_is_taken():
    half = torch.full((4, 4), 0.5, dtype=torch.bfloat16)
    np.testing.assert_array_equal(plot.overlay(PICTURE, half), plot.overlay(PICTURE, np.full((4, 4), 0.5)))


def axes_of(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and axis.images]


def test_a_figure_has_the_photograph_and_a_titled_overlay_per_method():
    maps = {"Grad-CAM": torch.from_numpy(MAP), "Layer-CAM": MAP[None] * 0.5}
    figure = plot.heatmaps(PICTURE, maps, caption="tabby (class 281), $0.9", colormap="jet", alpha=0.4)
    axes = axes_of(figure)
    assert [axis.get_title() for axis in axes] == ["photograph", "Grad-CAM", "Layer-CAM"]
    np.testing.assert_array_equal(axes[0].images[0].get_array(), PICTURE)
    for axis, heatmap in zip(axes[1:], maps.values(), strict=True):
        expected = plot.overlay(PICTURE, heatmap, colormap="jet", alpha=0.4)
        np.testing.assert_array_equal(axis.images[0].get_array(), expected)
    assert figure.get_supxlabel() == "tabby (class 281), $0.9"
    assert len(figure.axes) == len(axes) + 1


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 2)), (3, (1, 4)), (4, (2, 4)), (8, (3, 4))])
def test_many_overlays_wrap_into_rows(count, shape):
    figure = plot.heatmaps(PICTURE, {f"method {i}": MAP for i in range(count)})
    axes = axes_of(figure)
    assert len(axes) == count + 1
    specs = [axis.get_subplotspec() for axis in axes]
    assert {(spec.rowspan.start, spec.colspan.start) for spec in specs} == {
        (i // 4, i % 4) for i in range(count + 1)
    }
    assert specs[0].get_gridspec().get_geometry() == shape


def test_an_empty_map_says_so():
    figure = plot.heatmaps(PICTURE, {"Grad-CAM": np.zeros((7, 7)), "Layer-CAM": MAP})
    titles = [axis.get_title() for axis in axes_of(figure)]
    assert " ".join(titles[1].split()) == "Grad-CAM (empty: zero everywhere)"
    assert titles[2] == "Layer-CAM"


@pytest.mark.parametrize("shape", [(30, 30), (30, 90), (90, 30), (400, 40)])
def test_nothing_is_drawn_outside_the_figure_or_over_anything_else(shape):
    picture = RNG.random(shape)
    maps = {"Integrated Gradients": MAP, "empty one": np.zeros((2, 2))}
    figure: Any = plot.heatmaps(picture, maps, caption="a caption that may well have to be wrapped " * 2)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    for left, right in itertools.pairwise(boxes):
        assert left.x1 <= right.x0 + 1
    pictures = [axis.get_window_extent() for axis in axes_of(figure)]
    assert all(box.width / box.height == pytest.approx(shape[1] / shape[0], rel=0.02) for box in pictures)


def test_pyplot_knows_nothing_of_the_figure():
    before = plt.get_fignums()
    figure = plot.heatmaps(PICTURE, {"Grad-CAM": MAP})
    assert plt.get_fignums() == before
    assert not hasattr(figure, "number")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"colormap": "virids"}, "colormap='virids' is none of matplotlib's; did you mean 'viridis'"),
        ({"alpha": 1.5}, r"alpha=1\.5 is out of range"),
        ({"image": PICTURE[None]}, r"image has shape \(1, 12, 20, 3\); expected an array \(H, W\)"),
        (
            {"image": torch.zeros(12, 20, 3)},
            r"image has shape \(12, 20, 3\); expected .* tensor .*\(3, H, W\)",
        ),
        (
            {"image": PICTURE / 100},
            r"image has values from 0 to 2\.55; expected \[0, 1\] .*before normalization",
        ),
        ({"image": PICTURE.astype(int)}, "image has values of int64; expected uint8"),
        ({"image": Image.fromarray(PICTURE).convert("CMYK")}, r"mode 'CMYK'; .*images\.load"),
        ({"heatmap": MAP - 1}, r"heatmap has values from .*; expected \[0, 1\] \(xcam_fn\.heatmap"),
        ({"heatmap": MAP * np.nan}, "heatmap holds NaN"),
        ({"heatmap": np.zeros((2, 7, 7))}, r"heatmap has shape \(2, 7, 7\); expected one map"),
        ({"heatmap": np.zeros((0, 7))}, r"heatmap has shape \(0, 7\)"),
    ],
)
def test_values_out_of_range_are_refused(change, reason):
    arguments = {"image": PICTURE, "heatmap": MAP, **change}
    with pytest.raises(ValueError, match=reason):
        plot.overlay(arguments.pop("image"), arguments.pop("heatmap"), **arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "cat.jpg"}, "image is a str; expected a PIL image"),
        ({"heatmap": [[1.0]]}, "heatmap is a list; expected a tensor or an array"),
        ({"alpha": "0.5"}, "alpha='0.5' is a str; expected a number"),
        ({"colormap": 3}, "colormap is a int; expected the name"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(change, reason):
    arguments = {"image": PICTURE, "heatmap": MAP, **change}
    with pytest.raises(TypeError, match=reason):
        plot.overlay(arguments.pop("image"), arguments.pop("heatmap"), **arguments)


@pytest.mark.usefixtures("unchecked")
def test_a_figure_wants_titles_to_maps():
    with pytest.raises(TypeError, match="maps is a list; expected titles to heatmaps"):
        plot.heatmaps(PICTURE, [MAP])
    with pytest.raises(ValueError, match="maps is empty"):
        plot.heatmaps(PICTURE, {})
    with pytest.raises(ValueError, match=r"maps\['Grad-CAM'\] has shape \(2, 3, 4\)"):
        plot.heatmaps(PICTURE, {"Grad-CAM": np.zeros((2, 3, 4))})
