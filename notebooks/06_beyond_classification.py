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
# A heatmap answers *which parts of the picture made this score large?* The score need not be a class's logit. It can be a class's
# logit over some pixels, the score of a detected box, the similarity of two pictures, or anything else that a network
# computes. In `xcam_fn` it is defined by a *target*, a function from the network's output to one score per image, and
# every method accepts a target instead of a class.
#
# In every part of this notebook the right answer is known, so the maps can be checked: pictures are composed of several
# photographs, and a map has to find the right one.

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
    """The share of a heatmap inside one of the four photographs; a quarter is chance."""
    h, w = heatmap.shape[-2] // 2, heatmap.shape[-1] // 2
    row, column = divmod(quadrant, 2)
    part = heatmap[..., row * h : (row + 1) * h, column * w : (column + 1) * w]
    return float(part.sum() / heatmap.sum())


# %% [markdown]
# ## Segmentation
#
# A segmentation network returns logits for every pixel, (B, classes, H, W). `segment(cls, mask)` is the mean of a class's logit
# over the pixels of a mask; without a mask, over the pixels predicted as that class.
#
# A classifier that ends in pooling and a linear layer becomes a segmentation network if you drop the pooling and apply the linear
# layer at each position. `bind` does this with one function; it returns a network like any other, with the same layer names.


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
# The titles give the number of positions, of 14 × 14, predicted as each class.
#
# ## Detection
#
# `detection(box, label)` explains torchvision's detectors, whose output is a list of boxes, labels and scores for each
# image. The target is the score of the detection that matches the box best, times their intersection over union. For a
# torchvision network:
#
# ```python
# detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights="DEFAULT").eval()
# best = detector(x)[0]["boxes"][0]
# xf.gradcam(detector, "backbone.body.layer4", x, cls=xf.targets.detection(best))
# ```
#
# Its weights would have to be downloaded, so this notebook uses a detector of its own: it classifies windows of half the picture's
# size, and reports each window in which a class has a probability above 0.2.


# %%
def windows(net: Any, x: Tensor) -> list[dict[str, Tensor]]:
    """Detections in torchvision's format: windows whose pooled features predict a class."""
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
# If the label was not detected, or nothing was, the error says so:

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
# Without its last layer the same network is an encoder that turns a picture into 1,280 numbers. `similarity(embedding)` is
# the cosine similarity to another picture's embedding (or, with a CLIP-like network, to a sentence's), and the map
# shows which parts of one picture resemble the other. Each of the four photographs is mirrored and embedded, and its map has to
# find it in the picture of all four. The part that all embeddings share does not distinguish them, so the mean of the four targets
# is subtracted.


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
# A network that answers questions about a picture has the question as a second input. This one has weights set by hand: the
# question is a color, and the answer is the amount of that color, in a dict with other outputs. The map of the answer has to
# highlight that color. `bind` supplies the question and a keyword, and selects the answer.


# %%
class Asked(nn.Module):
    """Measures how much of the requested color is in the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.color = nn.Conv2d(
            3, 3, 1, bias=False
        )  # a channel for each of red, green and blue: its excess over the others
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
# ## What distinguishes two classes
#
# Class targets can be combined as well. `contrast()` subtracts the logits of the most similar classes from the class's own
# (Finer-CAM, arXiv:2501.11309). Evidence for cats in general cancels out, and only evidence for this class remains: the
# map shrinks to the region around the eye. Perturbation methods and metrics accept this target too; the compared classes are
# those of the unperturbed picture.

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
