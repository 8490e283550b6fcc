"""Metrics as `torchmetrics.Metric`; the package torchmetrics is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torchmetrics


def torchmetric(name: str, **options: Any) -> torchmetrics.Metric:
    """Return a metric as a `torchmetrics.Metric`: its mean over the images of all batches and processes.

    Its `update` takes `(model, x, heatmap, cls=None, method=None, layer=None)`, the last two for metrics of a
    method, and its `compute` returns the mean; for curves, the mean area.

    Args:
        name: the metric's name in `METRICS`.
        **options: the metric's keywords and scoring options: score, precision, chunk_size …

    Raises:
        ValueError: there is no such metric.
        ImportError: torchmetrics is not installed.
    """
    from xcam_fn.metrics.mean_metric import MeanMetric  # noqa: PLC0415, torchmetrics may not be there

    return MeanMetric(name, **options)
