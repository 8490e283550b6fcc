"""TorchCAM's metrics: what ours say of an extractor's heatmaps, added up over batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from xcam_fn import metrics
from xcam_fn.arguments import Count, check
from xcam_fn.compat.torchcam.methods.core import _Extractor
from xcam_fn.maps import resize
from xcam_fn.perturb import baseline_images
from xcam_fn.targets import Target, class_index, logit, per_image


@dataclass(frozen=True, eq=False)
class _Read(Target):
    """A target of what is made of an output first."""

    read: Callable[[Any], Any]
    target: Target

    def fixed(self, output: Any) -> Any:
        scores = self.target.fixed(self.read(output))
        return lambda output, which: scores(self.read(output), which)


class _Metric:
    """Sums over images, by the names of attributes.

    Args:
        cam_extractor: what explains: it is called with a class and scores, and has a model.
        logits_fn: what is done to the model's output before a class is read off, such as a softmax.
    """

    sums: ClassVar[dict[str, str]]
    baseline: Any = 0.0

    def __init__(self, cam_extractor: Any, logits_fn: Callable[[Any], Any] | None = None) -> None:
        self.cam_extractor, self.logits_fn = cam_extractor, logits_fn
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        for name in (*self.sums, "total", "nan_count"):
            setattr(self, name, 0)

    def update(
        self,
        input_tensor: Tensor,
        class_idx: int | list[int] | None = None,
        *,
        targets: Callable[[Any], Tensor] | list[Callable[[Any], Tensor]] | None = None,
    ) -> None:
        """Explain images and add up what their heatmaps are worth; those that hold NaN are only counted.

        Args:
            input_tensor: (B, C, *size).
            class_idx: a class, one for each image, or None for the predicted ones.
            targets: in place of class_idx, a function from an image's output to a score, or one for each image.

        Raises:
            ValueError: both or a value out of range are given.
        """
        if targets is not None and class_idx is not None:
            raise ValueError("expected either class_idx or targets, not both")
        x, read = input_tensor, self.logits_fn or (lambda output: output)
        functions = targets if isinstance(targets, list) else [targets] * len(x)
        output = self.cam_extractor.model(x)
        scores = read(output)
        more = {"input_tensor": (x, output)} if isinstance(self.cam_extractor, _Extractor) else {}
        if targets is None:
            index = class_index(class_idx, scores, "class_idx")
            given = index.tolist() if class_idx is None else class_idx
            cams = self.cam_extractor(given, scores, **more)
        else:
            index = None
            cams = self.cam_extractor(scores=scores, targets=functions, **more)
        cam = self.cam_extractor.fuse_cams(cams).detach()
        kept = ~cam.isnan().flatten(1).any(1)
        self.nan_count += int((~kept).sum())
        if not kept.any():
            return
        rows = kept.nonzero()[:, 0]
        asked = per_image([functions[i] for i in rows.tolist()]) if index is None else logit(index[rows])
        base, x = baseline_images(self.baseline, x)[rows].detach(), x[rows].detach()
        found = self._judged(x, resize(cam[rows], tuple(x.shape[2:])), _Read(read, asked), base)
        for name, values in zip(self.sums, found, strict=True):
            setattr(self, name, getattr(self, name) + float(values.sum()))
        self.total += len(x)

    def _judged(self, x: Tensor, heatmaps: Tensor, target: Target, base: Tensor) -> tuple[Tensor, Tensor]:
        """What is added up of each image, in the order of `sums`."""
        raise NotImplementedError

    def summary(self) -> dict[str, float]:
        """The means over all images that were added.

        Raises:
            AssertionError: there are none.
        """
        if not self.total:
            raise AssertionError("there are no images yet; update the metric before getting the summary")
        return {name: getattr(self, total) / self.total for total, name in self.sums.items()}


class ClassificationMetric(_Metric):
    """Average drop and increase in confidence: `avg_drop` and `conf_increase`."""

    sums: ClassVar[dict[str, str]] = {"drop": "avg_drop", "increase": "conf_increase"}

    def _judged(self, x: Tensor, heatmaps: Tensor, target: Target, base: Tensor) -> tuple[Tensor, Tensor]:
        given: Any = (self.cam_extractor.model, x, heatmaps, target)
        how: Any = {"baseline": base}
        return metrics.average_drop(*given, **how), metrics.increase_in_confidence(*given, **how)


class DeletionInsertionMetric(_Metric):
    """The areas under the curves of deletion and insertion: `deletion_auc` and `insertion_auc`.

    Args:
        cam_extractor: as for ClassificationMetric.
        logits_fn: as for ClassificationMetric.
        steps: how many, ≥ 1.
        baseline: what pixels are replaced by, a tensor, a callable of the images, or None for zeros.
        batch_size: perturbed images in one forward, ≥ 1.

    Raises:
        ValueError: steps or batch_size is out of range.
        TypeError: an argument is of the wrong kind.
    """

    sums: ClassVar[dict[str, str]] = {"deletion": "deletion_auc", "insertion": "insertion_auc"}

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
        if not (baseline is None or isinstance(baseline, Tensor) or callable(baseline)):
            raise TypeError(f"baseline={baseline!r}; expected a tensor, a callable of the images, or None")
        super().__init__(cam_extractor, logits_fn)
        self.steps, self.batch_size = steps, batch_size
        self.baseline = 0.0 if baseline is None else baseline

    def _judged(self, x: Tensor, heatmaps: Tensor, target: Target, base: Tensor) -> tuple[Tensor, Tensor]:
        how: Any = {"steps": self.steps, "chunk_size": self.batch_size, "baseline": base}
        model = self.cam_extractor.model
        curves = [curve(model, x, heatmaps, target, **how) for curve in (metrics.deletion, metrics.insertion)]
        return curves[0].auc, curves[1].auc
