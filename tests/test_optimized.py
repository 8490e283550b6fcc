"""The optimized family: the paper's loop, rows that do not see each other, and what is asked of the score."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf

OBJECTIVES = ("keep", "remove", "both")


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    return networks.seeded(networks.Residual(), seed).double()


def mask_of(cam: Tensor, size: torch.Size) -> Tensor:
    mask = F.interpolate(cam[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return (mask - mask.min()) / (mask.max() - mask.min())


def loop(model: nn.Module, layer: str, image: Tensor, cls: int, objective: str, steps: int) -> Tensor:
    """Opti-CAM of one image, by a hook and `torch.optim.Adam`."""
    model, seen = copy.deepcopy(model), []
    model.get_submodule(layer).register_forward_hook(
        lambda _, __, output: seen.append(output.detach().clone())
    )
    model(image[None])
    A = seen[-1][0].relu()
    u = torch.full((len(A),), 0.5, dtype=A.dtype, requires_grad=True)
    adam = torch.optim.Adam([u], lr=0.1)
    for _ in range(steps):
        mask = mask_of((u.softmax(0)[:, None, None] * A).sum(0), image.shape[1:])
        kept, removed = (model((image * shown)[None])[0, cls] for shown in (mask, 1 - mask))
        adam.zero_grad()
        {"keep": -kept, "remove": removed, "both": removed - kept}[objective].backward()
        adam.step()
    return (u.detach().softmax(0)[:, None, None] * A).sum(0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_opticam_is_the_papers_loop(objective):
    model, x = network(), images()
    options = {"objective": objective, "steps": 12, "postprocess": None}
    found = xf.opticam(model, "conv2", x, [[1, 2], [3, 0]], **options)
    expected = [
        loop(model, "conv2", image, cls, objective, 12)
        for image, row in zip(x, [[1, 2], [3, 0]], strict=True)
        for cls in row
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(expected), rtol=1e-8, atol=1e-10)


def test_each_objective_is_best_at_its_own():
    model, x = network(), images(1)
    maps = {o: xf.opticam(model, "relu", x, 1, objective=o, steps=40)[:, None] for o in OBJECTIVES}
    kept = {o: model(x * shown)[0, 1].item() for o, shown in maps.items()}
    removed = {o: model(x * (1 - shown))[0, 1].item() for o, shown in maps.items()}
    assert kept["keep"] > kept["both"] > kept["remove"]
    assert removed["remove"] < removed["both"] < removed["keep"]
    assert kept["both"] - removed["both"] > max(kept[o] - removed[o] for o in ("keep", "remove"))


def test_one_channel_is_the_map():
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 5)
    )
    model, x = networks.seeded(model).double(), images()
    found = xf.opticam(model, "1", x, 1, steps=2, postprocess=None)
    torch.testing.assert_close(found, model[:2](x)[:, 0].detach())
