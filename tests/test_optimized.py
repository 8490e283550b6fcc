"""The optimized family: the paper's loop, rows that do not see each other, and what is asked of the score."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf
from xcam_fn.metrics import deletion, insertion
from xcam_fn.perturb import blurred

OBJECTIVES = ("keep", "remove", "both")


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    return networks.seeded(networks.Residual(), seed).double()


def mask_of(cam: Tensor, size: torch.Size) -> Tensor:
    mask = F.interpolate(cam[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return (mask - mask.min()) / (mask.max() - mask.min())


def features_of(model: nn.Module, layer: str, image: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the network with the features that a hook on it sees, (K, H, W)."""
    model, seen = copy.deepcopy(model), []
    hook = lambda _, __, output: seen.append(output.clone())  # noqa: E731
    model.get_submodule(layer).register_forward_hook(hook)
    model(image[None])
    return model, seen[-1][0].detach()


def loop_opticam(model: nn.Module, layer: str, image: Tensor, cls: int, objective: str, steps: int) -> Tensor:
    model, A = features_of(model, layer, image)
    A = A.relu()
    u = torch.full((len(A),), 0.5, dtype=A.dtype, requires_grad=True)
    adam = torch.optim.Adam([u], lr=0.1)
    for _ in range(steps):
        mask = mask_of((u.softmax(0)[:, None, None] * A).sum(0), image.shape[1:])
        kept, removed = (model((image * shown)[None])[0, cls] for shown in (mask, 1 - mask))
        adam.zero_grad()
        {"keep": -kept, "remove": removed, "both": removed - kept}[objective].backward()
        adam.step()
    return (u.detach().softmax(0)[:, None, None] * A).sum(0)


def loop_curvecam(model: nn.Module, layer: str, image: Tensor, cls: int, steps: int) -> Tensor:
    cam = xf.gradcam(model, layer, image[None], cls, postprocess=None)[0].relu()
    u = (2 * (cam - cam.min()) / (cam.max() - cam.min()) - 1).requires_grad_()
    adam, smooth = torch.optim.Adam([u], lr=0.1), blurred(image[None])[0]
    p = lambda image: model(image[None])[0].softmax(0)[cls]  # noqa: E731
    for step in range(1, steps + 1):
        mask = mask_of(u.sigmoid(), image.shape[1:])
        share = (step * 0.6180339887498949) % 1
        rank, ordered = (1 - share) * (mask.numel() - 1), mask.flatten().sort().values
        q = torch.lerp(
            ordered[int(rank)], ordered[int(rank) + 1], rank % 1
        )  # torch.quantile parts ties otherwise
        Z = torch.sigmoid((mask - q) / 0.06)
        value = (
            p(image * Z + smooth * (1 - Z)) - p(image * (1 - Z)) + 0.5 * p(image * mask) - 0.3 * mask.mean()
        )
        adam.zero_grad()
        (-value).backward()
        adam.step()
    return u.detach().sigmoid()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_opticam_is_the_papers_loop(objective):
    model, x = network(), images()
    options = {"objective": objective, "steps": 12, "postprocess": None}
    found = xf.opticam(model, "conv2", x, [[1, 2], [3, 0]], **options)
    expected = [
        loop_opticam(model, "conv2", image, cls, objective, 12)
        for image, row in zip(x, [[1, 2], [3, 0]], strict=True)
        for cls in row
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(expected), rtol=1e-8, atol=1e-10)


def test_curvecam_is_the_loop_of_its_formula():
    model, x = network(), images()
    found = xf.curvecam(model, "relu", x, [[1, 2], [3, 0]], steps=8, postprocess=None)
    expected = [
        loop_curvecam(model, "relu", image, cls, 8)
        for image, row in zip(x, [[1, 2], [3, 0]], strict=True)
        for cls in row
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(expected), rtol=1e-7, atol=1e-9)


def test_the_curves_get_better():
    model, x = network(3), images(1)
    maps = [xf.curvecam(model, "relu", x, 1, method="layercam", keep=0.0, area=0.0, steps=n) for n in (1, 20)]
    first, last = ([m(model, x, one, 1, steps=8).auc for m in (insertion, deletion)] for one in maps)
    assert last[0] - last[1] > first[0] - first[1] + 0.005
    covers = [xf.curvecam(model, "relu", x, 1, area=area, steps=15).mean() for area in (0.0, 9.0)]
    assert covers[1] < covers[0] - 0.1


def test_each_objective_is_best_at_its_own():
    model, x = network(), images(1)
    maps = {o: xf.opticam(model, "relu", x, 1, objective=o, steps=25)[:, None] for o in OBJECTIVES}
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


def test_without_evidence_there_is_no_map():
    model, x = network(), images()
    with torch.no_grad():
        model.get_parameter("fc.weight").zero_()
    for method in (xf.opticam, xf.find_method("curvecam", method="eigencam")):
        assert not method(model, "relu", x, 1, steps=3, postprocess=None).any()


@pytest.mark.parametrize("name", ["opticam", "curvecam"])
@pytest.mark.parametrize(
    ("kind", "shape"), [(networks.OneDimensional, (2, 2, 40)), (networks.ThreeDimensional, (2, 1, 8, 9, 10))]
)
def test_signals_and_volumes(name, kind, shape):
    model = networks.seeded(kind()).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = xf.METHODS[name](model, "3", x, [[0, 3]] * 2, steps=3)
    assert found.shape == (2, 2, *shape[2:])
    assert found.max() == 1
    alone = xf.METHODS[name](model, "3", x[1:], 3, steps=3)
    torch.testing.assert_close(found[1:, 1], alone, rtol=0, atol=1e-9)
