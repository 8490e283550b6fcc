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

STYLE = {"alpha": 0.8, "alpha_follows_heatmap": True}

net = xf.models.load("lite0")
x, picture = xf.images.prepare(skimage.data.chelsea(), net.preset)
probabilities = net.model(x).softmax(1)[0].detach()
for probability, index in zip(*(part.tolist() for part in probabilities.topk(4)), strict=True):
    print(f"{probability:6.1%}  {net.categories[index]}")

# %% [markdown]
# All four are cats: the network knows what is in the picture, and hesitates about the breed. Whatever follows explains
# the likeliest of them.
#
# One call makes a heatmap. The first argument is the model, just as it is; the second the layer whose maps are used, where
# `None` is the last one that has places; the third the batch; the fourth the class.

# %%
CLS = int(probabilities.argmax())
heat = xf.gradcam(net.model, None, x, CLS)
print(tuple(heat.shape), f"from {float(heat.min()):.0f} to {float(heat.max()):.0f}")
xf.plot.heatmaps(picture, {"Grad-CAM": heat}, **STYLE)

# %% [markdown]
# The cheek and the nose. Next, every other method. All are called alike, so a loop over the registry is
# enough; `explain_all` is that loop, with whatever several of them need computed once. Methods that draw samples are given
# few here, so that the notebook takes seconds: RISE with its 4,000 masks looks smoother than with 200, and with one
# sample IS-CAM is Score-CAM.
#
# A method may refuse a network of a kind that it was not made for, and then says why.

# %%
BUDGET = {"num_samples": 1, "num_masks": 200, "steps": 10}
EXPENSIVE = ("perturbation", "fusion")

methods, refusals = {}, {}
for name in xf.METHODS:
    method = xf.find_method(name, **BUDGET)
    try:
        if method.family not in EXPENSIVE:
            method(net.model, None, x, CLS)
        methods[name] = method
    except ValueError as error:
        refusals[name] = str(error)
maps = xf.explain_all(net.model, None, x, CLS, methods)
for name, reason in refusals.items():
    print(f"{name}: {reason}")

# %%
COLUMNS = 5
count = -(-len(maps) // COLUMNS)
figure, axes = plt.subplots(count, COLUMNS, figsize=(11, 2.4 * count), layout="constrained", squeeze=False)
for axis in axes.flat:
    axis.axis("off")
for axis, (name, found) in zip(axes.flat, maps.items(), strict=False):
    axis.imshow(xf.plot.overlay(picture, found, **STYLE))
    axis.set_title(methods[name].title, fontsize=9)
plt.show()

# %% [markdown]
# They agree on the face, and not on much else. Those that weight channels have the layer's resolution, 7 × 7; RISE, which
# knows nothing of layers, has blobs wherever its masks happened to lie; integrated gradients, which look at pixels, find
# the outlines of eyes and stripes.
#
# ## Which one is right?
#
# That the maps differ means that looking at them proves nothing. So the network is asked: pixels are taken away in
# the order of a map, the most relevant first, and a map that found what matters makes the probability fall at
# once (*deletion*, low is good). Or they are shown in that order (*insertion*, high is good). A map of random numbers goes
# along: what does not beat it has explained nothing.

# %%
chance = torch.rand(heat.shape, generator=torch.Generator().manual_seed(0))
scores = {
    name: (
        float(xf.insertion(net.model, x, found, CLS, steps=16).auc),
        float(xf.deletion(net.model, x, found, CLS, steps=16).auc),
    )
    for name, found in {**maps, "chance": chance}.items()
}
ranked = sorted(scores, key=lambda name: scores[name][0] - scores[name][1], reverse=True)
print(f"{'':24} insertion  deletion")
for name in ranked:
    print(f"{name:24} {scores[name][0]:9.3f} {scores[name][1]:9.3f}")

# %%
figure, axis = plt.subplots(figsize=(7, 5.5), layout="constrained")
for name, (insertion, deletion) in scores.items():
    axis.scatter(deletion, insertion, color="black" if name == "chance" else "tab:blue", zorder=2)
    axis.annotate(name, (deletion, insertion), xytext=(4, 3), textcoords="offset points", fontsize=7)
axis.set(xlabel="deletion (low is good)", ylabel="insertion (high is good)", title="one photograph")
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# One photograph decides nothing; [the third notebook](03_evaluate.py) takes several, with intervals. But it shows how
# little a pretty map is worth without a number, and that the two numbers do not ask the same: a map of outlines
# makes the network forget the class sooner than a map of regions, because the network needs the outlines.
#
# What is said here holds wherever the notebook runs:

# %%
assert CLS == 282
assert {285, 281} <= set(probabilities.topk(4).indices.tolist())
for found in maps.values():
    assert found.shape == heat.shape
    assert 0 <= float(found.min()) and float(found.max()) <= 1
assert scores["integrated_gradients"][1] < min(scores["gradcam"][1], scores["chance"][1])
assert torch.equal(maps["gradcam"], heat)
