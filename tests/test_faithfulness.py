"""Metrics of faithfulness, complexity, robustness and randomization: slow loops, closed forms, Captum, shared forwards."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from captum.metrics import infidelity as captums_infidelity
from scipy.stats import entropy, pearsonr, spearmanr
from torch import Tensor, nn

import bad_calls
import xcam_fn as xf
from xcam_fn import metrics
from xcam_fn.evaluate import judged
from xcam_fn.perturb import normal, uniform
from xcam_fn.testing import small_case

MODEL, X, CLASSES, LAYER = small_case(2)
SIZE = tuple(X.shape[2:])
HEAT = xf.gradcam(MODEL, LAYER, X, CLASSES)
HEAT[1] = torch.rand(SIZE, dtype=X.dtype, generator=torch.Generator().manual_seed(0))


def probability(image: Tensor, cls: int) -> float:
    with torch.no_grad():
        return float(MODEL(image[None])[0].softmax(0)[cls])


def cell_of(grid: int | None) -> np.ndarray:
    """The number of the cell of each pixel, by the place of the cell's edges."""
    found = np.zeros(SIZE, dtype=int)
    rows, columns = (length if grid is None else min(grid, length) for length in SIZE)
    for i in range(SIZE[0]):
        for j in range(SIZE[1]):
            row = max(r for r in range(rows) if math.ceil(r * SIZE[0] / rows) <= i)
            column = max(c for c in range(columns) if math.ceil(c * SIZE[1] / columns) <= j)
            found[i, j] = row * columns + column
    return found


# -- removed in order ---------------------------------------------------------------------------------------------


def area(image: Tensor, cls: int, order: list[np.ndarray], end: float) -> float:
    """The area under the score while groups of pixels, each a mask, are set to `end` one after the other."""
    gone, scores = np.zeros(SIZE, dtype=bool), [probability(image, cls)]
    for group in order:
        gone = gone | group
        scores.append(probability(torch.where(torch.from_numpy(gone), end, image), cls))
    return sum((a + b) / 2 for a, b in itertools.pairwise(scores)) / len(order)


def test_relevance_gain_and_irof_equal_a_loop():
    gain = xf.symmetric_relevance_gain(MODEL, X, HEAT, CLASSES, baseline=0.3, pixels_per_step=56)
    regions = xf.irof(MODEL, X, HEAT, CLASSES, baseline=0.3, grid=3)
    cell = cell_of(3)
    for i, cls in enumerate(CLASSES):
        ranked = sorted(range(HEAT[i].numel()), key=lambda p: (-float(HEAT[i].flatten()[p]), p))
        areas = []
        for places in (ranked, ranked[::-1]):
            steps = np.array(places).reshape(-1, 56)
            groups = [np.isin(np.arange(HEAT[i].numel()), step).reshape(SIZE) for step in steps]
            areas.append(area(X[i], cls, groups, 0.3))
        assert gain[i] == pytest.approx(areas[1] - areas[0], abs=1e-9)
        means = [float(HEAT[i].numpy()[cell == c].mean()) for c in range(9)]
        groups = [cell == c for c in sorted(range(9), key=lambda c: (-means[c], c))]
        expected = 1 - area(X[i], cls, groups, 0.3) / probability(X[i], cls)
        assert regions[i] == pytest.approx(expected, abs=1e-9)


def test_relevance_gain_and_irof_have_closed_forms():
    """Of a score that is linear in the pixels and a heatmap of two values, both areas are known."""
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    heatmap = torch.zeros(1, 4, 4, dtype=torch.float64)
    heatmap[:, :2] = 1

    def upper(output: Tensor) -> Tensor:
        return output[:, 0, :2].mean((1, 2))

    found = xf.symmetric_relevance_gain(nn.Identity().eval(), x, heatmap, upper, pixels_per_step=1)
    assert found.item() == pytest.approx(0.75 - 0.25)
    assert xf.deletion(
        nn.Identity().eval(), x, heatmap, upper, pixels_per_step=1
    ).auc.item() == pytest.approx(0.25)
    assert xf.irof(nn.Identity().eval(), x, heatmap, upper, grid=2).item() == pytest.approx(0.75)


def test_average_gain_equals_its_formula():
    found = xf.average_gain(MODEL, X, HEAT, CLASSES)
    for i, cls in enumerate(CLASSES):
        own, shown = probability(X[i], cls), probability(X[i] * HEAT[i], cls)
        assert found[i] == pytest.approx(max(0, shown - own) / (1 - own), abs=1e-12)
    assert (found > 0).any()


# -- random subsets -----------------------------------------------------------------------------------------------


def subsets(fraction: float, count: int, grid: int | None, seed: int) -> list[np.ndarray]:
    cell = cell_of(grid)
    units = int(cell.max()) + 1
    size = max(1, round(fraction * units))
    draws = [uniform(seed, i, (units,), like=torch.zeros(1)).tolist() for i in range(count)]
    return [np.isin(cell, sorted(range(units), key=lambda u, d=d: (d[u], u))[:size]) for d in draws]


@pytest.mark.parametrize(("grid", "chunk_size"), [(None, 7), (3, 1), (100, None)])
def test_what_random_subsets_tell_equals_a_loop(grid, chunk_size):
    options = {"num_subsets": 9, "grid": grid, "baseline": 0.2, "seed": 3, "chunk_size": chunk_size}
    correlation = xf.faithfulness_correlation(MODEL, X, HEAT, CLASSES, fraction=0.3, **options)
    several = xf.sensitivity_n(MODEL, X, HEAT, CLASSES, fractions=[0.3, 0.6], **options)
    errors = [
        xf.infidelity(MODEL, X, HEAT, CLASSES, fraction=0.3, gradient=gradient, scaled=scaled, **options)
        for gradient in (False, True) for scaled in (False, True)
    ]  # fmt: skip
    for i, cls in enumerate(CLASSES):
        found = []
        for fraction in (0.3, 0.6):
            masks = [torch.from_numpy(mask) for mask in subsets(fraction, 9, grid, 3)]
            lost = np.array(
                [probability(X[i], cls) - probability(torch.where(m, 0.2, X[i]), cls) for m in masks]
            )
            found.append(([float(HEAT[i][m].sum()) for m in masks], lost, masks))
        expected = [pearsonr(said, lost).statistic for said, lost, _ in found]
        assert correlation[i] == pytest.approx(expected[0], abs=1e-9)
        np.testing.assert_allclose(several.correlations[i], expected, atol=1e-9)
        assert several.value[i] == pytest.approx(np.mean(expected), abs=1e-9)
        said, lost, masks = found[0]
        steep = [float(((X[i] - 0.2) * m * HEAT[i]).sum()) for m in masks]
        for (unscaled, scaled), values in zip(
            (errors[:2], errors[2:]), map(np.array, (said, steep)), strict=True
        ):
            assert unscaled[i] == pytest.approx(((values - lost) ** 2).mean(), rel=1e-9)
            factor = np.linalg.lstsq(values[:, None], lost, rcond=None)[0]
            assert scaled[i] == pytest.approx(((factor * values - lost) ** 2).mean(), rel=1e-6)
    torch.testing.assert_close(several.fractions, torch.tensor([0.3, 0.6], dtype=X.dtype))


def test_subsets_of_exact_contributions_are_explained_without_an_error():
    """A score that is linear in the pixels: what each pixel contributes is w x, and its gradient is w."""
    w = torch.randn(2, 1, 6, 8, dtype=torch.float64)
    x = torch.randn(2, 1, 6, 8, dtype=torch.float64)

    class Weighted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(x * w[:1]).sum((1, 2, 3)), (x * w[1:]).sum((1, 2, 3))], 1)

    model, options = Weighted().eval(), {"score": "logit", "num_subsets": 20}
    for cls in (0, 1):
        exact = (x * w[cls])[:, 0]
        one = torch.ones(2, dtype=x.dtype)
        for grid in (None, 4):
            found = xf.faithfulness_correlation(model, x, exact, cls, grid=grid, **options)
            torch.testing.assert_close(found, one)
            torch.testing.assert_close(
                xf.faithfulness_correlation(model, x, -exact, cls, grid=grid, **options), -one
            )
        for heatmap, gradient in ((exact, False), (w[cls].expand(2, 6, 8), True)):
            error = xf.infidelity(model, x, heatmap, cls, gradient=gradient, scaled=False, **options)
            assert error.abs().max() < 1e-20
            assert (xf.infidelity(model, x, heatmap.flip(1), cls, gradient=gradient, **options) > 0.01).all()
    nothing = torch.zeros(2, 6, 8)
    assert xf.faithfulness_correlation(model, x, nothing, 0, **options).tolist() == [0, 0]
    square = xf.infidelity(model, x, nothing, 0, scaled=False, **options)
    torch.testing.assert_close(xf.infidelity(model, x, nothing, 0, **options), square)


@pytest.mark.filterwarnings("ignore")
def test_infidelity_is_captums():
    masks = [torch.from_numpy(mask) for mask in subsets(0.3, 12, 5, 1)]
    for scaled in (False, True):
        found = xf.infidelity(
            MODEL,
            X,
            HEAT,
            CLASSES,
            gradient=True,
            scaled=scaled,
            fraction=0.3,
            num_subsets=12,
            grid=5,
            seed=1,
        )
        for i, cls in enumerate(CLASSES):
            removed = (torch.stack([X[i] * mask for mask in masks[k : k + 1]]) for k in range(12))

            def perturb(x: Tensor, removed=removed) -> tuple[Tensor, Tensor]:
                gone = next(removed)
                return gone, x - gone

            theirs = captums_infidelity(
                lambda x: MODEL(x).softmax(1), perturb, X[i, None], HEAT[i].expand(1, 3, *SIZE),
                target=cls, n_perturb_samples=12, max_examples_per_batch=1, normalize=scaled,
            )  # fmt: skip
            assert found[i] == pytest.approx(float(theirs), rel=1e-6)


# -- what the map itself is like ------------------------------------------------------------------------------------


def test_entropy_and_sparseness_equal_their_formulas():
    heatmap = torch.cat([HEAT, -3 * HEAT[:1], torch.zeros_like(HEAT[:2])])
    heatmap[-1, 2, 3] = 7
    entropies, sparse = xf.entropy(heatmap), xf.sparseness(heatmap.numpy())
    d = HEAT[0].numel()
    for i, one in enumerate(heatmap[:4].abs().flatten(1).numpy()):
        assert entropies[i] == pytest.approx(entropy(one), abs=1e-9)
        differences = np.abs(one[:, None] - one[None]).sum()  # Gini's own definition
        assert sparse[i] == pytest.approx(differences / (2 * d * one.sum()), abs=1e-9)
    assert entropies[4:].tolist() == pytest.approx([math.log(d), 0])
    assert sparse[4:].tolist() == pytest.approx([0, 1 - 1 / d])


# -- robustness and randomization -----------------------------------------------------------------------------------


def test_how_the_heatmap_moves_equals_a_loop():
    options = {"radius": 0.1, "num_samples": 4, "seed": 5}
    largest, mean, steepest = (
        metric("gradcam", MODEL, LAYER, X, CLASSES, **options)
        for metric in (xf.max_sensitivity, xf.average_sensitivity, xf.local_lipschitz)
    )
    for i, cls in enumerate(CLASSES):
        first = xf.gradcam(MODEL, LAYER, X[i, None], cls)
        moved, rates = [], []
        for n in range(4):
            change = 0.1 * (2 * uniform(5, n, tuple(X.shape[1:]), like=X) - 1)
            far = (xf.gradcam(MODEL, LAYER, (X[i] + change)[None], cls) - first).square().sum().sqrt()
            moved.append(far / first.square().sum().sqrt())
            rates.append(far / change.square().sum().sqrt())
        torch.testing.assert_close(largest[i], max(moved))
        torch.testing.assert_close(mean[i], sum(moved) / 4)
        torch.testing.assert_close(steepest[i], max(rates))


def test_efficient_mprt_equals_its_formula():
    found = xf.efficient_mprt("gradcam", MODEL, LAYER, X, CLASSES, bins=20, seed=1)
    maps = []  # of the network with all parameters drawn anew: the last that parameter_randomization sees

    def watched(model: nn.Module, layer, x: Tensor, cls) -> Tensor:
        maps.append(xf.gradcam(model, layer, x, cls))
        return maps[-1]

    xf.parameter_randomization(watched, MODEL, LAYER, X, CLASSES, seed=1)
    for i in range(3):
        before, after = (entropy(np.histogram(m[i].numpy(), 20)[0]) for m in (maps[0], maps[-1]))
        assert found[i] == pytest.approx((after - before) / before, abs=1e-9)


def test_the_random_logit_is_another_class():
    for seed in range(4):
        found = xf.random_logit("gradcam", MODEL, LAYER, X, CLASSES, seed=seed)
        step = 1 + int(uniform(seed, 0, (1,), like=torch.zeros(1)) * 4)
        for i, cls in enumerate(CLASSES):
            ours, other = (xf.gradcam(MODEL, LAYER, X[i, None], c).flatten() for c in (cls, (cls + step) % 5))
            assert found[i] == pytest.approx(spearmanr(ours, other).statistic, abs=1e-6)
        assert 1 <= step < 5
    predicted = MODEL(X).argmax(1)
    torch.testing.assert_close(
        xf.random_logit("gradcam", MODEL, LAYER, X, seed=3),
        xf.random_logit("gradcam", MODEL, LAYER, X, predicted, seed=3),
    )
    same = xf.random_logit(lambda model, layer, x, cls: x.abs().sum(1), MODEL, LAYER, X, CLASSES)
    torch.testing.assert_close(same, torch.ones_like(same))


def test_the_smooth_mprt_compares_means_under_noise():
    mean = xf.parameter_randomization("gradcam", MODEL, LAYER, X, CLASSES, seed=2, std=0.3, num_samples=3)

    def smoothed(model: nn.Module, layer, x: Tensor, cls) -> Tensor:
        noisy = [x + 0.3 * normal(2, n, tuple(x.shape[1:]), like=x) for n in range(3)]
        return sum(xf.gradcam(model, layer, each, cls) for each in noisy) / 3

    expected = xf.parameter_randomization(smoothed, MODEL, LAYER, X, CLASSES, seed=2)
    assert list(mean) == list(expected)
    for name in mean:
        torch.testing.assert_close(mean[name], expected[name])


# -- what holds for all ---------------------------------------------------------------------------------------------

FEW = {"num_subsets": 8, "grid": 4}
OF_HEATMAP = {
    "average_gain": {}, "symmetric_relevance_gain": {"steps": 5}, "irof": {"grid": 3},
    "faithfulness_correlation": FEW, "sensitivity_n": FEW | {"fractions": [0.4]}, "infidelity": FEW,
}  # fmt: skip
OF_METHOD = {
    "max_sensitivity": {"num_samples": 2}, "average_sensitivity": {"num_samples": 2},
    "local_lipschitz": {"num_samples": 2}, "efficient_mprt": {}, "random_logit": {},
}  # fmt: skip


def values(found) -> Tensor:
    return found.value if isinstance(found, metrics.SensitivityN) else found


def test_a_batch_is_its_images_and_nothing_changes():
    before, image = xf.testing.state(MODEL), X.clone()
    for name, options in OF_HEATMAP.items():
        metric = getattr(xf, name)
        whole = values(metric(MODEL, X, HEAT, CLASSES, chunk_size=5, **options))
        for i, cls in enumerate(CLASSES):
            alone = values(metric(MODEL, X[i, None], HEAT[i, None], cls, **options))
            torch.testing.assert_close(alone[0], whole[i])
    for name, options in OF_METHOD.items():
        metric = getattr(xf, name)
        whole = metric("gradcam", MODEL, LAYER, X, CLASSES, **options)
        alone = metric(
            "gradcam", MODEL, dict(MODEL.named_modules())[LAYER], X[2, None], CLASSES[2], **options
        )
        torch.testing.assert_close(alone[0], whole[2])
    assert xf.testing.state(MODEL) == before
    assert torch.equal(X, image)


def test_metrics_together_share_their_forwards():
    counted = []

    def scorer(images: Tensor) -> Tensor:
        counted.append(len(images))
        return MODEL(images)

    def forwards(names: list[str], maps: dict[str, Tensor]) -> int:
        counted.clear()
        judged(MODEL, X[:1], maps, CLASSES[:1], names, scorer=scorer)
        return sum(counted)

    one, two = {"a": HEAT[:1]}, {"a": HEAT[:1], "b": HEAT[1:2]}
    curve = forwards(["deletion"], one)
    assert forwards(["deletion", "symmetric_relevance_gain"], one) == 2 * curve - 1  # the image itself once
    subset = forwards(["infidelity"], one)
    assert subset == 1 + 100
    assert forwards(["infidelity", "faithfulness_correlation"], two) == subset  # whatever the heatmap
    several = ["sensitivity_n", "infidelity", "faithfulness_correlation"]
    assert forwards(several, two) == 1 + 4 * 100
    assert forwards(["average_drop", "average_gain", "increase_in_confidence"], one) == 2


def test_a_torchmetric_is_the_mean_over_all_batches():
    pytest.importorskip("torchmetrics")
    parts = [slice(0, 2), slice(2, 3)]
    for name, options, expected in (
        ("insertion", {"steps": 5}, xf.insertion(MODEL, X, HEAT, CLASSES, steps=5).auc),
        ("sensitivity_n", {"score": "logit", **FEW}, xf.sensitivity_n(MODEL, X, HEAT, CLASSES, score="logit", **FEW).value),
        ("entropy", {}, xf.entropy(HEAT)),
        ("random_logit", {"seed": 2}, xf.random_logit("gradcam", MODEL, LAYER, X, CLASSES, seed=2, heatmap=HEAT)),
    ):  # fmt: skip
        metric, others = (metrics.torchmetric(name, **options) for _ in range(2))
        given = {"method": "gradcam", "layer": LAYER} if name == "random_logit" else {}
        for part in parts:
            metric.update(MODEL, X[part], HEAT[part], CLASSES[part], **given)
        assert float(metric.compute()) == pytest.approx(float(expected.mean()), abs=1e-9)
        others.update(MODEL, X[:2], HEAT[:2], CLASSES[:2], **given)
        states = [
            pickle.loads(pickle.dumps(others)),
            others,
        ]  # as of two processes, whose states are added up
        total, count = (sum(getattr(one, state) for one in states) for state in ("total", "count"))
        assert float(total / count) == pytest.approx(float(expected[:2].mean()), abs=1e-9)
        assert {reduce.__name__ for reduce in metric._reductions.values()} == {"dim_zero_sum"}
        assert metric.higher_is_better is (metrics.METRICS[name].best == "highest")
    with pytest.raises(ValueError, match="name='insertions'"):
        metrics.torchmetric("insertions")


BAD = {
    "fraction": (lambda: xf.faithfulness_correlation(MODEL, X, HEAT, fraction=1.0), ValueError, r"fraction=1.0; expected a number > 0 and < 1"),
    "fractions": (lambda: xf.sensitivity_n(MODEL, X, HEAT, fractions=[]), ValueError, r"fractions=\[\]; expected at least one"),
    "subsets": (lambda: xf.infidelity(MODEL, X, HEAT, num_subsets=1), ValueError, r"num_subsets=1 is out of range"),
    "gradient": (lambda: xf.infidelity(MODEL, X, HEAT, gradient=1), TypeError, r"gradient must be True or False"),
    "grid": (lambda: xf.irof(MODEL, X, HEAT, grid=None), TypeError, r"grid must be .*, got None"),
    "no grid": (lambda: xf.infidelity(MODEL, X, HEAT, grid=0), ValueError, r"grid=0 is out of range"),
    "logit": (lambda: xf.average_gain(MODEL, X, HEAT, score="logit"), ValueError, r"average_gain: scores from .*expected \[0, 1\]; use"),
    "target": (lambda: xf.random_logit("gradcam", MODEL, LAYER, X, lambda y: y[:, 0]), ValueError, r"is not a class; expected None, an int or B ints"),
    "one class": (lambda: xf.random_logit("gradcam", nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval(), "0", X, 0), ValueError, r"the model has 1 class"),
    "bins": (lambda: xf.efficient_mprt("gradcam", MODEL, LAYER, X, bins=0), ValueError, r"bins=0 is out of range"),
    "method": (lambda: judged(MODEL, X, {"a": HEAT}, metric_names=["random_logit"]), ValueError, r"need the method, not only its heatmap"),
}  # fmt: skip


test_the_error_says_what_is_wrong = bad_calls.refused(BAD)
