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
# # From other libraries
#
# If you have code for pytorch-grad-cam, TorchCAM, Captum or XplainCAM, this notebook shows how to port it: first their code, then
# ours, then the largest difference between the two maps. If a library departs from the paper, `variant=` follows the library, so
# you can reproduce published numbers before you change anything.
#
# In every case you no longer need an object that hooks the model, a `with` block around it, a fixed order of calls, or a graph kept
# for `backward`.

# %%
import copy

import pytorch_grad_cam
import skimage.data
import torch
import torchcam.methods
import torchvision
from captum.attr import IntegratedGradients, LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch.nn import functional as F

import xcam_fn as xf

net = xf.models.load("lite0")
model = net.model
x, picture = xf.images.prepare(skimage.data.chelsea(), net.preset)
LAYER, CLS = "_blocks.15", 282

# Libraries that hook a model get a copy. (Ours never modifies the model, so it needs no copy.)
hooked = copy.deepcopy(model)
module = hooked.get_submodule(LAYER)
differences, pictures = {}, {}


def compared(name, theirs, ours):
    """Record the largest difference between two maps (1, h, w) in [0, 1], and draw both."""
    differences[name] = float((torch.as_tensor(theirs) - ours).abs().max())
    pictures[f"{name}: theirs"], pictures["ours"] = theirs, ours
    figure = xf.plot.heatmaps(picture, pictures)
    pictures.clear()
    print(f"{name}: largest difference {differences[name]:.1e}")
    return figure


def as_heatmap(raw):
    """Apply ReLU, resizing and min-max scaling, for libraries that leave this to the user."""
    return xf.heatmap(raw.detach(), tuple(x.shape[2:]))


# %% [markdown]
# ## pytorch-grad-cam
#
# Theirs:

# %%
with pytorch_grad_cam.GradCAM(hooked, [module]) as cam:
    theirs = cam(x, [ClassifierOutputTarget(CLS)])

# %% [markdown]
# Ours:

# %%
ours = xf.gradcam(model, LAYER, x, CLS)

compared("pytorch-grad-cam, GradCAM", theirs, ours)

# %% [markdown]
# Theirs is a numpy array, ours a tensor; both are (B, h, w) in [0, 1]. Instead of a list of layers, use `xf.multi_layer(method, layers)`; instead of
# `targets`, use the argument `cls`, which also takes any function of the output.
#
# Their Grad-CAM++ differs from the paper (see *What other libraries compute* in the documentation). Their definition:

# %%
with pytorch_grad_cam.GradCAMPlusPlus(hooked, [module]) as cam:
    theirs = cam(x, [ClassifierOutputTarget(CLS)])
ours = xf.find_method("gradcam_pp", variant="pytorch-grad-cam")(model, LAYER, x, CLS)

papers = xf.gradcam_pp(model, LAYER, x, CLS)

compared("pytorch-grad-cam, GradCAMPlusPlus", theirs, ours)

# %% [markdown]
# Eigen-CAM has no class. Unlike the paper, theirs centers the channels before it computes their first component, and its sign is
# whatever the solver returns; ours is fixed. Instead of `eigen_smooth=True`, use `xf.eigen_smooth(method)`; instead of
# `aug_smooth=True`, use `xf.smooth(method)`.

# %%
with pytorch_grad_cam.EigenCAM(hooked, [module]) as cam:
    theirs = cam(x, [ClassifierOutputTarget(CLS)])
ours = xf.find_method("eigencam", variant="pytorch-grad-cam")(model, LAYER, x)
negative = xf.heatmap(-xf.eigencam(model, LAYER, x, center=True, postprocess=None), tuple(x.shape[2:]))
turned = (torch.as_tensor(theirs) - ours).abs().max() > (torch.as_tensor(theirs) - negative).abs().max()
print("their sign is", "the opposite of ours" if turned else "the same as ours")

compared("pytorch-grad-cam, EigenCAM", theirs, negative if turned else ours)

# %% [markdown]
# ## TorchCAM
#
# Theirs. The forward pass has to run after the extractor is created and before it is called, and its graph has to stay alive:

# %%
with torchcam.methods.LayerCAM(hooked, LAYER) as extractor:
    output = hooked(x)
    (raw,) = extractor(CLS, output, normalized=False)
theirs = as_heatmap(raw)

# %% [markdown]
# Ours:

# %%
ours = xf.layercam(model, LAYER, x, CLS)

compared("TorchCAM, LayerCAM", theirs, ours)

# %% [markdown]
# TorchCAM's `normalized=True` map has the layer's size. Our `postprocess=None` map has that size too, before normalization. Several
# extractors on one model add several sets of hooks; our calls are independent.
#
# Their Score-CAM weights channels by a softmax of the logit's increase. To save time, both explain a small picture:

# %%
small = F.interpolate(x, size=(96, 96), mode="bilinear", align_corners=False)
with torchcam.methods.ScoreCAM(hooked, LAYER, batch_size=32) as extractor, torch.no_grad():
    hooked(small)
    (raw,) = extractor(CLS, normalized=False)
theirs = xf.heatmap(raw, (96, 96))
ours = xf.find_method("scorecam", variant="torchcam")(model, LAYER, small, CLS)
differences["TorchCAM, ScoreCAM"] = float((theirs - ours).abs().max())
print(f"largest difference {differences['TorchCAM, ScoreCAM']:.1e}")

# %% [markdown]
# LeGrad is for transformers; a small one with random weights is enough to compare. TorchCAM needs a function that maps a block's
# tokens to scores; ours finds the head itself.

# %%
torch.manual_seed(0)
vit = torchvision.models.VisionTransformer(64, 16, 3, 2, 32, 64).eval()
torch.nn.init.normal_(vit.get_submodule("heads.head").get_parameter("weight"))
patches = torch.randn(1, 3, 64, 64)
with torchcam.methods.LeGrad(
    copied := copy.deepcopy(vit),
    list(copied.encoder.layers),
    score_projection=lambda tokens: copied.heads(copied.encoder.ln(tokens)[:, 0]),
) as extractor:
    output = copied(patches)
    (raw,) = extractor(3, output, normalized=False)
theirs = xf.heatmap(raw.detach(), (64, 64))
ours = xf.legrad(vit, None, patches, 3)
differences["TorchCAM, LeGrad"] = float((theirs - ours).abs().max())
print(f"largest difference {differences['TorchCAM, LeGrad']:.1e}")

# %% [markdown]
# ## Captum
#
# Theirs, which leaves upsampling and scaling to the user:

# %%
raw = LayerGradCam(hooked, module).attribute(x, target=CLS, relu_attributions=True)
theirs = as_heatmap(raw[:, 0])

# %% [markdown]
# Ours:

# %%
ours = xf.gradcam(model, LAYER, x, CLS)

compared("Captum, LayerGradCam", theirs, ours)

# %% [markdown]
# Integrated gradients, both with the mean color as the baseline, which is 0 after normalization. Captum returns three channels
# of signed attributions; `postprocess=None` returns their sum. Ours chooses the weight of each interval to make the attributions
# add up to the difference of the scores, so the two agree closely but not exactly.

# %%
signed = IntegratedGradients(model).attribute(x, target=CLS, n_steps=24, internal_batch_size=8).sum(1)
own = xf.integrated_gradients(model, None, x, CLS, steps=24, postprocess=None)
with torch.no_grad():
    expected = float(model(x)[0, CLS] - model(torch.zeros_like(x))[0, CLS])
alike = float(torch.corrcoef(torch.stack([signed.flatten(), own.flatten()]))[0, 1])
print(f"correlation {alike:.4f}")
print(
    f"the scores differ by {expected:.4f}; Captum's sum {float(signed.sum()):.4f}, ours {float(own.sum()):.4f}"
)

# %% [markdown]
# ## XplainCAM
#
# XplainCAM's code is only shown, not run. From its README:
#
# ```text
# with GradCAM(model, target_layer=None) as cam_extractor:
#     output = model(input_tensor)
#     cam = cam_extractor(input_tensor, class_idx=CAT_CLASS)
# visualize_cam(img=img_show, cams={"GradCAM": cam})
#
# metric = AvgDropConf(model, cam, input_tensor, class_idx=CAT_CLASS)
# InsertionDeletion(model=model).compute(image=input_tensor, heatmap=cam, mode="Insertion", return_steps=True)
# ```
#
# | XplainCAM | xcam_fn |
# |---|---|
# | `GradCAM(model, target_layer=None)` | `xf.gradcam(model, None, x, cls)`, a function instead of each class |
# | `class_idx=` | `cls`, one for each image of a batch |
# | `visualize_cam(img, cams)` | `xf.plot.heatmaps(picture, maps)` |
# | `AvgDropConf(…).summary()` | `xf.average_drop(model, x, heat, cls)`, `xf.increase_in_confidence(…)` |
# | `InsertionDeletion(…).compute(…, mode="Insertion")` | `xf.insertion(model, x, heat, cls)`, `xf.deletion(…)` |
# | `plot_curves(…)` | `xf.plot.curves({"Grad-CAM": curve}, picture, heat)` |
#
# Ours; the library's tests compare these maps with XplainCAM's own:

# %%
variants = {
    name: xf.find_method(name, variant="xplaincam")(model, LAYER, x, CLS)
    for name in ("gradcam", "gradcam_pp", "layercam")
}
xf.plot.heatmaps(picture, variants)

# %% [markdown]
# ## Summary

# %%
for name, difference in differences.items():
    print(f"{name:36} {difference:.1e}")

assert max(differences.values()) < 2e-3
assert (
    float(
        (papers - xf.find_method("gradcam_pp", variant="pytorch-grad-cam")(model, LAYER, x, CLS)).abs().max()
    )
    > 1e-3
)
assert alike > 0.85
assert abs(float(own.sum()) - expected) < 1e-2 * abs(expected)
assert torch.equal(variants["gradcam"], xf.gradcam(model, LAYER, x, CLS))
