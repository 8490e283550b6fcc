"""Metrics as `torchmetrics.Metric`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError('torchmetrics is not installed; pip install "xcam-fn[torchmetrics]"') from error

from xcam_fn import checks
from xcam_fn.metrics.judged import Explainer, Heatmap, Judged, one_class_scoring, own_keywords, taken
from xcam_fn.metrics.of_method import Run, checked_run
from xcam_fn.metrics.table import METRICS, one_each
from xcam_fn.network.target_layer import Layer
from xcam_fn.targets import Classes


class MeanMetric(Metric):
    """The mean of a metric over all images, see `torchmetric`."""

    is_differentiable = full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        checks.check_choice("name", name, tuple(METRICS))
        own = own_keywords(METRICS[name].formula)
        self.name, self.own, self.how = name, taken(own, options), options
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return METRICS[self.name].best == "highest"

    def update(
        self, model: nn.Module, x: Tensor, heatmap: Heatmap, cls: Classes = None,
        method: str | Run | None = None, layer: Layer = None,
    ) -> None:  # fmt: skip
        """Add the scores of a batch of heatmaps."""
        with one_class_scoring(model, x, cls, **self.how) as scoring:
            run = method and checked_run(method, {})
            explain = Explainer(run, model, layer, scoring.explained.cls) if run else None
            found = one_each(METRICS[self.name].formula(Judged(scoring, heatmap, explain), **self.own))
        self.total += found.double().sum().to(self.total)
        self.count += len(found)

    def compute(self) -> Tensor:
        """The mean over all images so far."""
        return self.total / self.count
