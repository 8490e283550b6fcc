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
# # Training through the explanation
#
# A heatmap of `xcam_fn` is a differentiable function of the image and of the parameters, so it can be part of a loss. Here a
# network is trained on pictures with two cues to the class: an object, and a small colored patch in the corner, unrelated to the
# object. The patch is easier to learn, so the network learns the patch, and fails when the patch has the other color. One
# more term in the loss penalizes the Grad-CAM map outside the object, and the network learns the object instead: *right for
# the right reasons* (Ross et al., arXiv:1703.03717), with the map of a convolution instead of the input's gradient.

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

import xcam_fn as xf

SIZE = 32


def pictures(count: int, seed: int, *, patch: str = "tells") -> tuple[Tensor, Tensor, Tensor]:
    """Disks (class 0) and crosses (class 1) on noise, labels and masks: (N, 3, 32, 32), (N,), (N, 32, 32).

    The patch in the corner is red for disks and blue for crosses; with patch="lies" the colors are swapped.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=generator)
    center = torch.randint(15, 25, (count, 2, 1, 1), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    down, right = (rows - center[:, 0]).abs(), (columns - center[:, 1]).abs()
    disk = down**2 + right**2 <= 16
    cross = ((down <= 1) | (right <= 1)) & (down <= 5) & (right <= 5)
    shape = torch.where(label[:, None, None] == 0, disk, cross)
    x = 0.6 * torch.randn(count, 3, SIZE, SIZE, generator=generator) + 1.2 * shape[:, None]
    color = label if patch == "tells" else 1 - label
    x[:, :, 1:6, 1:6] = 0
    x[torch.arange(count), 2 * color, 1:6, 1:6] = 3
    inside = (down <= 7) & (right <= 7)
    return x, label, inside


def network(seed: int) -> nn.Sequential:
    """Three convolutions, pooling and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
        ).eval()  # fmt: skip


LAYER = "7"  # the last convolution's activation, 32 maps of 8 x 8

# %% [markdown]
# The added loss takes one line to compute the map and one to compare it. `create_graph=True` keeps the graph of the map's
# computation, so `loss.backward()` reaches the parameters.


# %%
def outside(model: nn.Module, x: Tensor, label: Tensor, inside: Tensor) -> Tensor:
    """The mean squared Grad-CAM map of both classes outside the object."""
    small = F.max_pool2d(inside[:, None].float(), 4)[:, 0]
    both = torch.stack([label, 1 - label], 1)
    cam = xf.gradcam(model, LAYER, x, both, postprocess=None, create_graph=True)
    return (cam * (1 - small)[:, None]).square().sum((1, 2, 3)).mean()


def train(weight: float, seed: int = 0, steps: int = 170) -> nn.Module:
    x, label, inside = pictures(2048, seed=1)
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    order = torch.Generator().manual_seed(2)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=order)
        loss = F.cross_entropy(model(x[batch]), label[batch])
        if weight:
            loss = loss + weight * outside(model, x[batch], label[batch], inside[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, patch: str) -> float:
    x, label, _ = pictures(1000, seed=3, patch=patch)
    return float((model(x).argmax(1) == label).float().mean())


ordinary, guided = train(0.0), train(1.0)
figures = {
    name: (accuracy(model, "tells"), accuracy(model, "lies"))
    for name, model in {"ordinary": ordinary, "with the map's loss": guided}.items()
}
for name, (same, moved) in figures.items():
    print(f"{name:20}  accuracy with the training patch {same:.1%}, with the swapped patch {moved:.1%}")

# %% [markdown]
# The ordinary network is nearly perfect with the training patch, and nearly always wrong with the swapped one. The guided network
# hardly depends on the patch. The heatmaps agree:

# %%
x, label, _ = pictures(4, seed=7, patch="lies")
figure, axes = plt.subplots(3, 4, figsize=(8, 6), layout="constrained")
for column in range(4):
    axes[0, column].imshow(((x[column] + 1) / 4).clamp(0, 1).permute(1, 2, 0))
    axes[0, column].set_title(["disk", "cross"][int(label[column])])
for row, (name, model) in enumerate({"ordinary": ordinary, "guided": guided}.items(), 1):
    for column, heatmap in enumerate(xf.gradcam(model, LAYER, x)):
        axes[row, column].imshow(heatmap)
    axes[row, 0].set_ylabel(name)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The same with `torch.func.grad`
#
# Nothing above depends on `backward`. Here the parameters are an argument, `functional_call` inserts them into the model, and
# `grad` returns the same gradients that `backward` stores in `.grad`.


# %%
class Outside(nn.Module):
    """The added loss as a module around the model, for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, label: Tensor, inside: Tensor) -> Tensor:
        return outside(self.model, x, label, inside)


batch = pictures(16, seed=4)
wrapped = Outside(guided)
parameters = {name: value.detach() for name, value in wrapped.named_parameters()}
by_transform = grad(lambda values: functional_call(wrapped, values, batch))(parameters)
guided.zero_grad()
wrapped(*batch).backward()
by_backward = {name: value.grad for name, value in wrapped.named_parameters() if value.grad is not None}
largest = max(float((by_transform[name] - value).abs().max()) for name, value in by_backward.items())
print(f"{len(by_backward)} gradients, largest difference {largest:.1e}")

# %% [markdown]
# Checks of this notebook's figures:

# %%
assert figures["ordinary"][0] > 0.98
assert figures["ordinary"][1] < 0.2
assert figures["with the map's loss"][0] > 0.9
assert figures["with the map's loss"][1] > 0.9
assert largest < 1e-5
