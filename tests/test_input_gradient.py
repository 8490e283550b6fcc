"""Methods of the gradient with respect to the images, and smoothgrad: the papers' loops, closed forms and Captum."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf
from xcam_fn.perturb import normal, uniform

CLASSES = [1, 4]


def images(batch: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, 8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    """Each ReLU is a module of its own and none is in place, as Captum's hooks ask for."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.Softplus(), nn.Linear(8, 5),
    )  # fmt: skip
    return networks.seeded(model).double()


def gradient(model: nn.Module, point: Tensor, cls: int) -> Tensor:
    """Of one image's score, (C, *size)."""
    leaf = point[None].clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[0, cls], leaf)[0][0]


# -- expected gradients --------------------------------------------------------------------------------------


def test_expected_gradients_are_the_papers_loop():
    model, x, baselines = network(), images(), images(3, seed=6)
    expected = torch.zeros(2, 8, 10, dtype=torch.float64)
    for b, cls in enumerate(CLASSES):
        for j in range(6):
            start, share = baselines[j % 3], uniform(2, j, (), like=x)
            point = start + share * (x[b] - start)
            expected[b] += ((x[b] - start) * gradient(model, point, cls)).sum(0) / 6
    for chunk_size in (1, 5, 100):
        found = xf.expected_gradients(
            model, None, x, CLASSES, baselines=baselines, num_samples=6, seed=2, chunk_size=chunk_size,
            postprocess=None,
        )  # fmt: skip
        torch.testing.assert_close(found, expected)


def test_expected_gradients_of_a_linear_network_are_a_mean_over_baselines():
    x, baselines = images(), images(4, seed=6)
    model = networks.seeded(nn.Sequential(nn.Flatten(), nn.Linear(240, 5))).double()
    w = model[1].weight[1].detach().reshape(3, 8, 10)
    found = xf.expected_gradients(model, None, x, 1, baselines=baselines, num_samples=8, postprocess=None)
    torch.testing.assert_close(found, ((x - baselines.mean(0)) * w).sum(1))
    assert (found - xf.expected_gradients(model, None, x, 1, postprocess=None)).abs().max() > 0.1
    product = xf.input_x_gradient(model, None, x, 1, postprocess=None)
    torch.testing.assert_close(product, (x * w).sum(1))


def test_captum_agrees_on_expected_gradients(monkeypatch):
    from captum.attr import GradientShap

    model, x, baselines = network(), images(1), images(3, seed=6)
    shares = np.array([uniform(0, j, (), like=x).item() for j in range(9)])
    monkeypatch.setattr(np.random, "choice", lambda count, number: np.arange(number) % count)
    monkeypatch.setattr(np.random, "uniform", lambda low, high, number: shares[:number])
    theirs = GradientShap(model).attribute(x, baselines, n_samples=9, stdevs=0.0, target=2)
    ours = xf.expected_gradients(model, None, x, 2, baselines=baselines, num_samples=9, postprocess=None)
    torch.testing.assert_close(ours, theirs.sum(1).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_baselines_that_do_not_fit_are_refused():
    for given, options in ((images()[:, :2], {}), (images(4), {"num_samples": 3})):
        with pytest.raises(
            ValueError, match=r"baselines have shape .*; expected \(N, 3, 8, 10\) with N from 1 to"
        ):
            xf.expected_gradients(network(), None, images(), baselines=given, **options)
    with pytest.raises(ValueError, match="baselines holds NaN or infinite values"):
        xf.expected_gradients(network(), None, images(), baselines=images() * torch.nan)
    with pytest.raises(TypeError, match=r"baselines must be a floating-point tensor"):
        xf.expected_gradients(network(), None, images(), baselines=0.0)


# -- one gradient --------------------------------------------------------------------------------------------


def test_input_x_gradient_is_the_product_and_captums():
    from captum.attr import InputXGradient

    model, x = network(), images()
    expected = torch.stack([(x[b] * gradient(model, x[b], c)).sum(0) for b, c in enumerate(CLASSES)])
    found = xf.input_x_gradient(model, None, x, CLASSES, postprocess=None)
    torch.testing.assert_close(found, expected)
    theirs = InputXGradient(model).attribute(x.clone().requires_grad_(), torch.tensor(CLASSES))
    torch.testing.assert_close(found, theirs.sum(1).detach())


def test_guided_gradcam_is_the_product_and_captums():
    from captum.attr import GuidedGradCam

    model, x = network(), images()
    found = xf.guided_gradcam(model, "3", x, CLASSES, postprocess=None)
    cam = xf.gradcam(model, "3", x, CLASSES, postprocess=lambda cam, size: xf.maps.resize(cam.relu(), size))
    torch.testing.assert_close(found, xf.guided_backprop(model, None, x, CLASSES, postprocess=None) * cam)
    peer = GuidedGradCam(model, model[3])
    with pytest.warns(UserWarning, match="backward hooks"):
        theirs = peer.attribute(
            x.clone().requires_grad_(), torch.tensor(CLASSES), interpolate_mode="bilinear"
        )
    torch.testing.assert_close(found, theirs.sum(1).detach())
    assert found.abs().amax() > 0


# -- smoothgrad ----------------------------------------------------------------------------------------------


def noisy(image: Tensor, j: int) -> Tensor:
    return image + 0.3 * (image.max() - image.min()) * normal(1, j, tuple(image.shape), like=image)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(0),
    "square": lambda maps: (maps**2).mean(0),
    "variance": lambda maps: ((maps - maps.mean(0)) ** 2).mean(0),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", ["layercam", "input_x_gradient", "scorecam"])
def test_smoothgrad_is_the_papers_loop(name, statistic):
    """Of a map that is positive and one that is signed, of attributions value by value."""
    model, x = network(), images()
    x[1] *= 3  # each image has a range of its own
    predicted = model(x).argmax(1).tolist()
    method = xf.smoothgrad(name, num_samples=3, std=0.3, statistic=statistic, seed=1)
    found = method(model, "3", x, postprocess=None)
    for b, cls in enumerate(predicted):
        copies = [noisy(x[b], j) for j in range(3)]
        if name == "input_x_gradient":
            maps = torch.stack([copy * gradient(model, copy, cls) for copy in copies])
            expected = STATISTICS[statistic](maps).sum(0)
        else:
            maps = [xf.METHODS[name](model, "3", copy[None], cls, postprocess=None)[0] for copy in copies]
            expected = STATISTICS[statistic](torch.stack(maps))
        torch.testing.assert_close(found[b], expected)
    many = method(model, "3", x, [[cls, 0] for cls in predicted], postprocess=None)
    torch.testing.assert_close(many[:, 0], found)


def test_smoothgrad_of_methods_that_return_heatmaps_and_of_functions():
    model, x = network(), images()
    quick = {"num_samples": 2, "std": 0.3, "seed": 1}
    heatmaps = xf.smoothgrad("smooth(gradcam)", **quick)(model, "3", x, 1, postprocess=None)
    raw = [xf.smooth("gradcam")(model, "3", noisy(x[0], j)[None], 1, postprocess=None) for j in range(2)]
    torch.testing.assert_close(heatmaps[:1], torch.stack(raw).mean(0))

    def mine(model: nn.Module, layer: str, x: Tensor, cls: object, postprocess: object = None) -> Tensor:
        return x.sum(1)

    found = xf.smoothgrad(mine, **quick)(model, "3", x, postprocess=None)
    torch.testing.assert_close(found[0], torch.stack([noisy(x[0], j) for j in range(2)]).mean(0).sum(0))


@pytest.mark.parametrize(
    ("statistic", "kind"), [("mean", "smoothgrad"), ("square", "smoothgrad_sq"), ("variance", "vargrad")]
)
def test_captum_agrees_on_smoothgrad(monkeypatch, statistic, kind):
    from captum.attr import InputXGradient, NoiseTunnel

    model, x = network(), images(1)
    std = 0.3 * (x.max() - x.min()).item()
    noise = torch.stack([normal(1, j, tuple(x.shape[1:]), like=x) for j in range(4)])
    monkeypatch.setattr(torch, "normal", lambda mean, given: mean + given * noise)
    tunnel = NoiseTunnel(InputXGradient(model))
    theirs = tunnel.attribute(x, nt_type=kind, nt_samples=4, stdevs=std, target=2)
    method = xf.smoothgrad("input_x_gradient", num_samples=4, std=0.3, statistic=statistic, seed=1)
    torch.testing.assert_close(method(model, None, x, 2, postprocess=None), theirs.sum(1).detach())


def test_smoothgrad_has_the_kind_and_the_options_of_its_method():
    found = xf.find_method("smoothgrad(integrated_gradients)", steps=3, std=0.2)
    assert (found.returns, found.family, found.options["std"]) == ("attributions", "gradient", 0.2)
    assert xf.smoothgrad("rise").returns == "scores"
    assert xf.smoothgrad("smooth(rise)").returns == "maps"
    model, x = network(), images()
    maps = found(model, None, x, 1, num_samples=1)
    alone = torch.stack([xf.integrated_gradients(model, None, (x[b] + 0.2 * (x[b].max() - x[b].min()) * normal(
        0, 0, (3, 8, 10), like=x))[None], 1, steps=3)[0] for b in range(2)])  # fmt: skip
    torch.testing.assert_close(maps, alone)
