"""Methods of methods: smoothed, projected, of several layers, scaled and sliding; left out where they do not fit."""

import functools
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf
from xcam_fn import cli
from xcam_fn.checks import StructureError
from xcam_fn.maps import minmax_resized, own_size, resize
from xcam_fn.methods.wrappers import last_layers
from xcam_fn.projections import principal_component

CLASSES = [281, 650]
LAYERS = ["_blocks.4", "_blocks.10", "_blocks.15"]


def images(batch: int = 2, size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network() -> nn.Module:
    return networks.seeded(networks.Residual()).double()


# -- what they compute ---------------------------------------------------------------------------------------


def test_smooth_is_the_mean_over_mirrored_and_brightened_inputs():
    model, x = network(), images()
    classes = [[0, 1, 2], [2, 3, 4]]
    expected = torch.zeros(2, 3, 12, 16, dtype=torch.float64)
    for scale in (0.5, 2.0):
        expected += xf.layercam(model, "conv2", x * scale, classes) / 4
        expected += xf.layercam(model, "conv2", x.flip(-1) * scale, classes).flip(-1) / 4
    found = xf.smooth("layercam", scales=(0.5, 2.0))(model, "conv2", x, classes)
    torch.testing.assert_close(found, expected)
    one = xf.smooth(xf.layercam, flips=False, scales=(1.0,))
    torch.testing.assert_close(one(model, "conv2", x), xf.layercam(model, "conv2", x))


def test_smooth_keeps_the_class_of_the_input_itself():
    model, x = networks.seeded(networks.Linearized()).double(), images(8)
    predicted = model(x).argmax(1)
    assert (model(-30 * x).argmax(1) != predicted).any()
    turned = xf.smooth("gradcam", flips=False, scales=(-30.0,))
    torch.testing.assert_close(turned(model, "conv", x), xf.gradcam(model, "conv", -30 * x, predicted))
    by_probability = turned(model, "conv", x, xf.targets.probability())
    torch.testing.assert_close(
        by_probability, xf.gradcam(model, "conv", -30 * x, xf.targets.probability(predicted))
    )


class GoesOnWhereBright(nn.Module):
    """One convolution more where the images are bright: the default layer depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.relu, self.other, self.fc = nn.ReLU(), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        y = self.other(self.second(y)) if x.mean() > 1 else y
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("wrapped", [
    xf.smooth("gradcam", flips=False, scales=(1.0, 2.0)),
    xf.smoothgrad("gradcam", num_samples=3, std=0.5),
    xf.smoothgradcam_pp.with_options(num_samples=3, std=1.5),
])  # fmt: skip
def test_changed_inputs_are_explained_at_the_layer_of_the_input_itself(wrapped):
    model = networks.seeded(GoesOnWhereBright()).double()
    x = images(1) - images(1).mean() + 0.95
    assert xf.default_layer(model, x) == "relu"
    assert xf.default_layer(model, x * 2) == "other"
    torch.testing.assert_close(wrapped(model, None, x, 1), wrapped(model, "relu", x, 1))


@pytest.mark.parametrize(
    "name", ["gradcam", "layercam", "cam", "smoothgradcam_pp", "scorecam", "iscam", "ablationcam"]
)
def test_eigen_smooth_is_the_component_of_what_is_added_up(name):
    """Each method hands the projection its weighted features: their sum is its map."""
    model, x = network(), images()
    options = {"num_samples": 2} if name in ("iscam", "smoothgradcam_pp") else {}
    method = functools.partial(xf.METHODS[name], **options, postprocess=None)
    channels = [method(model, "relu", x, [1, 3], projection=lambda w, k=k: w[:, k]) for k in range(6)]
    weighted = torch.stack(channels, 1)
    torch.testing.assert_close(weighted.sum(1), method(model, "relu", x, [1, 3]))
    found = xf.eigen_smooth(xf.METHODS[name])(model, "relu", x, [1, 3], postprocess=None, **options)
    torch.testing.assert_close(found, principal_component(weighted))
    many = xf.eigen_smooth(name)(model, "relu", x, [[1], [3]], postprocess=None, **options)
    torch.testing.assert_close(many[:, 0], found)


def test_several_layers_are_combined():
    model, x = networks.seeded(networks.OneDimensional()), torch.randn(2, 2, 31)
    maps = [xf.layercam(model, name, x, 1) for name in ("1", "3")]
    for combine, expected in (
        ("mean", (maps[0] + maps[1]) / 2), ("max", torch.maximum(*maps)), ("product", maps[0] * maps[1]),
        (lambda stacked: stacked[0] - stacked[1], maps[0] - maps[1]),
    ):  # fmt: skip
        found = xf.multi_layer("layercam", combine=combine)(model, None, x, 1)
        torch.testing.assert_close(found, xf.heatmap(expected, (31,)))
        named = xf.multi_layer("layercam", ["1", "3"], combine)(model, None, x, 1, postprocess=None)
        torch.testing.assert_close(named, expected)
    raw = xf.multi_layer("layercam", each=None)(model, None, x, [[1, 2]] * 2, postprocess=None)
    assert raw.shape == (2, 2, 27)
    alone = [xf.layercam(model, name, x, [[1, 2]] * 2, postprocess=None) for name in ("1", "3")]
    torch.testing.assert_close(raw, (alone[0] + resize(alone[1], (27,))) / 2)


def test_the_last_layers_of_the_last_resolutions(lite0, photographs):
    import torchvision

    photographs = photographs[:1, :, ::2, ::2]

    resnet = torchvision.models.resnet18(weights=None).eval()
    assert last_layers(resnet, photographs) == ["layer2", "layer3", "layer4"]
    assert last_layers(resnet, photographs, "layer3.0.conv1") == ["layer1", "layer2", "layer3.0.conv1"]
    assert last_layers(resnet, photographs, resnet.layer2, count=2) == ["layer1", "layer2"]
    assert last_layers(resnet, photographs, "layer1") == ["relu", "layer1"]
    squeezing = torchvision.models.efficientnet_b0(weights=None).eval()  # has maps of 1 × 1 in between
    shapes = xf.layers(squeezing, photographs)
    assert [shapes[name][-1] for name in last_layers(squeezing, photographs)] == [14, 7, 4]
    vgg = torchvision.models.vgg11(weights=None).eval()
    assert last_layers(vgg, photographs) == ["features.9", "features.14", "features.19"]
    shapes = xf.layers(lite0, photographs)
    assert [shapes[name][-1] for name in last_layers(lite0, photographs, "_blocks.15")] == [14, 7, 3]


# -- other libraries -----------------------------------------------------------------------------------------


def grad_cam(peer, model: nn.Module, layers: list[str], x: Tensor, **options) -> Tensor:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with peer(model, [model.get_submodule(name) for name in layers]) as cam:
        return torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in CLASSES], **options))


@pytest.mark.parametrize("name", ["gradcam", "hirescam"])
def test_augmented_maps_agree_with_pytorch_grad_cam(lite0, photographs, name):
    import pytorch_grad_cam

    peer = {"gradcam": pytorch_grad_cam.GradCAM, "hirescam": pytorch_grad_cam.HiResCAM}[name]
    theirs = grad_cam(peer, lite0, ["_blocks.15"], photographs, aug_smooth=True)
    ours = xf.smooth(name)(lite0, "_blocks.15", photographs, CLASSES)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "peer"),
    [("gradcam", "GradCAM"), ("layercam", "LayerCAM"), ("gradcam_elementwise", "GradCAMElementWise")],
)
def test_eigen_smoothed_maps_agree_with_pytorch_grad_cam(lite0, photographs, name, peer):
    """Its LayerCAM drops negative products before the projection, which changes nothing where A ≥ 0."""
    import pytorch_grad_cam

    layer = "_swish" if name == "layercam" else "_blocks.15"
    twin = Last(lite0) if name == "layercam" else lite0
    theirs = grad_cam(
        getattr(pytorch_grad_cam, peer), twin, ["last" if twin is not lite0 else layer], photographs,
        eigen_smooth=True,
    )  # fmt: skip
    raw = xf.eigen_smooth(name)(lite0, layer, photographs, CLASSES, postprocess=None)
    apart = [(xf.heatmap(s * raw, (224, 224)) - xf.heatmap(theirs, (224, 224))).abs() for s in (1, -1)]
    assert torch.stack(apart).flatten(2).amax(2).amin(0).max() <= 1e-4


class Last(nn.Module):
    """EfficientNet-Lite0 with its last activation a module of its own, for libraries that hook."""

    def __init__(self, lite0: nn.Module) -> None:
        super().__init__()
        self.split = xf.split(lite0, "_swish", torch.zeros(1, 3, 224, 224))
        self.lite0, self.last = lite0, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features, residual = self.split.trunk(x)
        return self.split.head(self.last(features), residual)


def test_several_layers_agree_with_both(lite0, photographs):
    import pytorch_grad_cam
    import torchcam.methods

    theirs = grad_cam(pytorch_grad_cam.GradCAM, lite0, LAYERS, photographs)
    scaled_first = xf.multi_layer("gradcam", LAYERS, each=lambda cam, size: minmax_resized(cam.relu(), size))
    ours = scaled_first(lite0, None, photographs, CLASSES)
    assert (ours - theirs).abs().max() <= 1e-4
    with torchcam.methods.GradCAM(lite0, LAYERS) as extractor:
        cams = extractor(CLASSES, lite0(photographs))
        theirs = extractor.fuse_cams(cams)
    fused = xf.multi_layer("gradcam", LAYERS, "max", each=own_size)
    ours = fused(lite0, None, photographs, CLASSES, postprocess=None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("pool", "drop", "theta"), [("mean", 0.0, 0.0), ("max", 0.5, 0.0), ("mean", 0.4, 0.2)]
)
def test_sess_agrees_with_pytorch_grad_cam(lite0, photographs, pool, drop, theta):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    x = photographs[:, :, ::2, 16:].contiguous()[:, :, :, ::2][..., :96]  # not square
    peer = pytorch_grad_cam.SESS(
        lite0,
        [lite0.get_submodule("_blocks.15")],
        num_scales=2,
        pool=pool,
        pre_filter_ratio=drop,
        theta=theta,
    )
    theirs = torch.from_numpy(peer(x, [ClassifierOutputTarget(c) for c in CLASSES]))
    ours = xf.sess("gradcam", num_scales=2, pool=pool, drop=drop, theta=theta)(
        lite0, "_blocks.15", x, CLASSES
    )
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours.amax() == 1


# -- as methods ----------------------------------------------------------------------------------------------


def test_wrapped_methods_are_found_by_name():
    found = xf.find_method("smooth(eigen_smooth(iscam))", num_samples=3, flips=False)
    assert (found.name, found.family) == ("smooth(eigen_smooth(iscam))", "perturbation")
    assert found.title == "IS-CAM, first component, smoothed"
    parameters = inspect.signature(found).parameters
    assert parameters["flips"].default is False
    assert {"num_samples", "chunk_size", "postprocess"} <= set(parameters)
    model, x = network(), images()
    projected = functools.partial(xf.iscam, num_samples=3, projection=principal_component)
    expected = xf.smooth(projected, flips=False)(model, "relu", x, 1)
    assert torch.equal(found(model, "relu", x, 1), expected)
    fused = xf.find_method("smooth(gradcam)+eigen_smooth(scorecam)")
    parts = {"gradient": xf.smooth("gradcam"), "region": xf.eigen_smooth("scorecam")}
    assert torch.equal(fused(model, "relu", x, 1), xf.fusioncam(model, "relu", x, 1, **parts))
    together = xf.explain_all(model, "relu", x, 1, ["iscam", "smooth(iscam)"], num_samples=2)
    alone = xf.smooth("iscam")(model, "relu", x, 1, num_samples=2)
    torch.testing.assert_close(together["smooth(iscam)"], alone)
    variant = xf.find_method("smooth(gradcam_pp)", variant="torchcam")(model, "relu", x, 1)
    expected = xf.smooth(xf.find_method("gradcam_pp", variant="torchcam"))(model, "relu", x, 1)
    assert torch.equal(variant, expected)


def test_wrapped_methods_can_be_sent_to_other_processes():
    code = """
import pickle, xcam_fn as xf
for name in ("smooth(gradcam)", "eigen_smooth(scorecam)", "multi_layer(smooth(layercam))", "sess(gradcam)", "smoothgrad(rise)"):
    method = xf.find_method(name)
    again = pickle.loads(pickle.dumps(method))
    assert (again.name, again.title, again.__signature__ if "smooth(g" in name else 0) == (
        name, method.title, method.__signature__ if "smooth(g" in name else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # as users import it, without the tests' hook
    assert pickle.loads(pickle.dumps(StructureError("no")))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: xf.find_method("smoth(gradcam)"), r"'smoth\(gradcam\)' is not known; expected one of smooth\("),
        (lambda: xf.find_method("smooth(gradcm)"), "'gradcm' is not known; did you mean 'gradcam'"),
        (lambda: xf.find_method("smooth(gradcam"), r"'smooth\(gradcam' is not known"),
        (lambda: xf.eigen_smooth("rise"), "eigen_smooth: 'rise' is not a weighted sum of channels"),
        (lambda: xf.eigen_smooth(xf.eigencam), "eigen_smooth: 'eigencam'"),
        (lambda: xf.smooth("gradcam", scales=()), "scales is empty"),
        (lambda: xf.smoothgrad("gradcam", statistic="median"), "statistic='median'; expected one of 'mean', 'square', 'variance'"),
        (lambda: xf.smoothgrad("gradcam", std=-1.0), "std=-1.0 is out of range"),
        (lambda: xf.multi_layer("gradcam", []), "layers is empty"),
        (lambda: xf.multi_layer("gradcam", combine="sum"), "combine='sum'; expected one of 'mean'"),
        (lambda: xf.sess("gradcam", drop=1.5), "drop=1.5 is out of range"),
        (lambda: xf.sess("gradcam", pool="sum"), "pool='sum'"),
        (lambda: xf.sess("gradcam", window=0), "window=0"),
        (lambda: xf.sess("gradcam", window=1000)(network(), None, images()), "window=1000 exceeds the input's shorter side; expected at most 12"),
        (lambda: xf.find_method("sess(rise)", growth=float("inf")), "growth=inf is out of range"),
        (lambda: xf.smooth("gradcam", scales=(1.0, float("nan"))), "scales=nan is out of range"),
        (lambda: last_layers(network(), images(), "fc"), "layer 'fc' has no spatial maps"),
    ],
)  # fmt: skip
def test_bad_calls(unchecked, call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: xf.smooth("gradcam", flips=torch.ones(2)), r"flips must be True or False, got shape \(2,\)"),
        (lambda: xf.smooth("gradcam", scales="11"), "scales must be a list"),
        (lambda: xf.multi_layer("gradcam", combine=3), "combine must be one of 'mean', 'max', 'product' or"),
        (lambda: xf.multi_layer("gradcam")(network(), None, images(), create_graph=None), "create_graph must be True or False, got None"),
        (lambda: xf.find_method(3), "name must be a name"),
    ],
)  # fmt: skip
def test_bad_kinds(unchecked, call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_a_single_layer_is_not_several(unchecked):
    with pytest.raises(TypeError, match="layers must be a list or None"):
        xf.multi_layer("gradcam", "layer4")
    with pytest.raises(TypeError, match="layers must be a list or None"):
        xf.refinecam(network(), None, images(), layers="layer4")


# -- what does not fit a network is left out where all are asked for -----------------------------------------


def test_methods_that_the_network_has_no_structure_for_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 6 * 8, 5))
    model, x = networks.seeded(model), images(1, (6, 8)).float()
    quick = {"num_samples": 1, "num_masks": 4, "num_groups": 2, "steps": 2}
    found = xf.explain_all(model, None, x, 1, **quick)
    assert list(found) == [
        name for name in xf.METHODS if name not in ("cam", "cameras", "refinecam", *networks.OF_ATTENTION)
    ]
    with pytest.raises(StructureError, match="cam needs global average pooling and one linear layer"):
        xf.explain_all(model, None, x, 1, ["gradcam", "cam"])
    with pytest.raises(StructureError, match="Sequential has no earlier layer with a higher resolution"):
        xf.refinecam(model, None, x, 1)


def test_the_command_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    few = {name: xf.METHODS[name] for name in ("gradcam", "cam")}
    monkeypatch.setattr("xcam_fn.METHODS", few)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(photo)
    common = [str(photo), "--model", "alexnet", "--weights", "random", "--output", str(tmp_path)]
    assert cli.main(["explain", *common, "--methods", "all"]) == 0
    assert cli.main(["compare", *common]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("xcam:")]
    assert len(lines) == 2
    assert all(line.startswith("xcam: left out: cam: layer ") for line in lines)
    assert "Grad-CAM" in out
    assert cli.main(["explain", *common, "--methods", "gradcam", "cam"]) == 2
    assert "xcam: error: layer " in capsys.readouterr().err
    assert cli.main(["explain", *common, "--methods", "smooth(gradcam)", "--save-maps"]) == 0
    (saved,) = tmp_path.glob("*_smooth(gradcam).npy")
    assert np.load(saved).max() > 0
