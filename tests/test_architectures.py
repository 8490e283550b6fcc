"""Every family of torchvision and ten of timm: the default layer is the expected one, and Grad-CAM works there."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import xcam_fn as xf

TORCHVISION = {
    "alexnet": ("features.11", 96),
    "convnext_tiny": ("features", 64),
    "densenet121": ("features", 64),
    "efficientnet_b0": ("features", 64),
    "efficientnet_v2_s": ("features", 64),
    "googlenet": ("inception5b", 96),
    "inception_v3": ("Mixed_7c", 299),
    "maxvit_t": ("blocks.3", 224),
    "mnasnet0_5": ("layers", 64),
    "mobilenet_v2": ("features", 64),
    "mobilenet_v3_small": ("features", 64),
    "regnet_x_400mf": ("trunk_output", 64),
    "regnet_y_400mf": ("trunk_output", 64),
    "resnet18": ("layer4", 64),
    "resnet50": ("layer4", 64),
    "resnext50_32x4d": ("layer4", 64),
    "shufflenet_v2_x0_5": ("conv5", 64),
    "squeezenet1_1": ("classifier.2", 96),
    "vgg11": ("features.19", 64),
    "vgg16_bn": ("features.42", 64),
    "vgg19": ("features.35", 64),
    "wide_resnet50_2": ("layer4", 64),
}
TIMM = {
    "convnext_atto": ("norm_pre", 64),
    "densenet121": ("features", 64),
    "efficientnet_b0": ("bn2", 64),
    "mobilenetv3_small_050": ("blocks", 64),
    "nfnet_l0": ("final_act", 64),
    "regnetx_002": ("final_conv", 64),
    "repvgg_a0": ("final_conv", 64),
    "resnet18": ("layer4", 64),
    "seresnet18": ("layer4", 64),
    "tf_efficientnet_lite0": ("bn2", 64),
    "xception41": ("act", 96),
}


def check(model: nn.Module, layer: str, size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert xf.default_layer(model, x) == layer
    found = xf.gradcam(model, None, x, [1, 2])
    assert found.shape == (2, size, size)
    assert torch.isfinite(found).all()
    assert found.max() <= 1
    assert xf.feature_and_grad(model, layer, x, [1, 2]).grads.abs().max() > 0


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.filterwarnings("ignore::FutureWarning:torchvision")
def test_torchvision(name):
    import torchvision

    layer, size = TORCHVISION[name]
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    check(model, layer, size)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    import timm

    layer, size = TIMM[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False).eval()
    check(model, layer, size)


def test_the_page_gives_every_cell_and_a_reason_for_each_without_a_map(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    table = importlib.import_module("make_architectures")
    rows = list(table.read().values())
    assert len(rows) >= 45
    libraries = {"torchvision", "timm", "transformers", "monai", "ultralytics"}
    assert libraries == {row["library"] for row in rows}
    assert set(rows[0]) == {*table.ABOUT, *table.METHODS}
    assert all(float(row["batch"]) <= 1e-5 for row in rows)
    page = table.page(rows)  # raises where there is no reason
    assert _without_versions(page) == _without_versions(table.PAGE.read_text(encoding="utf-8"))


def _without_versions(page: str) -> str:
    return re.sub(r"with torch .*?\. Nothing", "with … Nothing", page)
