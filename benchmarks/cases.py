"""The cases to measure, and the default ones of `python -m benchmarks`."""

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
# The forwards of each method's plain loop for K maps: a number per map, and a number of others, one image
# each. Union-CAM and Fusion-CAM run Score-CAM again, as in libraries where each method is a separate object.
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

# The cost of these is linear in the number of samples; both libraries use the same number.
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
        batch: the number of images.
        size: their height and width in pixels.
        classes: the number of classes explained at once; 1 means the predicted class.
        layer: a name, or None for the network's usual layer.
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
    """A case that is ready to run.

    Attributes:
        case: the case.
        network: the network.
        x: (B, 3, size, size).
        cls: None, or the classes of each image.
        maps: the number of maps of the layer.
        sample: the maximum number of maps, or of steps of curves, in a plain loop.
        peer_sample: the maximum number of maps in another library's perturbation method.
        heatmap: the heatmap to judge, for `CURVES`.
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
        """The maps that a plain loop runs, evenly spaced."""
        return _evenly(self.maps, self.sample)

    @property
    def peer_channels(self) -> list[int]:
        """The maps that another library runs, evenly spaced."""
        return _evenly(self.maps, self.peer_sample)

    @property
    def forwards(self) -> int:
        """The number of forwards in the plain loop of the case."""
        if self.case.task == CURVES:
            return 2 * STEPS
        if self.case.task == TABLE:
            return sum(each * self.maps + once + _JUDGED for each, once in TABLE_FORWARDS.values())
        return self.maps


def prepared(case: Case, network: Network | None = None, sample: int = 96, peer_sample: int = 96) -> Setting:
    """Prepare the case, and load its network if none is given."""
    if case.task == TABLE:
        case = case._replace(layer=TABLE_LAYER)
    if network is None or (case.layer and case.layer != network.layer):
        network = networks.load(case.network, case.layer)
    x = networks.photographs(network.preset, case.batch, case.size)
    asked = networks.fresh(network)
    maps = xf.features(asked.model, network.layer, x[:1]).shape[1]
    # Any classes will do, likely or not: the cost does not depend on them.
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
    """The default cases of `python -m benchmarks`."""
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
    """A few cases, for a first look and for `make bench-check`."""
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
