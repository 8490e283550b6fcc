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
# A network classifies a photograph as *tiger cat*. Which parts of the photograph led to that? This notebook explains one
# photograph with every method of the library, and then measures on the network how good the explanations are.

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
# The top four are all cats: the network recognizes the animal but is unsure of the breed. Everything below explains the
# most likely class.
#
# One call makes a heatmap. Its arguments are the model, unmodified; the layer to explain, where `None` is the last layer
# with spatial positions; the batch; and the class.

# %%
CLS = int(probabilities.argmax())
heat = xf.gradcam(net.model, None, x, CLS)
print(tuple(heat.shape), f"from {float(heat.min()):.0f} to {float(heat.max()):.0f}")
xf.plot.heatmaps(picture, {"Grad-CAM": heat})

# %% [markdown]
# The map highlights the cheek and the nose. Next, every other method. All methods have the same signature, so a loop over the
# registry is enough; `explain_all` is that loop, and computes shared work only once. To keep the notebook fast, sampling methods
# use few samples, methods that mask channels use 64 of the 1,280, and fusion methods use Group-CAM's map. RISE with its default of
# 4,000 masks would look smoother than with 200, and with one sample IS-CAM equals Score-CAM.
#
# `explain_all` leaves out methods whose required structure the network does not have: LeGrad and three others need attention. Calling
# such a method directly raises a `StructureError`.

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
    # Pixel-level maps are clipped at their 99th percentile; otherwise they would be invisible.
    shown = (found / found.quantile(0.99)).clamp(max=1) if found.mean() < 0.05 else found
    axis.imshow(xf.plot.overlay(picture, shown))
    axis.set_title(xf.METHODS[name].title.replace(" Feature", "\nFeature"), fontsize=9)
plt.show()

# %% [markdown]
# The maps agree on the face, and on little else. Methods that weight channels have the layer's resolution, 7 × 7. RISE uses no layer,
# and has blobs where its random masks happened to lie. Integrated gradients and guided backprop work on pixels, and show the
# outlines of eyes and stripes. Many maps are nearly identical, as theory predicts: only pooling and one linear layer follow this layer,
# and then Grad-CAM, CAM, HiResCAM, XGrad-CAM and others are equal. Random-CAM explains nothing, yet looks as convincing as the
# rest.
#
# ## Which one is right?
#
# The maps differ, and a visual check cannot tell which is right. So test them on the network: remove pixels in the order of a map,
# the most relevant first. If the map is right, the probability falls quickly (*deletion*, lower is better). Or reveal pixels in
# that order (*insertion*, higher is better). Below are twelve maps of different kinds, and a map of random numbers as a baseline.

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
    axis.scatter([deletion], [row], color="tab:red", label="deletion, lower is better" if row == 0 else None)
    axis.scatter(
        [insertion], [row], color="tab:blue", label="insertion, higher is better" if row == 0 else None
    )
axis.set(
    yticks=range(len(ranked)), yticklabels=reversed(ranked), xlabel="area under the curve", xlim=(0, None)
)
axis.grid(axis="x", alpha=0.3)
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# In insertion, every region map beats chance: the network needs the face. But so does Random-CAM, which weights channels at
# random: at the last layer nearly every channel is active on the face. Only a method that beats Random-CAM has shown something.
# In deletion, chance beats all region maps. This is a property of the metric: scattered holes disturb a network more than one large
# hole, wherever it is. So deletion cannot compare pixel maps with region maps. Integrated gradients and guided backprop are scattered
# too, and score well in both.
#
# One photograph decides nothing; [the third notebook](03_evaluate.ipynb) uses several, with intervals. But this one shows that a
# heatmap means little without a score, and a score means little unless you know what it measures.
#
# The following checks hold on every machine:

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
