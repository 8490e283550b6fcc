"""The metrics by name, and the scores of several heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.docstrings import documented
from xcam_fn.metrics import curves, localization, of_map, of_method, randomization, subsets
from xcam_fn.metrics.curves import Curve, Road
from xcam_fn.metrics.judged import Heatmap, Judged, Metric, Values, checked, one_class_scoring
from xcam_fn.metrics.subsets import SensitivityN
from xcam_fn.scoring.running import RunningOptions
from xcam_fn.targets import Classes

_FAMILIES = (of_map, curves, subsets, of_method, randomization, localization)
METRICS: Mapping[str, Metric] = MappingProxyType(
    {one.name: one for family in _FAMILIES for one in vars(family).values() if isinstance(one, Metric)}
)
"""Every metric that a heatmap or a data set can be judged by, by its name."""
STANDARD = ("average_drop", "increase_in_confidence", "insertion", "deletion")
LOCALIZATION = ("energy_pointing_game", "relevance_rank_accuracy", "pointing_game", "mask_iou", "pixel_auc")
"""What asks whether a heatmap is where the object is, which has to be known."""
GRID = ("grid_pointing", "relevance_rank_accuracy", "pointing_game")
"""The same of mosaics."""


def scored(judged: Judged, metric_names: Sequence[str]) -> dict[str, Values | Curve]:
    """The scores or the curve of each metric."""
    found = {name: METRICS[name].formula(judged) for name in metric_names}
    return {name: value if isinstance(value, Curve) else one_each(value) for name, value in found.items()}


def one_each(found: Values | Curve | Road | SensitivityN) -> Values:
    """A metric's single score per image: for a curve, its area."""
    if isinstance(found, Tensor):
        return found
    return found.auc if isinstance(found, Curve) else found.value


@documented
def judged(
    model: nn.Module,
    x: Float[Tensor, "B C *size"],
    heatmaps: Mapping[str, Heatmap],
    cls: Classes = None,
    metric_names: Sequence[str] = STANDARD,
    *,
    region: Any = None,
    **how: Unpack[RunningOptions],
) -> dict[str, dict[str, Values | Curve]]:
    """Return the scores of heatmaps, from any source, on one batch.

    Args:
        heatmaps: names to heatmaps in [0, 1].
        cls: None for the predicted class of each image, an int, B ints, or a target. It is resolved once.
        metric_names: names of `METRICS`, except metrics that need the method.
        region: the objects' boxes or masks, as `pointing_game` takes them, for localization metrics.
        **how: scoring options: precision, compile, scorer, chunk_size, progress.

    Returns:
        {name: {metric: scores or curve}}.

    Raises:
        ValueError: a metric is not known or needs the method or the region, or a heatmap does not fit.
    """
    check("heatmaps", heatmaps, Mapping)
    check("metric_names", metric_names, Sequence[str])
    for name in metric_names:
        checks.check_choice("metric_names", name, tuple(METRICS))
    found: dict[str, dict[str, Values | Curve]] = {}
    with one_class_scoring(model, x, cls, **how) as scoring:
        maps = {name: checked(heatmap, x) for name, heatmap in heatmaps.items()}
        for name, heatmap in maps.items():
            same = next((found[other] for other in found if torch.equal(maps[other], heatmap)), None)
            found[name] = same or scored(Judged(scoring, heatmap, region=region), metric_names)
    return found
