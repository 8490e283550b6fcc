"""pytorch-grad-cam's names made of ours, against the library itself."""

import contextlib
import copy
import importlib
import inspect
import io
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchvision
from pytorch_grad_cam.metrics import arcc, cam_mult_image, road
from pytorch_grad_cam.utils import find_layers, image, model_targets, reshape_transforms, svd_on_activations
from torch import Tensor, nn

import networks
import xcam_fn as xf
from xcam_fn.compat import pytorch_grad_cam as compat
from xcam_fn.testing import state

CLASSES = [4, 1]
# Methods of a principal component: its sign is what the solver returns there, and what the features say here.
ANY_SIGN = {"EigenCAM", "EigenGradCAM", "KPCA_CAM"}
CAMS = [
    "GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "ShapleyCAM",
    "EigenGradCAM", "SegEigenCAM", "EigenCAM", "KPCA_CAM", "FEM", "FullGrad", "ScoreCAM", "AblationCAM", "FinerCAM",
    "RefineCAM", "SESS",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"SESS": {"num_scales": 2}, "FEM": {"k": 1.0}}


@pytest.fixture(scope="module")
def cases(lite0, photographs) -> dict[str, tuple[nn.Module, list[nn.Module], Tensor]]:
    """Networks, their layers, and two pictures of their size."""
    small = networks.seeded(networks.Unshared())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        resnet = torchvision.models.resnet18(weights=None).eval()
    pixels = nn.functional.interpolate(photographs, size=(96, 96), mode="area")
    return {
        "small": (small, [small.last], torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))),
        "resnet18": (resnet, [resnet.layer4], pixels),
        "lite0": (lite0, [lite0.get_submodule("_blocks.15")], pixels),
    }


def targets_of(library: Any, kind: str = "ClassifierOutputTarget") -> list[Any]:
    return [getattr(library.utils.model_targets, kind)(c) for c in CLASSES]


def theirs_of(
    name: str, model: nn.Module, layers: list[nn.Module], x: Tensor, *args: Any, **how: Any
) -> np.ndarray:
    """The peer's maps, of a copy of the model, without what it prints."""
    twin = copy.deepcopy(nn.ModuleList([model, *layers]))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        cam = getattr(pytorch_grad_cam, name)(twin[0], list(twin[1:]), **OPTIONS.get(name, {}))
        return cam(x, *args, **how)


def largest(name: str, case: Any, *, signs: bool = False, **how: Any) -> float:
    """The largest difference of our maps and theirs; with `signs` of the nearer one of a map's two signs."""
    model, layers, x = case
    theirs = theirs_of(name, model, layers, x, targets_of(pytorch_grad_cam), **how)
    cam = getattr(compat, name)(model, layers, **OPTIONS.get(name, {}))
    ours = cam(x, targets_of(compat), **how)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (np.float32, (len(x), *x.shape[2:]))
    if not signs:
        return np.abs(ours - theirs).max()
    raw = cam.method(**how).with_options(postprocess=None)(model, cam.layers[0], x, CLASSES)
    either = [np.abs(xf.heatmap(sign * raw, x.shape[2:]).numpy() - theirs).max((1, 2)) for sign in (1, -1)]
    return np.minimum(*either).max()


# Its AblationCAM puts −1e7, −2e7 … in the place of features that may be negative, by their place in its batch.
PAIRS = [(name, network) for name in CAMS for network in ("small", "resnet18", "lite0")]
PAIRS.remove(("AblationCAM", "lite0"))


@pytest.mark.parametrize(("name", "network"), PAIRS)
def test_classes_agree(cases, name, network):
    model, layers, x = cases[network]
    x = x[..., :64, :64] if network == "lite0" and name != "SESS" else x
    if name in ("ScoreCAM", "AblationCAM") and network == "resnet18":
        layers, x = [model.layer2], x[..., :48, :48]  # a forward for each of its channels is enough
    assert largest(name, (model, layers, x), signs=name in ANY_SIGN) <= 1e-4


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "XGradCAM", "FEM", "FullGrad", "SegEigenCAM"])
def test_augmented_maps_agree(cases, name):
    assert largest(name, cases["small"], aug_smooth=True) <= 1e-4


@pytest.mark.parametrize(
    "name", ["GradCAM", "HiResCAM", "LayerCAM", "ShapleyCAM", "SegEigenCAM", "FEM", "FinerCAM"]
)
def test_eigen_smoothed_maps_agree(cases, name):
    assert largest(name, cases["resnet18"], signs=True, eigen_smooth=True) <= 1e-4
    assert largest("ScoreCAM", cases["small"], signs=True, eigen_smooth=True) <= 1e-4


@pytest.mark.parametrize("name", ["GradCAM", "RefineCAM", "SESS", "FEM"])
def test_several_layers_agree(cases, name):
    model, layers, x = cases["resnet18"]
    assert largest(name, (model, [model.layer3[-1], *layers], x)) <= 1e-4
    model, layers, x = cases["small"]
    assert largest("ScoreCAM", (model, [model.conv2, *layers], x)) <= 1e-4


@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM", "FinerCAM", "SESS"])
def test_the_predicted_class_agrees(cases, name):
    model, layers, x = cases["small"]
    ours = getattr(compat, name)(model, layers, **OPTIONS.get(name, {}))(x, None)
    assert np.abs(ours - theirs_of(name, model, layers, x, None)).max() <= 1e-4


@pytest.mark.parametrize(
    "kind", ["ClassifierOutputSoftmaxTarget", "ClassifierOutputReST", "a callable", "FinerWeightedTarget"]
)
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM", "AblationCAM"])
def test_targets_agree(cases, kind, name):
    model, layers, x = cases["small"]
    for_both = [
        [lambda y: y[0] - y[2], lambda y: y.max()]
        if kind == "a callable"
        else [library.utils.model_targets.FinerWeightedTarget(c, [2, 3], 0.5) for c in CLASSES]
        if kind == "FinerWeightedTarget"
        else targets_of(library, kind)
        for library in (compat, pytorch_grad_cam)
    ]
    ours = getattr(compat, name)(model, layers)(x, for_both[0])
    assert np.abs(ours - theirs_of(name, model, layers, x, for_both[1])).max() <= 1e-4


def test_all_targets_score_alike():
    y, maps = torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.rand(5, 4, 6)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 9.0, 9.0]])
    detected = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
    none = {name: value[:0] for name, value in detected.items()}
    made = [
        ("ClassifierOutputTarget", (2,), y), ("ClassifierOutputTarget", (2,), y.expand(3, 5)),
        ("ClassifierOutputSoftmaxTarget", (2,), y), ("ClassifierOutputReST", (2,), y),
        ("ClassifierOutputReST", (2,), y.expand(3, 5)), ("BinaryClassifierOutputTarget", (0,), y[:1]),
        ("BinaryClassifierOutputTarget", (1,), y[:1]), ("SoftmaxOutputTarget", (), y),
        ("RawScoresOutputTarget", (), y), ("SemanticSegmentationTarget", (3, np.eye(4, 6)), maps),
        ("FinerWeightedTarget", (1, [0, 2], 0.7), y), ("FasterRCNNBoxScoreTarget", ([1, 1], boxes.numpy()), detected),
        ("FasterRCNNBoxScoreTarget", ([1], boxes[:1].numpy(), 0.2), none),
    ]  # fmt: skip
    for name, given, output in made:
        ours = getattr(compat.utils.model_targets, name)(*given)(output)
        torch.testing.assert_close(ours, getattr(model_targets, name)(*given)(output), msg=name)


def test_finer_cams_options_agree(cases):
    model, layers, x = cases["small"]
    for how in ({"alpha": 0.4}, {"comparison_categories": [2, 4, 9]}, {"target_idx": 2}):
        ours = compat.FinerCAM(model, layers, base_method=compat.LayerCAM)(x, **how)
        theirs = pytorch_grad_cam.FinerCAM(model, layers, base_method=pytorch_grad_cam.LayerCAM)(x, **how)
        assert np.abs(ours - theirs).max() <= 1e-4


def test_options_of_sess_agree(cases):
    model, layers, x = cases["small"]
    how: dict[str, Any] = {"window_size": 12, "step_size": 6, "pool": "max", "smooth": False, "num_scales": 3}
    how |= {"use_softmax_scores": False, "pre_filter_ratio": 0.3}
    ours = compat.SESS(model, layers, **how)(x, targets_of(compat, "ClassifierOutputSoftmaxTarget"))
    theirs = pytorch_grad_cam.SESS(model, layers, **how)(
        x, [lambda y, c=c: y.softmax(-1)[..., c] for c in CLASSES]
    )
    assert np.abs(ours - theirs).max() <= 1e-4


def test_tokens_are_arranged(lite0):
    vit = networks.seeded(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=6))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arranged = lambda tokens: reshape_transforms.vit_reshape_transform(tokens, 4, 4)  # noqa: E731
    given: Any = ([vit.encoder.layers[-1].ln_1], arranged)
    theirs = pytorch_grad_cam.GradCAM(vit, *given)(x, targets_of(pytorch_grad_cam))
    for place in (arranged, None):
        ours = compat.GradCAM(vit, given[0], place)(x, targets_of(compat))
        assert np.abs(ours - theirs).max() <= 1e-4
    tokens = torch.rand(2, 17, 5)
    assert torch.equal(
        compat.utils.reshape_transforms.vit_reshape_transform(tokens, 2, 8),
        arranged(tokens).reshape(2, 5, 2, 8),
    )
    swin = compat.utils.reshape_transforms.swinT_reshape_transform(tokens[:, 1:], 2, 8)
    assert torch.equal(swin, reshape_transforms.swinT_reshape_transform(tokens[:, 1:], 2, 8))


def test_volumes_agree():
    model = networks.seeded(networks.ThreeDimensional())
    x = torch.randn(1, 1, 6, 8, 10, generator=torch.Generator().manual_seed(0))
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv3d))
    theirs = pytorch_grad_cam.GradCAM(model, [layer])(x, targets_of(pytorch_grad_cam)[1:])
    assert np.abs(compat.GradCAM(model, [layer])(x, targets_of(compat)[1:]) - theirs).max() <= 1e-4


def test_guided_backprop_agrees(cases):
    model, _, x = cases["small"]
    twin = copy.deepcopy(model)
    for cls in (None, 3):
        theirs = pytorch_grad_cam.GuidedBackpropReLUModel(twin)(x[:1].clone(), cls)
        ours = compat.GuidedBackpropReLUModel(model)(x[:1], cls)
        assert ours.shape == theirs.shape == (12, 16, 3)
        assert np.abs(ours - theirs).max() <= 1e-5


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")
def test_concepts_agree(cases):
    model, (layer,), x = cases["resnet18"]
    head = lambda concepts: model.fc(concepts.float())  # noqa: E731
    theirs: Any = pytorch_grad_cam.DeepFeatureFactorization(model, layer, None, head)(x, 4)
    ours: Any = compat.DeepFeatureFactorization(model, layer, computation_on_concepts=head)(x, 4)
    assert np.abs(ours[0] - theirs[0]).max() <= 1e-4 * np.abs(theirs[0]).max()
    assert all(np.abs(o - t).max() <= 1e-4 for o, t in zip(ours[1], theirs[1], strict=True))
    assert np.abs(ours[2] - theirs[2]).max() <= 1e-3
    picture, colors = np.random.default_rng(0).random((*x.shape[2:], 3)), np.eye(4, 3)
    shown = compat.utils.image.show_factorization_on_image(picture, ours[1][0], colors)
    expected = image.show_factorization_on_image(picture, ours[1][0].copy(), colors)
    assert np.abs(shown.astype(int) - expected).max() <= 1
    assert compat.image.show_factorization_on_image(picture, ours[1][0]).shape == picture.shape


def test_pictures_are_as_theirs():
    random, ours = np.random.default_rng(0), compat.utils.image
    picture, cam = random.random((20, 30, 3), np.float32), random.random((20, 30), np.float32)
    for how in ({}, {"use_rgb": True, "image_weight": 0.2}, {"colormap": 4}):
        assert np.array_equal(
            ours.show_cam_on_image(picture, cam, **how), image.show_cam_on_image(picture, cam, **how)
        )
    assert np.array_equal(ours.deprocess_image(picture), image.deprocess_image(picture))
    assert torch.equal(ours.preprocess_image(picture), image.preprocess_image(picture))
    assert (
        np.abs(ours.scale_cam_image(cam[None], (12, 55)) - image.scale_cam_image(cam[None], (12, 55))).max()
        <= 1e-5
    )
    assert np.array_equal(ours.scale_cam_image(cam[None]), image.scale_cam_image(cam[None]))
    maps = random.random((2, 3, 4, 5), np.float32)
    for values, size in ((maps, (9, 7)), (maps[:, :1], (3, 3))):
        across = [one.scale_accross_batch_and_channels(values, size) for one in (ours, image)]
        assert np.abs(across[0] - across[1]).max() <= 1e-5
    with pytest.raises(ValueError, match="img reaches"):
        ours.show_cam_on_image(picture * 255, cam)
    with pytest.raises(ValueError, match="concept_labels is not supported"):
        ours.show_factorization_on_image(picture, cam[None], concept_labels=["one"])


def test_projections_and_searches_are_as_theirs(cases):
    A = np.random.default_rng(0).random((2, 6, 4, 5), np.float32)
    A[0, 0, 0, 0] = np.nan
    ours = importlib.import_module("xcam_fn.compat.pytorch_grad_cam.utils.svd_on_activations")
    for name in ("get_2d_projection", "get_2d_projection_kernel", "get_2d_projection_with_sign_correction"):
        found, expected = getattr(ours, name)(A), getattr(svd_on_activations, name)(A)
        assert np.minimum(*(np.abs(s * found - expected).max((1, 2)) for s in (1, -1))).max() <= 1e-5
    model = cases["resnet18"][0]
    finder = importlib.import_module("xcam_fn.compat.pytorch_grad_cam.utils.find_layers")
    types = [nn.Conv2d, nn.Linear]
    assert finder.find_layer_types_recursive(model, types) == find_layers.find_layer_types_recursive(
        model, types
    )


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # theirs hands tensors to NumPy
def test_metrics_agree(cases, monkeypatch):
    """Their noise is drawn anew each time; ours is one, and is given to them."""
    model, layers, x = cases["small"]
    cams = compat.GradCAM(model, layers)(x)
    pairs = [
        (cam_mult_image, compat.metrics.cam_mult_image, name)
        for name in ("CamMultImageConfidenceChange", "DropInConfidence", "IncreaseInConfidence")
    ]
    pairs += [
        (road, compat.metrics.road, f"ROAD{name}")
        for name in ("MostRelevantFirst", "LeastRelevantFirst", "MostRelevantFirstAverage", "Combined")
    ]
    given: Any = (x, cams)
    monkeypatch.setattr(road.torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(compat.metrics, "normal", lambda *_, like: torch.zeros_like(like))
    for theirs, ours, name in pairs:
        expected = getattr(theirs, name)()(*given, targets_of(pytorch_grad_cam), model)
        found = getattr(ours, name)()(*given, targets_of(compat), model)
        assert np.abs(found - expected).max() <= 1e-4, name
    both = [
        library(percentile="auto")(
            *given, targets_of(compat), model, return_visualization=True, return_diff=False
        )
        for library in (compat.metrics.ROADMostRelevantFirst, road.ROADMostRelevantFirst)
    ]
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-4)
    theirs = arcc.ARCC(pytorch_grad_cam.GradCAM(model, layers))(*given, targets_of(pytorch_grad_cam), model)
    ours = compat.metrics.ARCC(compat.GradCAM(model, layers))(*given, targets_of(compat), model)
    assert np.abs(ours - theirs).max() <= 1e-4


# -- what an object is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CAMS, "RandomCAM"])
def test_objects_leave_the_model_as_it_was(cases, name):
    model, layers, x = cases["small"]
    before = state(model)
    with getattr(compat, name)(model=model, target_layers=layers, **OPTIONS.get(name, {})) as cam:
        assert np.array_equal(cam(input_tensor=x, targets=None), cam(x))
    assert state(model) == before


def test_a_model_in_training_mode_is_explained_by_a_copy(cases):
    _, _, x = cases["small"]
    model = networks.seeded(networks.Unshared()).train()
    before = state(model)
    found = compat.GradCAM(model, [model.last])(x, targets_of(compat))
    guided = compat.GuidedBackpropReLUModel(model)(x, 1)
    drop = compat.metrics.DropInConfidence()(x, found, targets_of(compat), model)
    assert state(model) == before
    assert model.training
    model.eval()
    assert np.array_equal(found, compat.GradCAM(model, [model.last])(x, targets_of(compat)))
    assert np.array_equal(guided, compat.GuidedBackpropReLUModel(model)(x, 1))
    assert np.array_equal(drop, compat.metrics.DropInConfidence()(x, found, targets_of(compat), model))


def test_outputs_are_those_of_the_last_call(cases):
    model, layers, x = cases["small"]
    cam = compat.LayerCAM(model, layers)
    cam(x)
    assert torch.equal(cam.outputs, model(x).detach())


@pytest.mark.parametrize("name", [*CAMS, "RandomCAM", "GuidedBackpropReLUModel", "DeepFeatureFactorization"])
def test_arguments_are_theirs(name):
    theirs, ours = (inspect.signature(getattr(one, name)).parameters for one in (pytorch_grad_cam, compat))
    assert list(ours) == list(theirs)
    for own, other in zip(ours.values(), theirs.values(), strict=True):
        is_class = isinstance(other.default, type) and other.default is not other.empty
        if is_class:
            assert own.default.__name__ == other.default.__name__
        elif own.name != "ablation_layer":
            assert own.default == other.default


def test_every_public_name_is_there():
    callables = {name for name, value in vars(pytorch_grad_cam).items() if callable(value)}
    missing = [name for name in callables if not hasattr(compat, name)]
    assert missing == []
    for path in ("grad_cam", "base_cam", "sess", "feature_factorization.deep_feature_factorization", "metrics.arcc",
                 "metrics.perturbation_confidence", "utils.find_layers", "utils.reshape_transforms"):  # fmt: skip
        assert importlib.import_module(f"xcam_fn.compat.pytorch_grad_cam.{path}")


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (compat.GradCAM, TypeError, "missing a required argument: 'target_layers'"),
        (lambda m: compat.GradCAM(m, m.last), TypeError, "target_layers must be a list of modules"),
        (lambda m: compat.GradCAM(m, [])(torch.ones(1, 3, 8, 8)), ValueError, "target_layers is empty"),
        (lambda m: compat.GradCAM(m, [nn.ReLU()])(torch.ones(1, 3, 8, 8)), ValueError, "is not a module of this"),
        (lambda m: compat.GradCAM(m, [m.last])(torch.ones(1, 3, 8, 8), [len] * 2), ValueError, "targets is a list of 2; expected None or a list of 1"),
        (lambda m: compat.GradCAM(m, [m.last])(torch.ones(1, 3, 8, 8), 3), ValueError, "targets is a int"),
        (lambda m: compat.FullGrad(m, [])(torch.ones(1, 3, 8, 8), eigen_smooth=True), ValueError, "is not a weighted sum of channels"),
        (lambda m: compat.AblationCAM(m, [m.last], ratio_channels_to_ablate=0.5), ValueError, "this library ablates every channel"),
        (lambda m: compat.RefineCAM(m, [m.last], base_method="GradCAM"), TypeError, "base_method='GradCAM'; expected a class"),
        (lambda m: compat.SESS(m, [m.last], scales=[8])(torch.ones(1, 3, 8, 8)), ValueError, "scales is not supported"),
        (lambda m: compat.SESS(m, [m.last])(torch.ones(1, 3, 8, 8), [torch.sum]), ValueError, "use_softmax_scores=False"),
        (lambda m: compat.ActivationsAndGradients(m, [m.last], None), ValueError, "xcam_fn.feature_and_grad"),
        (lambda m: compat.AblationLayerFasterRCNN(), ValueError, "ablate one layer"),
        (compat.run_dff_on_image, ValueError, "xcam_fn.plot.concepts"),
        (lambda m: type("Mine", (compat.GradCAM,), {"get_cam_weights": None}), TypeError, "xcam_fn.from_gradients"),
        (lambda m: compat.utils.reshape_transforms.fasterrcnn_reshape_transform({}), ValueError, "explain one layer"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(cases, make, kind, words, unchecked):
    with pytest.raises(kind, match=words):
        make(cases["small"][0])
