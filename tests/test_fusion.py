"""Union-CAM, Fusion-CAM and what is shared by many methods on one batch."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from torch import Tensor, nn
from torch.nn import functional as F

import bad_calls
import networks
import xcam_fn as xf

GRADIENT = [n for n, m in xf.METHODS.items() if m.family == "gradient" and n not in networks.OF_ATTENTION]
REGION = [name for name, method in xf.METHODS.items() if method.family == "perturbation"]
QUICK = networks.QUICK | {"refinecam": {"layers": ["conv1", "conv2"]}}


def quick(name: str):
    return functools.partial(xf.METHODS[name], **QUICK.get(name, {}))


def images(batch: int = 2, size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    return networks.seeded(networks.Residual(), seed).double()


# -- the papers, one image at a time --------------------------------------------------------------------------


def stretched(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return np.zeros_like(values) if span == 0 else (values - values.min()) / span


class Loop:
    """Both methods for one image and class, written as the papers' formulas, in numpy."""

    def __init__(self, model: nn.Module, image: Tensor, cls: int) -> None:
        self.model, self.image, self.cls = model, image, cls

    def p(self, mask: np.ndarray) -> float:
        with torch.no_grad():
            return float(self.model((self.image * torch.from_numpy(mask))[None])[0].softmax(0)[self.cls])

    def beta(self, mask: np.ndarray) -> float:
        return self.p(mask) - self.p(np.zeros_like(mask))

    def union(self, A: np.ndarray, G: np.ndarray, R: np.ndarray) -> np.ndarray:
        total = np.zeros(A.shape[1:])
        for a, g in zip(A, G, strict=True):
            kept = np.maximum(np.where(g < np.percentile(g, 10), 0, g), 0)
            if kept.sum() > 0:
                total += kept / kept.sum() * a
        resized = F.interpolate(torch.from_numpy(total)[None, None], R.shape, mode="bilinear")[0, 0].numpy()
        D = stretched(resized)
        combined = stretched(self.beta(D) * D + self.beta(R) * R)
        return combined if self.beta(combined) >= self.beta(R) else R

    def fusion(self, gradient: np.ndarray, R: np.ndarray) -> np.ndarray:
        D = np.where(gradient > np.percentile(gradient, 10), gradient, 0)
        combined = stretched(self.beta(D) * D + self.beta(R) * R)
        one, other = self.beta(combined) * combined, self.beta(R) * R
        sim = np.clip(1 - np.abs(one - other), 0, 1)
        return stretched(sim * np.maximum(one, other) + (1 - sim) * (one + other) / 2)


@pytest.mark.parametrize("seed", range(6))
def test_both_equal_the_papers_loop(seed):
    model, x = network(seed), images(3)
    classes = [1, 3, 0]
    A, G, _ = xf.feature_and_grad(model, "relu", x, classes)
    R = xf.scorecam(model, "relu", x, classes)
    gradient = xf.layercam(model, "relu", x, classes)
    union = xf.unioncam(model, "relu", x, classes)
    fusion = xf.fusioncam(model, "relu", x, classes, gradient="layercam")
    for i, cls in enumerate(classes):
        loop = Loop(model, x[i], cls)
        np.testing.assert_allclose(union[i], loop.union(A[i].numpy(), G[i].numpy(), R[i].numpy()), atol=1e-5)
        np.testing.assert_allclose(fusion[i], loop.fusion(gradient[i].numpy(), R[i].numpy()), atol=1e-5)


# -- any gradient method with any perturbation method -----------------------------------------------------------


def test_every_method_runs_in_a_pair_on_two_photographs(lite0, photographs):
    x = photographs[:, :, ::7, ::7].contiguous()
    parts = {
        name: functools.partial(xf.METHODS[name], **QUICK.get(name, {})) for name in (*GRADIENT, *REGION)
    }
    maps = xf.explain_all(lite0, "_blocks.3", x, [281, 650], parts)
    gain = xf.gain(lite0, x, [281, 650])
    for pair in [
        (name, other)
        for i, name in enumerate(GRADIENT)
        for other in (REGION[i % len(REGION)], REGION[-i % len(REGION)])
    ]:
        fused = xf.fuse(*map(maps.__getitem__, pair), gain)  # what Fusion-CAM makes of the pair
        assert fused.shape == (2, 32, 32)
        assert torch.isfinite(fused).all(), pair
        assert fused.amin() >= 0, pair
        assert fused.amax() <= 1, pair
        assert fused.any(), pair


def test_components_in_every_form_are_the_same():
    model, x = network(), images()
    expected = xf.fusioncam(model, "relu", x, gradient="layercam", region="iscam", chunk_size=3)
    maps = {name: xf.METHODS[name](model, "relu", x) for name in ("layercam", "iscam")}
    for gradient, region in (
        (xf.layercam, xf.iscam),
        (maps["layercam"], functools.partial(xf.iscam, num_samples=10)),
        (maps["layercam"].numpy(), maps["iscam"]),
    ):
        found = xf.fusioncam(model, "relu", x, gradient=gradient, region=region)
        torch.testing.assert_close(found, expected)
    named = xf.find_method("layercam+iscam")
    torch.testing.assert_close(named(model, "relu", x), expected)
    assert named.title == "Fusion-CAM of Layer-CAM and IS-CAM"
    by_hand = xf.fuse(maps["layercam"], maps["iscam"], xf.gain(model, x))
    torch.testing.assert_close(by_hand, expected)


def test_several_classes_and_other_numbers_of_axes():
    model, x = network(), images()
    maps = xf.fusioncam(model, "relu", x, [[1, 2], [0, 4]])
    torch.testing.assert_close(maps[:, 1], xf.fusioncam(model, "relu", x, [2, 4]))
    volume, v = networks.seeded(networks.ThreeDimensional()), torch.randn(2, 1, 6, 8, 10)
    assert xf.fusioncam(volume, None, v).shape == (2, 6, 8, 10)
    assert xf.unioncam(volume, None, v).shape == (2, 6, 8, 10)


# -- degenerate maps ----------------------------------------------------------------------------------------------

unit = st.floats(0, 1, width=32)
map_values = stnp.arrays(np.float32, (2, 4, 5), elements=unit)
gains = st.lists(st.floats(-1, 1), min_size=6, max_size=6)


@settings(deadline=None, max_examples=200)
@given(map_values, map_values, gains, st.sampled_from(["any", "same", "zero", "constant"]), st.floats(0, 100))
def test_whatever_is_fused_is_finite_and_in_range(first, second, betas, kind, theta):
    first, second = torch.from_numpy(first), torch.from_numpy(second)
    if kind == "same":
        second = first
    if kind == "zero":
        first, second = torch.zeros_like(first), torch.zeros_like(second)
    if kind == "constant":
        first = torch.full_like(first, float(first.max()))
    answers = iter(torch.tensor(betas, dtype=torch.float32).reshape(3, 2))
    fused = xf.fuse(first, second, lambda *maps: [next(answers) for _ in maps], theta=theta)
    assert torch.isfinite(fused).all()
    assert fused.min() >= 0
    assert fused.max() <= 1
    if kind == "zero":
        assert not fused.any()


def test_a_probability_of_one_or_zero_and_a_negative_gain():
    x = images()
    for logits in ([60.0, -60.0], [-60.0, 60.0], [0.0, 0.0]):

        def scorer(images: Tensor, logits=logits) -> Tensor:  # certain, whatever it sees
            return torch.tensor(logits, dtype=images.dtype).expand(len(images), 2)

        fused = xf.fusioncam(network(), "relu", x, 0, scorer=scorer)
        assert not fused.any()  # nothing is gained by showing anything

    def contrary(images: Tensor) -> Tensor:  # the more is seen, the less probable
        return torch.stack([-images.abs().sum((1, 2, 3)), torch.zeros(len(images)).to(images)], 1)

    for name in ("unioncam", "fusioncam"):
        found = xf.METHODS[name](network(), "relu", x, 0, scorer=contrary)
        assert torch.isfinite(found).all()
        assert 0 <= found.min() <= found.max() <= 1


# -- many methods at once -----------------------------------------------------------------------------------------


class Counting(torch.overrides.TorchFunctionMode):
    """Counts the images that go through the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, torch.conv2d) and args[0].shape[1] == 3:
            self.images += len(args[0])
        return function(*args, **(kwargs or {}))


def forwards(run) -> int:
    with Counting() as counting:
        run()
    return counting.images


def test_all_methods_together_pay_once_for_what_they_share():
    model, x = network(), images(1).float()
    model = model.float()
    methods = {name: quick(name) for name in xf.METHODS if name not in networks.OF_ATTENTION}
    for method in methods.values():
        method(model, "relu", x)  # traced and prepared
    distinct = sum(forwards(lambda m=m: m(model, "relu", x)) for n, m in methods.items() if n not in ("unioncam", "fusioncam"))  # fmt: skip
    apart = sum(forwards(lambda m=m: m(model, "relu", x)) for m in methods.values())
    together = forwards(lambda: xf.explain_all(model, "relu", x, None, methods))
    # What is left of the two fusions: the image itself, and the scores of D, R, F and of the baseline.
    assert together <= distinct + 2 * 6
    assert together < apart
    alone = xf.explain_all(model, "relu", x, None, {"it": quick("scorecam")})["it"]
    score = forwards(lambda: xf.explain_all(model, "relu", x, None, {"it": quick("scorecam")}))
    for cls in (None, 1, [1]):
        names = ["scorecam", "unioncam", "fusioncam"]
        three = forwards(lambda cls=cls, names=names: xf.explain_all(model, "relu", x, cls, names))
        assert three <= score + 2 * 6
    assert torch.equal(alone, xf.scorecam(model, "relu", x))


def test_equal_masks_are_scored_once_for_all_methods():
    model, x = network().float(), images(1).float()
    methods = {"scorecam": xf.scorecam, "iscam": functools.partial(xf.iscam, num_samples=2)}
    expected = {name: method(model, "relu", x) for name, method in methods.items()}
    maps = forwards(lambda: xf.scorecam(model, "relu", x))
    apart = sum(forwards(lambda m=m: m(model, "relu", x)) for m in methods.values())
    together = forwards(lambda: xf.explain_all(model, "relu", x, None, methods))
    assert (
        together <= apart - maps + 4
    )  # the masks of scale 1 are Score-CAM's; the image and baseline are scored
    for name, found in xf.explain_all(model, "relu", x, None, methods).items():
        assert torch.equal(found, expected[name])
    other = {"scorecam": xf.scorecam, "logits": functools.partial(xf.scorecam, score="logit")}
    assert forwards(lambda: xf.explain_all(model, "relu", x, None, other)) >= 2 * (maps - 4)


def test_together_they_are_what_they_are_apart(lite0, photographs):
    x = photographs[:, :, ::7, ::7].contiguous()
    left = ("sscam", "iscam", "rise", "drise", "cam", *networks.OF_ATTENTION)
    names = [name for name in xf.METHODS if name not in left]
    few = {"num_groups": 4, "num_samples": 2, "steps": 2, "scales": [1.0, 1.5], "channels": 8}
    together = xf.explain_all(lite0, "_blocks.3", x, None, [*names, "gradcam+groupcam"], **few)
    assert list(together) == [*names, "gradcam+groupcam"]
    for name in names:
        apart = xf.find_method(name, **few)(lite0, "_blocks.3", x)
        torch.testing.assert_close(together[name], apart, rtol=0, atol=1e-6)


def test_many_methods_leave_the_model_alone_and_find_its_class_once():
    model, x = network(), images()
    before = xf.testing.state(model)
    found = xf.explain_all(model, model.relu, x, xf.targets.probability(), ["gradcam", "fusioncam"])
    assert xf.testing.state(model) == before
    torch.testing.assert_close(found["gradcam"], xf.gradcam(model, "relu", x, xf.targets.probability()))
    x.requires_grad_()
    assert all(
        heatmap.requires_grad
        for heatmap in xf.explain_all(model, "relu", x, 1, ["gradcam", "unioncam"]).values()
    )

    def mine(model: nn.Module, layer: str, x: Tensor, cls: object) -> Tensor:
        assert layer == "relu"  # a user's function is handed what the user passed
        return torch.ones(len(x), *x.shape[2:])

    assert xf.explain_all(model, "relu", x, 1, [mine])["mine"].all()


# -- bad input ------------------------------------------------------------------------------------------------------

ONE = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def fuse(**options):
    return lambda: xf.fusioncam(networks.seeded(networks.Residual()), "relu", ONE, 1, **options)


def every(methods, **options):
    return lambda: xf.explain_all(networks.seeded(networks.Residual()), "relu", ONE, 1, methods, **options)


BAD = {
    "name": (fuse(gradient="gradcm"), ValueError, r"method 'gradcm' is not known; did you mean 'gradcam'"),
    "kind": (fuse(region=3), TypeError, r"region must be a name or a callable or a tensor"),
    "shape": (
        fuse(region=torch.zeros(1, 3, 4)),
        ValueError,
        r"region: the heatmaps have shape \(1, 3, 4\); expected \(1, 12, 16\)",
    ),
    "range": (
        fuse(gradient=torch.full((1, 12, 16), 2.0)),
        ValueError,
        r"gradient: the heatmaps have values from 2 to 2; expected \[0, 1\]",
    ),
    "nan": (
        fuse(region=torch.full((1, 12, 16), torch.nan)),
        ValueError,
        r"region holds NaN or infinite values",
    ),
    "theta": (fuse(theta=101), ValueError, r"theta=101 is out of range; expected a number ≥ 0 and ≤ 100"),
    "maps": (
        lambda: xf.fuse(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5), lambda *m: [torch.zeros(1)] * len(m)),
        ValueError,
        r"gradient_map has shape \(1, 4, 4\) and region_map \(1, 4, 5\); expected the same shape",
    ),
    "axes": (
        lambda: xf.denoise(torch.zeros(4, 4), axes=9),
        ValueError,
        r"axes=9, but the maps have shape \(4, 4\)",
    ),
    "axes of a sum": (
        lambda: xf.agree(torch.zeros(4, 4), torch.zeros(4, 4), axes=3),
        ValueError,
        r"axes=3, but",
    ),
    "no axes": (lambda: xf.denoise(torch.zeros(4, 4), axes=0), ValueError, r"axes=0 is out of range"),
    "complex": (
        lambda: xf.denoise(torch.zeros(4, 4) * 1j),
        TypeError,
        r"maps is a tensor of torch.complex64; expected a dense tensor",
    ),
    "array": (
        lambda: xf.combine(np.zeros((4, 4)), torch.zeros(4, 4), []),
        TypeError,
        r"first must be .*, got ndarray",
    ),
    "no gains": (
        lambda: xf.fuse(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), None),
        TypeError,
        r"gain must be a callable, got None",
    ),
    "no baseline": (
        fuse(baseline=None),
        TypeError,
        r"baseline must be a tensor or a number",
    ),
    "nan baseline": (fuse(baseline=float("nan")), ValueError, r"baseline=nan is out of range"),
    "gain without a baseline": (
        lambda: xf.gain(networks.seeded(networks.Residual()), ONE, 1, baseline=None),
        TypeError,
        r"baseline must be .*, got None",
    ),
    "no methods": (every([]), ValueError, r"methods is empty; expected at least one of gradcam,"),
    "twice": (every(["gradcam", "gradcam"]), ValueError, r"methods: two are called 'gradcam'"),
    "method kind": (every([3]), TypeError, r"methods: 3 must be a name or a function"),
    "option": (every(["gradcam"], chunk_size=3), TypeError, r"no method takes the option 'chunk_size'"),
}


test_the_error_says_what_is_wrong = bad_calls.refused(BAD)
