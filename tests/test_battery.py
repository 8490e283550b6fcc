"""The battery that every method passes, once for each, and its short form for pairs and for tokens."""

import functools

import pytest
import torch

import networks
import xcam_fn as xf
from xcam_fn.checks import StructureError
from xcam_fn.testing import Case, check_method, small_case, small_transformer

LACKING = (
    "cam",
    "cameras",
    "guided_backprop",
    "guided_gradcam",
    "refinecam",
)  # what a transformer has no structure for
OF_METHODS = ["smooth(gradcam)", "eigen_smooth(gradcam)", "multi_layer(layercam)", "smooth(eigen_smooth(ablationcam))", "smoothgrad(input_x_gradient)"]  # fmt: skip
OF_ONES_OWN = {
    "from_gradients": xf.from_gradients(lambda A, G: G.abs().mean((2, 3)), name="absolute"),
    "from_features": xf.from_features(lambda A: A.amax(1).clamp(min=0.0), name="strongest"),
    **{f"sess, {pool}": xf.sess("gradcam", num_scales=2, pool=pool, drop=0.3) for pool in ("mean", "max")},
}


@pytest.mark.parametrize("name", [*xf.METHODS, *OF_METHODS])
def test_every_method_passes_the_battery(name):
    check_method(xf.find_method(name), **networks.QUICK.get(name, {}))


@pytest.mark.parametrize("name", OF_ONES_OWN)
def test_methods_of_ones_own_pass_the_battery(name):
    check_method(OF_ONES_OWN[name])


def test_the_battery_fails_what_is_wrong():
    wrong = {
        "a batch equals its images": lambda A, G: G.mean((0, 2, 3)).expand(A.shape[:2]),
        "the order of channels": lambda A, G: G.mean((2, 3)) * torch.arange(A.shape[1]),
        "the same call": lambda A, G: G.mean((2, 3)) * torch.rand(A.shape[:2]),
        "zero, not NaN": lambda A, G: torch.ones(A.shape[:2], dtype=A.dtype),
    }
    for promise, weighting in wrong.items():
        with torch.random.fork_rng(), pytest.raises(AssertionError, match=promise):
            check_method(xf.from_gradients(weighting, name="wrong"))


# -- in short: heatmaps, of images and classes that do not see each other -------------------------------------


def check_in_short(method, case: Case) -> None:
    model, x, _, layer = case
    classes = [[0, 1], [2, 3], [4, 0]]
    together = method(model, layer, x, classes)
    assert together.shape == (3, 2, 20, 28)
    assert 0 <= together.min() < together.max() <= 1
    alone = [method(model, layer, x[i : i + 1], row[1]) for i, row in enumerate(classes)]
    torch.testing.assert_close(together[:, 1], torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in xf.METHODS if name not in LACKING])
def test_every_method_works_on_tokens(name):
    check_in_short(functools.partial(xf.METHODS[name], **networks.QUICK.get(name, {})), small_transformer(1))


@pytest.mark.parametrize("name", LACKING)
def test_methods_that_need_what_a_transformer_lacks(name):
    case = small_transformer()
    with pytest.raises(StructureError):
        xf.METHODS[name](case.model, case.layer, case.x)


def of_family(family: str) -> list[str]:
    return [name for name, method in xf.METHODS.items() if method.family == family]


@pytest.mark.parametrize(
    ("gradient", "region"),
    [*((g, "scorecam") for g in of_family("gradient")), *(("gradcam", r) for r in of_family("perturbation"))],
)
def test_every_method_is_half_of_a_pair(gradient, region):
    gradient_half, region_half = (
        functools.partial(xf.METHODS[name], **networks.QUICK.get(name, {})) for name in (gradient, region)
    )
    case = (small_transformer if gradient in networks.OF_ATTENTION else small_case)(1)
    check_in_short(functools.partial(xf.fusioncam, gradient=gradient_half, region=region_half), case)
