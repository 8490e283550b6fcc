"""The target of detectors: how sure the detection is that matches a box best, how well it fits, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import Count, Share, check
from xcam_fn.targets.beyond_classes import finite
from xcam_fn.targets.classes import class_index, is_sequence, is_whole
from xcam_fn.targets.outputs import DETECTIONS, describe, is_listed, misfit, part_of
from xcam_fn.targets.target import Fixed, Target

Format = Literal["torchvision", "ultralytics", "yolov5", "yolov8", "yolov10", "detr", "rtdetr"]
Part = Literal["both", "class", "box", "similarity"]
_MaybeFormat = Format | None
_MaybeSize = Sequence[Count] | None

# Of transformers, whose outputs look alike: those with a class for no object, and those without.
_SOFTMAX = ("Detr", "Yolos", "TableTransformer")
_SIGMOID = (
    "RTDetr", "RTDetrV2", "DeformableDetr", "ConditionalDetr", "DabDetr", "DFine", "GroundingDino",
)  # fmt: skip
_SHAPES: dict[str, str] = {
    "yolov5": "(B, N, 5 + classes): center, size, objectness, classes",
    "yolov8": "(B, 4 + classes, N): center, size, classes",
    "yolov10": "(B, N, 6): corners, score, label",
    "detr": "logits (B, N, classes + 1), the last class for no object, and pred_boxes (B, N, 4)",
    "rtdetr": "logits (B, N, classes), a sigmoid for each class, and pred_boxes (B, N, 4)",
}
_EXPECTED = (
    f"a list of one dict for each image, with keys {str(DETECTIONS)[1:-1]}, as from torchvision's "
    "detectors, the output of a YOLO head, or an object with logits and pred_boxes"
)


def detection(
    box: Any,
    label: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    *,
    part: Part = "both",
    format: Format | None = None,  # noqa: A002
    size: Sequence[int] | None = None,
    min_score: float = 0.05,
    min_iou: float = 0.5,
) -> Target:
    """The target for detectors: score × overlap (IoU) of the detection that best matches a box.

        detected    score   IoU with box   product
        ┌───┐       0.9     0.5            0.45
        │ ┌─┼─┐     0.6     0.8            0.48   ◀ score
        └─┼─┘ │     0.7     0.0            0.00
          └───┘

    Both factors are differentiated: the map shows what raises the confidence and what makes the box fit. A
    perturbed image scores 0 if no detection of the label overlaps the box by `min_iou`; the original image
    must have such a detection, with a score of at least `min_score`.

    Supported outputs are torchvision's lists of dicts; the outputs of ultralytics' YOLO heads, and its
    Results; and outputs with logits and pred_boxes, as from DETR-like models in transformers. If the format
    is ambiguous, pass `format`. With `layer=None` the gradient is taken at the layer through which the whole
    score is computed; if there are several such layers, `multi_layer` sums their maps.

    Args:
        box: (4,) for all images, (B, 4), or (B, n, 4) for n boxes each: x1, y1, x2, y2 in pixels of x. If an
            image was letterboxed into x, letterbox its box too: scale it and add the margins.
        label: the label to match, one per image, or (B, n); None for any.
        part: "both"; only the score ("class") or only the overlap ("box") of the detection with the highest
            product; or D-RISE's "similarity": IoU × cosine of the class probabilities with those of the
            explained detection × objectness. Without objectness, the score is used: the probability of any
            object (DETR), or that of the most probable class.
        format: how to read the output: "torchvision", "ultralytics" (Results), "yolov5" (B, N, 5 + classes),
            "yolov8" (B, 4 + classes, N), "yolov10" (B, N, 6), "detr" (the last class means no object) or
            "rtdetr" (independent classes); None if the output itself is unambiguous.
        size: height and width of x, for boxes given as fractions of the image (DETR).
        min_score: the minimum score of the explained detection, in [0, 1].
        min_iou: the minimum overlap of a matching detection, in [0, 1]; with "similarity", only for x itself.

    Raises:
        ValueError: box is invalid, or an option is out of range; when called: the output is not one of
            detections or its format is ambiguous, an image has no matching detection, or box or label has
            another number of images.
        TypeError: box, label or an option has the wrong type.

    References:
        Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps (arXiv:2006.03204).
    """
    box = finite("box", box)
    if box.ndim not in (1, 2, 3) or box.shape[-1] != 4 or box.numel() == 0:
        expected = "(4,) or (B, 4): x1, y1, x2, y2; or (B, n, 4)"
        raise ValueError(f"box has shape {tuple(box.shape)}; expected {expected}")
    for name, value, kind in (
        ("part", part, Part), ("format", format, _MaybeFormat), ("size", size, _MaybeSize),
        ("min_score", min_score, Share), ("min_iou", min_iou, Share),
    ):  # fmt: skip
        check(name, value, kind)
    if size is not None and len(size) != 2:
        raise ValueError(f"size={size!r}; expected two integers, height and width, such as x.shape[2:]")
    if checks.is_readable(box):
        if not bool((box[..., 2:] > box[..., :2]).all()):
            raise ValueError(f"box={box.tolist()}; expected x1, y1, x2, y2 with x1 < x2 and y1 < y2")
        ends = [torch.inf, torch.inf] if size is None else [size[1], size[0]]
        if not bool((box[..., :2] < box.new_tensor(ends)).all() and (box[..., 2:] > 0).all()):
            raise ValueError(f"box={box.tolist()} is outside the image; expected pixels of x, starting at 0")
    return Detection(box, _checked_label(label), part, format, size, min_score, min_iou)


def _checked_label(label: Any) -> Tensor | None:
    found = torch.as_tensor(label) if is_sequence(label) or isinstance(label, int) else label
    if found is None:
        return None
    if isinstance(label, bool) or not isinstance(found, Tensor) or not is_whole(found):
        raise TypeError(f"label={label!r}; expected None, an integer, or one for each image")
    checks.check_tensor("label", found)
    return found


class Detected(NamedTuple):
    """What is detected in one image.

    Attributes:
        boxes: (N, 4), corners in pixels of x.
        scores: (N,), or of every class (N, C) where there are no labels.
        labels: (N,), or None.
        objectness: (N,), how likely there is an object.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor | None
    objectness: Tensor


class _Wanted(NamedTuple):
    """The n boxes looked for in one image, their labels, and what the detections that match them say.

    Attributes:
        boxes: (n, 4).
        labels: (n,), or None for any.
        says: the labels (n,), or the scores of every class (n, C), of the detections explained.
    """

    boxes: Tensor
    labels: Tensor | None
    says: Tensor


@dataclass(frozen=True, eq=False)
class Detection(Target):
    """The target of boxes, see `detection`; `wanted` is what an earlier output chose."""

    box: Tensor
    label: Tensor | None
    part: str
    format: Format | None
    size: Sequence[int] | None
    min_score: float
    min_iou: float
    wanted: Sequence[_Wanted] | None = None

    @property
    def is_placed(self) -> bool:
        """A box is a place of the image."""
        return True

    @property
    def whole(self) -> Detection:
        """The score and the box's corners: the IoU with a box that fits exactly has no gradient."""
        return replace(self, part="whole")

    def similar(self) -> Detection:
        """The same with D-RISE's similarity as its score."""
        return replace(self, part="similarity")

    def pinned(self, output: Any) -> Detection:
        """The target with the detections that it explains chosen by this output."""
        return replace(self, wanted=self.wanted or self._choose(output))

    def fixed(self, output: Any) -> Fixed:
        """The scores of outputs, for the detections that this one chooses."""
        wanted = self.wanted or self._choose(output)

        def scores(output: Any, which: Tensor | None) -> Tensor:
            found = read(output, self.format, self.size)
            rows = wanted if which is None else [wanted[i] for i in which.tolist()]
            best = torch.stack([self._best(one, row) for one, row in zip(found, rows, strict=True)])
            return best if self.box.ndim == 3 else best[:, 0]

        return scores

    def _choose(self, output: Any) -> list[_Wanted]:
        """What is looked for in each image; ValueError where a box is matched by no detection."""
        found = read(output, self.format, self.size)
        batch, shape = len(found), tuple(self.box.shape)
        if self.box.ndim > 1 and shape[0] != batch:
            expected = f"(4,) for all images, {(batch, 4)}, or ({batch}, n, 4)"
            raise ValueError(f"detection: box has shape {shape} for a batch of {batch}; expected {expected}")
        boxes = self.box if self.box.ndim == 3 else self.box.expand(batch, 4)[:, None]
        labels = self._labels(*boxes.shape[:2])
        return [self._match(i, *row) for i, row in enumerate(zip(found, boxes, labels, strict=True))]

    def _labels(self, batch: int, count: int) -> Sequence[Tensor | None]:
        """The labels looked for in each image, (n,)."""
        if self.label is None:
            return [None] * batch
        label = self.label[:, None] if self.label.ndim == 1 else self.label
        if label.ndim and (label.shape[0] != batch or label.shape[1] not in (1, count) or label.ndim > 2):
            has = f"label has shape {tuple(self.label.shape)} for a batch of {batch}"
            raise ValueError(f"detection: {has}; expected one, ({batch},) or {(batch, count)}")
        return list(label.expand(batch, count))

    def _match(self, image: int, one: Detected, boxes: Tensor, labels: Tensor | None) -> _Wanted:
        """What is looked for in an image, whose detections have to match the boxes."""
        if not len(one.boxes):
            remedy = "pass another image, or lower the detector's threshold (box_score_thresh in torchvision)"
            raise ValueError(f"detection: image {image} has no detections; {remedy}")
        if labels is not None:
            _check_labels(image, one, labels)
        sure, overlap = (values.detach() for values in _parts(one, boxes, labels))
        best = (sure * overlap * (overlap >= self.min_iou)).argmax(1)
        if checks.is_readable(sure):
            if one.labels is None and not (sure.amin() >= 0 and sure.amax() < 1.001):
                has = f"scores from {sure.amin():.4g} to {sure.amax():.4g}, read with format={self.format!r}"
                raise ValueError(f"detection: the model's output holds {has}; expected [0, 1]")
            for j, i in enumerate(best.tolist()):
                matches = sure[j, i] >= self.min_score and overlap[j, i] >= self.min_iou and overlap[j, i] > 0
                if not matches:
                    near = int((sure[j] * (overlap[j] + 1e-6)).argmax())
                    raise self._unmatched(
                        image, boxes[j], labels if labels is None else labels[j],
                        float(sure[j, near]), float(overlap[j, near]), one.boxes[near],
                    )  # fmt: skip
        says = (one.scores if one.labels is None else one.labels)[best]
        return _Wanted(boxes, labels, says.detach())

    def _unmatched(
        self, image: int, box: Tensor, label: Tensor | None, score: float, overlap: float, near: Tensor
    ) -> ValueError:
        """The error for a box that no detection matches, with the best that there is."""
        of = "" if label is None else f" with label {int(label)}"
        least = f"≥ {self.min_iou}" if self.min_iou else "> 0"
        return ValueError(
            f"detection: image {image} has no detection{of} that matches box {box.tolist()}: the best has "
            f"score {score:.3g} and IoU {overlap:.3g}; expected ≥ {self.min_score} and {least}; "
            f"pass its box {[round(v, 1) for v in near.tolist()]}, or lower min_score or min_iou"
        )

    def _best(self, one: Detected, wanted: _Wanted) -> Tensor:
        """The score of the best match of each box, (n,), 0 where nothing matches."""
        sure, overlap = _parts(one, wanted.boxes, wanted.labels)
        if self.part == "similarity":
            sure = _alike(one, wanted.says.to(one.boxes.device)) * one.objectness
        elif self.min_iou:
            overlap = torch.where(overlap >= self.min_iou, overlap, 0.0)
        product = sure * overlap
        value = {"class": sure, "box": overlap, "whole": sure + one.boxes.sum(1)}.get(self.part, product)
        nothing = product.new_zeros(len(product), 1)  # the first of equal products is taken
        best = torch.cat([nothing, product.detach()], 1).argmax(1, keepdim=True)
        return torch.cat([nothing, value], 1).gather(1, best)[:, 0]


def _parts(one: Detected, boxes: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """How sure each detection is of the labels, and its IoU with the boxes, (n, N) each."""
    from torchvision.ops import box_iou  # noqa: PLC0415  (loaded with the first detector)

    overlap = box_iou(boxes.to(one.boxes), one.boxes).to(one.scores)
    labels = labels if labels is None else labels.to(one.scores.device)
    if one.labels is None:
        sure = one.scores.amax(1)[None] if labels is None else one.scores[:, labels].T
    else:
        sure = one.scores[None] if labels is None else one.scores * (one.labels == labels[:, None])
    return sure.expand(overlap.shape), overlap


def _alike(one: Detected, says: Tensor) -> Tensor:
    """The cosines of the class probabilities with those looked for, (n, N)."""
    if one.labels is not None:
        return (one.labels == says[:, None]).to(one.scores)
    return torch.cosine_similarity(says[:, None], one.scores[None], dim=-1)


def _check_labels(image: int, one: Detected, labels: Tensor) -> None:
    """Raise where an image has no detection of a label, or a network no such class."""
    if one.labels is None:
        class_index(labels[None], one.scores[:1], "label")
        return
    for label in labels if checks.is_readable(one.labels) else ():
        if not bool((one.labels == label.to(one.labels.device)).any()):
            there = f"its labels are {one.labels.unique().tolist()}"
            wanted = f"label {int(label)}; {there}: pass one of them, or label=None for any"
            raise ValueError(f"detection: image {image} has no detection with {wanted}")


# -- outputs -------------------------------------------------------------------------------------------------


def read(output: Any, format: Format | None, size: Sequence[int] | None) -> list[Detected]:  # noqa: A002
    """What is detected in each image.

    Raises:
        ValueError: the output does not say its format, or does not fit it.
    """
    form = format or _format_of(output)
    if form == "torchvision" and is_listed(output):
        return [_listed(output, one) for one in output]
    if form == "ultralytics" and _is_results(output):
        boxes = [one.boxes for one in output]
        return [Detected(b.xyxy, b.conf, b.cls.to(torch.int64), b.conf) for b in boxes]
    if form in ("detr", "rtdetr"):
        return _of_queries(output, form, size)
    values = output[0] if isinstance(output, (tuple, list)) and output else output
    if form not in ("yolov5", "yolov8", "yolov10") or not isinstance(values, Tensor) or values.ndim != 3:
        raise _unread(output, form)
    checks.check_dense("detection: the model's output", values)
    values = values.movedim(1, 2) if form == "yolov8" else values
    if values.shape[2] < 5 + (form != "yolov8") or (form == "yolov10" and values.shape[2] != 6):
        raise _unread(output, form)
    if form == "yolov10":
        return [Detected(one[:, :4], one[:, 4], one[:, 5].to(torch.int64), one[:, 4]) for one in values]
    scores = values[..., 4:] if form == "yolov8" else values[..., 4:5] * values[..., 5:]
    objectness = scores.amax(-1) if form == "yolov8" else values[..., 4]
    return _of_classes(_corners(values[..., :4]), scores, objectness)


def _listed(output: Any, one: dict[str, Any]) -> Detected:
    """One of torchvision's dicts."""
    expected = "boxes (N, 4), labels (N,) and scores (N,), tensors"
    for key, axes in zip(DETECTIONS, (2, 1, 1), strict=True):
        if not isinstance(one[key], Tensor):
            raise misfit(output, ("logits",), expected, "detection: ")
        checks.check_dense(f"detection: {key}", one[key])
        if one[key].shape != (len(one["boxes"]), 4)[:axes]:
            raise misfit(output, ("logits",), expected, "detection: ")
    return Detected(one["boxes"], one["scores"], one["labels"], one["scores"])


def _of_queries(output: Any, form: str, size: Sequence[int] | None) -> list[Detected]:
    """The queries of DETR and its kin, whose boxes are shares of the image."""
    logits, shares = part_of(output, "logits", "pred_logits"), part_of(output, "pred_boxes")
    if logits is None or shares is None or logits.ndim != 3 or shares.shape != (*logits.shape[:2], 4):
        raise _unread(output, form)
    if size is None:
        has = "the model's boxes are relative to the image size"
        raise ValueError(f"detection: {has}; pass size=(height, width) of x, such as size=x.shape[2:]")
    boxes = _corners(shares) * shares.new_tensor([size[1], size[0]] * 2)
    if form == "rtdetr":
        return _of_classes(boxes, logits.sigmoid(), logits.sigmoid().amax(-1))
    p = logits.softmax(-1)
    return _of_classes(boxes, p[..., :-1], 1 - p[..., -1])


def _of_classes(boxes: Tensor, scores: Tensor, objectness: Tensor) -> list[Detected]:
    """Boxes (B, N, 4) with the scores of every class (B, N, C)."""
    return [Detected(b, s, None, o) for b, s, o in zip(boxes, scores, objectness, strict=True)]


def _corners(boxes: Tensor) -> Tensor:
    """Boxes of center and size as x1, y1, x2, y2."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], -1)


def _format_of(output: Any) -> str | None:
    """The format as far as the output itself says it: its keys, its type, or what stands beside the boxes."""
    if is_listed(output):
        return "torchvision"
    if _is_results(output):
        return "ultralytics"
    if part_of(output, "pred_boxes") is not None:
        kind = type(output).__name__.removesuffix("ObjectDetectionOutput")
        return "detr" if kind in _SOFTMAX else "rtdetr" if kind in _SIGMOID else None
    is_pair = isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], Tensor)
    return _format_beside(*output) if is_pair else None


def _format_beside(values: Tensor, raw: Any) -> str | None:
    """The format of a YOLO head's predictions by what it returns beside them."""
    if isinstance(raw, list) and raw and all(isinstance(one, Tensor) and one.ndim == 5 for one in raw):
        rows, widths = sum(one[0, ..., 0].numel() for one in raw), {one.shape[-1] for one in raw}
        return "yolov5" if {(rows, width) for width in widths} == {tuple(values.shape[1:])} else None
    known: dict[str, Any] = raw if isinstance(raw, dict) else {}
    is_dual = {"one2many", "one2one"} <= known.keys()
    heads = [known["one2many"], known["one2one"]] if is_dual else [known]
    scores = next((one["scores"] for one in heads if isinstance(one, dict) and "scores" in one), None)
    if not isinstance(scores, Tensor) or values.ndim != 3:
        return None
    found = {
        "yolov8": values.shape[1:] == (4 + scores.shape[1], scores.shape[2]),
        "yolov10": is_dual and values.shape[1] <= scores.shape[2] and values.shape[2] == 6,
    }
    return next(name for name, fits in found.items() if fits) if sum(found.values()) == 1 else None


def _is_results(output: Any) -> bool:
    """Whether an output is a list of ultralytics' Results."""
    boxes = [getattr(one, "boxes", None) for one in output] if isinstance(output, list) else []
    names = ("xyxy", "conf", "cls")
    return bool(boxes) and all(isinstance(getattr(b, n, None), Tensor) for b in boxes for n in names)


def _unread(output: Any, form: str | None) -> ValueError:
    """The error for an output that does not say its format, or does not fit the one that is asked for."""
    has = f"detection: the model's output is {describe(output)}"
    values = output[0] if isinstance(output, (tuple, list)) and output else output
    if form in _SHAPES:
        return ValueError(f"{has}; format={form!r} expects {_SHAPES[form]}")
    if part_of(output, "pred_boxes") is not None:
        possible = ("detr", "rtdetr")
    elif isinstance(values, Tensor) and values.ndim == 3:
        possible = ("yolov5", "yolov8", "yolov10")
    else:
        return misfit(output, ("logits",), _EXPECTED, "detection: ")
    remedy = ", or ".join(f"format={name!r} for {_SHAPES[name]}" for name in possible)
    return ValueError(f"{has}, whose format is ambiguous; pass {remedy}")
