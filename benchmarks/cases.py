"""What is measured: cases, and the ones that `python -m benchmarks` runs unless told otherwise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

import xcam_fn as xf
from benchmarks import networks
from benchmarks.networks import Network

CURVES = "insertion+deletion"
TABLE = "table"
STEPS = 113
TABLE_LAYER = "_blocks.15"
TABLE_SCALES = 2
_GROUPS = 32
# What each method's own loop runs for K maps: so many whole forwards a map, and so many besides, one image
# each. Union-CAM and Fusion-CAM run Score-CAM anew, as where each method is an object of its own.
TABLE_FORWARDS = {
    "gradcam": (0, 2),
    "gradcam_pp": (0, 2),
    "xgradcam": (0, 2),
    "layercam": (0, 2),
    "groupcam": (0, 2 * _GROUPS + 2),
    "scorecam": (1, 1),
    "ablationcam": (1, 1),
    "iscam": (TABLE_SCALES, 1),
    "unioncam": (1, 6),
    "fusioncam": (1, 6),
}
_JUDGED = 2 * STEPS + 2  # forwards of the four metrics of one heatmap

# What these cost is linear in the number of samples; both libraries take the same.
OPTIONS: dict[str, dict[str, Any]] = {"sscam": {"num_samples": 2}, "iscam": {"num_samples": 2}}
GRADIENT = ("gradcam", "gradcam_pp", "xgradcam", "layercam", "hirescam")
PERTURBATION = ("scorecam", "sscam", "iscam", "ablationcam")
OTHERS = (
    "gradcam_elementwise", "smoothgradcam_pp", "shapleycam", "finercam", "eigencam", "eigengradcam",
    "segeigencam", "kpcacam", "fem", "cam", "reciprocam", "deep_feature_factorization", "fullgrad",
    "guided_backprop", "integrated_gradients", "smooth(gradcam)", "eigen_smooth(gradcam)",
)  # fmt: skip
TITLES = {name: xf.find_method(name).title for name in (*xf.METHODS, *OTHERS)} | {
    CURVES: "Insertion + deletion",
    TABLE: "Evaluation table",
}


class Case(NamedTuple):
    """One thing to compute.

    Attributes:
        task: a name of `METHODS`, several with commas (`explain_all`), `CURVES` or `TABLE`.
        network: a key of `NETWORKS`.
        batch: how many images.
        size: of their sides, pixels.
        classes: how many of them are explained at once; with 1 the predicted one.
        layer: a name, or None for the network's usual one.
    """

    task: str
    network: str
    batch: int = 1
    size: int = 224
    classes: int = 1
    layer: str | None = None

    @property
    def title(self) -> str:
        """The task in print."""
        title = TITLES.get(self.task) or f"{self.task.count(',') + 1} methods"
        return title + (f", {self.classes} classes" if self.classes > 1 else "")

    @property
    def key(self) -> str:
        """One word for the case."""
        return "/".join(str(part) for part in self if part is not None)

    def dumps(self) -> str:
        """The case as text, for another process."""
        return json.dumps(self)

    @classmethod
    def loads(cls, text: str) -> Case:
        """The case from its text."""
        return cls(*json.loads(text))


class Setting(NamedTuple):
    """A case made ready.

    Attributes:
        case: what is computed.
        network: on which network.
        x: (B, 3, size, size).
        cls: None, or as many classes for each image.
        maps: how many maps the layer has.
        sample: how many of them a plain loop runs at most, and how many steps of curves.
        peer_sample: how many of them another library's perturbation method runs at most.
        heatmap: that is judged, for `CURVES`.
    """

    case: Case
    network: Network
    x: Tensor
    cls: list[list[int]] | None
    maps: int
    sample: int
    peer_sample: int
    heatmap: Tensor | None

    @property
    def channels(self) -> list[int]:
        """The maps that a plain loop runs, evenly chosen."""
        return _evenly(self.maps, self.sample)

    @property
    def peer_channels(self) -> list[int]:
        """The maps that another library runs, evenly chosen."""
        return _evenly(self.maps, self.peer_sample)

    @property
    def forwards(self) -> int:
        """How many forwards the plain loop of the case is."""
        if self.case.task == CURVES:
            return 2 * STEPS
        if self.case.task == TABLE:
            return sum(each * self.maps + once + _JUDGED for each, once in TABLE_FORWARDS.values())
        return self.maps


def prepared(case: Case, network: Network | None = None, sample: int = 96, peer_sample: int = 96) -> Setting:
    """The case made ready, on a network that is loaded already or not."""
    if case.task == TABLE:
        case = case._replace(layer=TABLE_LAYER)
    if network is None or (case.layer and case.layer != network.layer):
        network = networks.load(case.network, case.layer)
    x = networks.photographs(network.preset, case.batch, case.size)
    asked = networks.fresh(network)
    maps = xf.features(asked.model, network.layer, x[:1]).shape[1]
    # The classes of one picture, likely and unlikely alike: what they cost does not depend on which they are.
    cls = [list(range(281, 281 + case.classes))] * case.batch if case.classes > 1 else None
    heatmap = None
    if case.task in (CURVES, TABLE):
        heatmap = xf.gradcam(asked.model, network.layer, x)
    return Setting(case, network, x, cls, maps, sample, peer_sample, heatmap)


def _evenly(maps: int, sample: int) -> list[int]:
    count = min(maps, sample)
    return [round(index * (maps - 1) / max(count - 1, 1)) for index in range(count)]


# ---------------------------------------------------------------------------------------------------------


def default() -> list[Case]:
    """What `python -m benchmarks` runs."""
    return [
        *(Case(task, "lite0", batch) for task in GRADIENT for batch in (1, 16)),
        *(Case("gradcam", name, batch) for name in list(networks.NETWORKS)[1:] for batch in (1, 16)),
        *(Case("gradcam", name, 1, 448) for name in ("lite0", "resnet50")),
        *(Case("gradcam", name, 1, classes=5) for name in ("lite0", "resnet50")),
        *(Case(task, "lite0") for task in PERTURBATION),
        *(Case(task, "lite0") for task in OTHERS),
        *(Case("ablationcam", name) for name in list(networks.NETWORKS)[1:]),
        *(Case("scorecam", name) for name in ("resnet50", "vgg19")),
        *(Case(CURVES, name) for name in ("lite0", "resnet50")),
        Case(TABLE, "lite0", layer=TABLE_LAYER),
    ]


def quick() -> list[Case]:
    """A few of them, for a first look and for `make bench-check`."""
    return [
        Case("gradcam", "lite0"),
        Case("gradcam", "lite0", 16),
        Case("gradcam", "resnet50"),
        Case("gradcam", "lite0", 1, classes=5),
        Case("scorecam", "lite0"),
        Case("ablationcam", "lite0"),
        Case(CURVES, "lite0"),
    ]


def product(
    tasks: Sequence[str], names: Sequence[str], batches: Sequence[int], sizes: Sequence[int]
) -> list[Case]:
    """All combinations."""
    return [
        Case(task, name, batch, size)
        for task, name, batch, size in itertools.product(tasks, names, batches, sizes)
    ]
