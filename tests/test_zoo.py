"""Methods of the features alone, CAM and others: the papers' formulas in loops, and other libraries' maps."""

import functools

import pytest
import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf
from xcam_fn.checks import StructureError
from xcam_fn.perturb import normal, uniform
from xcam_fn.projections import kernel_component, peak_component, principal_component

FEATURES_ALONE = ["eigencam", "kpcacam", "fem", "randomcam"]
CLASSES = [281, 650]


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(*head: nn.Module) -> nn.Sequential:
    """A convolution whose features ("1") are pooled, and a head."""
    body = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = networks.seeded(nn.Sequential(*body, *(head or [nn.Linear(6, 5)]))).double()
    assert isinstance(model, nn.Sequential)
    return model


def test_families():
    assert {xf.METHODS[name].family for name in ("cam", "eigencam", "kpcacam", "fem")} == {"activation"}
    assert xf.randomcam.family == "baseline"


def test_cam_of_a_score_that_depends_on_nothing_is_zero():
    """What the battery leaves out for its family."""
    case = xf.testing.small_case()
    with torch.no_grad():
        case.model.get_parameter("fc.weight").zero_()
    assert not xf.cam(case.model, case.layer, case.x, 1).any()


# -- components ----------------------------------------------------------------------------------------------


def component_by_svd(A: Tensor, center: bool, sign: str = "mean") -> Tensor:
    """Position by channel, one image at a time, as Eigen-CAM's paper writes it."""
    found = []
    for image in A:
        X = image.flatten(1).T
        X = X - X.mean(0) if center else X
        _, _, Vt = torch.linalg.svd(X)
        projected = X @ Vt[0]
        other = X.mean(1) if sign == "mean" else component_by_svd(image[None], center=False).flatten()
        turned = ((projected - projected.mean()) * (other - other.mean())).sum()
        turned = turned if center else projected.sum()
        found.append((projected if turned >= 0 else -projected).reshape(image.shape[1:]))
    return torch.stack(found)


@pytest.mark.parametrize(("center", "sign"), [(True, "mean"), (True, "uncentered"), (False, "uncentered")])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 30, 4, 5), (2, 5, 9), (2, 4, 3, 3, 3)])
def test_the_principal_component_is_that_of_the_svd(shape, center, sign):
    A = maps(*shape).relu()
    expected = component_by_svd(A, center, sign)
    project = functools.partial(principal_component, center=center, sign=sign)
    torch.testing.assert_close(project(A), expected)
    single = project(A.float())
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-5)
    half = project(A.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.05)


def test_a_components_sign_does_not_depend_on_the_order_of_channels():
    A = maps(3, 8, 4, 5).relu()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    of_uncentered = functools.partial(principal_component, sign="uncentered")
    for project in (principal_component, of_uncentered, kernel_component, peak_component):
        torch.testing.assert_close(project(A[:, order]), project(A))
        found = peak_component(A * torch.tensor([1.0, -1.0, 1.0])[:, None, None, None]).flatten(1)
        assert (found.amax(1) >= -found.amin(1)).all()


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("channels", [3, 40])
def test_constant_features_give_zeros(value, channels):
    A = torch.full((2, channels, 5, 7), value)
    for project in (
        principal_component, functools.partial(principal_component, center=False), peak_component,
        kernel_component, functools.partial(kernel_component, kernel="rbf"),
    ):  # fmt: skip
        assert (project(A) == 0).all()


def test_a_component_can_be_differentiated_where_channels_are_dead():
    A = maps(1, 6, 3, 4).relu()
    A[:, [1, 4]] = 0  # two equal eigenvalues, for which the derivative of eigh is NaN
    for project in (principal_component, kernel_component):
        leaf, direction, weight = A.clone().requires_grad_(), maps(1, 6, 3, 4, seed=1), maps(1, 3, 4, seed=2)
        (found,) = torch.autograd.grad((project(leaf) * weight).sum(), leaf)
        ends = [(project(A + step * direction) * weight).sum() for step in (1e-6, -1e-6)]
        torch.testing.assert_close(
            (found * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("kernel", ["linear", "sigmoid", "rbf"])
def test_kernel_components_are_those_of_scikit_learn(kernel):
    from sklearn.decomposition import KernelPCA

    A = maps(2, 7, 4, 5).relu()
    found = kernel_component(A, kernel=kernel, gamma=0.05)
    for ours, image in zip(found, A, strict=True):
        X = image.flatten(1).T
        theirs = KernelPCA(1, kernel=kernel, gamma=0.05, eigen_solver="dense").fit_transform(X - X.mean(0))
        theirs = torch.from_numpy(theirs).reshape(4, 5)
        theirs = theirs if (theirs * ours).sum() > 0 else -theirs
        torch.testing.assert_close(ours, theirs)
    if kernel == "linear":
        torch.testing.assert_close(found, principal_component(A, sign="uncentered"))


def test_the_sign_of_features_is_that_of_their_uncentered_component():
    """Where channels of both signs cancel in the mean, which then says nothing of where the features are."""

    def agreement(found: Tensor, other: Tensor) -> Tensor:
        return (found * (other - other.mean((1, 2), keepdim=True))).sum((1, 2))

    case = xf.testing.small_case()
    A = maps(6, 5, 4, 6, seed=2)
    A[..., 1:3, 2:4] += 3 * torch.tensor([1.0, -1.0, 2.0, -1.5, -1.0])[:, None, None]
    uncentered = principal_component(A, center=False)
    for project in (
        functools.partial(principal_component, sign="uncentered"), kernel_component,
        functools.partial(kernel_component, kernel="rbf"),
    ):  # fmt: skip
        assert (agreement(project(A), uncentered) > 0).all()
    for of_features in (xf.eigencam.with_options(center=True), xf.kpcacam):
        found = of_features(case.model, "features.3", case.x, postprocess=None)
        own = xf.eigencam(case.model, "features.3", case.x, postprocess=None)
        assert (agreement(found, own) > 0).all()
    assert (agreement(principal_component(A), uncentered) < 0).any()


# -- features alone ------------------------------------------------------------------------------------------


def test_fem_is_the_papers_loop():
    model, x = pooled(), maps(2, 3, 8, 9)
    A = model[:2](x).detach()
    masks, shares = torch.zeros(2, 6, 7, dtype=torch.float64), torch.zeros(2, 6, 7, dtype=torch.float64)
    for b in range(2):
        for channel in A[b]:
            limit = channel.mean() + 1.5 * channel.std(correction=0)
            masks[b] += channel.mean() * (channel >= limit)
            shares[b] += (channel > limit).double().mean() * channel
    torch.testing.assert_close(xf.fem(model, "1", x, k=1.5, postprocess=None), masks)
    found = xf.fem(model, "1", x, k=1.5, summed="features", postprocess=None)
    torch.testing.assert_close(found, shares)


def test_random_weights_depend_on_the_seed_and_the_channels_number_alone():
    model, x = pooled(), maps(2, 3, 8, 9)
    A = model[:2](x).detach()
    w = 2 * uniform(3, 0, (6,), like=x) - 1
    torch.testing.assert_close(
        xf.randomcam(model, "1", x, seed=3, postprocess=None), torch.einsum("k,bkhw->bhw", w, A)
    )
    assert not torch.equal(xf.randomcam(model, "1", x), xf.randomcam(model, "1", x, seed=1))
    many = 2 * uniform(0, 0, (4000,), like=x) - 1
    assert many.min() >= -1
    assert many.mean().abs() < 0.05
    assert (many.var() - 1 / 3).abs() < 0.02


@pytest.mark.parametrize("name", FEATURES_ALONE)
def test_what_looks_at_no_class_checks_it_all_the_same(name):
    model, x = pooled(), maps(2, 3, 8, 9)
    method = xf.METHODS[name]
    alone = method(model, "1", x)
    found = method(model, "1", x, [[0, 1, 2], [3, 4, 0]])
    assert torch.equal(found, alone[:, None].expand(-1, 3, -1, -1))
    for cls in (5, [0], [[0], [9]], lambda output: output[:, :2]):
        with pytest.raises(ValueError, match="cls"):
            method(model, "1", x, cls)
    with pytest.raises(TypeError, match=rf"{name}\(\) has no option 'powr'"):
        method(model, "1", x, powr=1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fem", {"k": -1}, "k=-1 is out of range"),
        ("fem", {"summed": "both"}, "summed='both'; expected one of 'masks', 'features'"),
        ("kpcacam", {"kernel": "cosine"}, "kernel='cosine'; expected one of 'sigmoid', 'rbf', 'linear'"),
        ("kpcacam", {"gamma": 0}, "gamma=0 is out of range"),
        ("smoothgradcam_pp", {"num_samples": 0}, "num_samples=0"),
        ("smoothgradcam_pp", {"std": -1.0}, "std=-1.0"),
        ("reciprocam", {"chunk_size": 0}, "chunk_size=0"),
        ("reciprocam", {"score": "odds"}, "score='odds'"),
        ("scorecam", {"projection": principal_component, "summed": "masks"}, "summed='masks' cannot be combined with a projection"),
    ],
)  # fmt: skip
def test_bad_options(unchecked, name, options, words):
    with pytest.raises(ValueError, match=words):
        xf.METHODS[name](pooled(), "1", maps(1, 3, 8, 9), **options)


def test_a_map_of_features_of_ones_own():
    strongest = xf.from_features(lambda A, floor=0.0: A.amax(1).clamp(min=floor), name="strongest")
    model, x = pooled(), maps(2, 3, 8, 9)
    expected = model[:2](x).detach().amax(1).clamp(min=0.3)
    torch.testing.assert_close(strongest(model, "1", x, floor=0.3, postprocess=None), expected)


# -- CAM -----------------------------------------------------------------------------------------------------


def test_cam_reads_the_linear_layers_weights_off_the_head():
    model, x = pooled(), maps(2, 3, 8, 9)
    A, weight = model[:2](x).detach(), model[4].weight.detach()
    assert isinstance(weight, Tensor)
    found = xf.cam(model, "1", x, [[0, 3], [4, 1]], postprocess=None)
    torch.testing.assert_close(
        found, torch.einsum("bnk,bkhw->bnhw", weight[torch.tensor([[0, 3], [4, 1]])], A)
    )
    by_probability = xf.cam(model, "1", x, xf.targets.probability([0, 4]), postprocess=None)
    torch.testing.assert_close(by_probability, found[:, 0])
    two = pooled(nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 5))  # linear after linear is linear
    second, first = two.get_parameter("6.weight"), two.get_parameter("4.weight")
    w = (second @ first).detach()
    torch.testing.assert_close(
        xf.cam(two, "1", x, 2, postprocess=None), torch.einsum("k,bkhw->bhw", w[2], two[:2](x).detach())
    )


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (pooled(), "0"),
        (pooled(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), "1"),
        (pooled(nn.Linear(6, 8), nn.Hardswish(), nn.Linear(8, 5)), "1"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)), "1"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(252, 5)), "1"),
    ],
    ids=["before a ReLU", "hidden layer", "smooth hidden layer", "maximum", "no pooling"],
)  # fmt: skip
def test_a_head_without_such_weights_is_refused(model, layer):
    model = networks.seeded(model).double()
    with pytest.raises(StructureError, match=f"layer '{layer}': .* or use gradcam"):
        xf.cam(model, layer, maps(2, 3, 8, 9), 1)


# -- Smooth Grad-CAM++ ---------------------------------------------------------------------------------------


def test_without_noise_smooth_gradcam_pp_is_gradcam_pp():
    model, x = networks.seeded(networks.Residual()).double(), maps(2, 3, 8, 9)
    found = xf.smoothgradcam_pp(model, "conv2", x, [1, 3], std=0.0, num_samples=2, postprocess=None)
    torch.testing.assert_close(found, xf.gradcam_pp(model, "conv2", x, [1, 3], postprocess=None))


def test_smooth_gradcam_pp_is_the_papers_loop():
    model, x = networks.seeded(networks.Residual()).double(), maps(2, 3, 8, 9)
    found = xf.smoothgradcam_pp(model, "conv2", x, num_samples=3, std=0.4, seed=2, postprocess=None)
    A = xf.features(model, "conv2", x)
    classes = model(x).argmax(1)  # of the input itself, whatever the noise makes of it
    noisy = [x + 0.4 * normal(2, j, (3, 8, 9), like=x) for j in range(3)]
    G = torch.stack([xf.feature_and_grad(model, "conv2", one, classes).grads for one in noisy])
    for b in range(2):
        expected = torch.zeros(8, 9, dtype=torch.float64)
        for k in range(6):
            powers = [(G[:, b, k] ** p).mean(0) for p in (1, 2, 3)]
            alpha = powers[1] / (2 * powers[1] + (A[b, k] * powers[2]).sum())
            expected += (alpha * powers[0].relu()).sum() * A[b, k]
        torch.testing.assert_close(found[b], expected)


# -- Recipro-CAM ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("layer", ["relu", "bn"])  # after bn the head reads the skip connection as well
def test_reciprocam_is_the_papers_loop(layer, gaussian):
    model, x = networks.seeded(networks.Residual()).double(), maps(2, 3, 5, 6)
    split = xf.split(model, layer, x)
    found = xf.reciprocam(model, layer, x, [1, 3], gaussian=gaussian, postprocess=None, chunk_size=7)
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16 if gaussian else torch.tensor([[1.0]])
    reach = len(kernel) // 2
    for b, cls in enumerate([1, 3]):
        A, residual = split.trunk(x[b : b + 1])
        for i in range(5):
            for j in range(6):
                mask = torch.zeros(5 + 2 * reach, 6 + 2 * reach, dtype=torch.float64)
                mask[i : i + len(kernel), j : j + len(kernel)] = kernel
                mask = mask[reach : reach + 5, reach : reach + 6]
                with torch.no_grad():
                    expected = split.head(A * mask, residual).softmax(1)[0, cls]
                torch.testing.assert_close(found[b, i, j], expected)


def test_reciprocam_of_signals_and_volumes():
    for network, shape in (
        (networks.OneDimensional, (2, 2, 31)),
        (networks.ThreeDimensional, (2, 1, 9, 10, 11)),
    ):
        model, x = networks.seeded(network()), maps(*shape).float()
        found = xf.reciprocam(model, None, x, [[0, 3]] * 2)
        assert found.shape == (2, 2, *shape[2:])
        assert found.amax() == 1


# -- other libraries -----------------------------------------------------------------------------------------


# "_swish" is lite0's default layer: one module that runs 33 times, of which hooks cannot name the last.
LAYERS = ["_blocks.15", "_conv_head"]


def grad_cam(peer, model: nn.Module, layer: str, x: Tensor, **options) -> Tensor:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with peer(model, [model.get_submodule(layer)]) as cam:
        return torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in CLASSES], **options))


def difference(raw: Tensor, theirs: Tensor, *, any_sign: bool = False) -> float:
    """The largest distance of our raw map's heatmap from their map."""
    size = theirs.shape[-2:]
    signs = (1, -1) if any_sign else (1,)
    apart = [
        (xf.heatmap(sign * raw, size) - xf.heatmap(theirs, size)).abs().flatten(1).amax(1) for sign in signs
    ]
    return torch.stack(apart).amin(0).max().item()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("gradcam_elementwise", "GradCAMElementWise"),
        ("eigencam", "EigenCAM"),
        ("eigengradcam", "EigenGradCAM"),
        ("segeigencam", "SegEigenCAM"),
        ("kpcacam", "KPCA_CAM"),
        ("fem", "FEM"),
    ],
)
def test_pytorch_grad_cam_agrees(lite0, layer, photographs, name, peer):
    import pytorch_grad_cam

    theirs = grad_cam(getattr(pytorch_grad_cam, peer), lite0, layer, photographs)
    ours = xf.find_method(name, variant="pytorch-grad-cam")(
        lite0, layer, photographs, CLASSES, postprocess=None
    )
    # A singular vector has no sign of its own: theirs is the one that the solver happens to return.
    assert difference(ours, theirs, any_sign=name in ("eigencam", "eigengradcam", "kpcacam")) <= 1e-4


def test_pytorch_grad_cam_random_weights_agree_when_given_ours(lite0, photographs, monkeypatch):
    import numpy as np
    import pytorch_grad_cam

    monkeypatch.setattr(
        np.random, "uniform",
        lambda low, high, size: low + (high - low) * uniform(0, 0, size[1:], like=photographs).expand(size).numpy(),
    )  # fmt: skip
    theirs = grad_cam(pytorch_grad_cam.RandomCAM, lite0, "_blocks.15", photographs)
    ours = xf.randomcam(lite0, "_blocks.15", photographs, postprocess=None)
    assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("network", ["lite0", "resnet18"])
def test_torchcam_cam_agrees(lite0, photographs, network):
    import torchcam.methods
    import torchvision

    if network == "lite0":
        model, layer, fc = lite0, xf.default_layer(lite0, photographs), "_fc"
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, layer, fc = torchvision.models.resnet18(weights=None).eval(), "layer4", "fc"
    with torchcam.methods.CAM(model, layer, fc) as extractor:
        model(photographs)
        (theirs,) = extractor(CLASSES, normalized=False)
    ours = xf.cam(model, layer, photographs, CLASSES, postprocess=None)
    assert difference(ours, theirs) <= 1e-4
    assert difference(xf.cam(model, layer, photographs, [0, 1], postprocess=None), theirs) > 0.1
    if network == "lite0":
        with pytest.raises(StructureError, match=r"_blocks\.15"):
            xf.cam(model, "_blocks.15", photographs, CLASSES)


@pytest.mark.parametrize("layer", [*LAYERS, "_swish"])
def test_torchcam_smooth_gradcam_pp_agrees_when_given_our_noise(lite0, layer, photographs):
    """Its `hook_g` and `hook_a` hold what the last noisy forward left: one gradient and features with noise."""
    import torchcam.methods

    class Ours:
        draws = iter(range(3))

        def sample(self, shape: torch.Size) -> Tensor:
            return (0.3 * normal(0, next(self.draws), tuple(shape[1:]), like=photographs)).expand(shape)

    with torchcam.methods.SmoothGradCAMpp(lite0, layer, num_samples=3) as extractor:
        extractor._distrib = Ours()
        scores = lite0(photographs)
        (theirs,) = extractor(CLASSES, scores, normalized=False)
    method = xf.find_method("smoothgradcam_pp", variant="torchcam", num_samples=3)
    assert difference(method(lite0, layer, photographs, CLASSES, postprocess=None), theirs) <= 1e-4
    paper = xf.smoothgradcam_pp(lite0, layer, photographs, CLASSES, num_samples=3, postprocess=None)
    assert difference(paper, theirs) > 1e-4


REFINED = ["_blocks.4", "_blocks.10", "_blocks.15"]


def test_refinecam_agrees_with_both(lite0, photographs):
    import pytorch_grad_cam
    import torchcam.methods
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    peer = pytorch_grad_cam.RefineCAM(lite0, [lite0.get_submodule(name) for name in REFINED])
    theirs = torch.from_numpy(peer(photographs, [ClassifierOutputTarget(c) for c in CLASSES]))
    ours = xf.find_method("refinecam", variant="pytorch-grad-cam")(
        lite0, None, photographs, CLASSES, layers=REFINED
    )
    assert (ours - theirs).abs().max() <= 1e-4
    with torchcam.methods.RefineCAM(lite0, REFINED) as extractor:
        (theirs,) = extractor(CLASSES, lite0(photographs), normalized=False)
    ours = xf.find_method("refinecam", variant="torchcam")(
        lite0, None, photographs, CLASSES, layers=REFINED, postprocess=None
    )
    assert ours.shape == theirs.shape == (2, 28, 28)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_refinecam_is_the_product_of_heatmaps(lite0, photographs):
    x = photographs[:1]
    heatmaps = [xf.layercam(lite0, name, x, 281) for name in REFINED]
    product = heatmaps[0] * heatmaps[1] * heatmaps[2]
    found = xf.refinecam(lite0, None, x, 281, method=xf.layercam, layers=REFINED)
    torch.testing.assert_close(found, xf.heatmap(product, (224, 224)))
    assert found.amax() == 1
