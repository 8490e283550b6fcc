"""What the tests share: shapes checked at run time, real photographs and a real network."""

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from jaxtyping import install_import_hook

_jaxtyped = jaxtyping.jaxtyped


def jaxtyped_shapes(*args: Any, **keywords: Any) -> Any:
    """Check the signatures that have shapes: the types of all others are pyright's.

    But none of nested functions, which would be compiled anew at each call around them.
    """
    checked = _jaxtyped(*args, **keywords)
    return checked if args else lambda it: checked(it) if has_shapes(it) else it


def has_shapes(it: Any) -> bool:
    """Whether a class, or the signature of a function that is not nested, has shapes."""
    if isinstance(it, type):
        return True
    words = re.findall(r"\w+", " ".join(map(str, it.__annotations__.values())))
    meant = [it.__globals__.get(word) for word in words]
    return "<locals>" not in it.__qualname__ and any("jaxtyping." in f"{kind}" for kind in meant)


jaxtyping.jaxtyped = jaxtyped_shapes  # what the hook decorates with
install_import_hook("xcam_fn", "beartype.beartype").__enter__()

# The networks are small, and the tests run side by side; commands in processes of their own take this over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import networks
import xcam_fn as xf
from xcam_fn.models import LoadedModel
from xcam_fn.models.images import Preset

torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


# Of all that tests need, what CI may lack. XplainCAM has no release; the packages pin what does not fit beside the others, and
# FiftyOne brings a database server.
MAY_BE_ABSENT = (
    "shared/",
    "chromium",
    "checkout of xplaincam",
    "ultralytics",
    "mtcnn",
    "torchcrepe",
    "fiftyone",
)


def refused_skip(report: pytest.TestReport | pytest.CollectReport) -> Any:
    """The report, failed where CI would leave out a test for another reason than those."""
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if os.environ.get("CI") and reason and not any(word in reason.lower() for word in MAY_BE_ABSENT):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} is not to be skipped in CI: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return refused_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return refused_skip((yield))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave out the run-time check of signatures, so that the library's own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with photographs and reference maps."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with reference maps and photographs is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    return xf.models.load("lite0").model


@pytest.fixture
def network() -> LoadedModel:
    """A small network whose photographs are 32 pixels wide."""
    preset = Preset(32, 36, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = networks.seeded(networks.Linearized()).eval()
    classes = model(torch.zeros(1, 3, 32, 32)).shape[1]
    return LoadedModel(model, preset, [f"class {i}" for i in range(classes)], "small")


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """Two real photographs, (2, 3, 224, 224): a tabby cat and an astronaut."""
    import skimage.data

    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(224),
            v2.CenterCrop(224),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    pictures = (skimage.data.chelsea(), skimage.data.astronaut())
    return torch.stack([prepare(Image.fromarray(picture)) for picture in pictures])
