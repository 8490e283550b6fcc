# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Volumes, signals, clips, and a detector
#
# A heatmap has the spatial and time axes of its input: one for a signal, three for a volume, and three for a clip, with time. The
# functions are the same. This notebook trains four small networks on synthetic data, in seconds, so the right location of each map
# is known.

# %%
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
torch.manual_seed(0)


def trained(net: nn.Module, draw: Draw, steps: int) -> nn.Module:
    """Train the network to classify the inputs of `draw(count, generator)`, which returns inputs, labels and masks."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        x, label, _ = draw(16, generator)
        loss = F.cross_entropy(net(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, label, _ = draw(64, generator)
    net.eval()
    with torch.no_grad():
        right = float((net(x).argmax(1) == label).double().mean())
    print(f"accuracy on 64 new inputs: {right:.0%}")
    assert right > 0.9
    return net


def network(axes: int, kernel: int, width: int = 12) -> nn.Module:
    """Two convolutions, global max pooling and a linear layer."""
    Conv, Pool = getattr(nn, f"Conv{axes}d"), getattr(nn, f"AdaptiveMaxPool{axes}d")
    layers = [
        Conv(1, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        Conv(width, width, kernel, padding=kernel // 2),
    ]
    return nn.Sequential(*layers, nn.ReLU(), Pool(1), nn.Flatten(), nn.Linear(width, 2))


def share(heatmap: Tensor, inside: Tensor) -> float:
    """The share of a heatmap inside the mask."""
    return float((heatmap * inside).sum() / heatmap.sum())


# %% [markdown]
# ## A volume
#
# Noise with a bright blob (class 1) or a thin rod (class 0). Voxels are 3 mm deep and 1 mm wide.


# %%
def volumes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Volumes (count, 1, 12, 20, 20), their labels, and masks of the blob or rod."""
    x = 0.5 * torch.randn(count, 1, 12, 20, 20, generator=generator)
    label = torch.randint(2, (count,), generator=generator)
    inside = torch.zeros(count, 12, 20, 20)
    for i in range(count):
        z, row, column = (int(torch.randint(1, high, (), generator=generator)) for high in (8, 10, 14))
        depth, height, width = (3, 5, 5) if label[i] else (1, 9, 1)
        inside[i, z : z + depth, row : row + height, column : column + width] = 1
    return x + 3 * inside[:, None], label, inside


classifier = trained(network(3, 3), volumes, 40)
x, label, inside = volumes(8, torch.Generator().manual_seed(7))
chosen = int(label.argmax())
x, inside = x[chosen : chosen + 1], inside[chosen]
heatmap = xf.layercam(classifier, None, x, 1)[0]
print(
    f"{share(heatmap, inside):.0%} of the map is inside the blob, which is {float(inside.mean()):.1%} of the volume"
)
assert share(heatmap, F.max_pool3d(inside[None, None], 3, 1, 1)[0, 0]) > 0.8
xf.plot.volume(x[0], heatmap, spacing=(3.0, 1.0, 1.0), unit="mm")

# %% [markdown]
# The same volume as slices. For an animation, use `xf.plot.animation(x[0], heatmap, window=(-1, 4)).save("slices.gif", writer="pillow")`.

# %%
xf.plot.volume(x[0], heatmap, slices=5, spacing=(3.0, 1.0, 1.0), unit="mm")

# %% [markdown]
# ## A signal
#
# A short tone in noise, 500 Hz or 1,000 Hz, sampled at 4,000 Hz.

# %%
RATE = 4000


def tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Signals (count, 1, 512), their labels, and masks of the tone."""
    label = torch.randint(2, (count,), generator=generator)
    begin = torch.randint(0, 400, (count, 1), generator=generator)
    sample = torch.arange(512)
    inside = ((sample >= begin) & (sample < begin + 100)).float()
    tone = torch.sin(2 * torch.pi * 500 * (1 + label[:, None]) * sample / RATE)
    return (tone * inside + 0.2 * torch.randn(count, 512, generator=generator))[:, None], label, inside


listener = trained(network(1, 9), tones, 60)
x, label, inside = tones(1, torch.Generator().manual_seed(3))
heard = {
    "Layer-CAM": xf.layercam(listener, None, x)[0],
    "occlusion": xf.occlusion(listener, None, x, window=32, stride=8)[0],
}
found = {name: share(one, inside[0]) for name, one in heard.items()}
print({name: f"{value:.0%}" for name, value in found.items()})
assert min(found.values()) > 0.6
xf.plot.signal(x[0], heard["Layer-CAM"], rate=RATE, spectrogram=64, names=["tone"])

# %% [markdown]
# ## A clip
#
# A square that moves to the right (class 1) or to the left (class 0). No single frame shows the direction: the network has to use time.


# %%
def clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (count, 1, 8, 16, 24), their labels, and masks of the square."""
    label = torch.randint(2, (count,), generator=generator)
    inside = torch.zeros(count, 8, 16, 24)
    for i in range(count):
        row, column = (int(torch.randint(0, high, (), generator=generator)) for high in (11, 4))
        for t in range(8):
            at = column + 2 * t if label[i] else 19 - column - 2 * t
            inside[i, t, row : row + 5, at : at + 5] = 1
    return inside[:, None] + 0.1 * torch.randn(inside[:, None].shape, generator=generator), label, inside


watcher = trained(network(3, 3), clips, 60)
x, label, inside = clips(1, torch.Generator().manual_seed(1))
watched = xf.layercam(watcher, None, x)[0]
near = F.max_pool3d(inside[None], 5, 1, 2)[0]
print(f"{share(watched, near):.0%} of the map is at the square, {float(near.mean()):.0%} of the clip")
assert share(watched, near) > 0.8
shown = (x[0].clamp(0, 1), watched)
xf.plot.video(*shown, count=4, fps=8.0)

# %% [markdown]
# ## One scale for many maps
#
# Each heatmap is scaled to a maximum of 1, even that of the wrong direction. On a common scale, the two classes can be compared.

# %%
both = xf.gradcam(watcher, None, x, [[0, 1]], postprocess=partial(xf.heatmap, scale="batch"))[0]
largest = both.flatten(1).amax(1)
right = int(label[0])
print({name: round(float(value), 2) for name, value in zip(("left", "right"), largest, strict=True)})
assert largest[right] == 1.0
assert np.isclose(float(xf.gradcam(watcher, None, x, 1 - right).max()), 1.0)

# %% [markdown]
# ## A detector
#
# The head scores a cross and a disk in each of 8 × 12 cells; its output has YOLO's layout, boxes and classes, (1, 4 + 2, 96).
# The target is one box: which pixels made the network detect the cross, and which the disk?


# %%
class Detector(nn.Module):
    """Boxes of 12 pixels around cells of 4 pixels, with the scores of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2, 2), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.head(self.body(x))
        rows, columns = torch.meshgrid(*map(torch.arange, scores.shape[2:]), indexing="ij")
        center = 4.0 * torch.stack([columns, rows]).flatten(1) + 2
        boxes = torch.cat([center, torch.full_like(center, 12)]).expand(len(x), -1, -1)
        scores = scores.flatten(2)
        return torch.cat([boxes, scores.sigmoid()], 1), {"scores": scores}


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 32, 48) of a cross and a disk, and the cell of each, (count, 2)."""
    places = torch.stack(
        [
            torch.randint(2, 6, (count, 2), generator=generator),
            torch.randint(2, 5, (count, 2), generator=generator),
        ],
        2,
    )
    places[:, 1, 1] += 5  # the disk is on the right
    down, right = (torch.arange(n)[None, None] - 4 * places[..., i, None] - 2 for i, n in enumerate((32, 48)))
    down, right = down[..., :, None].abs(), right[..., None, :].abs()
    near = (down <= 5) & (right <= 5)
    cross, disk = near & ((down <= 1) | (right <= 1)), down**2 + right**2 <= 16
    picture = torch.where(torch.tensor([True, False])[:, None, None], cross, disk).any(1).float()
    noise = 0.1 * torch.randn(count, 1, 32, 48, generator=generator)
    return picture[:, None] + noise, 12 * places[..., 0] + places[..., 1]


detector, generator = Detector(), torch.Generator().manual_seed(0)
optimizer = torch.optim.Adam(detector.parameters(), 0.01)
for _ in range(150):
    x, cells = scenes(16, generator)
    wanted = F.one_hot(cells, 96).float()
    loss = F.binary_cross_entropy_with_logits(detector(x)[1]["scores"], wanted, pos_weight=torch.tensor(30.0))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
detector.eval()
x, cells = scenes(1, torch.Generator().manual_seed(2))
found = detector(x)[0].detach()[0]
maps, boxes = {}, {}
for label, name in enumerate(("cross", "disk")):
    assert int(found[4 + label].argmax()) == cells[0, label]
    cx, cy, w, h = found[:4, cells[0, label]].tolist()
    boxes[name] = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    maps[name] = xf.hirescam(detector, None, x, xf.targets.detection(boxes[name], label))[0]
    left, top, right, bottom = map(round, boxes[name])
    inside = torch.zeros(32, 48)
    inside[top - 4 : bottom + 4, left - 4 : right + 4] = 1  # a cell of the layer is four pixels wide
    print(f"{name}: {share(maps[name], inside):.0%} of the map is at its box")
    assert share(maps[name], inside) > 0.9
xf.plot.detections(x[0, 0].clamp(0, 1), boxes, maps)
