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
# # Compose: a method of your own
#
# Most methods of this family differ in one line: how a channel is weighted. That line is all that has to be written.
# Batches, classes, targets, several classes at once, derivatives, the command line, the evaluation, and the checks that find
# out whether it keeps its promises, come with it.

# %%
import functools
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
import skimage.io
import torch
from torch import Tensor

import xcam_fn as xf
from xcam_fn.cli import main
from xcam_fn.testing import check_method

net = xf.models.load("lite0")
x, picture = xf.images.prepare(skimage.data.chelsea(), net.preset)
dog, other = xf.images.prepare(skimage.data.astronaut(), net.preset)

# %% [markdown]
# ## An idea
#
# Grad-CAM averages the gradient over all places. But at most places of most channels there is next to nothing, and the
# gradient there speaks of what would happen if there were something. So let a channel be weighted by the gradient at
# its own peak, where it has actually found something.


# %%
def peak(A: Tensor, G: Tensor) -> Tensor:
    """The gradient at each channel's strongest position, (B, K)."""
    strongest = A.flatten(2).argmax(2, keepdim=True)
    return G.flatten(2).gather(2, strongest).squeeze(2)


peakcam = xf.from_gradients(
    peak, name="peakcam", title="Peak-CAM", summary="the gradient at each channel's peak"
)

# %% [markdown]
# Three lines, and it is a method like any other:

# %%
both = torch.cat([x, dog])
one = peakcam(net.model, None, x)  # the predicted class
batch = peakcam(net.model, None, both, cls=[282, 652])  # one class for each image
several = peakcam(net.model, None, x, cls=[[281, 282, 285]])  # three classes of one image
why = peakcam(net.model, "_blocks.10", x, cls=lambda y: y[:, 282] - y[:, 285])  # this cat and not that one
print(*(tuple(found.shape) for found in (one, batch, several, why)))

# %% [markdown]
# At the last layer of this network it has to be Grad-CAM: what comes after is pooling and one linear layer, so that the
# gradient is the same at every place. An earlier layer is where the two part.

# %%
LAYER = "_blocks.10"
rows = [
    {f"{title}, {layer}": method(net.model, layer, x) for title, method in
     {"Grad-CAM": xf.gradcam, "Peak-CAM": peakcam, "Layer-CAM": xf.layercam}.items()}
    for layer in ("_swish", LAYER)
]  # fmt: skip
xf.plot.grid(picture, rows)

# %% [markdown]
# ## Does it keep its promises?
#
# `check_method` runs the battery that every method of the library passes: a batch equals its images, several classes
# equal one at a time, channels may come in any order, threads share a model, nothing is left behind …

# %%
check_method(peakcam)

# %% [markdown]
# It passes. A weighting that seems as harmless does not: dividing by the largest gradient *of the batch* makes an image's
# map depend on its neighbors. The failure says so.


# %%
def relative(A: Tensor, G: Tensor) -> Tensor:
    """A mistake: the batch's largest gradient decides which of an image's gradients count."""
    return (G - 0.1 * G.abs().max()).relu().mean((2, 3))


failure = ""
try:
    check_method(xf.from_gradients(relative))
except AssertionError as error:
    failure = str(error)
print(failure)

# %% [markdown]
# ## With keywords
#
# Keywords of the function become the method's, are checked by name, and can be set once and for all:


# %%
def soft_peak(A: Tensor, G: Tensor, sharpness: float = 1.0) -> Tensor:
    """The gradient averaged with softmax(sharpness · A) as weights: 0 is Grad-CAM, ∞ is the peak, (B, K)."""
    share = (sharpness * A.flatten(2)).softmax(2)
    return (share * G.flatten(2)).sum(2)


softpeakcam = xf.from_gradients(soft_peak, name="softpeakcam", title="Soft-Peak-CAM")
check_method(softpeakcam, sharpness=2.0)
sharpness = {
    f"sharpness {value:g}": softpeakcam(net.model, LAYER, x, sharpness=value) for value in (0.0, 1.0, 1e6)
}
xf.plot.heatmaps(picture, sharpness)

# %% [markdown]
# ## Beside the others
#
# Wherever the name of a method goes, the method goes as well: into metrics, into `evaluate.run`, into `explain_all`, which
# computes features and gradients once for all three of these.

# %%
named = {
    "gradcam": xf.gradcam,
    "peakcam": peakcam,
    "softpeakcam": functools.partial(softpeakcam, sharpness=3.0),
}
maps = xf.explain_all(net.model, LAYER, x, 282, named)
drops = {name: float(xf.average_drop(net.model, x, heat, 282)) for name, heat in maps.items()}
for name, drop in drops.items():
    print(f"{name:12} average drop {drop:.3f}")

# %% [markdown]
# ## On the command line
#
# The command takes it as well: a file with the method in it, a colon, and the method's name. What follows is what
# `xcam explain cat.png --methods gradcam my_methods.py:peakcam` does.

# %%
folder = Path(tempfile.mkdtemp())
skimage.io.imsave(folder / "cat.png", skimage.data.chelsea())
(folder / "my_methods.py").write_text(
    """
import xcam_fn as xf


def peak(A, G):
    strongest = A.flatten(2).argmax(2, keepdim=True)
    return G.flatten(2).gather(2, strongest).squeeze(2)


peakcam = xf.from_gradients(peak, name="peakcam", title="Peak-CAM")
"""
)
status = main(
    ["explain", str(folder / "cat.png"), "--methods", "gradcam", f"{folder / 'my_methods.py'}:peakcam",
     "--output", str(folder / "explained"), "--save-maps"]
)  # fmt: skip
written = sorted(path.name for path in (folder / "explained").iterdir())
print(*written)

# %% [markdown]
# ## Fusions
#
# Two maps that err in different ways are better together. Any gradient method and any perturbation method fuse by name, in
# Python and in the command (`xcam explain --example --methods layercam+ablationcam`); parts may be methods of your own.

# %%
fused = {
    "Layer-CAM + Ablation-CAM": xf.find_method("layercam+ablationcam")(net.model, None, x),
    "Peak-CAM + Group-CAM": xf.fusioncam(net.model, None, x, gradient=peakcam, region="groupcam"),
}

# %% [markdown]
# And the way in which they are fused can be yours as well. `xf.gain` asks the network how much of the class a heatmap shows; a
# fusion is then arithmetic. Here, the geometric mean, which keeps only what both parts show, each to the power of what it gained:


# %%
def geometric(D: Tensor, R: Tensor, gains: Tensor) -> Tensor:
    """Heatmaps D and R (B, h, w), and what each gains (2, B), to one heatmap."""
    share = gains.relu() / gains.relu().sum(0).clamp(min=1e-12)
    return xf.heatmap(D ** share[0, :, None, None] * R ** share[1, :, None, None], tuple(D.shape[1:]))


D, R = xf.layercam(net.model, None, x, 282), xf.groupcam(net.model, None, x, 282)
gain = xf.gain(net.model, x, 282)
fused["geometric"] = geometric(D, R, gain(D, R))
xf.plot.heatmaps(picture, fused)

# %% [markdown]
# The claims of this notebook:

# %%
assert torch.allclose(one, xf.gradcam(net.model, None, x), atol=1e-4)  # pooling and one linear layer
assert not torch.allclose(peakcam(net.model, LAYER, x), xf.gradcam(net.model, LAYER, x), atol=0.1)
assert torch.allclose(batch[:1], peakcam(net.model, None, x, cls=282), atol=1e-4)
assert torch.allclose(several[:, 1], peakcam(net.model, None, x, cls=282), atol=1e-4)
assert "batch" in failure or "image" in failure
assert status == 0
assert written == ["cat.png", "cat_gradcam.npy", "cat_peakcam.npy"]
saved = torch.from_numpy(np.load(folder / "explained" / "cat_peakcam.npy"))
assert torch.allclose(saved, one[0], atol=1e-4)
assert torch.allclose(sharpness["sharpness 0"], xf.gradcam(net.model, LAYER, x), atol=1e-3)
assert torch.allclose(sharpness["sharpness 1e+06"], peakcam(net.model, LAYER, x), atol=1e-3)
assert all(float(heat.min()) >= 0 and float(heat.max()) <= 1 for heat in fused.values())
