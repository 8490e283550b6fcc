"""Small networks that the tests cut, each with something that libraries trip over."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf

# Methods that a convolutional network has no structure for.
OF_ATTENTION = [name for name, method in xf.METHODS.items() if method.needs == xf.legrad.needs]

# Options with which methods are quick on networks as small as these.
QUICK: dict[str, dict[str, Any]] = {
    "smoothgradcam_pp": {"num_samples": 2},
    "integrated_gradients": {"steps": 4},
    "expected_gradients": {"num_samples": 2},
    "integrated_gradcam": {"steps": 2},
    "smoothgrad(input_x_gradient)": {"num_samples": 2},
    "sscam": {"num_samples": 2},
    "iscam": {"num_samples": 2},
    "groupcam": {"num_groups": 3},
    "gscorecam": {"channels": 3},
    "cameras": {"scales": [1.0, 1.5]},
    "occlusion": {"window": 8, "stride": 6},
    "rise": {"num_masks": 20},
    "drise": {"num_masks": 20},
    "deep_feature_factorization": {"num_concepts": 3},
    "opticam": {"steps": 2},
    "curvecam": {"steps": 2},
}


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with weights that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


class Residual(nn.Module):
    """A skip connection around a block, and one ReLU used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.relu(self.bn(self.conv1(x)))
        out = self.conv2(out)
        out += x
        out = self.relu(out)
        return self.fc(out.mean((2, 3)))


class Unshared(Residual):
    """The same network with its last ReLU a module of its own, for libraries that hook or replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.relu(self.bn(self.conv1(x)))
        return self.fc(self.last(self.conv2(out) + x).mean((2, 3)))


class ReadsParameters(nn.Module):
    """The forward itself reads parameters and a buffer, and takes the batch size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.head = nn.Parameter(torch.ones(5, 6))
        self.register_buffer("shift", torch.full((6, 1, 1), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        features = self.conv(x).relu() * self.scale + self.shift
        return F.linear(features.mean((2, 3)).view(batch, -1), self.head)


class InPlaceFunction(nn.Module):
    """`F.relu(features, inplace=True)` right after the layer, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        return self.fc(out.mean((2, 3)))


class InPlaceIgnored(nn.Module):
    """An in-place module whose return value is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        self.relu(out)
        return self.fc(out.mean((2, 3)))


class DataDependent(nn.Module):
    """Control flow that depends on values: it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x).relu()
        if out.abs().mean() > 1e-6:
            out = self.block(out)
        return self.fc(out.mean((2, 3)).reshape(int(x.shape[0]), -1))


class Isinstance(nn.Module):
    """A test that a proxy fails without a word: a trace goes the wrong way silently."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if isinstance(out, torch.Tensor):
            out = out.relu() * 2
        return self.fc(out.mean((2, 3)))


class ReturnsTuple(nn.Module):
    """A layer that returns its maps in a tuple with something else."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.conv(x).relu()
            return out, out.mean((2, 3))

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps, means = self.inner(x)
        return self.fc(maps.amax((2, 3)) + means)


class WritesBuffer(nn.Module):
    """A forward that counts its own calls in a buffer and keeps its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros(1))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.fc(self.conv(x).relu().mean((2, 3)))


class WithLogits(NamedTuple):
    logits: Tensor
    aux: Tensor


class Wrapped(nn.Module):
    """Another network's output, put into a dict, an object or a tuple."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = Residual()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        match self.kind:
            case "logits":
                return {"logits": y}
            case "out":
                return {"out": y, "aux": y * 2}
            case "object":
                return WithLogits(y, y * 2)
            case _:
                return (y, y * 2)


class OneDimensional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 6, 5), nn.ReLU(), nn.Conv1d(6, 6, 3), nn.ReLU(),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5),
        )  # fmt: skip


class ThreeDimensional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 6, 3), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 5),
        )  # fmt: skip


class Linearized(nn.Module):
    """Convolution, global average pooling and one linear layer: every CAM has a closed form here."""

    def __init__(self, channels: int = 7, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu_().mean((2, 3)))
