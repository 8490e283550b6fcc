"""Targets: functions from a model's output to one score for each image, which is what a map explains.

| the network returns        | target                                                                     |
|----------------------------|----------------------------------------------------------------------------|
| logits (B, classes)        | `logit`, `probability`, `log_odds`, `sigmoid` (multi-label), `contrast`    |
| logits (B, classes, H, W)  | `segment`: torchvision's dict and an object with .logits too               |
| detections                 | `detection`: torchvision's lists, YOLO heads, DETR and its kin              |
| embeddings (B, D)          | `similarity`: image_embeds and pooler_output too                           |
| numbers (B,) or (B, n)     | `regression`                                                               |
| something for each image   | `per_image`, a function for each                                           |

Each takes the model's output to scores (B,), or (B, n) where n classes of each image are asked for.
Targets are added, subtracted and multiplied by numbers, also with callables of your own:
`logit(281) - 0.5 * logit(282)`.

`target` has what all of them share, `classes` those of classification, `detections` that of detectors,
`beyond_classes` the others, `outputs` the search for logits or embeddings in an output. Nothing here runs a
network.
"""

from xcam_fn.targets.beyond_classes import per_image, regression, segment, similarity
from xcam_fn.targets.classes import (
    Classes,
    ClassScore,
    class_index,
    contrast,
    log_odds,
    logit,
    probability,
    resolve,
    sigmoid,
)
from xcam_fn.targets.detections import detection
from xcam_fn.targets.outputs import describe, logits
from xcam_fn.targets.target import Score, Target

__all__ = [
    "ClassScore", "Classes", "Score", "Target", "class_index", "contrast", "describe", "detection",
    "log_odds", "logit", "logits", "per_image", "probability", "regression", "resolve", "segment", "sigmoid",
    "similarity",
]  # fmt: skip
