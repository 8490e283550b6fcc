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
# # One photograph, every method
#
# A network looks at a photograph and says *tiger cat*. What did it look at? This notebook asks every method of the
# library about one and the same photograph, and then asks the network whether the answers are any good.

# %%
import matplotlib.pyplot as plt
import skimage.data
import torch

import xcam_fn as xf
from xcam_fn.checks import StructureError

net = xf.models.load("lite0")
x, picture = xf.images.prepare(skimage.data.chelsea(), net.preset)
probabilities = net.model(x).softmax(1)[0].detach()
for probability, index in zip(*(part.tolist() for part in probabilities.topk(4)), strict=True):
    print(f"{probability:6.1%}  {net.categories[index]}")

# %% [markdown]
# All four are cats: the network knows what is in the picture, and hesitates about the breed. Whatever follows explains
# the likeliest of them.
#
# One call makes a heatmap. The first argument is the model, just as it is; the second the layer to explain, where
# `None` is the last one that has places; the third the batch; the fourth the class.

# %%
CLS = int(probabilities.argmax())
heat = xf.gradcam(net.model, None, x, CLS)
print(tuple(heat.shape), f"from {float(heat.min()):.0f} to {float(heat.max()):.0f}")
xf.plot.heatmaps(picture, {"Grad-CAM": heat})

# %% [markdown]
# The cheek and the nose. Next, every other method. All are called alike, so a loop over the registry is
# enough; `explain_all` is that loop, with whatever several of them need computed once. Methods that draw samples are given
# few here, those that mask channels mask 64 of the 1,280, and those that fuse two maps take Group-CAM's, so that the notebook takes
# seconds: RISE with its 4,000 masks looks smoother than with 200, and with one sample IS-CAM is Score-CAM.
#
# A method that needs a structure which the network does not have is left out: LeGrad and three more look at attention, and here is none. Asked by
# name it says so, with a `StructureError`.

# %%
maps = xf.explain_all(
    net.model, None, x, CLS,
    num_samples=1, num_masks=200, steps=10, channels=64, region="groupcam", scales=(1.0, 1.5),
)  # fmt: skip
refusals = {}
for name in xf.METHODS:
    if name not in maps:
        try:
            xf.METHODS[name](net.model, None, x, CLS)
        except StructureError as error:
            refusals[name] = str(error)
print(f"{len(maps)} maps")
print(*refusals.values(), sep="\n")

# %%
COLUMNS = 6
count = -(-len(maps) // COLUMNS)
figure, axes = plt.subplots(count, COLUMNS, figsize=(11, 2.05 * count), layout="constrained", squeeze=False)
for axis in axes.flat:
    axis.axis("off")
for axis, (name, found) in zip(axes.flat, maps.items(), strict=False):
    # Maps of single points are drawn up to their 99th percentile, or nothing of them would be seen.
    shown = (found / found.quantile(0.99)).clamp(max=1) if found.mean() < 0.05 else found
    axis.imshow(xf.plot.overlay(picture, shown))
    axis.set_title(xf.METHODS[name].title.replace(" Feature", "\nFeature"), fontsize=9)
plt.show()

# %% [markdown]
# They agree on the face, and not on much else. Those that weight channels have the layer's resolution, 7 × 7; RISE, which
# knows nothing of layers, has blobs wherever its masks happened to lie; integrated gradients and guided backprop, which look at pixels,
# find the outlines of eyes and stripes. Many are alike, and have to be: after this layer come pooling and one linear layer, where
# Grad-CAM, CAM, HiResCAM, XGrad-CAM and others are one and the same. And Random-CAM, which explains nothing, looks no less
# convincing than the rest.
#
# ## Which one is right?
#
# That the maps differ means that looking at them proves nothing. So the network is asked: pixels are taken away in
# the order of a map, the most relevant first, and a map that found what matters makes the probability fall at
# once (*deletion*, low is good). Or they are shown in that order (*insertion*, high is good). Twelve maps of different kinds will
# do, and one of random numbers, to have something to compare with.

# %%
JUDGED = (
    "gradcam", "layercam", "finercam", "scorecam", "ablationcam", "groupcam", "eigencam", "rise", "curvecam",
    "integrated_gradients", "guided_backprop", "randomcam",
)  # fmt: skip
chance = torch.rand(heat.shape, generator=torch.Generator().manual_seed(0))
scores = {
    name: (
        float(xf.insertion(net.model, x, found, CLS, steps=8).auc),
        float(xf.deletion(net.model, x, found, CLS, steps=8).auc),
    )
    for name, found in {**{name: maps[name] for name in JUDGED}, "chance": chance}.items()
}
ranked = sorted(scores, key=lambda name: scores[name][0] - scores[name][1], reverse=True)
print(f"{'':24} insertion  deletion")
for name in ranked:
    print(f"{name:24} {scores[name][0]:9.3f} {scores[name][1]:9.3f}")

# %%
figure, axis = plt.subplots(figsize=(8, 1 + 0.26 * len(ranked)), layout="constrained")
for row, name in enumerate(reversed(ranked)):
    insertion, deletion = scores[name]
    axis.plot([deletion, insertion], [row, row], color="0.8", zorder=1)
    axis.scatter([deletion], [row], color="tab:red", label="deletion, low is good" if row == 0 else None)
    axis.scatter([insertion], [row], color="tab:blue", label="insertion, high is good" if row == 0 else None)
axis.set(
    yticks=range(len(ranked)), yticklabels=reversed(ranked), xlabel="area under the curve", xlim=(0, None)
)
axis.grid(axis="x", alpha=0.3)
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# Every map of regions beats chance where pixels are shown: the face is what the network needs. But so does Random-CAM, which weights
# channels by lot: at the last layer nearly every channel lies on the face, and a method has shown something only when it does better
# than that. Where pixels are taken away, chance beats all maps of regions, and that says something of the metric: holes scattered over
# the whole image spoil it for a network sooner than one large hole, wherever it is. So deletion is no measure between a map of points
# and a map of regions. Integrated gradients and guided backprop scatter as well, and are good at both.
#
# One photograph decides nothing; [the third notebook](03_evaluate.ipynb) takes several, with intervals. But it shows how
# little a pretty map is worth without a number, and how little a number is worth without knowing what it asks.
#
# What is said here holds wherever the notebook runs:

# %%
assert CLS == 282
assert {285, 281} <= set(probabilities.topk(4).indices.tolist())
for found in maps.values():
    assert found.shape == heat.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
assert set(xf.METHODS) - set(maps) == {"legrad", "attention_rollout", "chefer", "agcam"}
for name in (
    "gradcam", "layercam", "scorecam", "ablationcam", "groupcam", "rise", "integrated_gradients", "randomcam",
):  # fmt: skip
    assert scores[name][0] > scores["chance"][0] + 0.02
for name in ("gradcam", "layercam", "scorecam", "ablationcam", "groupcam", "rise"):
    assert scores[name][1] > scores["chance"][1] + 0.1
assert scores["integrated_gradients"][1] < scores["gradcam"][1] - 0.1
assert torch.equal(maps["gradcam"], heat)
