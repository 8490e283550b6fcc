"""TorchCAM's names over our functions, beside TorchCAM itself."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
import torchcam.methods
import torchcam.metrics
import torchcam.utils
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf
from xcam_fn.compat.torchcam import explain, methods, metrics, remember, utils
from xcam_fn.compat.torchcam.methods._utils import locate_candidate_layer
from xcam_fn.perturb import normal

CLASSES = [1, 3]
GRADIENT = ["GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "SmoothGradCAMpp", "FinerCAM", "RefineCAM"]
MASKING = ["ScoreCAM", "ISCAM", "SSCAM"]
OPTIONS: dict[str, dict[str, Any]] = {
    "SmoothGradCAMpp": {"num_samples": 2},
    "ISCAM": {"num_samples": 2},
    "SSCAM": {"num_samples": 2},
}


class Two(nn.Module):
    """Two convolutions, and nothing that changes what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3, stride=2)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))


class Noise:
    """Our noise in the place of a distribution of TorchCAM's."""

    def __init__(self, extractor: Any, channels: bool) -> None:
        self.extractor, self.channels, self.drawn = extractor, channels, -1

    def sample(self, size: torch.Size) -> Tensor:
        self.drawn += 1  # and from the beginning for the next layer
        j, shape = self.drawn % self.extractor.num_samples, size[1:] if self.channels else size[2:]
        return (self.extractor.std * normal(0, j, tuple(shape), like=torch.zeros(1))).expand(size)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor]:
    return networks.seeded(Two()), torch.randn(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def both(name, model, layer, x, **options):
    """The maps of TorchCAM and of ours, and both fused."""
    given = OPTIONS.get(name, {}) | options
    twin = copy.deepcopy(model)  # theirs hooks it
    with getattr(torchcam.methods, name)(twin, layer, **given) as extractor:
        if hasattr(extractor, "_distrib"):
            extractor._distrib = Noise(extractor, channels=name == "SmoothGradCAMpp")
        theirs = extractor(CLASSES, twin(x))
        fused = extractor.fuse_cams(theirs)
    model = remember(model)
    with getattr(methods, name)(model, layer, **given) as extractor:
        ours = extractor(CLASSES, model(x))
        return [*theirs, fused], [*ours, extractor.fuse_cams(ours)]


def assert_alike(theirs, ours):
    assert [cam.shape for cam in ours] == [cam.shape for cam in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert other.amax() > 0.1
        assert (mine - other).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [*GRADIENT, *MASKING])
def test_small_networks_agree(small, name):
    model, x = small
    assert_alike(*both(name, model, ["first", "second"], x))


@pytest.mark.parametrize("name", [*GRADIENT, *MASKING])
def test_lite0_agrees(lite0, photographs, name):
    x = photographs if name in GRADIENT else F.interpolate(photographs, size=64, mode="bilinear")
    layer = ["_blocks.10", "_blocks.15"] if name == "RefineCAM" else "_blocks.15"
    few = {"num_samples": 1} if name in ("ISCAM", "SSCAM") else {}
    assert_alike(*both(name, lite0, layer, x, **few))


@pytest.mark.parametrize("name", ["CAM", *GRADIENT, *MASKING])
def test_resnet18_agrees(resnet18, photographs, name):
    layer: Any = ["layer3", "layer4"]
    if name == "CAM":
        layer = None
    elif name in MASKING:
        layer, photographs = "layer1", F.interpolate(photographs, size=32, mode="bilinear")
    assert_alike(*both(name, resnet18, layer, photographs))


def test_legrad_agrees():
    model = networks.seeded(torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    assert_alike(*both("LeGrad", model, blocks, x))
    assert_alike(*both("LeGrad", model, blocks[:1], x, grid_shape=(4, 4)))


def test_the_default_layer_is_theirs(resnet18, lite0):
    from torchcam.methods._utils import locate_candidate_layer as theirs

    for model in (resnet18, lite0, networks.seeded(networks.Linearized())):
        assert locate_candidate_layer(model) == theirs(copy.deepcopy(model))
    assert locate_candidate_layer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 2)), (3, 2, 2)) is None


@pytest.mark.parametrize("name", ["ClassificationMetric", "DeletionInsertionMetric"])
@pytest.mark.parametrize("logits_fn", [None, partial(torch.softmax, dim=-1)])
def test_metrics_agree(small, name, logits_fn):
    model, x = small
    targets = [itemgetter(1), itemgetter(2)]
    summaries = []
    for library, extractors in ((torchcam.metrics, torchcam.methods), (metrics, methods)):
        extractor = extractors.LayerCAM(copy.deepcopy(model), ["first", "second"])
        metric = getattr(library, name)(extractor, logits_fn)
        metric.update(x)
        metric.update(x, [1, 2])
        metric.update(x, targets=targets)
        summaries.append(metric.summary())
        assert metric.total == 6
    assert summaries[0] == pytest.approx(summaries[1], abs=1e-6)


def test_overlay_agrees():
    rng = np.random.default_rng(0)
    mask = Image.fromarray(rng.random((7, 7), dtype=np.float32))
    for shape in ((20, 30, 3), (20, 30)):
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        theirs = torchcam.utils.overlay_mask(picture, mask, colormap="viridis", alpha=0.4)
        assert np.array_equal(utils.overlay_mask(picture, mask, colormap="viridis", alpha=0.4), theirs)
    for wrong, kind in (((np.zeros((3, 3)), mask), TypeError), ((picture, picture, "jet", 1.0), ValueError)):
        with pytest.raises(kind):
            utils.overlay_mask(*wrong)


# -- how the forward is told of ------------------------------------------------------------------------------


def test_the_input_is_given_or_remembered(small):
    model, x = small
    output = model(x)
    expected = methods.LayerCAM(model, model.second)(CLASSES, output, input_tensor=x)[0]
    wrapped = remember(model)
    extractor = methods.LayerCAM(wrapped, wrapped.second)
    assert torch.equal(extractor(CLASSES, wrapped(x), retain_graph=True)[0], expected)
    ours = xf.layercam(model, "second", x, CLASSES, postprocess=None)
    assert torch.equal(extractor(CLASSES, wrapped(x), normalized=False)[0], ours.relu())
    with torch.no_grad():
        scores = wrapped(x)
    assert torch.equal(extractor(CLASSES, scores)[0], expected)
    functions = [itemgetter(i) for i in CLASSES]
    torch.testing.assert_close(extractor(targets=functions, scores=scores)[0], expected)
    with torch.inference_mode():
        wrapped(x)
    assert methods.ScoreCAM(wrapped, "second")(1)[0].shape == expected.shape


def test_scores_that_are_computed_of_the_output_are_explained(small):
    model, x = small
    twin, wrapped = copy.deepcopy(model), remember(model)
    with torchcam.methods.GradCAMpp(twin, "second") as extractor:
        (theirs,) = extractor(CLASSES, twin(x).softmax(1), normalized=False)
    ours = methods.GradCAMpp(wrapped, "second")(CLASSES, wrapped(x).softmax(1), normalized=False)[0]
    torch.testing.assert_close(ours, theirs)
    output = model(x)
    given = methods.GradCAMpp(model, "second")
    seen = given(CLASSES, output.softmax(1), normalized=False, input_tensor=(x, output))
    torch.testing.assert_close(seen[0], theirs)
    for scores, how in ((output.softmax(1), {"input_tensor": x}), (model(x), {"input_tensor": (x, output)})):
        with pytest.raises(ValueError, match=r"scores is not the model's output .*remember\(model\)"):
            given(CLASSES, scores, **how)


def test_a_model_that_remembers_is_the_model(small):
    model, x = small
    wrapped = remember(model)
    again, other = copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))
    output = wrapped(x)
    for one in (again, other, copy.deepcopy(wrapped)):
        assert torch.equal(one(x), output)
    assert wrapped.fc is model.fc
    assert not hasattr(wrapped, "nothing")
    extractor = methods.GradCAM(wrapped, "second")
    images = torch.randn(6, 1, 3, 12, 15, generator=torch.Generator().manual_seed(1))
    expected = [extractor(1, wrapped(one))[0] for one in images]
    with ThreadPoolExecutor(3) as pool:  # each thread has its own last forward
        found = list(pool.map(lambda one: extractor(1, wrapped(one))[0], images))
    assert all(map(torch.equal, found, expected))


def test_nothing_is_left_on_the_model(small):
    model, x = copy.deepcopy(small[0]), small[1]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [*GRADIENT, *MASKING]:
        layer = ["first", "second"]
        with getattr(methods, name)(model, layer, **OPTIONS.get(name, {})) as extractor:
            extractor.disable_hooks()
            extractor.enable_hooks()
            extractor.reset_hooks()
            extractor.remove_hooks()
            assert extractor.hook_handles == []
            extractor(CLASSES, model(x), input_tensor=x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# -- names and errors ----------------------------------------------------------------------------------------


def test_every_class_is_there_with_its_arguments():
    import inspect

    for name in torchcam.methods.activation.__all__ + torchcam.methods.gradient.__all__:
        theirs = inspect.signature(getattr(torchcam.methods, name)).parameters
        ours = inspect.signature(getattr(methods, name)).parameters
        named = [p for p in theirs.values() if p.kind is not p.VAR_KEYWORD]
        assert [p.name for p in named] == [n for n in ours if n in theirs and ours[n].kind != 4], name
        plain = [p.name for p in named if p.name != "base_method"]
        assert [theirs[n].default for n in plain] == [ours[n].default for n in plain], name


def test_what_is_printed_is_theirs(small):
    model, _ = small
    for name in [*GRADIENT, "ScoreCAM", "SSCAM"]:
        given = (["first", "second"],)
        theirs = getattr(torchcam.methods, name)(copy.deepcopy(model), *given)
        assert repr(getattr(methods, name)(model, *given)) == repr(theirs)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m, x: methods.GradCAM(m, "second")(1, m(x)), ValueError, r"input_tensor=x, .*remember\(model\)"),
        (lambda m, x: methods.GradCAM(m, "third"), ValueError, "layer 'third' is not in Two"),
        (lambda m, x: methods.GradCAM(m, 3), TypeError, "must be a name"),
        (lambda m, x: methods.GradCAM(m, None, (3, 12, 15), reshape_transform=len), ValueError, "target_layer=None"),
        (lambda m, x: methods.GradCAM(m, "first", reshape_transform=3), TypeError, "reshape_transform must be a function, got int"),
        (lambda m, x: methods.GradCAM(m, "first", samples=3), TypeError, "samples"),
        (lambda m, x: methods.GradCAM(m, "first")(1, input_tensor=x), ValueError, "scores is required"),
        (lambda m, x: methods.GradCAM(m, "first")(9, m(x), input_tensor=x), ValueError, "class_idx=9 is out of range"),
        (lambda m, x: methods.GradCAM(m, "first")([1], m(x), input_tensor=x), ValueError, "holds 1 classes"),
        (lambda m, x: methods.GradCAM(m, "first")(input_tensor=x), ValueError, "exactly one of class_idx and targets"),
        (lambda m, x: methods.GradCAM(m, "first")(1, m(x), input_tensor=x, gamma=1), TypeError, "no option 'gamma'"),
        (lambda m, x: methods.CAM(m, "first")(targets=len, input_tensor=x), ValueError, "CAM does not support targets"),
        (lambda m, x: methods.CAM(m, ["first", "second"]), ValueError, "CAM expects one layer"),
        (lambda m, x: methods.CAM(m, "second", fc_layer="head"), ValueError, "layer 'head' is not in Two"),
        (lambda m, x: methods.CAM(m, "first")(1, input_tensor=x), ValueError, "cam needs global average pooling"),
        (lambda m, x: methods.RefineCAM(m, "first"), ValueError, "at least two target layers"),
        (lambda m, x: methods.RefineCAM(m, ["first", "second"], base_method=nn.ReLU), TypeError, "CAM extractor class"),
        (lambda m, x: methods.FinerCAM(m, "first", base_method=methods.ScoreCAM), TypeError, "GradCAM, GradCAMpp, or"),
        (lambda m, x: methods.FinerCAM(m, "first", gamma=-1.0), ValueError, "gamma=-1.0; expected a real number"),
        (lambda m, x: methods.FinerCAM(m, "first", num_references=0.5), TypeError, "expected a positive integer"),
        (lambda m, x: methods.FinerCAM(m, "first")(1, input_tensor=x), ValueError, "scores is required"),
        (lambda m, x: methods.FinerCAM(m, "first")(1, m(x), targets=len), ValueError, "does not support targets"),
        (lambda m, x: methods.LeGrad(m, []), ValueError, "expected one explicit target block or more"),
        (lambda m, x: methods.LeGrad(m, "first"), ValueError, "score_projection=None works only with torchvision's"),
        (lambda m, x: methods.LeGrad(m, "first", score_projection=len, grid_shape=3), TypeError, "grid_shape=3; expected"),
        (lambda m, x: methods.LeGrad(m, "first", score_projection=len)(1, input_tensor=x), ValueError, "not a block with attention"),
        (lambda m, x: methods.GradCAM.fuse_cams(x), TypeError, "must be a list of tensors"),
        (lambda m, x: methods.GradCAM.fuse_cams([]), ValueError, "cams is an empty list"),
        (lambda m, x: metrics.ClassificationMetric(methods.CAM(m, "second")).update(x, 1, targets=len), ValueError, "not both"),
        (lambda m, x: metrics.ClassificationMetric(methods.CAM(m, "second")).summary(), AssertionError, "update the metric"),
        (lambda m, x: metrics.DeletionInsertionMetric(None, steps=0), ValueError, "steps=0"),
        (lambda m, x: metrics.DeletionInsertionMetric(None, baseline=0), TypeError, "baseline"),
        (explain.explain, ValueError, "no counterpart"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(small, unchecked, call, kind, words):
    with pytest.raises(kind, match=words):
        call(*small)


def test_a_grid_that_does_not_fit_is_said():
    model = networks.seeded(torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10))
    extractor = methods.LeGrad(model, model.encoder.layers[0], prefix_tokens=2)
    with pytest.raises(ValueError, match=r"prefix_tokens=2 do not fit 17 tokens: 15 patches"):
        extractor(1, input_tensor=torch.randn(1, 3, 32, 32))


def test_maps_that_hold_nan_are_counted(small):
    model, x = small

    class Extractor:
        def __init__(self) -> None:
            self.model = model

        def __call__(self, cls: Any, scores: Tensor) -> list[Tensor]:
            return [torch.tensor([[[0.0, 1.0]], [[0.0, torch.nan]]])]

        def fuse_cams(self, cams: list[Tensor]) -> Tensor:
            return cams[0]

    metric = metrics.DeletionInsertionMetric(Extractor(), steps=3, baseline=x.mean((2, 3), keepdim=True))
    metric.update(x)
    assert (metric.total, metric.nan_count) == (1, 1)
