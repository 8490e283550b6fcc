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
# Most gradient methods differ in one line: how they weight a channel. That line is all you write. The library adds batches,
# classes, targets, several classes at once, derivatives, the command line, the evaluation, and the checks that every method
# has to pass.

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
# Grad-CAM averages the gradient over all positions. But most channels are nearly zero at most positions, and there the
# gradient describes a feature that is absent. Instead, weight each channel by the gradient at its peak, where the feature
# is present.


# %%
def peak(A: Tensor, G: Tensor) -> Tensor:
    """The gradient at each channel's strongest position, (B, K)."""
    strongest = A.flatten(2).argmax(2, keepdim=True)
    return G.flatten(2).gather(2, strongest).squeeze(2)


peakcam = xf.from_gradients(
    peak, name="peakcam", title="Peak-CAM", summary="the gradient at each channel's peak"
)

# %% [markdown]
# With these three lines it is a method like any other:

# %%
both = torch.cat([x, dog])
one = peakcam(net.model, None, x)  # the predicted class
batch = peakcam(net.model, None, both, cls=[282, 652])  # one class for each image
several = peakcam(net.model, None, x, cls=[[281, 282, 285]])  # three classes of one image
why = peakcam(net.model, "_blocks.10", x, cls=lambda y: y[:, 282] - y[:, 285])  # why 282 and not 285
print(*(tuple(found.shape) for found in (one, batch, several, why)))

# %% [markdown]
# At the last layer of this network, Peak-CAM equals Grad-CAM: only pooling and one linear layer follow, so the gradient is the
# same at every position. At an earlier layer the two differ.

# %%
LAYER = "_blocks.10"
rows = [
    {f"{title}, {layer}": method(net.model, layer, x) for title, method in
     {"Grad-CAM": xf.gradcam, "Peak-CAM": peakcam, "Layer-CAM": xf.layercam}.items()}
    for layer in ("_swish", LAYER)
]  # fmt: skip
xf.plot.grid(picture, rows)

# %% [markdown]
# ## Is it correct?
#
# `check_method` runs the checks that every method of the library passes: a batch gives the same maps as its images one by
# one, and several classes the same as one class at a time; the order of channels does not matter; threads can share a model; a
# call leaves nothing behind; and more.

# %%
check_method(peakcam)

# %% [markdown]
# It passes. The next weighting looks just as harmless, but fails: its threshold is a fraction of the largest gradient *of the
# batch*, so an image's map depends on the other images. The failure says so.


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
# The function's keywords become the method's. Their names are checked, and you can set them once, in advance:


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
# ## With other methods
#
# Everything that takes a method's name also takes the method itself: metrics, `evaluate.run`, and `explain_all`, which here
# computes features and gradients once for all three methods.

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
# The command takes it as well, as the file that defines the method, a colon, and the method's name. The next cell runs
# `xcam explain cat.png --methods gradcam my_methods.py:peakcam`.

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
# Two maps with different errors can complement each other. Any gradient method and any perturbation method can be fused by name,
# in Python and in the command (`xcam explain --example --methods layercam+ablationcam`), your own methods included.

# %%
fused = {
    "Layer-CAM + Ablation-CAM": xf.find_method("layercam+ablationcam")(net.model, None, x),
    "Peak-CAM + Group-CAM": xf.fusioncam(net.model, None, x, gradient=peakcam, region="groupcam"),
}

# %% [markdown]
# You can also define the fusion itself. `xf.gain` measures how far the image masked by a heatmap scores above an empty image; the
# fusion is then arithmetic. Here it is the geometric mean weighted by these gains, which keeps only what both maps show:


# %%
def geometric(D: Tensor, R: Tensor, gains: Tensor) -> Tensor:
    """Fuse heatmaps D and R (B, h, w), with their gains (2, B), into one heatmap."""
    share = gains.relu() / gains.relu().sum(0).clamp(min=1e-12)
    return xf.heatmap(D ** share[0, :, None, None] * R ** share[1, :, None, None], tuple(D.shape[1:]))


D, R = xf.layercam(net.model, None, x, 282), xf.groupcam(net.model, None, x, 282)
gain = xf.gain(net.model, x, 282)
fused["geometric"] = geometric(D, R, gain(D, R))
xf.plot.heatmaps(picture, fused)

# %% [markdown]
# Checks of this notebook's claims:

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
