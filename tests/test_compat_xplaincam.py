"""XplainCAM's names over ours: its README, its maps and scores, its scripts, and the library itself where it is."""

import importlib
import inspect
import json
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

import networks
import xcam_fn as xf
from xcam_fn.compat.xplaincam import cam, metrics, utils
from xcam_fn.compat.xplaincam.scripts import evaluate

QUICK: dict[str, dict[str, Any]] = {
    "SSCAM": {"num_samples": 1, "std": 0.0},  # without noise it is deterministic there as well
    "ISCAM": {"num_samples": 2},
    "GroupCAM": {"groups": 4},
    "RISE": {"N": 20, "batch_size": 10},
    "IntegratedGradients": {"n_steps": 5},
}
NAMES = [name for name in cam.__all__ if name != "BaseCAM"]
IS_LAYERED = {name: getattr(cam, name).layered for name in NAMES}


def small_vgg(**_: Any) -> nn.Module:
    """The modules of VGG-19 by name and kind, with few channels."""
    config = [4, 4, "M", 6, 6, "M", *[8] * 4, "M", *[8] * 4, "M", *[8] * 4, "M"]
    vgg = torchvision.models.VGG(torchvision.models.vgg.make_layers(config), init_weights=False)
    vgg.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 1000))
    return networks.seeded(vgg)


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


def picture(shared: Path, name: str = "n02099601_golden_retriever") -> tuple[Tensor, int]:
    """One of the photographs of the reference maps, prepared, and the class that they explain."""
    folder = shared / "reference"
    x = normalize(to_tensor(Image.open(folder / f"{name}_224.png")), utils.MEAN, utils.STD)[None]
    return x, json.loads((folder / "public.json").read_text())[f"{name}.JPEG"]["class"]


# -- XplainCAM's README -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_the_readme_runs_with_its_imports_changed(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "vgg19", small_vgg)
    text = (shared / "seed" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert len(blocks) == 9
    never_defined = {"cam_gradcam", "cam_gradcampp", "insdel_results"}
    names: dict[str, Any] = {name: getattr(cam, name) for name in cam.__all__}  # most are imported nowhere
    for number, block in enumerate(blocks):
        code = re.sub(
            r"^from (?:xplaincam|XaiVisionCAM)\.", "from xcam_fn.compat.xplaincam.", block, flags=re.M
        )
        photograph = next((shared / "images").glob("*.jpg"))
        code = code.replace('"path/to/your/image.png"', repr(str(photograph)))
        exec(compile(code, f"README.md, block {number}", "exec"), names)
        if "cam_gradcam" not in names and "del_result" in names:
            model, x = names["model"], names["input_tensor"]
            names |= {"cam_gradcam": cam.GradCAM(model)(x), "cam_gradcampp": cam.GradCAMpp(model, None)(x)}
            result = {"Insertion": names["ins_result"], "Deletion": names["del_result"]}
            names["insdel_results"] = {"GradCAM": result, "GradCAMpp": result}
    assert never_defined <= names.keys()
    assert [found.shape for found in names["cams"].values()] == 3 * [(1, 1, 224, 224)]
    assert {path.name for path in Path("output").iterdir()} == {
        "gradcam_insertion.png", "gradcam_deletion.png", "all_cams.png", "all_cams_insertion.png",
        "all_cams_deletion.png",
    }  # fmt: skip


# -- its numbers --------------------------------------------------------------------------------------------


def test_its_reference_maps_and_scores(lite0, shared):
    x, cls = picture(shared)
    facts = json.loads((shared / "reference" / "public.json").read_text())
    expected = facts["n02099601_golden_retriever.JPEG"]["methods"]
    names = ["GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "GroupCAM", "AblationCAM"]
    far: dict[str, float] = {}
    with np.load(shared / "reference" / "public.npz") as reference:
        for name in [*names, "IntegratedGradients"]:
            given: Any = {"target_layer": "_blocks.15"} if IS_LAYERED[name] else {"n_steps": 20}
            theirs = torch.from_numpy(reference[f"n02099601_golden_retriever.JPEG/{name}"])
            with getattr(cam, name)(lite0, **given) as extractor:
                found = extractor(x, class_idx=cls)
            assert found.shape == (1, 1, 224, 224)
            # ReLU6 cuts off: where a value is at its edge, rounding decides whether a gradient passes. Of
            # Grad-CAM++ one map in float64 differs by 7e-4 from one in float32, and one thread's from two threads'.
            bound = 2e-3 if name in ("IntegratedGradients", "GradCAMpp") else 1e-4
            if not (largest := (found[0, 0] - theirs).abs().max().item()) <= bound:
                far[name] = largest
        theirs = torch.from_numpy(reference["n02099601_golden_retriever.JPEG/GradCAM"])[None, None]
    assert not far
    summary = metrics.AvgDropConf(lite0, theirs, x, cls).summary()
    assert summary["avg_drop"] == pytest.approx(expected["GradCAM"]["avg_drop"], abs=1e-5)
    assert summary["avg_increase"] == expected["GradCAM"]["increase"]
    curve = metrics.InsertionDeletion(lite0).compute(x, theirs, cls, mode="Insertion", return_steps=True)
    assert curve["auc"] == pytest.approx(expected["GradCAM"]["insertion"], abs=1e-4)
    assert curve["steps"].shape == (113,)
    assert curve["steps"].dtype == np.float32


def hooked(model: nn.Module, layer: str, x: Tensor, cls: int) -> Tensor:
    """Grad-CAM of what hooks see: the layer's output as it is after the forward, and its own gradient."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)

    def keep(_: Any, __: Any, output: Tensor) -> None:
        seen.append(output)
        output.register_hook(seen.append)

    handle = module.register_forward_hook(keep)
    model(x)[:, cls].sum().backward()
    handle.remove()
    A, G = (each.detach() for each in seen)
    return xf.heatmap((G.mean((2, 3), keepdim=True) * A).sum(1), x.shape[2:])


def test_a_relu_in_place_after_the_layer_is_seen_as_a_hook_sees_it():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(True),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    model, x = nn.Sequential(nn.Sequential(*layers), nn.Linear(288, 5)).eval(), torch.randn(1, 3, 16, 16)
    state = xf.testing.state(model)
    extractor = cam.GradCAM(model, input_shape=(3, 16, 16))
    assert extractor.target_layer_name == "0.2"
    found = extractor(x, 3)
    assert xf.testing.state(model) == state
    torch.testing.assert_close(found[:, 0], hooked(model, "0.2", x, 3), rtol=0, atol=1e-5)
    assert not torch.allclose(found[:, 0], xf.gradcam(model, "0.2", x, 3), atol=1e-2)
    assert not torch.allclose(found[:, 0], xf.gradcam(model, "0.3", x, 3), atol=1e-2)


def test_equal_pixels_are_inserted_in_its_order():
    model, x = networks.seeded(networks.Residual()), torch.randn(1, 3, 16, 16)
    heatmap = torch.randint(3, (1, 1, 16, 16)).float()
    step, order = 60, heatmap.flatten().argsort(descending=True)
    expected = []
    for count in (0, 60, 120, 180, 240, 256):
        image = xf.perturb.blurred(x).flatten(2)
        image[..., order[:count]] = x.flatten(2)[..., order[:count]]
        expected.append(model(image.reshape(x.shape)).softmax(1)[0, 1].item())
    found = metrics.InsertionDeletion(model, step=step).compute(x, heatmap, 1, return_steps=True)
    np.testing.assert_allclose(found["steps"], expected, atol=1e-6)
    assert found["auc"] == pytest.approx((sum(expected) - (expected[0] + expected[-1]) / 2) / 5, abs=1e-6)


# -- the library itself, where it is ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Any:
    """XplainCAM, with what it needs, in the folders of the environment variable XPLAINCAM."""
    if "XPLAINCAM" not in os.environ:
        pytest.skip("the environment variable XPLAINCAM names no checkout of XplainCAM")
    sys.path += os.environ["XPLAINCAM"].split(os.pathsep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: importlib.import_module(f"xplaincam.{name}") for name in ("cam", "utils")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["lite0", "resnet18", "small_vgg"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "RISE"])
def test_its_classes_return_the_same(theirs, shared, lite0, name, network):
    model = {"lite0": lite0, "small_vgg": small_vgg()}.get(network)
    model = xf.models.load("resnet18", weights="random").model if model is None else model
    given: dict[str, Any] = dict(QUICK.get(name, {}))
    if IS_LAYERED[name]:
        given["target_layer"] = "_blocks.15" if network == "lite0" else None
    x, _ = picture(shared)
    cls = int(model(x).argmax())
    with getattr(theirs["cam"], name)(model, **given) as extractor:
        expected = extractor(x, class_idx=cls)
    found = getattr(cam, name)(model, **given)(x, class_idx=cls)
    assert found.shape == expected.shape
    largest = (found - expected.detach()).abs().max().item()
    assert largest <= (2e-3 if name in ("IntegratedGradients", "GradCAMpp") else 1e-4), largest


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "densenet121"])
def test_its_candidate_layer(theirs, name):
    model = torchvision.models.get_model(name, weights=None).eval()
    assert utils.locate_candidate_layer(model) == theirs["utils"].locate_candidate_layer(model)


# -- the objects --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_object_remembers_its_arguments_and_touches_nothing(name):
    model = networks.seeded(networks.Residual())
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    state = xf.testing.state(model)
    given = QUICK.get(name, {})
    with getattr(cam, name)(model, **given) as extractor:
        first = extractor(x)
    assert torch.equal(extractor(x), first), "outside of the with it is the same"
    if IS_LAYERED[name] and name not in ("UnionCAM", "FusionCAM"):
        assert torch.equal(extractor.forward(x, None, retain_graph=True), first)
    assert xf.testing.state(model) == state
    assert first.shape == ((1, 1, 224, 224) if name == "GradCAM" else (1, 1, 16, 16))
    assert not first.requires_grad
    assert all(getattr(extractor, key) == value for key, value in given.items())
    if IS_LAYERED[name]:
        assert extractor.target_layer_name == "conv2"
        by_module = getattr(cam, name)(model, target_layer=model.conv2, **given)
        assert torch.equal(by_module(x), first)
    with pytest.raises(AttributeError, match="stores no features, gradients or masks"):
        extractor.activations  # noqa: B018


def test_layercam_takes_a_list_of_classes():
    model, x = networks.seeded(networks.Residual()), torch.randn(1, 3, 16, 16)
    found = cam.LayerCAM(model)(x, [1, 3])
    assert found.shape == (2, 1, 1, 16, 16)
    for i, cls in enumerate((1, 3)):
        torch.testing.assert_close(found[i], cam.LayerCAM(model)(x, cls))
    assert torch.equal(cam.LayerCAM(model)(x, [3]), cam.LayerCAM(model)(x, 3))


def test_fusioncam_takes_classes_and_their_arguments():
    model, x = networks.seeded(networks.Residual()), torch.randn(1, 3, 16, 16)
    found = cam.FusionCAM(model, None, grad_cam=cam.XGradCAM, region_cam=cam.AblationCAM)(x, 1, theta=20.0)
    ours = xf.fusioncam(model, "conv2", x, 1, gradient="xgradcam", region="ablationcam", theta=20.0)
    torch.testing.assert_close(found[:, 0], ours)
    made = cam.FusionCAM(model, None, region_cam=cam.ISCAM, num_samples=3, grad_cam=cam.GradCAM)
    with pytest.raises(TypeError, match="num_samples"):
        made(x)  # both classes are given it, as there


def test_options_reach_our_methods():
    made = cam.GroupCAM(networks.Residual(), groups=2, cluster_method="k_means").method()
    assert made.options == {"num_groups": 2, "cluster": "kmeans"}
    assert cam.RISE(networks.Residual(), N=8, batch_size=4, s=3, p1=0.5).method().options == {
        "num_masks": 8, "keep": 0.5, "score": "logit", "grid": 3, "chunk_size": 4,
    }  # fmt: skip
    assert str(inspect.signature(cam.ScoreCAM)) == (
        "(model, target_layer=None, input_shape=(3, 224, 224), batch_size=32)"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: cam.GradCAM("resnet18"), TypeError, r"model must be a torch.nn.Module"),
        (lambda m, x: cam.GradCAM(m, "conv9"), ValueError, r"layer 'conv9' is not in Residual; did you mean"),
        (lambda m, x: cam.GradCAM(nn.Linear(1, 1)), ValueError, r"finds no Conv2d in Linear; name a layer"),
        (lambda m, x: cam.GradCAM(m, layer=None), TypeError, r"unexpected keyword argument 'layer'"),
        (lambda m, x: cam.BaseCAM(m)(x), NotImplementedError, r"has no method; use a subclass"),
        (lambda m, x: cam.GradCAM(m.train())(x), ValueError, r"call model.eval\(\) first"),
        (lambda m, x: metrics.AvgDropConf(m, x[:1, 0], x), ValueError, r"input_tensor has 2 images; expected one"),
        (lambda m, x: metrics.InsertionDeletion(m, mode="In"), ValueError, r"mode='In'"),
        (
            lambda m, x: metrics.InsertionDeletion.plot_curves({"a": {"auc": 1.0}}),
            ValueError,
            r"results\['a'\] has no 'steps'; call compute with return_steps=True",
        ),
        (
            lambda m, x: metrics.InsertionDeletion.plot_curves({"auc": 1.0, "steps": np.ones(3)}),
            ValueError,
            r"image or cam is None; the plot of a single result needs both",
        ),
        (lambda m, x: utils.sample_images_flat(Path(__file__).parent, 1), RuntimeError, r"has no photographs"),
        (lambda m, x: utils.resolve_target_layer(nn.Sequential(nn.Flatten(), nn.Linear(150528, 2)).eval()), ValueError, r"name one"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call(networks.seeded(networks.Residual()), torch.randn(2, 3, 16, 16))


# -- metrics, utilities, scripts ----------------------------------------------------------------------------


def test_average_drop_takes_maps_of_any_range_and_size():
    model, x = networks.seeded(networks.Residual()), torch.randn(1, 3, 16, 16)
    heatmap = torch.rand(1, 1, 8, 8)
    shown = xf.maps.resize(heatmap, (16, 16))
    one = metrics.AvgDropConf(model, heatmap, x, class_idx=2)
    assert one.avg_drop == pytest.approx(xf.average_drop(model, x, shown[:, 0], 2).item(), abs=1e-6)
    assert one.avg_increase == xf.increase_in_confidence(model, x, shown[:, 0], 2).item()
    squared = metrics.AvgDropConf(model, (2 * heatmap)[0, 0].numpy(), x, 2, alpha=2.0)
    p, q = (model(image).softmax(1)[0, 2].item() for image in (x, x * (2 * shown) ** 2))
    assert squared.summary() == {
        "avg_drop": pytest.approx(max(0, p - q) / p, abs=1e-6),
        "avg_increase": q > p,
    }


def test_figures_are_saved_and_shown_where_there_are_windows(tmp_path, monkeypatch):
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.get_fignums())))
    maps = {name: torch.rand(1, 1, 16, 16) * 5 for name in "abc"}
    utils.visualize_cam(torch.rand(1, 3, 16, 16), maps, "title", tmp_path / "new" / "cams.png", nrow=2)
    assert len(plt.gcf().axes) == 5, (
        "the figure is pyplot's own: four pictures in rows of two, and the colors"
    )
    assert (tmp_path / "new" / "cams.png").is_file()
    assert not shown, "agg shows nothing, and warns"
    monkeypatch.setattr(plt, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    utils.visualize_cam(torch.rand(1, 3, 16, 16), maps)
    metrics.InsertionDeletion.plot_curves({n: {"auc": 0.5, "steps": np.ones(3)} for n in "ab"}, "Deletion")
    assert shown == [2, 3]
    assert len(plt.get_fignums()) == 2, "curves are closed, as there"


def test_utilities(tmp_path):
    model = networks.seeded(networks.Residual())
    assert utils.locate_candidate_layer(model, (3, 16, 16)) == utils.resolve_target_layer(model) == "relu"
    assert utils.resolve_target_layer(model, "conv1") == "conv1"
    x = torch.tensor([[[[1.0, -2.0]], [[-3.0, 4.0]]]])
    assert utils.convert_to_gray(x).tolist() == [[[[4.0, 6.0]]]]
    (tmp_path / "index.json").write_text('{"281": ["n02123045", "tabby"]}')
    assert utils.load_class_index(tmp_path / "index.json") == {281: "tabby"}
    for i in range(5):
        Image.fromarray(np.full((30, 20, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    sample = utils.sample_images_flat(tmp_path, 3, seed=1)
    assert sample == utils.sample_images_flat(tmp_path, 3, seed=1)
    assert len(utils.sample_images_flat(tmp_path, 9)) == 5
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert utils.load_image(tmp_path / "1.png", 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("script", "header"),
    [
        ("drop_increase_evaluation", "CAM Method,Model,Average Drop,Increase in Confidence"),
        ("del_inser_evaluation", "CAM Method,Model,Deletion,Insertion"),
        ("eval_latency", "CAM Method,Average Latency (s)"),
    ],
)
def test_scripts(script, header, tmp_path, monkeypatch, capsys):
    loaded = xf.models.LoadedModel(small_vgg(), None, [], "vgg16")
    monkeypatch.setattr(xf.models, "load", lambda *_, **__: loaded)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(255, size=(40, 30, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    table = tmp_path / "tables" / "table.csv"
    arguments = ["--methods", "GradCAM++", "GradCAM", "--output-csv", str(table), "--image-size", "32"]
    arguments += ["--save-plot-path", str(tmp_path / "plots")]
    monkeypatch.setattr(sys, "argv", [script, "--data_path", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"xcam_fn.compat.xplaincam.{script}", run_name="__main__")
    assert not left.value.code, capsys.readouterr().err
    rows = table.read_text().splitlines()
    assert rows[0] == header
    assert [row.partition(",")[0] for row in rows[1:]] == ["GradCAM++", "GradCAM"]
    plots = {"all_deletions_2.png", "all_insertions_2.png"} if script == "del_inser_evaluation" else set()
    assert {path.name for path in (tmp_path / "plots").glob("*")} == plots
    if script == "drop_increase_evaluation":
        drops = [
            metrics.AvgDropConf(
                loaded.model, cam.GradCAM(loaded.model, input_shape=(3, 32, 32))(x), x
            ).avg_drop
            for x in (utils.load_image(tmp_path / f"{i}.png", 32) for i in range(2))
        ]
        assert float(rows[2].split(",")[2]) == pytest.approx(sum(drops) / 2, abs=1e-4)


def test_a_script_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["eval_latency", str(tmp_path), "--methods", "GradCM", "--weights", "random"]
    )
    with pytest.raises(SystemExit) as left:
        runpy.run_module("xcam_fn.compat.xplaincam.eval_latency", run_name="__main__")
    assert left.value.code == 2
    assert "--methods='GradCM'" in capsys.readouterr().err
    assert list(inspect.signature(evaluate).parameters)[:2] == ["script", "data_path"]


def test_overlays_are_as_opaque_everywhere_as_xplaincams(monkeypatch):
    drawn: list = []
    monkeypatch.setattr(utils, "saved_and_shown", lambda figure, *_, **__: drawn.append(figure))
    image, cam = torch.rand(1, 3, 8, 8), torch.linspace(0, 1, 64).reshape(8, 8)
    utils.visualize_cam(image, {"map": cam})
    colors = mpl.colormaps["jet"](cam.numpy())[..., :3]
    expected = 255 * (0.5 * image[0].movedim(0, -1).numpy() + 0.5 * colors)
    np.testing.assert_allclose(drawn[0].axes[1].images[0].get_array(), expected, atol=1.01)
