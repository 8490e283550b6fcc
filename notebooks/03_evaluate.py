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
# # Evaluate: which method, and how sure?
#
# One photograph proves nothing about a method. This notebook makes a small data set, evaluates four methods on it, and
# asks how far the answer can be trusted. It is what `xcam evaluate` and `xcam report` do, step by step.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from PIL import Image

import xcam_fn as xf

# %% [markdown]
# ## A data set
#
# Four photographs come with scikit-image. Each is taken whole and cut, which makes eight pictures in a folder, as a camera
# might leave it; and the network gets them at 160 pixels, so that this notebook takes seconds. A real evaluation has a hundred
# different ones: what these eight can show is how it is done, and how wide intervals are.

# %%
folder = Path(tempfile.mkdtemp())
for name in ("chelsea", "coffee", "astronaut", "rocket"):
    picture = getattr(skimage.data, name)()
    height, width = picture.shape[:2]
    cuts = {"whole": picture, "cut": picture[:, width // 10 : width // 10 + height]}
    for cut, pixels in cuts.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name}_{cut}.jpg", quality=95)

net = xf.models.load("lite0")
net = net._replace(preset=net.preset._replace(crop=160, resize=176))
photographs = xf.dataset.photographs(folder, net.categories)
print(len(photographs), "photographs, such as", photographs[0].name)

# %% [markdown]
# ## The run
#
# Every method on every photograph, three metrics each. Results go into a file as they come, so that a run that is killed goes
# on where it stopped; run again, as here, nothing is done twice.
#
# Two of the four are there to test the test. One weights channels by a pattern that has nothing to do with the class, as a method
# that explains nothing would. The other is Grad-CAM with its sign turned, which points at what speaks *against* the class: if the
# evaluation cannot tell that from Grad-CAM, it is blind.


# %%
def pattern(A, G):
    """Weights that have nothing to do with the class: a fixed pattern of signs."""
    signs = 1.0 - 2.0 * ((A.new_tensor(range(A.shape[1])) * 7) % 5 < 2)
    return signs.expand(A.shape[:2])


def turned(A, G):
    """Grad-CAM's weights with the wrong sign."""
    return -G.mean((2, 3))


METHODS = {
    "gradcam": xf.gradcam,
    "groupcam": xf.groupcam,
    "pattern": xf.from_gradients(pattern, title="pattern"),
    "turned": xf.from_gradients(turned, title="turned"),
}
METRICS = ["average_drop", "insertion", "complexity"]
output = folder / "results"
outcome = xf.evaluate.run(net, photographs, METHODS, METRICS, output=output)
again = xf.evaluate.run(net, photographs, METHODS, METRICS, output=output)
print(f"{outcome.results} results, {outcome.failures} failures")

# %% [markdown]
# ## The table
#
# Means with 95 % bootstrap intervals.

# %%
found = xf.report.read(output)
print(xf.report.markdown(xf.report.table(found)))
means = xf.report.means(found)

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained", sharey=True)
for axis, metric in zip(axes, METRICS, strict=True):
    about = xf.evaluate.METRICS[metric]
    for height, row in enumerate(means.values()):
        mean = row[metric]
        axis.plot(
            [mean.low, mean.high], [height, height], color="tab:blue", linewidth=3, solid_capstyle="round"
        )
        axis.plot(mean.value, height, "o", color="white", markeredgecolor="tab:blue", markersize=7)
    axis.set(yticks=range(len(means)), yticklabels=means, title=f"{about.title}, {about.best} is best")
    axis.grid(axis="x", alpha=0.3)
plt.show()

# %% [markdown]
# ## Is a difference one?
#
# Intervals that overlap do not settle it, as the methods were run on the *same* photographs: some are hard for
# all. So pairs are compared photograph by photograph. `p` is the chance of such a difference were the two alike (signs
# flipped at random), corrected for how many pairs were looked at.

# %%
compared = xf.report.pairs(found)
for pair in compared:
    if pair.metric == "insertion":
        verdict = f"{pair.better} is better" if pair.better else "no telling"
        print(f"{pair.first:10} {pair.second:10} {pair.difference:+.3f}  p = {pair.p:.3f}  {verdict}")

# %% [markdown]
# The turned Grad-CAM is told from both methods, so the evaluation is not blind. But it cannot tell Grad-CAM
# from Group-CAM, nor either of them from a pattern that explains nothing. At this network's last layer nearly all channels are
# about the object, so any of them lands on it, and eight photographs are far too few to see how much
# better a real weighting does. A table without intervals would have named a winner.
#
# The report says so in sentences made from the numbers: methods are ranked on each photograph, and leaders are those whose mean ranks
# are no further from the best than chance allows.

# %%
print(*xf.report.advice(xf.report.board(found)), sep="\n")

# %% [markdown]
# ## Curves
#
# A mean of areas is a thin summary. The curves behind it, the mean over photographs:

# %%
figures = xf.report.figures(found)
figures["insertion"]

# %% [markdown]
# And for one photograph what the network sees on the way: this is what *insertion* means.

# %%
x, picture = xf.images.prepare(folder / "rocket_whole.jpg", net.preset)
heat = xf.groupcam(net.model, None, x)
curve = xf.insertion(net.model, x, heat)
shown = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
scores = np.interp(shown, curve.fractions, curve.scores[0])
xf.plot.frames(picture, heat, fractions=shown, scores=scores)

# %% [markdown]
# ## The page
#
# `report.write` puts all of it into a folder: tables as Markdown and CSV, figures, and `report.html`, one file with the photographs
# on which the methods agree most and least.

# %%
written = xf.report.write(found, output)
print(*(path.name for path in written))

# %% [markdown]
# What this notebook claims:

# %%
assert outcome.photographs == len(photographs) == 8
assert outcome.results == again.results == 8 * len(METHODS)
assert outcome.failures == 0
for pair in compared:
    if pair.metric == "insertion":
        both = {pair.first, pair.second}
        if "turned" not in both:
            assert pair.better is None
        elif "pattern" not in both:
            assert pair.better in both - {"turned"}
assert means["groupcam"]["insertion"].value > means["turned"]["insertion"].value + 0.1
assert (output / "report.html").is_file()
