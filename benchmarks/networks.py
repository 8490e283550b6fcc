"""The networks and images of the benchmarks, and adapters for other libraries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import skimage.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf

# Name to title and layer; None is the network's default layer.
NETWORKS: dict[str, tuple[str, str | None]] = {
    "lite0": ("EfficientNet-Lite0", None),
    "resnet50": ("ResNet-50", "layer4"),
    "densenet121": ("DenseNet-121", "features"),
    "convnext_tiny": ("ConvNeXt-Tiny", "features"),
    "vgg19": ("VGG-19", "features.35"),
}


class Network(NamedTuple):
    """A network to be explained at a layer.

    Attributes:
        name: its key in `NETWORKS`.
        title: its name in print.
        model: the network, in evaluation mode.
        layer: the name of the layer, as our functions take it.
        preset: the preprocessing of its images.
    """

    name: str
    title: str
    model: nn.Module
    layer: str
    preset: xf.images.Preset


def load(name: str, layer: str | None = None) -> Network:
    """Load a network by name: Lite0 with published weights, the others with seeded random weights."""
    title, usual = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):  # leaves the global random state unchanged
        loaded = xf.models.load(name, weights=None if name == "lite0" else "random")
    layer = layer or usual
    if layer is None:
        x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop)
        layer = xf.default_layer(copy.deepcopy(loaded.model), x)  # on a copy: our timings start uncached
    return Network(name, title, loaded.model, layer, loaded.preset)


def fresh(network: Network) -> Network:
    """A copy of the network, without cached state."""
    return network._replace(model=copy.deepcopy(network.model))


def for_peer(network: Network) -> tuple[nn.Module, str]:
    """A deep copy of the network for a library that hooks modules, and the layer by its name in the copy.

    Lite0 runs one ReLU6 twice, and a hook cannot distinguish the calls. The copy instead has a separate ReLU6
    after each batch norm, which computes the same.
    """
    model = copy.deepcopy(network.model)
    if network.name != "lite0":
        return model, network.layer
    for name in ("_bn0", "_bn1"):
        setattr(model, name, nn.Sequential(model.get_submodule(name), nn.ReLU6()).eval())
    model._swish = nn.Identity()
    return model, "_bn1" if network.layer.startswith("_swish") else network.layer


def photographs(preset: xf.images.Preset, batch: int = 1, size: int | None = None) -> Tensor:
    """A photograph of a cat, (1, 3, h, w), or shifted and flipped crops of it, (batch, 3, h, w)."""
    if size is not None:
        assert isinstance(preset.resize, int)
        preset = preset._replace(resize=round(preset.resize * size / preset.crop), crop=size)
    cat = skimage.data.chelsea()
    if batch == 1:
        return xf.images.prepare(cat, preset)[0]
    crops = [cat[:, start : start + 311] for start in range(0, 160, 160 * 2 // max(batch, 16))]
    crops += [crop[:, ::-1] for crop in crops]
    return torch.cat([xf.images.prepare(crop, preset)[0] for crop in crops[:batch]])


def normalized(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Resize and scale a raw map to (B, H, W) in [0, 1], which other libraries leave to the caller."""
    cam = F.interpolate(cam[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    cam = cam - cam.amin((1, 2), keepdim=True)
    return cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12)


def correlation(maps: Any, expected: Any) -> float:
    """The smallest correlation of two batches of maps (B, h, w); 1 for equal maps, constant ones included."""
    worst = 1.0
    for a, b in zip(torch.as_tensor(maps).double(), torch.as_tensor(expected).double(), strict=True):
        if torch.allclose(a, b, atol=1e-6):
            continue
        u, v = a - a.mean(), b - b.mean()
        norm = u.norm() * v.norm()
        worst = min(worst, float((u * v).sum() / norm) if norm > 0 else 0.0)
    return worst
