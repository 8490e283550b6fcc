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
# # Beyond classification
#
# A heatmap answers *what in the picture made this number large?* The number need not be a class's logit. It may be the
# logit of a class over some pixels, the score of a detected box, the likeness of two pictures, or anything else that a
# network computes. In `xcam_fn` that number is a *target*, a function from the network's output to one score for each
# image, and every method takes it in the place of the class.
#
# Every part of this notebook has an answer that is known beforehand, so that the maps can be checked and not only
# admired: pictures are put together from several photographs, and a map has to find the right one.

# %%
from pathlib import Path
from typing import Any

import skimage.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf

loaded = xf.models.load("lite0")
network, names = loaded.model, loaded.categories
folder = Path(skimage.data.__file__).parent
photographs = [folder / name for name in ("chelsea.png", "coffee.png", "motorcycle_left.png", "camera.png")]
prepared = [xf.images.prepare(path, loaded.preset) for path in photographs]
CAT, COFFEE, MOPED, TRIPOD = range(4)  # in this order, row by row


def tiled(tiles: list[Tensor]) -> Tensor:
    """Four pictures (..., h, w) as one of two rows of two."""
    return torch.cat([torch.cat(tiles[:2], -1), torch.cat(tiles[2:], -1)], -2)


x = tiled([one for one, _ in prepared])
picture = tiled([torch.as_tensor(shown).movedim(-1, 0) for _, shown in prepared]).movedim(0, -1).numpy()


def share(heatmap: Tensor, quadrant: int) -> float:
    """How much of a heatmap is in one of the four photographs: a quarter of it if it knew nothing."""
    h, w = heatmap.shape[-2] // 2, heatmap.shape[-1] // 2
    row, column = divmod(quadrant, 2)
    part = heatmap[..., row * h : (row + 1) * h, column * w : (column + 1) * w]
    return float(part.sum() / heatmap.sum())


# %% [markdown]
# ## Segmentation
#
# A dense network returns logits for every pixel, (B, classes, H, W). `segment(cls, mask)` is the mean of a class's logit
# over the pixels of a mask; without a mask, over the pixels where the class wins.
#
# A classifier that ends in pooling and a linear layer becomes a dense network when the linear layer is applied to each
# position and the pooling left out. `bind` says so in one function, and what it returns is a network like any other, its
# layers called as before.


# %%
def every_position(net: Any, x: Tensor) -> dict[str, Tensor]:
    """Logits at each position of the last features, (B, 1000, H / 32, W / 32), as torchvision returns them."""
    return {"out": F.conv2d(net.extract_features(x), net._fc.weight[..., None, None], net._fc.bias)}


dense = xf.bind(network, every_position)
wins = dense(x)["out"][0].argmax(0)
classes = {"tiger cat": (282, CAT), "espresso": (967, COFFEE), "moped": (665, MOPED), "tripod": (872, TRIPOD)}
segmented = {}
for name, (cls, _) in classes.items():
    segmented[f"{name}, {int((wins == cls).sum())} px"] = xf.gradcam(
        dense, "_swish", x, xf.targets.segment(cls)
    )[0]
found = {
    name: share(heatmap, q)
    for (name, heatmap), (_, q) in zip(segmented.items(), classes.values(), strict=True)
}
print({name: f"{value:.0%}" for name, value in found.items()})
assert min(found.values()) > 0.6
segmented.popitem()  # three maps fill a row
xf.plot.heatmaps(picture, segmented)

# %% [markdown]
# The titles say how many of the 14 × 14 positions each class wins.
#
# ## Detection
#
# `detection(box, label)` is for torchvision's detectors, whose output is a list with boxes, labels and scores for each
# image. The score is that of the detection that matches the box best, times how well it does (intersection over
# union). For a network of torchvision:
#
# ```python
# detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights="DEFAULT").eval()
# best = detector(x)[0]["boxes"][0]
# xf.gradcam(detector, "backbone.body.layer4", x, cls=xf.targets.detection(best))
# ```
#
# Its weights are a download, so a detector of our own stands in: it looks at windows of half the picture's size, and
# reports each in which one class is more probable than 0.2.


# %%
def windows(net: Any, x: Tensor) -> list[dict[str, Tensor]]:
    """Detections as torchvision returns them: windows whose pooled features are sure of a class."""
    features = net.extract_features(x)
    side, step = features.shape[-1] // 2, 32
    pooled = F.avg_pool2d(features, side, stride=1)
    probability = net._fc(pooled.movedim(1, -1)).softmax(-1)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in pooled.shape[-2:]), indexing="ij")
    corner = torch.stack([columns, rows], -1).flatten(0, 1) * float(step)
    boxes = torch.cat([corner, corner + side * step], -1)
    detections = []
    for scores, labels in zip(*probability.flatten(1, 2).max(-1), strict=True):
        kept = scores.detach() > 0.2
        detections.append({"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]})
    return detections


detector = xf.bind(network, windows)
with torch.no_grad():
    (all_found,) = detector(x)
print(f"{len(all_found['boxes'])} windows of {len(all_found['labels'].unique())} classes")

half = x.shape[-1] / 2
boxes = {
    q: [q % 2 * half, q // 2 * half, q % 2 * half + half, q // 2 * half + half] for q in (COFFEE, TRIPOD)
}
detected = {
    "the box of the espresso": xf.gradcam(detector, "_swish", x, xf.targets.detection(boxes[COFFEE], 967))[0],
    "the box of the tripod": xf.gradcam(detector, "_swish", x, xf.targets.detection(boxes[TRIPOD], 872))[0],
}
assert share(detected["the box of the espresso"], COFFEE) > 0.6
assert share(detected["the box of the tripod"], TRIPOD) > 0.6
xf.plot.heatmaps(picture, detected)

# %% [markdown]
# A label that was not found, or an image in which nothing was, is an error that says so:

# %%
message = ""
try:
    xf.gradcam(detector, "_swish", x, xf.targets.detection(boxes[COFFEE], 1))
except ValueError as error:
    message = str(error)
print(message)
assert "image 0 has no detection with label 1; its labels are [" in message

# %% [markdown]
# ## Embeddings
#
# Without its last layer the same network is a tower that turns a picture into 1,280 numbers. `similarity(embedding)` is
# the cosine of the angle to another picture's embedding (or, with a CLIP-like network, to a sentence's), and the map
# shows what in one picture is like the other. Each of the four photographs is mirrored, embedded on its own, and looked
# for in the picture of all four. What an embedding shares with all the others says nothing about it, so their mean is
# taken away: a difference of targets.


# %%
def embedding(net: Any, x: Tensor) -> Tensor:
    """The features averaged over positions, (B, 1280)."""
    return net.extract_features(x).mean((2, 3))


tower = xf.bind(network, embedding)
with torch.no_grad():
    looked_for = torch.cat([tower(one.flip(-1)) for one, _ in prepared])
likeness = [xf.targets.similarity(one) for one in looked_for]
average = 0.25 * sum(likeness)
alike = {
    f"like the {name}": xf.gradcam(tower, "_swish", x, likeness[q] - average)[0]
    for name, (_, q) in classes.items()
}
found = {name: share(heatmap, q) for q, (name, heatmap) in enumerate(alike.items())}
print({name: f"{value:.0%}" for name, value in found.items()})
assert min(found.values()) > 0.6
alike.popitem()
xf.plot.heatmaps(picture, alike)

# %% [markdown]
# ## Two inputs
#
# A network that is asked something about a picture takes the question too. This one has weights set by hand: asked for a
# color, it returns how much of that color there is, in a dict with other things. The map of the answer has to be where
# the color is. `bind` puts the question and a keyword in and takes the answer out.


# %%
class Asked(nn.Module):
    """How much of the color asked for there is in the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.color = nn.Conv2d(
            3, 3, 1, bias=False
        )  # a channel for each of red, green, blue: the excess of it
        with torch.no_grad():
            self.color.weight[:, :, 0, 0] = 1.5 * torch.eye(3) - 0.5
        self.rectified = nn.ReLU()

    def forward(self, image: Tensor, question: Tensor, *, sharpness: float) -> dict[str, Tensor]:
        excess = self.rectified(self.color(image)).mean((2, 3))
        return {"answer": ((sharpness * question).softmax(-1) * excess).sum(-1), "excess": excess}


rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
disks = torch.full((1, 3, 96, 96), 0.9)
for color, (row, column) in enumerate([(24, 24), (30, 70), (70, 40)]):
    inside = (rows - row) ** 2 + (columns - column) ** 2 < 16**2
    disks[0, :, inside] = 0.1
    disks[0, color, inside] = 0.9

asked = {}
for color, name in enumerate(["red", "green", "blue"]):
    question = F.one_hot(torch.tensor([color]), 3).float()
    answer = xf.bind(
        Asked().eval(), lambda net, x, q=question: net(x, q.expand(len(x), 3), sharpness=20.0)["answer"]
    )
    asked[f"{name}?"] = xf.gradcam(answer, "rectified", disks, xf.targets.regression())[0]
    (row, column) = [(24, 24), (30, 70), (70, 40)][color]
    inside = (rows - row) ** 2 + (columns - column) ** 2 < 18**2
    assert float(asked[f"{name}?"][inside].sum() / asked[f"{name}?"].sum()) > 0.95
xf.plot.heatmaps(disks[0].movedim(0, -1).numpy(), asked, alpha=0.85)

# %% [markdown]
# ## What tells two classes apart
#
# Targets of classes can be composed as well. `contrast()` takes the logits of the most similar classes away from the
# class's own (Finer-CAM, arXiv:2501.11309). What makes this animal a cat counts for tabbies too, and cancels; what is
# left is what makes it a tiger cat: the map draws together around the eye. Perturbation methods and metrics take such a target too; the classes it compares
# stay those of the picture as it is.

# %%
cat, shown = prepared[CAT]
target = xf.targets.contrast(weight=1.0)
contrasted = {
    "tiger cat": xf.gradcam(network, "_swish", cat)[0],
    "contrast with the 3 nearest": xf.gradcam(network, "_swish", cat, target)[0],
    "tiger cat − Egyptian cat": xf.gradcam(
        network, "_swish", cat, xf.targets.logit(282) - xf.targets.logit(285)
    )[0],
}
with torch.no_grad():
    logits = network(cat)
nearest = (logits[0] - logits[0, 282]).abs().argsort()[1:4]
print("the 3 nearest:", ", ".join(names[i] for i in nearest))
torch.testing.assert_close(target(logits), logits[:, 282] - logits[:, nearest].mean(-1))
assert contrasted["contrast with the 3 nearest"].mean() < 0.8 * contrasted["tiger cat"].mean()
xf.plot.heatmaps(shown, contrasted)
