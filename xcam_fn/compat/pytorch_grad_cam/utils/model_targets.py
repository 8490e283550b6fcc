"""Targets of one image: plain functions of the network's output for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from torch import Tensor


def _target(title: str, names: str, score: Callable[..., Tensor]) -> type[Any]:
    """Return a class with these attributes; its objects map an output to `score(output, **attributes)`."""
    call = lambda self, model_output: score(model_output, **vars(self))  # noqa: E731
    own = {"__call__": call, "__module__": __name__, "__doc__": f"Arguments: {names or 'none'}."}
    return make_dataclass(title, names.split(), eq=False, namespace=own)


def _finer(y: Tensor, main_category: Any, comparison_categories: Any, alpha: Any) -> Tensor:
    shares, others = y.softmax(-1)[..., comparison_categories], y[..., comparison_categories]
    compared = shares * (y[..., main_category, None] - alpha * others)
    return compared.sum(-1) / (shares.sum(-1) + 1e-9)


ClassifierOutputTarget = _target("ClassifierOutputTarget", "category", lambda y, category: y[..., category])
ClassifierOutputSoftmaxTarget = _target(
    "ClassifierOutputSoftmaxTarget", "category", lambda y, category: y.softmax(-1)[..., category]
)
ClassifierOutputReST = _target(
    "ClassifierOutputReST", "category", lambda y, category: (y + y.log_softmax(-1))[..., category]
)
BinaryClassifierOutputTarget = _target(
    "BinaryClassifierOutputTarget", "category", lambda y, category: y if category == 1 else -y
)
SoftmaxOutputTarget = _target("SoftmaxOutputTarget", "", lambda y: y.softmax(-1))
RawScoresOutputTarget = _target("RawScoresOutputTarget", "", lambda y: y)
SemanticSegmentationTarget = _target(
    "SemanticSegmentationTarget",
    "category mask",
    lambda y, category, mask: (y[category] * torch.as_tensor(mask, device=y.device)).sum(),
)
FinerWeightedTarget = _target("FinerWeightedTarget", "main_category comparison_categories alpha", _finer)


@dataclass(eq=False)
class FasterRCNNBoxScoreTarget:
    """The sum over boxes of overlap plus score of the best overlapping detection, if it has the label."""

    labels: Any
    bounding_boxes: Any
    iou_threshold: float = 0.5

    def __call__(self, model_outputs: Any) -> Tensor:
        from torchvision.ops import box_iou  # noqa: PLC0415  (loaded with the first detector)

        detected, total = model_outputs["boxes"], model_outputs["boxes"].new_zeros(1)
        for box, label in zip(self.bounding_boxes, self.labels, strict=False) if len(detected) else ():
            overlap = box_iou(torch.as_tensor(box).to(detected)[None], detected)[0]
            best = overlap.argmax()
            if overlap[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlap[best] + model_outputs["scores"][best]
        return total
