"""The metrics: slow loops, other libraries, XplainCAM's own scores, and what has to hold for any heatmap."""

import inspect
import itertools
import json
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur, normalize, to_tensor

import bad_calls
import networks
import xcam_fn as xf
from xcam_fn import metrics
from xcam_fn.metrics.curves import imputed
from xcam_fn.testing import small_case

SIZE = (20, 28)
maps = stnp.arrays(np.float64, (3, *SIZE), elements=st.floats(0, 1, width=16))


def probability(model: nn.Module, image: Tensor, cls: int) -> float:
    with torch.no_grad():
        return float(model(image[None])[0].softmax(0)[cls])


# -- slow loops ---------------------------------------------------------------------------------------------------


def loop_curve(model, start: Tensor, end: Tensor, heatmap: np.ndarray, cls: int, pixels: int):
    order = sorted(range(heatmap.size), key=lambda i: (-heatmap.flat[i], i))
    counts = [*range(0, heatmap.size, pixels), heatmap.size]
    scores = []
    for count in counts:
        image = start.clone().flatten(1)
        image[:, order[:count]] = end.flatten(1)[:, order[:count]]
        scores.append(probability(model, image.reshape(start.shape), cls))
    area = sum(
        (scores[i] + scores[i + 1]) / 2 * (counts[i + 1] - counts[i]) / heatmap.size
        for i in range(len(scores) - 1)
    )
    return [count / heatmap.size for count in counts], scores, area


@settings(deadline=None, max_examples=20)
@given(maps, st.integers(0, 5), st.sampled_from([7, 100, 560, 10_000]), st.sampled_from([1, 3, 64]))
def test_curves_and_drops_equal_a_loop(heatmap, seed, pixels, chunk_size):
    model, x, classes, _ = small_case(seed)
    options = {"pixels_per_step": pixels, "chunk_size": chunk_size}
    inserted = xf.insertion(model, x, heatmap, classes, **options)
    deleted = xf.deletion(model, x, torch.from_numpy(heatmap), classes, **options)
    lost = xf.average_drop(model, x, heatmap, classes)
    gained = xf.increase_in_confidence(model, x, heatmap, classes)
    smooth = xf.perturb.blurred(x)
    for i, cls in enumerate(classes):
        for curve, (start, end) in ((inserted, (smooth[i], x[i])), (deleted, (x[i], x[i] * 0))):
            fractions, scores, area = loop_curve(model, start, end, heatmap[i], cls, pixels)
            np.testing.assert_allclose(curve.fractions, fractions, atol=1e-12)
            np.testing.assert_allclose(curve.scores[i], scores, atol=1e-9)
            np.testing.assert_allclose(curve.auc[i], area, atol=1e-9)
        p = probability(model, x[i], cls)
        shown = probability(model, x[i] * torch.from_numpy(heatmap[i]), cls)
        assert lost[i] == pytest.approx(max(0, p - shown) / p, abs=1e-9)
        assert gained[i] == (shown > p)


@settings(deadline=None, max_examples=20)
@given(maps)
def test_what_holds_for_any_heatmap(heatmap):
    model, x, *_ = small_case(1)
    predicted = model(x).argmax(1)
    p = model(x).softmax(1).gather(1, predicted[:, None])[:, 0].detach()
    inserted, deleted = xf.insertion(model, x, heatmap, steps=9), xf.deletion(model, x, heatmap, steps=9)
    torch.testing.assert_close(inserted.scores[:, -1], p)
    torch.testing.assert_close(deleted.scores[:, 0], p)
    # A monotone transform: dyadic values stay apart when squared.
    for curve, again in (
        (inserted, xf.insertion(model, x, heatmap**2, steps=9)),
        (deleted, xf.deletion(model, x, heatmap * 3 - 1, steps=9)),
    ):
        if np.unique(heatmap).size == np.unique(heatmap**2).size:
            torch.testing.assert_close(curve.scores, again.scores)
        assert ((curve.auc >= 0) & (curve.auc <= 1)).all()
    for i in range(3):
        alone = xf.insertion(model, x[i : i + 1], heatmap[i : i + 1], steps=9)
        torch.testing.assert_close(alone.scores[0], inserted.scores[i])


def test_the_default_is_448_of_224_by_224_pixels():
    model, x = networks.seeded(networks.Linearized()), torch.randn(1, 3, 224, 224)
    curve = xf.deletion(model, x, torch.rand(1, 224, 224))
    assert curve.scores.shape == (1, 113)
    torch.testing.assert_close(curve.fractions[1] * 224 * 224, torch.tensor(448.0))
    # RISE's published rule for the area under equally spaced points
    s = curve.scores[0]
    torch.testing.assert_close(curve.auc[0], (s.sum() - s[0] / 2 - s[-1] / 2) / (len(s) - 1))


def test_the_model_and_the_images_stay_as_they_are():
    model, x, *_ = small_case()
    before, image = xf.testing.state(model), x.clone()
    heatmap = xf.gradcam(model, "features.4", x)
    for metric in (xf.average_drop, xf.increase_in_confidence, xf.insertion, xf.deletion, xf.road):
        metric(model, x, heatmap)
    metrics.parameter_randomization("gradcam", model, "features.4", x)
    assert xf.testing.state(model) == before
    assert torch.equal(x, image)


# -- XplainCAM's own scores, other libraries ------------------------------------------------------------------------


def test_xplaincams_scores(lite0, shared):
    folder = shared / "reference"
    facts = json.loads((folder / "public.json").read_text())
    keys = itertools.cycle(["GradCAM", "ScoreCAM", "FusionCAM"])
    with np.load(folder / "public.npz") as reference:
        for (image, fact), key in zip(facts.items(), keys, strict=False):
            picture = Image.open(folder / image.replace(".JPEG", "_224.png"))
            x = normalize(to_tensor(picture), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
            heatmap, expected = reference[f"{image}/{key}"][None], fact["methods"][key]
            cls = fact["class"]
            found = {
                "avg_drop": xf.average_drop(lite0, x, heatmap, cls),
                "increase": xf.increase_in_confidence(lite0, x, heatmap, cls),
                "insertion": xf.insertion(lite0, x, heatmap, cls).auc,
                "deletion": xf.deletion(lite0, x, heatmap, cls).auc,
            }
            for name, value in found.items():
                assert value.item() == pytest.approx(expected[name], abs=1e-3), (image, name)


@pytest.mark.filterwarnings("ignore")
def test_pytorch_grad_cams_road_imputes_the_same():
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    torch.manual_seed(0)
    image, heatmap = torch.randn(3, 24, 24), torch.rand(24, 24)
    rank = metrics.relevance_rank(heatmap[None])[0]
    gone = rank < 0.4 * 24 * 24
    theirs = NoisyLinearImputer(noise=0)(image, (~gone).float())
    ours = imputed(image, gone, torch.zeros(3, 24, 24))
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


def test_imputed_pixels_are_the_mean_of_their_neighbors():
    torch.manual_seed(1)
    image, gone = torch.randn(3, 9, 11, dtype=torch.float64), torch.rand(9, 11) < 0.7
    found = imputed(image, gone, torch.zeros_like(image))
    assert torch.equal(found[:, ~gone], image[:, ~gone])
    for row, column in gone.nonzero().tolist():
        total, weight = torch.zeros(3, dtype=torch.float64), 0.0
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if (i, j) != (0, 0) and 0 <= row + i < 9 and 0 <= column + j < 11:
                    share = 1 / 6 if 0 in (i, j) else 1 / 12
                    total, weight = total + share * found[:, row + i, column + j], weight + share
        torch.testing.assert_close(found[:, row, column], total / weight)


def test_road_prefers_the_better_heatmap():
    """The score is the mean of one quadrant: removing it first has to cost more than removing it last."""

    class Quadrant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen = x[:, :, :8, :8].mean((1, 2, 3))
            return torch.stack([seen * 9, -seen * 9], 1)

    x = torch.zeros(2, 3, 16, 16)
    x[:, :, :8, :8] = 1.0 + 0.1 * torch.rand(2, 3, 8, 8)
    good = torch.zeros(2, 16, 16)
    good[:, :8, :8] = 1.0
    better = xf.road(Quadrant().eval(), x, good, 0).value
    worse = xf.road(Quadrant().eval(), x, 1 - good, 0).value
    assert (better > 0.02).all()
    assert (worse < -0.02).all()
    again = xf.road(Quadrant().eval(), x, good, 0, chunk_size=1)
    torch.testing.assert_close(again.value, better)


# -- what the map itself is like --------------------------------------------------------------------------------------


@given(st.integers(0, 7), st.integers(0, 9), st.integers(0, 6), st.integers(0, 8))
def test_the_pointing_game_of_a_single_point(row, column, top, left):
    heatmap = torch.zeros(1, 8, 10)
    heatmap[0, row, column] = 1
    box = [[left, top, 10, 8]]
    inside = float(left <= column and top <= row)
    assert xf.pointing_game(heatmap, box).tolist() == [inside]
    assert xf.energy_pointing_game(heatmap, torch.tensor(box)).tolist() == [inside]
    mask = torch.zeros(1, 8, 10)
    mask[:, top:, left:] = 1
    assert xf.pointing_game(heatmap, mask).tolist() == [inside]
    assert xf.pointing_game(heatmap, mask, tolerance=20).tolist() == [1.0]
    assert xf.pointing_game(heatmap * 0, mask).tolist() == [0.0]


def test_energy_is_the_share_inside():
    heatmap = torch.tensor([[[0.2, 0.6], [0.2, 0.0]]])
    assert xf.energy_pointing_game(heatmap, [[1, 0, 2, 2]]).item() == pytest.approx(0.6)
    assert xf.complexity(heatmap).item() == pytest.approx(0.25)
    assert xf.energy_pointing_game(heatmap * 0, [[1, 0, 2, 2]]).item() == 0


def test_coherency_and_adcc_equal_their_formulas():
    from scipy.stats import pearsonr

    model, x, classes, _ = small_case(2)
    first = xf.gradcam(model, "features.4", x, classes)
    again = xf.gradcam(model, "features.4", x * first[:, None], classes)
    coherent = xf.coherency("gradcam", model, "features.4", x, classes)
    together = xf.adcc(xf.gradcam, model, "features.4", x, classes)
    drops = xf.average_drop(model, x, first, classes)
    for i in range(3):
        varied = first[i].std() > 0 and again[i].std() > 0  # of image 1, the second heatmap is zero
        r = pearsonr(first[i].flatten(), again[i].flatten()).statistic if varied else 0.0
        assert coherent[i] == pytest.approx((1 + r) / 2, abs=1e-6)
        parts = [coherent[i], 1 - first[i].mean(), 1 - drops[i]]
        assert together[i] == pytest.approx(float(3 / sum(1 / p for p in parts)), abs=1e-6)


def test_randomizing_parameters_moves_the_map_and_a_map_of_the_image_alone_stays():
    model, x, classes, _ = small_case(3)
    found = xf.parameter_randomization("gradcam", model, "features.4", x, classes)
    assert list(found) == ["fc", "features.3", "features.1", "features.0"]
    assert found["features.0"].shape == (3,)
    assert found["features.0"].mean() < 0.9

    def edges(model, layer, x, cls):
        return xf.heatmap(x.abs().sum(1), x.shape[2:])

    assert all(
        (values > 0.999).all() for values in xf.parameter_randomization(edges, model, None, x).values()
    )
    alone = xf.parameter_randomization("gradcam", model, "features.4", x, classes, cascading=False)
    torch.testing.assert_close(alone["fc"], found["fc"])


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 6, (4, 5, 6), generator=generator).double() for _ in range(2))
    for i, value in enumerate(metrics.spearman(first, second)):
        assert value == pytest.approx(spearmanr(first[i].flatten(), second[i].flatten()).statistic)


def test_arrays_are_taken_where_tensors_are():
    first, second = GOOD.numpy()[:, ::-1], GOOD.flip(2).numpy()
    second.flags.writeable = False
    for compare in (metrics.pearson, metrics.spearman):
        expected = compare(GOOD.flip(1), GOOD.flip(2))
        torch.testing.assert_close(compare(first, second), expected)
    assert torch.equal(metrics.relevance_rank(first), metrics.relevance_rank(GOOD.flip(1)))
    tensors, arrays = ({"a": a, "b": a} for a in (GOOD.flip(1), first))
    found, expected = (xf.evaluate.judged(CASE.model, CASE.x, maps) for maps in (arrays, tensors))
    torch.testing.assert_close(found["b"]["average_drop"], expected["a"]["average_drop"])
    assert xf.road(CASE.model, CASE.x, first, fractions=np.linspace(0.2, 0.8, 3)).fractions.shape == (3,)


def test_a_wide_tolerance_takes_no_longer_than_the_image():
    assert xf.pointing_game(GOOD, [[3, 3, 4, 4]] * 3, tolerance=10**9).tolist() == [1, 1, 1]


def test_how_far_an_empty_heatmap_moves_is_not_told():
    """A constant image whose heatmap is empty, and is not once there is noise in the image."""

    def spread(model, layer, x, cls):
        return x.amax(1) - x.amin(1)

    x = torch.rand(3, 3, *SIZE, dtype=torch.float64)
    x[1] = 0.5
    with pytest.raises(
        ValueError, match=r"the heatmap of image 1 is zero everywhere, so its relative change is undefined"
    ):
        xf.max_sensitivity(spread, CASE.model, None, x)
    assert torch.isfinite(xf.max_sensitivity(spread, CASE.model, None, x[::2])).all()


def test_the_blur_is_the_papers():
    x = torch.randn(1, 3, 64, 80)
    torch.testing.assert_close(xf.perturb.blurred(x), gaussian_blur(x, 51, 50.0))


# -- help -------------------------------------------------------------------------------------------------------------

ALL = [*metrics.METRICS, "parameter_randomization"]


@pytest.mark.parametrize("name", ALL)
def test_help_names_every_argument_and_its_sections_are_well_formed(name):
    function = getattr(xf, name)
    doc = inspect.getdoc(function)
    assert "{" not in doc.partition("Returns:")[0]
    sections = re.split(r"^(Args|Returns|Raises|References):\n", doc, flags=re.M)
    titles, bodies = sections[1::2], sections[2::2]
    assert titles == [title for title in ("Args", "Returns", "Raises", "References") if title in titles]
    assert "Args" in titles
    assert "Returns" in titles
    for body in bodies:
        assert all(line.startswith("    ") for line in body.splitlines() if line)
    entries = [line for line in bodies[0].splitlines() if line and not line.startswith("     ")]
    assert all(re.fullmatch(r"    (\*\*)?\w+: .+", line) for line in entries)
    described = [line.partition(":")[0].strip(" *") for line in entries]
    assert described == list(inspect.signature(function).parameters)
    assert (function.__name__, pickle.loads(pickle.dumps(function))) == (name, function)


def test_the_signature_is_flat():
    shown = str(inspect.signature(xf.insertion))
    assert shown.startswith(
        "(model: nn.Module | None, x: Images, heatmap: Heatmap, cls: Classes = None, *, baseline: Baseline = "
    )
    assert "**" not in shown
    assert all(metrics.METRICS[name] is getattr(xf, name) for name in metrics.METRICS)


# -- bad input ----------------------------------------------------------------------------------------------------------

CASE = small_case()
GOOD = torch.rand(3, *SIZE)
BAD = {
    "shape": (lambda: xf.insertion(CASE.model, CASE.x, GOOD[:, :5]), ValueError, r"heatmap has shape \(3, 5, 28\); expected \(3, 20, 28\)"),
    "kind": (lambda: xf.insertion(CASE.model, CASE.x, [1]), TypeError, r"heatmap must be a tensor"),
    "nan": (lambda: xf.deletion(CASE.model, CASE.x, GOOD * torch.nan), ValueError, r"heatmap holds NaN"),
    "range": (lambda: xf.average_drop(CASE.model, CASE.x, GOOD * 3), ValueError, r"heatmap has values from .*; expected \[0, 1\]"),
    "steps": (lambda: xf.deletion(CASE.model, CASE.x, GOOD, steps=0), ValueError, r"steps=0 is out of range"),
    "both": (lambda: xf.deletion(CASE.model, CASE.x, GOOD, steps=1, pixels_per_step=1), ValueError, r"pass only one of them"),
    "classes": (lambda: xf.deletion(CASE.model, CASE.x, GOOD, [[1, 2]] * 3), ValueError, r"expected one class for each image"),
    "option": (lambda: xf.deletion(CASE.model, CASE.x, GOOD, chunks=3), TypeError, r"there is no option 'chunks'; the options are chunk_size"),
    "complex": (lambda: xf.deletion(CASE.model, CASE.x, GOOD * 1j), TypeError, r"heatmap is a tensor of torch.complex64.*real numbers"),
    "sparse": (lambda: xf.complexity(GOOD.to_sparse()), TypeError, r"heatmap is a torch.sparse_coo tensor of .*expected a dense tensor"),
    "meta": (lambda: xf.complexity(GOOD.to("meta")), TypeError, r"heatmap is a meta tensor of torch.float32"),
    "words": (lambda: xf.complexity(np.array([["a"]])), TypeError, r"heatmap must be a tensor or an array"),
    "region nan": (lambda: xf.pointing_game(GOOD, GOOD * torch.nan), ValueError, r"region holds NaN or infinite values"),
    "box nan": (lambda: xf.energy_pointing_game(GOOD, [[torch.nan, 3, 2, 5]] * 3), ValueError, r"region holds NaN"),
    "region word": (lambda: xf.pointing_game(GOOD, "left"), TypeError, r"region must be a tensor or an array"),
    "two shapes": (lambda: metrics.spearman(GOOD, GOOD[:, 1:]), ValueError, r"shapes \(3, 560\) and \(3, 532\)|shapes \(3, 20, 28\) and"),
    "x": (lambda: xf.average_drop(CASE.model, 3, GOOD), TypeError, r"x must be a torch.Tensor"),
    "std": (lambda: xf.road(CASE.model, CASE.x, GOOD, std=float("nan")), ValueError, r"std=nan is out of range"),
    "fraction nan": (lambda: xf.road(CASE.model, CASE.x, GOOD, fractions=[0.5, np.nan]), ValueError, r"fractions=.*expected at least one number"),
    "fraction": (lambda: xf.road(CASE.model, CASE.x, GOOD, fractions=0.5), TypeError, r"fractions must be an iterable, got 0.5"),
    "radius": (lambda: xf.max_sensitivity("gradcam", CASE.model, "features.4", CASE.x, radius=float("inf")), ValueError, r"radius=inf is out of range"),
    "box": (lambda: xf.pointing_game(GOOD, [[3, 3, 2, 5]] * 3), ValueError, r"expected boxes \(left, top, right, bottom\)"),
    "boxes": (lambda: xf.pointing_game(GOOD, [[3, 3, 9, 5]]), ValueError, r"region has shape \(1, 4\) for heatmaps of shape \(3, 20, 28\)"),
    "fractions": (lambda: xf.road(CASE.model, CASE.x, GOOD, fractions=[1.0]), ValueError, r"fractions=\[1.0\]; expected at least one number, each > 0"),
}  # fmt: skip


test_the_error_says_what_is_wrong = bad_calls.refused(BAD)
