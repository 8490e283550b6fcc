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
# # Evaluate: which method is best, and how certain is that?
#
# One photograph proves nothing about a method. This notebook makes a small data set, evaluates four methods on it, and
# measures how reliable the result is. These are the steps of `xcam evaluate` and `xcam report`.

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
# The data set is a folder with four photographs from scikit-image, each in full and cropped, which makes eight pictures. The network
# gets them at 160 pixels, to keep this notebook fast. A real evaluation uses a hundred different photographs; these eight show how
# to run one, and how wide the intervals are.

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
# The run scores every method on every photograph with three metrics. It writes results to a file as it goes, so a run that is killed
# continues where it stopped. The second run below finds everything done and computes nothing.
#
# Two of the four methods test the evaluation itself. `pattern` weights channels by a pattern unrelated to the class, so it explains
# nothing. `turned` is Grad-CAM with its sign flipped, which highlights evidence *against* the class: an evaluation that cannot
# distinguish it from Grad-CAM is useless.


# %%
def pattern(A, G):
    """Weights unrelated to the class: a fixed pattern of signs."""
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
# ## Is a difference significant?
#
# Overlapping intervals do not answer this: all methods ran on the *same* photographs, and some photographs are hard for every
# method. So methods are compared in pairs, photograph by photograph. `p` is the probability of a difference this large if the two
# were equally good (signs flipped at random), corrected for the number of pairs.

# %%
compared = xf.report.pairs(found)
for pair in compared:
    if pair.metric == "insertion":
        verdict = f"{pair.better} is better" if pair.better else "not significant"
        print(f"{pair.first:10} {pair.second:10} {pair.difference:+.3f}  p = {pair.p:.3f}  {verdict}")

# %% [markdown]
# `turned` is significantly worse than both real methods, so the evaluation can detect a bad one. But it cannot distinguish
# Grad-CAM from Group-CAM, or either from a pattern that explains nothing. At this network's last layer nearly all channels are active
# on the object, so almost any weighting highlights it, and eight photographs are far too few to show how much better a real weighting
# is. A table without intervals would have named a winner.
#
# The report draws these conclusions in sentences generated from the numbers. It ranks the methods on each photograph; leaders are the
# methods whose mean rank is no further from the best than chance allows.

# %%
print(*xf.report.advice(xf.report.board(found)), sep="\n")

# %% [markdown]
# ## Curves
#
# A mean area says little about the shape of the curves. Here are the curves, averaged over photographs:

# %%
figures = xf.report.figures(found)
figures["insertion"]

# %% [markdown]
# And for one photograph, the images that the network sees during *insertion*:

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
# `report.write` saves everything in a folder: tables as Markdown and CSV, figures, and `report.html`, a single file that also shows
# the photographs on which the methods agree most and least.

# %%
written = xf.report.write(found, output)
print(*(path.name for path in written))

# %% [markdown]
# Checks of this notebook's claims:

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
