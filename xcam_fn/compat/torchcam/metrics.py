"""TorchCAM's metrics: the metrics of `xcam_fn` for an extractor's heatmaps, summed over batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from xcam_fn import metrics
from xcam_fn.arguments import Count, check
from xcam_fn.compat.torchcam.methods.core import _CAM
from xcam_fn.maps import resize
from xcam_fn.perturb import baseline_images
from xcam_fn.targets import Target, class_index, logit, per_image


@dataclass(frozen=True, eq=False)
class _Read(Target):
    """A target of a function (`read`) of the output."""

    read: Callable[[Any], Any]
    target: Target

    def fixed(self, output: Any) -> Any:
        scores = self.target.fixed(self.read(output))
        return lambda output, which: scores(self.read(output), which)


class _Metric:
    """Sums of metrics over images; `metrics` lists each metric, its sum's attribute and its mean's name."""

    metrics: ClassVar[tuple[tuple[Any, str, str], ...]]
    baseline: Any = 0.0
    how: Any = MappingProxyType({})

    def __init__(self, cam_extractor: Any, logits_fn: Callable[[Any], Any] | None = None) -> None:
        self.cam_extractor, self.logits_fn = cam_extractor, logits_fn
        self.reset()

    def reset(self) -> None:
        """Reset all sums to zero."""
        vars(self).update({total: 0.0 for _, total, _ in self.metrics}, total=0, nan_count=0)

    def update(
        self,
        input_tensor: Tensor,
        class_idx: int | list[int] | None = None,
        *,
        targets: Callable[[Any], Tensor] | list[Callable[[Any], Tensor]] | None = None,
    ) -> None:
        """Explain images and add up their metrics; heatmaps with NaN are only counted.

        Args:
            input_tensor: (B, C, *size).
            class_idx: a class, one for each image, or None for the predicted classes.
            targets: instead of class_idx, a function from an image's output to a score, or one per image.

        Raises:
            ValueError: both are given, or a value is out of range.
        """
        if targets is not None and class_idx is not None:
            raise ValueError("expected either class_idx or targets, not both")
        extractor, x, read = self.cam_extractor, input_tensor, self.logits_fn or (lambda output: output)
        output = extractor.model(x)
        scores = read(output)
        more: Any = {"input_tensor": (x, output)} if isinstance(extractor, _CAM) else {}
        functions: Any = targets if isinstance(targets, list) else [targets] * len(x)
        if targets is None:
            index = class_index(class_idx, scores, "class_idx")
            cams = extractor(index.tolist() if class_idx is None else class_idx, scores, **more)
        else:
            index = None
            cams = extractor(scores=scores, targets=functions, **more)
        cam = extractor.fuse_cams(cams).detach()
        is_nan = cam.isnan().flatten(1).any(1)
        self.nan_count += int(is_nan.sum())
        rows = (~is_nan).nonzero()[:, 0]
        if not len(rows):
            return
        asked = per_image([functions[i] for i in rows.tolist()]) if index is None else logit(index[rows])
        base, x = baseline_images(self.baseline, x)[rows].detach(), x[rows].detach()
        given: Any = (extractor.model, x, resize(cam[rows], tuple(x.shape[2:])), _Read(read, asked))
        for metric, total, _ in self.metrics:
            found = metric(*given, baseline=base, **self.how)
            setattr(self, total, getattr(self, total) + float(getattr(found, "auc", found).sum()))
        self.total += len(x)

    def summary(self) -> dict[str, float]:
        """Return the means over all images; raise AssertionError if there are none."""
        if not self.total:
            raise AssertionError("no images yet; update the metric before getting the summary")
        return {name: getattr(self, total) / self.total for _, total, name in self.metrics}


class ClassificationMetric(_Metric):
    """Average drop and increase in confidence.

    Args:
        cam_extractor: an extractor with a `model`, called with a class and scores.
        logits_fn: applied to the model's output before a class's score is read, such as a softmax.
    """

    metrics = (
        (metrics.average_drop, "drop", "avg_drop"),
        (metrics.increase_in_confidence, "increase", "conf_increase"),
    )


class DeletionInsertionMetric(_Metric):
    """The areas under the deletion and insertion curves.

    Args:
        cam_extractor: as for ClassificationMetric.
        logits_fn: as for ClassificationMetric.
        steps: the number of steps, ≥ 1.
        baseline: the replacement of pixels, a tensor, a function of the images, or None for zeros.
        batch_size: perturbed images per forward, ≥ 1.

    Raises:
        ValueError: steps or batch_size is out of range.
        TypeError: an argument has the wrong type.
    """

    metrics = (
        (metrics.deletion, "deletion", "deletion_auc"),
        (metrics.insertion, "insertion", "insertion_auc"),
    )

    def __init__(
        self,
        cam_extractor: Any,
        logits_fn: Callable[[Any], Any] | None = None,
        *,
        steps: int = 20,
        baseline: Tensor | Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 32,
    ) -> None:
        check("steps", steps, Count)
        check("batch_size", batch_size, Count)
        check("baseline", baseline, Tensor | Callable | None)
        self.how = {"steps": steps, "chunk_size": batch_size}
        self.baseline = 0.0 if baseline is None else baseline
        super().__init__(cam_extractor, logits_fn)
