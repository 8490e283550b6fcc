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

from xcam_fn import perturb, plot
from xcam_fn.metrics import Curve, relevance_rank

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (12, 20, 3), np.uint8)
MAP = RNG.random((12, 20))


def colors(values: np.ndarray, name: str) -> np.ndarray:
    return mpl.colormaps[name](values)[..., :3] * 255


@pytest.mark.parametrize("colormap", ["inferno", "jet"])
def test_an_overlay_is_the_weighted_mean_of_picture_and_color(colormap):
    found = plot.overlay(PICTURE, MAP, colormap=colormap, alpha=0.3, alpha_follows_heatmap=False)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, 0.7 * PICTURE + 0.3 * colors(MAP, colormap), atol=0.51)


def test_the_extremes_of_alpha_are_the_picture_and_the_color():
    np.testing.assert_array_equal(plot.overlay(PICTURE, MAP, alpha=0.0), PICTURE)
    full = plot.overlay(PICTURE, MAP, alpha=1.0, alpha_follows_heatmap=False)
    np.testing.assert_allclose(full, colors(MAP, "inferno"), atol=0.51)


def test_by_default_the_opacity_follows_the_heatmap():
    cover = 0.75 * MAP[..., None]
    expected = (1 - cover) * PICTURE + cover * colors(MAP, "inferno")
    np.testing.assert_allclose(plot.overlay(PICTURE, MAP), expected, atol=0.51)
    np.testing.assert_array_equal(plot.overlay(PICTURE, np.zeros((12, 20))), PICTURE)


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
        ({"colormap": "virids"}, "colormap='virids' is not one of matplotlib's; did you mean 'viridis'"),
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
        (
            {"image": PICTURE.astype(int)},
            "image has dtype int64 of unknown range; expected bool, uint8",
        ),
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
        ({"image": "cat.jpg"}, "image must be a PIL image"),
        ({"heatmap": [[1.0]]}, "heatmap must be a tensor or an array"),
        ({"alpha": "0.5"}, "alpha must be a number"),
        ({"colormap": 3}, "colormap must be a name"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(change, reason):
    arguments = {"image": PICTURE, "heatmap": MAP, **change}
    with pytest.raises(TypeError, match=reason):
        plot.overlay(arguments.pop("image"), arguments.pop("heatmap"), **arguments)


@pytest.mark.usefixtures("unchecked")
def test_a_figure_wants_titles_to_maps():
    with pytest.raises(TypeError, match="maps must be titles to heatmaps"):
        plot.heatmaps(PICTURE, [MAP])
    with pytest.raises(ValueError, match="maps is empty"):
        plot.heatmaps(PICTURE, {})
    with pytest.raises(ValueError, match=r"maps\['Grad-CAM'\] has shape \(2, 3, 4\)"):
        plot.heatmaps(PICTURE, {"Grad-CAM": np.zeros((2, 3, 4))})


# -- curves ------------------------------------------------------------------------------------------------


def curve(B: int = 1, T: int = 6, seed: int = 0, **change: Any) -> Curve:
    scores = torch.rand(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fractions = torch.linspace(0, 1, T, dtype=torch.float64)
    return Curve(fractions, scores, torch.trapezoid(scores, fractions))._replace(**change)


def legend_of(figure: Any) -> list[str]:
    return [" ".join(text.get_text().split()) for text in figure.axes[-1].get_legend().get_texts()]


def assert_nothing_is_cut_off(figure: Any) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    for box in boxes:
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    for left, right in itertools.pairwise(boxes):
        assert left.x1 <= right.x0 + 1 or left.y0 >= right.y1 - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_curve_has_the_area_under_it_shaded_and_named(dtype):
    given = Curve(*(part.to(dtype).requires_grad_() for part in curve()))
    figure = plot.curves({"Grad-CAM": given}, title="insertion", xlabel="share shown", ylabel="p")
    (axis,) = figure.axes
    (line,) = axis.lines
    fractions, scores, auc = (part.detach().double().numpy() for part in given)
    np.testing.assert_array_equal(line.get_xydata(), np.stack([fractions, scores[0]], 1))
    (area,) = axis.collections
    (path,) = area.get_paths()
    x, y = path.vertices[:-1].T
    inside = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert inside == pytest.approx(float(curve().auc), abs=0.01 if dtype == torch.bfloat16 else 1e-6)
    assert axis.get_title() == f"insertion, Grad-CAM, AUC = {auc[0]:.3f}"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("share shown", "p")
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 1), (0, 1))


def test_beside_one_curve_is_the_overlay():
    figure = plot.curves({"Grad-CAM": curve()}, PICTURE, MAP, colormap="jet", alpha=0.3)
    left, right = figure.axes
    np.testing.assert_array_equal(
        left.images[0].get_array(), plot.overlay(PICTURE, MAP, colormap="jet", alpha=0.3)
    )
    assert left.get_title() == "Grad-CAM"
    assert right.get_title() == f"AUC = {float(curve().auc):.3f}"
    assert right.get_xlabel() == "share of pixels changed"
    empty = plot.curves({"Grad-CAM": curve()}, PICTURE, MAP * 0)
    assert "empty" in empty.axes[0].get_title()


def test_the_mean_of_a_batch_has_a_band_of_its_standard_error():
    given = curve(B=5)
    axis = plot.curves({"RISE": given}).axes[0]
    scores = given.scores.numpy()
    np.testing.assert_allclose(axis.lines[0].get_ydata(), scores.mean(0))
    _, band = axis.collections
    error = scores.std(0, ddof=1) / 5**0.5
    vertices: Any = band.get_paths()[0].vertices
    drawn = {(round(x, 9), round(y, 9)) for x, y in vertices}
    expected = np.concatenate([scores.mean(0) - error, scores.mean(0) + error])
    assert drawn == {
        (round(x, 9), round(y, 9)) for x, y in zip(given.fractions.tolist() * 2, expected, strict=True)
    }
    auc = given.auc.numpy()
    mean, spread = auc.mean(), auc.std(ddof=1) / 5**0.5
    assert axis.get_title() == f"RISE, AUC = {mean:.3f} ± {spread:.3f}\nmean ± standard error of 5 images"


@pytest.mark.parametrize("best", ["highest", "lowest"])
def test_many_curves_are_named_from_the_best_on(best):
    given = {f"method {i}": curve(seed=i) for i in range(14)}
    figure = plot.curves(given, best=best)
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == list(given)
    assert not axis.collections
    ranked = sorted(given, key=lambda name: float(given[name].auc), reverse=best == "highest")
    assert legend_of(figure) == [f"{name}: {float(given[name].auc):.3f}" for name in ranked]
    assert axis.get_legend().get_title().get_text().endswith(f"{best} first")
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axis.lines}
    for handle, name in zip(axis.get_legend().get_lines(), ranked, strict=True):
        assert (handle.get_color(), handle.get_linestyle()) == looks[name]


def test_equal_areas_stay_in_the_order_given():
    for best in ("highest", "lowest"):
        names = [
            text.split(":")[0] for text in legend_of(plot.curves(dict.fromkeys("bca", curve()), best=best))
        ]
        assert names == list("bca")


def test_a_method_looks_alike_in_two_figures_and_like_no_other():
    def looks(figure: Any) -> list[tuple[Any, ...]]:
        return [(line.get_color(), str(line._unscaled_dash_pattern)) for line in figure.axes[0].lines]

    insertion = plot.curves({f"method {i}": curve(seed=i) for i in range(28)})
    deletion = plot.curves({f"method {i}": curve(seed=99 - i) for i in range(28)}, best="lowest")
    assert looks(insertion) == looks(deletion)
    assert len(set(looks(insertion))) == 28


def test_only_batches_have_bands_and_errors():
    figure = plot.curves({"one": curve(), "five": curve(B=5, T=9), "two": curve(B=2)})
    assert len(figure.axes[0].lines) == 3
    assert len(figure.axes[0].collections) == 2
    assert {text.split(":")[0]: "±" in text for text in legend_of(figure)} == {
        "one": False, "five": True, "two": True,
    }  # fmt: skip
    assert "standard error" in figure.axes[0].get_legend().get_title().get_text()


def test_the_vertical_axis_reaches_as_far_as_scores_and_bands():
    given = curve(B=3)
    wide = given._replace(scores=given.scores * 30 - 10)
    mean, error = wide.scores.mean(0), wide.scores.std(0) / 3**0.5
    low, high = plot.curves({"logits": wide, "probabilities": curve()}).axes[0].get_ylim()
    assert low == pytest.approx(float((mean - error).min()))
    assert high == pytest.approx(float((mean + error).max()))


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 14, 30])
def test_no_curve_or_legend_is_cut_off(count, B):
    long = "a method with a name of many words, $5_x$"
    given = {f"{long * (i % 3 == 0)} {i}": curve(B, seed=i) for i in range(count)}
    assert_nothing_is_cut_off(plot.curves(given, title="a title that may well have to be wrapped " * 2))


@pytest.mark.parametrize("shape", [(30, 30), (30, 90), (90, 30), (400, 40)])
def test_no_overlay_beside_a_curve_is_cut_off(shape):
    figure = plot.curves({"Integrated Gradients": curve()}, RNG.random(shape), MAP * 0, title="insertion")
    assert_nothing_is_cut_off(figure)


def test_neither_curves_nor_frames_change_what_they_are_given():
    given, picture, heatmap = curve(B=1), PICTURE.copy(), MAP.copy()
    for array in (picture, heatmap):
        array.setflags(write=False)
    copies = [part.clone() for part in given]
    before = plt.get_fignums()
    plot.curves({"Grad-CAM": given}, picture, heatmap)
    plot.frames(picture, heatmap)
    plot.frames(torch.from_numpy(PICTURE).movedim(-1, 0), torch.from_numpy(MAP), mode="deletion")
    assert all(torch.equal(part, copied) for part, copied in zip(given, copies, strict=True))
    np.testing.assert_array_equal(picture, PICTURE)
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"curves": {}}, "curves is empty; expected at least one curve"),
        (
            {"curves": {"CAM": curve(scores=torch.rand(1, 5))}},
            r"curves\['CAM'\] has fractions \(6,\), scores \(1, 5\) and auc \(1,\); expected \(T,\), \(B, T\)",
        ),
        ({"curves": {"CAM": curve(auc=torch.rand(2))}}, r"auc \(2,\); expected"),
        ({"curves": {"CAM": curve(scores=torch.rand(6))}}, r"scores \(6,\)"),
        ({"curves": {"CAM": curve(0)}}, r"scores \(0, 6\)"),
        ({"curves": {"CAM": curve(fractions=torch.tensor(0.5), auc=torch.rand(1, 6))}}, r"fractions \(\)"),
        (
            {"curves": {"CAM": curve(scores=torch.full((1, 6), torch.nan))}},
            r"curves\['CAM'\]\.scores holds NaN",
        ),
        (
            {"curves": {"CAM": curve(auc=torch.full((1,), torch.inf))}},
            r"curves\['CAM'\]\.auc holds NaN or inf",
        ),
        (
            {"curves": {"CAM": curve(fractions=torch.linspace(1, 0, 6))}},
            "fractions go from 1 to 0; expected asc",
        ),
        ({"curves": {"CAM": curve(fractions=torch.arange(6.0))}}, "fractions go from 0 to 5; expected"),
        ({"best": "first"}, "best='first'; expected one of 'highest', 'lowest'"),
        ({"image": PICTURE}, "image is given without heatmap; pass both, or neither"),
        ({"heatmap": MAP}, "heatmap is given without image; pass both, or neither"),
        ({"image": PICTURE, "heatmap": MAP - 1}, r"heatmap has values from .*; expected \[0, 1\]"),
        ({"colormap": "virids"}, "colormap='virids' is not one"),
        (
            {"image": PICTURE, "heatmap": MAP, "curves": {"a": curve(), "b": curve()}},
            "image and heatmap go with one curve, got 2",
        ),
        (
            {"image": PICTURE, "heatmap": MAP, "curves": {"CAM": curve(B=3)}},
            r"curves\['CAM'\] has 3 images, and image is one; pass Curve\(",
        ),
    ],
)
def test_curves_that_do_not_fit_are_refused(change, reason):
    arguments = {"curves": {"CAM": curve()}, **change}
    with pytest.raises(ValueError, match=reason):
        plot.curves(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_a_figure_of_curves_wants_names_to_curves():
    with pytest.raises(TypeError, match="curves must be names to curves"):
        plot.curves([curve()])
    with pytest.raises(TypeError, match=r"curves\['CAM'\] must be a Curve"):
        plot.curves({"CAM": tuple(curve())})
    with pytest.raises(TypeError, match=r"curves\['CAM'\]\.auc must be a tensor, .* got 'high'"):
        plot.curves({"CAM": curve(auc="high")})


# -- frames ------------------------------------------------------------------------------------------------


def frames_of(figure: Any) -> list[np.ndarray]:
    return [np.asarray(axis.images[0].get_array()) for axis in axes_of(figure)]


@pytest.mark.parametrize("mode", ["insertion", "deletion"])
def test_frames_are_what_a_slow_loop_makes(mode):
    heatmap = np.round(RNG.normal(size=(12, 20)), 1)  # with ties, and outside [0, 1]
    unseen = np.broadcast_to([0.2, 0.4, 0.6], PICTURE.shape)
    fractions = [0.0, 0.1, 0.33, 0.5, 0.9, 1.0, 0.05]
    figure = plot.frames(PICTURE, heatmap, mode=mode, baseline=[0.2, 0.4, 0.6], fractions=fractions)
    places = sorted(range(240), key=lambda place: -heatmap[place // 20, place % 20])
    start, end = (unseen * 255, PICTURE) if mode == "insertion" else (PICTURE, unseen * 255)
    found = frames_of(figure)
    assert len(figure.axes) == 12
    assert len(found) == len(fractions)
    for fraction, frame in zip(fractions, found, strict=True):
        expected = start.astype(float).copy()
        for place in places[: round(fraction * 240)]:
            expected[place // 20, place % 20] = end[place // 20, place % 20]
        np.testing.assert_array_equal(frame, np.round(expected))


def test_the_order_is_that_of_the_metrics():
    heatmap = (torch.rand(1, 12, 20, generator=torch.Generator().manual_seed(1)) - 0.5).mul(8).round() * 1e-6
    rank = relevance_rank(heatmap)[0].numpy()
    figure = plot.frames(np.zeros_like(PICTURE), heatmap, baseline=1.0, mode="deletion", fractions=[0.3])
    np.testing.assert_array_equal(frames_of(figure)[0][..., 0] == 255, rank < 72)


def test_by_default_pixels_come_into_a_blur_and_go_into_the_mean_color():
    shown, taken = (frames_of(plot.frames(PICTURE, MAP, mode=mode)) for mode in ("insertion", "deletion"))
    pixels = torch.from_numpy(PICTURE).movedim(-1, 0)[None].double()
    blur = perturb.blurred(pixels)[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(shown[0], blur, atol=0.5 + 1e-9)
    np.testing.assert_array_equal(shown[-1], PICTURE)
    np.testing.assert_array_equal(taken[0], PICTURE)
    assert (taken[-1] == np.round(255 * np.array([0.485, 0.456, 0.406]))).all()
    assert len(shown) == len(taken) == 6
    called = frames_of(plot.frames(PICTURE, MAP, mode="deletion", baseline=perturb.blurred))
    np.testing.assert_array_equal(called[-1], shown[0])


def test_frames_are_titled_by_share_and_score():
    figure = plot.frames(PICTURE, MAP, caption="insertion of $5")
    titles = [axis.get_title() for axis in axes_of(figure)]
    assert titles == ["0 %", "5 %", "10 %", "25 %", "50 %", "100 %"]
    assert figure.get_supxlabel() == "insertion of $5"
    for scores in ([0.834, 1.0], np.array([0.834, 1]), torch.tensor([0.834, 1]).requires_grad_()):
        figure = plot.frames(PICTURE, MAP, fractions=[0.125, 1.0], scores=scores)
        assert [axis.get_title() for axis in figure.axes] == ["12.5 %\np = 0.83", "100 %\np = 1.00"]


def test_pictures_in_a_row():
    maps = {f"map {i}": np.full((8, 8), i / 4) for i in range(4)}
    figure = plot.heatmaps(np.zeros((8, 8, 3)), maps, columns=2)
    grid = figure.axes[0].get_subplotspec()
    assert grid is not None
    assert grid.get_gridspec().get_geometry() == (3, 2)
    with pytest.raises(ValueError, match="columns=0"):
        plot.heatmaps(np.zeros((8, 8, 3)), maps, columns=0)


def test_frames_resize_a_heatmap_as_overlays_do():
    small = torch.rand((3, 5), generator=torch.Generator().manual_seed(0))
    large = F.interpolate(small[None, None], PICTURE.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    for frame, expected in zip(
        frames_of(plot.frames(PICTURE, small, baseline=0.0)),
        frames_of(plot.frames(PICTURE, large, baseline=0.0)),
        strict=True,
    ):
        assert (frame != expected).any(-1).mean() < 0.02  # those that rounding made ties


@pytest.mark.parametrize("shape", [(30, 30), (30, 90), (90, 30), (400, 40)])
def test_no_frame_is_cut_off(shape):
    scores = np.linspace(0, 1, 8)
    figure = plot.frames(RNG.random(shape), MAP, fractions=scores, scores=scores, caption="insertion " * 30)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "insert"}, "mode='insert'; expected one of 'insertion', 'deletion'"),
        ({"heatmap": MAP * np.nan}, "heatmap holds NaN or infinite values; expected finite values"),
        ({"heatmap": np.zeros((2, 7, 7))}, r"heatmap has shape \(2, 7, 7\); expected one map"),
        ({"image": PICTURE / 100}, r"image has values from 0 to 2\.55"),
        ({"fractions": []}, r"fractions=\[\]; expected at least one number, each from 0 to 1"),
        ({"fractions": [0.5, 1.5]}, r"fractions=\[0\.5, 1\.5\]; expected at least one"),
        ({"fractions": [np.nan]}, "fractions holds NaN"),
        ({"scores": [0.5, 0.5]}, "scores has 2 entries; expected 6, one per fraction"),
        ({"scores": np.zeros((6, 1))}, r"scores has shape \(6, 1\); expected 1 axis of numbers"),
        ({"baseline": [0.5, 0.5]}, r"baseline has shape \(2,\); expected a number, three"),
        (
            {"baseline": -2.1},
            r"baseline has values from -2\.1 to -2\.1; expected \[0, 1\] \(in units of the picture",
        ),
        ({"baseline": lambda x: x[:, :, :3]}, r"baseline has shape \(1, 3, 3, 20\); expected a number"),
    ],
)
def test_frames_that_cannot_be_made_are_refused(change, reason):
    arguments = {"image": PICTURE, "heatmap": MAP, **change}
    with pytest.raises(ValueError, match=reason):
        plot.frames(**arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"baseline": "gray"}, "baseline must be a tensor, an array or a sequence of numbers, got 'gray'"),
        ({"fractions": "all"}, "fractions must be a tensor, .* got 'all'"),
        ({"scores": [None] * 6 + ["x"]}, "scores must be a tensor, .* got \\[None"),
        ({"heatmap": [[1.0]]}, "heatmap must be a tensor or an array"),
    ],
)
def test_frames_of_the_wrong_kind_are_refused(change, reason):
    arguments = {"image": PICTURE, "heatmap": MAP, **change}
    with pytest.raises(TypeError, match=reason):
        plot.frames(**arguments)


# -- detections ------------------------------------------------------------------------------------------------


def test_boxes_are_drawn_where_they_lie_on_the_picture():
    picture = np.zeros((40, 60, 3))
    boxes = {
        "left": [2.0, 1.0, 10.0, 18.0],
        "right": torch.tensor([14.0, 4.0, 29.0, 19.0]),
    }  # pixels of the maps
    figure = plot.detections(picture, boxes, {"left": np.eye(20, 30), "right": np.ones((20, 30))})
    photograph, left, right = figure.axes[:3]
    corners = lambda axis: [(*p.get_xy(), p.get_width(), p.get_height()) for p in axis.patches[1::2]]  # noqa: E731
    assert corners(left) == [(3.5, 1.5, 16, 34)]
    assert corners(right) == [(27.5, 7.5, 30, 30)]
    assert corners(photograph) == corners(left) + corners(right)
    colors = [axis.patches[1].get_edgecolor() for axis in (left, right)]
    assert colors == [p.get_edgecolor() for p in photograph.patches[1::2]]
    assert colors[0] != colors[1]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({"b": [0.0, 0.0, 1.0, 1.0]}, r"boxes has the titles \['b'\]; expected those of maps, \['a'\]"),
        ({"a": [0.0, 0.0, 0.0, 1.0]}, r"boxes\['a'\]=\[0\.0, 0\.0, 0\.0, 1\.0\]; expected x1, y1, x2, y2"),
        ({"a": [0.0, 0.0, 1.0]}, r"boxes\['a'\]=\[0\.0, 0\.0, 1\.0\]; expected x1, y1, x2, y2"),
        ({}, "boxes is empty; expected at least one box"),
    ],
)
def test_boxes_that_are_none_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        plot.detections(PICTURE, boxes, {"a": MAP})
