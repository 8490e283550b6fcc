"""What is explained: functions from a model's output to one score for each image.

| the network returns        | target                                                                     |
|----------------------------|----------------------------------------------------------------------------|
| logits (B, classes)        | `logit`, `probability`, `log_odds`, `sigmoid` (multi-label), `contrast`    |
| logits (B, classes, H, W)  | `segment`: torchvision's dict and an object with .logits too               |
| a list of detections       | `detection`, for torchvision's detectors                                   |
| embeddings (B, D)          | `similarity`: image_embeds and pooler_output too                           |
| numbers (B,) or (B, n)     | `regression`                                                               |

Targets are added, subtracted and multiplied by numbers, also with callables of your own:
`logit(281) - 0.5 * logit(282)`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.targets.classes import Classes, Score, class_index, is_sequence
from xcam_fn.targets.outputs import dense_logits, describe, detections, embeddings, logits, numbers

__all__ = [
    "ClassScore",
    "Classes",
    "Score",
    "Target",
    "class_index",
    "contrast",
    "describe",
    "detection",
    "log_odds",
    "logit",
    "logits",
    "probability",
    "regression",
    "resolve",
    "segment",
    "sigmoid",
    "similarity",
]

# Scores of an output whose rows stand for the images that the second argument says; None: row i for image i.
Fixed = Callable[[Any, Tensor | None], Tensor]
Weighting = Literal["mean", "probability"]


class Target(abc.ABC):
    """A function from a model's output to a score for each image, which can be added up and multiplied.

    A target may choose something by the output: the predicted class, the classes most like it, the pixels
    of a class. `fixed` makes the choice once, on the images as they are, and keeps it for outputs of
    perturbed images.
    """

    @abc.abstractmethod
    def fixed(self, output: Any) -> Fixed:
        """The target with every choice made by this output.

        Args:
            output: what the model returned for the B images as they are.

        Returns:
            A function of an output of P rows and of the images (P,) in the batch that its rows stand for
            (None: the same B) to scores (P,), or (P, n) where n classes of each image were asked for.
        """

    def __call__(self, output: Any) -> Tensor:
        return self.fixed(output)(output, None)

    def pinned(self, output: Any) -> Target:
        """The target itself with every choice made by this output, whatever output it is given then."""
        return _Pinned(self.fixed(output))

    def __add__(self, other: Any) -> Target:
        return _combination((1.0, self), (1.0, other))

    def __radd__(self, other: Any) -> Target:
        return self if type(other) is int and other == 0 else self + other  # sum() begins with 0

    def __sub__(self, other: Any) -> Target:
        return _combination((1.0, self), (-1.0, other))

    def __rsub__(self, other: Any) -> Target:
        return _combination((-1.0, self), (1.0, other))

    def __mul__(self, factor: Any) -> Target:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        checks.check_number("factor", factor)
        return _combination((float(factor), self))

    __rmul__ = __mul__

    def __neg__(self) -> Target:
        return -1 * self


@dataclass(frozen=True, eq=False)
class _Pinned(Target):
    """A target whose choices were made by an earlier output."""

    scores: Fixed

    def fixed(self, output: Any) -> Fixed:  # noqa: ARG002
        return self.scores


def _rows(of_images: Tensor, which: Tensor | None) -> Tensor:
    """The rows of something that there is one of for each image, for the images that an output stands for."""
    return of_images if which is None else of_images[which]


# ---------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassScore(Target):
    """The target that reads one class (or n) of each image off the logits.

    Attributes:
        cls: None for the predicted class, an int, B ints or (B, n) ints.
        of: logits (B, classes) and an index (B, n) to (B, n) scores.
    """

    cls: Classes
    of: Callable[[Tensor, Tensor], Tensor]

    def fixed(self, output: Any) -> Fixed:
        index = class_index(self.cls, logits(output))
        rows = index.reshape(index.shape[0], -1)

        def scores(output: Any, which: Tensor | None) -> Tensor:
            found = self.of(logits(output), _rows(rows, which))
            return found if index.ndim == 2 else found.squeeze(-1)

        return scores

    def pinned(self, output: Any) -> ClassScore:
        return dataclasses.replace(self, cls=class_index(self.cls, logits(output)))


def logit(cls: Classes = None) -> ClassScore:
    """The target that is a class's logit.

        logits    1.5  4.0  -2.0  3.1
        cls=3                     ▲     score 3.1

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.

    Returns:
        A target: the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, _logit)


def probability(cls: Classes = None) -> ClassScore:
    """The target that is a class's probability, softmax over the last axis of the logits, in [0, 1].

        logits     1.5   4.0  -2.0   3.1
        softmax   0.06  0.67  0.00  0.27
        cls=3                        ▲     score 0.27

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.

    Returns:
        A target: the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, _probability)


def sigmoid(cls: Classes = None) -> ClassScore:
    """The target that is a class's own probability in a multi-label network, in [0, 1].

        logits     1.5   4.0  -2.0   3.1
        sigmoid   0.82  0.98  0.12  0.96
        cls=3                        ▲     score 0.96

    Args:
        cls: None for the most probable label of each image, an int, B ints, or (B, n) ints for n labels each.

    Returns:
        A target: the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, _sigmoid)


def log_odds(cls: Classes = None) -> ClassScore:
    """The target that is a class's log-odds, log p/(1 − p): its logit minus the logsumexp of all others.

    Unlike the logit it does not change when all logits do, and unlike the probability its gradient does not
    vanish where the network is sure.

        logits    1.5  4.0  -2.0  3.1
                  └─── others ──┘  ▲    score 3.1 − log(e^1.5 + e^4.0 + e^−2.0) = −0.98

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.

    Returns:
        A target: the model's output to (B,) scores, or (B, n). It raises ValueError where there is one class.
    """
    return ClassScore(cls, _log_odds)


def _logit(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index)


def _probability(values: Tensor, index: Tensor) -> Tensor:
    return values.softmax(-1).gather(-1, index)


def _sigmoid(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).sigmoid()


def _log_odds(values: Tensor, index: Tensor) -> Tensor:
    count = values.shape[-1]
    if count == 1:
        raise ValueError(
            "log_odds: the model has 1 class; expected two or more. One logit alone is the log-odds of its "
            "class: pass cls=xcam_fn.targets.regression()"
        )
    is_own = torch.arange(count, device=values.device) == index[..., None]
    others = values[:, None].masked_fill(is_own, -torch.inf)
    return values.gather(-1, index) - others.logsumexp(-1)


@dataclass(frozen=True, eq=False)
class _Contrast(Target):
    """The target of `contrast`."""

    cls: Classes
    others: Classes
    weight: float
    count: int
    weighting: Weighting

    def fixed(self, output: Any) -> Fixed:
        values = logits(output)
        index = class_index(self.cls, values)
        rows = index.reshape(index.shape[0], -1)
        others = self._others(values, rows)

        def scores(output: Any, which: Tensor | None) -> Tensor:
            values = logits(output)
            own = values.gather(-1, _rows(rows, which))
            chosen = _rows(others, which)
            compared = values.gather(-1, chosen.flatten(1)).reshape(chosen.shape)
            found = own - self.weight * self._average(compared)
            return found if index.ndim == 2 else found.squeeze(-1)

        return scores

    def _others(self, values: Tensor, rows: Tensor) -> Tensor:
        """The classes that each of (B, n) is compared with, (B, n, m)."""
        if values.shape[-1] == 1:
            raise ValueError("contrast: the model has 1 class; expected another to compare it with")
        if self.others is None:
            return _nearest(values.detach(), rows, self.count)
        batch, n = rows.shape
        index = class_index(_for_every_image(self.others, batch), values, "others")
        others = index.reshape(batch, 1, -1).expand(-1, n, -1)
        if checks.is_readable(others) and bool((others == rows[..., None]).any()):
            image = int((others == rows[..., None]).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"others={self.others!r} holds the class itself, {rows[image].tolist()} for image {image}; "
                "expected classes to compare it with, or None for those most like it"
            )
        return others

    def _average(self, compared: Tensor) -> Tensor:
        if self.weighting == "mean":
            return compared.mean(-1)
        return (compared.softmax(-1) * compared).sum(-1)


def contrast(
    cls: Classes = None,
    others: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    weight: int | float = 0.6,
    *,
    count: int = 3,
    weighting: Weighting = "mean",
) -> Target:
    """The target that sets a class off against those most like it: y_c − weight · mean of their logits.

    What the class shares with them cancels, what tells it from them stays. With a gradient method this is
    Finer-CAM.

        logits    1.5  4.0  -2.0  3.1  3.6
                   ▼         far   ▼    ▼
        cls=1     └── the 3 nearest ────┘     score 4.0 − 0.6 · (1.5 + 3.1 + 3.6) / 3 = 2.36

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.
        others: None for the classes whose logits are nearest to the class's, an int or ints for the same
            classes for all images, or (B, m) ints.
        weight: how much of the others is taken away; 0 leaves the logit alone, at 1 what they share cancels.
        count: how many classes are nearest, ≥ 1; no more than there are are taken.
        weighting: "mean" as in the paper, or "probability": each counts by its probability among the others,
            as pytorch-grad-cam does (with weight=1).

    Returns:
        A target: the model's output to (B,) scores, or (B, n).

    Raises:
        ValueError: weight, count or weighting is out of range; when called, a class is out of range or
            compared with itself.
        TypeError: an argument is of the wrong kind.

    References:
        Zhang et al., Finer-CAM (arXiv:2501.11309).
    """
    checks.check_number("weight", weight)
    checks.check_count("count", count)
    checks.check_choice("weighting", weighting, get_args(Weighting))
    return _Contrast(cls, others, float(weight), count, weighting)


def _nearest(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The classes whose values (B, classes) are nearest to those of (B, n) classes, (B, n, count)."""
    distance = (values[:, None] - values.gather(-1, rows)[..., None]).abs()
    is_own = torch.arange(values.shape[-1], device=values.device) == rows[..., None]
    order = distance.masked_fill(is_own, torch.inf).sort(dim=-1, stable=True).indices
    return order[..., : min(count, values.shape[-1] - 1)]


def _for_every_image(others: Classes, batch: int) -> Classes:
    """The classes (B, m), also where they are given once for all images."""
    if isinstance(others, Tensor) and others.ndim < 2:
        return others.reshape(1, -1).expand(batch, -1)
    if is_sequence(others) and not any(is_sequence(row) for row in others):  # type: ignore[union-attr]
        return [list(others)] * batch  # type: ignore[arg-type]
    return others


# ---------------------------------------------------------------------------------------------------------
# Dense outputs, detections, embeddings, numbers
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Segment(Target):
    """The target of `segment`."""

    cls: int | Sequence[int] | Tensor
    mask: Tensor | None

    def fixed(self, output: Any) -> Fixed:
        values = dense_logits(output)
        index = class_index(self.cls, values.flatten(2)[..., 0])
        if index.ndim == 2:
            raise ValueError(
                f"segment: cls has shape {tuple(index.shape)}; expected one class, or {len(index)} for the "
                "images"
            )
        share = self._share(values.detach(), index)

        def scores(output: Any, which: Tensor | None) -> Tensor:
            values = dense_logits(output).flatten(2)
            rows = _rows(index, which)[:, None, None].expand(-1, 1, values.shape[-1])
            return (values.gather(1, rows).squeeze(1) * _rows(share, which)).sum(-1)

        return scores

    def _share(self, values: Tensor, index: Tensor) -> Tensor:
        """What each pixel counts, (B, pixels), 1 for each image in all."""
        batch, size = values.shape[0], tuple(values.shape[2:])
        if self.mask is None:
            mask = values.argmax(1) == index.reshape(-1, *[1] * len(size))
        elif tuple(self.mask.shape) in (size, (batch, *size)):
            mask = self.mask.to(values.device).expand(batch, *size)
        else:
            raise ValueError(
                f"segment: mask has shape {tuple(self.mask.shape)}, the model's output has {size} pixels for "
                f"each of {batch} image(s); expected a mask of shape {size} or {(batch, *size)} (resize it "
                "to the output, mode='nearest')"
            )
        mask = mask.flatten(1).to(values.dtype)
        if checks.is_readable(mask) and not bool(mask.any(1).all()):
            image = int((~mask.any(1)).nonzero()[0])
            raise ValueError(self._no_pixel(image, int(index[image]), values))
        return mask / mask.sum(1, keepdim=True)

    def _no_pixel(self, image: int, cls: int, values: Tensor) -> str:
        if self.mask is not None:
            return f"segment: mask holds no pixel for image {image}; expected one or more"
        there = values[image].argmax(0).unique().tolist()
        return (
            f"segment: class {cls} has the highest logit at no pixel of image {image}, where the classes are "
            f"{there}; pass one of these, or mask= the pixels to explain"
        )


def segment(cls: int | Sequence[int] | Tensor, mask: Any = None) -> Target:
    """The target for dense outputs: the mean of a class's logit over the pixels of a mask.

        logits of cls      mask         score
        ┌─────────┐     ┌─────────┐
        │ 0 1 2 0 │     │ . # # . │
        │ 0 3 4 1 │  ×  │ . # # . │  →  (1 + 2 + 3 + 4) / 4 = 2.5
        │ 0 0 1 0 │     │ . . . . │
        └─────────┘     └─────────┘

    The output is (B, classes, H, W), torchvision's dict with 'out', or a dict or an object with logits.

    Args:
        cls: a class, or one for each image.
        mask: (H, W) or (B, H, W), the pixels of the output that count (bool, or how much each counts);
            None for those where the class has the highest logit, in the image as it is.

    Returns:
        A target: the model's output to (B,) scores.

    Raises:
        TypeError: mask is no array of numbers, or cls is None.
        ValueError: when called: the output is not dense, the mask has another size than it or holds no
            pixel, or the class has the highest logit nowhere.

    References:
        Vinogradova et al., Towards Interpretable Semantic Segmentation via Gradient-weighted Class Activation
        Mapping (arXiv:2002.11434).
    """
    if cls is None:
        raise TypeError("segment: cls is None; expected a class, or one for each image")
    return _Segment(cls, None if mask is None else _array("mask", mask))


@dataclass(frozen=True, eq=False)
class _Detection(Target):
    """The target of `detection`."""

    box: Tensor
    label: int | Sequence[int] | Tensor | None

    def fixed(self, output: Any) -> Fixed:
        found = detections(output)
        boxes = _of_images("detection: box", self.box, len(found), 4)
        labels = None if self.label is None else _of_images("label", torch.as_tensor(self.label), len(found))
        for image, detected in enumerate(found):
            _check_detected(image, detected, None if labels is None else int(labels[image]))

        def scores(output: Any, which: Tensor | None) -> Tensor:
            found = detections(output)
            images = range(len(found)) if which is None else which.tolist()
            return torch.stack(
                [
                    _best_match(detected, boxes[image], None if labels is None else labels[image])
                    for detected, image in zip(found, images, strict=True)
                ]
            )

        return scores


def detection(box: Any, label: int | Sequence[int] | Tensor | None = None) -> Target:
    """The target for torchvision's detectors: score × overlap (IoU) of the detection that matches a box best.

        detected    score   IoU with box   product
        ┌───┐       0.9     0.5            0.45
        │ ┌─┼─┐     0.6     0.8            0.48   ◀ score
        └─┼─┘ │     0.7     0.0            0.00
          └───┘

    It can be differentiated in both, so that a map shows what makes the network sure and what makes the box
    fit. Where nothing of the label overlaps the box, the score is 0. In a perturbed image in which nothing
    is detected it is 0 too; an image that is to be explained has to have a detection.

    Name the layer: `backbone.body.layer4` for a ResNet with a feature pyramid; `layer=None` would find one of
    the detector's heads. Detectors resize images and pad them to multiples of 32 pixels; a map is stretched
    over the padding too, so that images whose resized sides are multiples of 32 are explained most exactly.

    Args:
        box: (4,) for all images or (B, 4): x1, y1, x2, y2 in pixels of the image as passed in.
        label: the label that counts, or one for each image; None for any.

    Returns:
        A target: the model's output, a list of B dicts with boxes, labels and scores, to (B,) scores.

    Raises:
        ValueError: box is no box; when called: the output is something else, an image has no detection (of
            that label), or box or label is for another number of images.
        TypeError: box or label is of the wrong kind.
    """
    box = _array("box", box)
    if box.ndim not in (1, 2) or box.shape[-1] != 4 or box.numel() == 0:
        raise ValueError(
            f"box has shape {tuple(box.shape)}; expected (4,) or (B, 4): x1, y1, x2, y2 in pixels"
        )
    box = box.to(torch.float32) if not box.is_floating_point() else box
    if checks.is_readable(box) and not bool((box[..., 2:] > box[..., :2]).all()):
        raise ValueError(f"box={box.tolist()}: expected x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    return _Detection(box, _checked_label(label))


def _checked_label(label: Any) -> Any:
    if label is None:
        return None
    found = torch.as_tensor(label) if is_sequence(label) or isinstance(label, int) else label
    if isinstance(label, bool) or not isinstance(found, Tensor) or found.dtype not in _WHOLE:
        raise TypeError(f"label={label!r}; expected None, a whole number, or one for each image")
    return found


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_detected(image: int, detected: dict[str, Tensor], label: int | None) -> None:
    if not len(detected["scores"]):
        raise ValueError(
            f"detection: image {image} has no detections; pass an image in which the model finds something, "
            "or lower the score that it asks for (torchvision's box_score_thresh or score_thresh)"
        )
    if label is not None and not bool((detected["labels"] == label).any()):
        raise ValueError(
            f"detection: image {image} has no detection with label {label}; its labels are "
            f"{detected['labels'].unique().tolist()}: pass one of these, or label=None for any"
        )


def _best_match(detected: dict[str, Tensor], box: Tensor, label: Tensor | None) -> Tensor:
    """The highest score × IoU, 0 where nothing is detected."""
    products = detected["scores"] * _overlap(detected["boxes"], box.to(detected["boxes"]))
    if label is not None:
        products = products * (detected["labels"] == label.to(detected["labels"]))
    return torch.cat([products, products.new_zeros(1)]).max()


def _overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """Intersection over union of boxes (N, 4) with a box (4,)."""
    area = lambda corners: (corners[..., 2:] - corners[..., :2]).clamp(min=0).prod(-1)  # noqa: E731
    shared = torch.cat([torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])], -1)
    return area(shared) / (area(boxes) + area(box) - area(shared))


@dataclass(frozen=True, eq=False)
class _Similarity(Target):
    """The target of `similarity`."""

    embedding: Tensor

    def fixed(self, output: Any) -> Fixed:
        batch, width = embeddings(output).shape
        if self.embedding.shape[-1] != width:
            raise ValueError(
                f"similarity: embedding has shape {tuple(self.embedding.shape)}, but the model's output is "
                f"{describe(output)}; expected {width} numbers, an embedding from the same model"
            )
        wanted = _of_images("similarity: embedding", self.embedding, batch, width)

        def scores(output: Any, which: Tensor | None) -> Tensor:
            found = embeddings(output)
            return torch.cosine_similarity(found, _rows(wanted, which).to(found), dim=-1)

        return scores


def similarity(embedding: Any) -> Target:
    """The target for embeddings: the cosine of the angle to a wanted embedding, in [−1, 1].

            ▲ the image's
           ╱
          ╱ θ
         ╱──────▶ embedding        score cos θ

    The wanted embedding may be that of another image, or of a sentence for CLIP-like networks. The output is
    (B, D), or a dict or an object with image_embeds, pooler_output or embedding.

    Args:
        embedding: (D,) for all images or (B, D); its length does not matter.

    Returns:
        A target: the model's output to (B,) scores.

    Raises:
        ValueError: embedding is zero, not finite or has no (D,) or (B, D); when called: the output holds no
            embedding, or one of another width.
        TypeError: embedding is no array of numbers.
    """
    wanted = _array("embedding", embedding)
    if wanted.ndim not in (1, 2) or wanted.numel() == 0:
        raise ValueError(f"embedding has shape {tuple(wanted.shape)}; expected (D,) or (B, D)")
    wanted = wanted if wanted.is_floating_point() else wanted.to(torch.float32)
    if checks.is_readable(wanted) and not bool(wanted.ne(0).any(-1).all()):
        raise ValueError("embedding is zero everywhere, which has no direction; expected another vector")
    return _Similarity(wanted)


@dataclass(frozen=True, eq=False)
class _Regression(Target):
    """The target of `regression`."""

    index: int

    def fixed(self, output: Any) -> Fixed:
        count = numbers(output).shape[1]
        if self.index >= count:
            raise ValueError(
                f"regression: index={self.index} is out of range: the model's output is {describe(output)}; "
                f"expected 0 to {count - 1}"
            )
        return lambda output, _: numbers(output)[:, self.index]


def regression(index: int = 0) -> Target:
    """The target for networks that return numbers: one of them, as it is.

        output (B, n)    0.3  17.2  -4.0
        index=1               ▲            score 17.2

    Explain `-regression()` for what makes the number smaller.

    Args:
        index: which of the numbers, from 0; an output of shape (B,) has one.

    Returns:
        A target: the model's output, (B,) or (B, n), to (B,) scores.

    Raises:
        ValueError: index is negative; when called: out of range, or the output is something else.
        TypeError: index is no whole number.
    """
    checks.check_count("index", index, at_least=0)
    return _Regression(index)


def _array(name: str, value: Any) -> Tensor:
    """Something like an array as a tensor of finite numbers."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor or an array") from error
    if checks.is_readable(found) and not bool(torch.isfinite(found.detach()).all()):
        raise ValueError(f"{name} holds NaN or infinite values; expected finite ones")
    return found


def _of_images(name: str, value: Tensor, batch: int, *width: int) -> Tensor:
    """Something given once, or once for each image, as one for each of B images."""
    if value.ndim > len(width) and value.shape[0] != batch:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} for a batch of {batch}; expected {(*width,)} for all "
            f"images or {(batch, *width)}"
        )
    return value.expand(batch, *width)


# ---------------------------------------------------------------------------------------------------------
# Sums and differences
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Function(Target):
    """A callable of the user's own as a part of a sum."""

    of: Score

    def fixed(self, output: Any) -> Fixed:  # noqa: ARG002
        def scores(output: Any, which: Tensor | None) -> Tensor:
            found = self.of(output)
            counted = isinstance(found, Tensor) and found.ndim > 0 and which is None
            checks.check_scores(found, len(found) if counted else 1 if which is None else len(which))
            return found

        return scores


@dataclass(frozen=True, eq=False)
class _Combination(Target):
    """Multiples of targets, added up."""

    terms: tuple[tuple[float, Target], ...]

    def fixed(self, output: Any) -> Fixed:
        terms = [(factor, target.fixed(output)) for factor, target in self.terms]
        return lambda output, which: _added([factor * scores(output, which) for factor, scores in terms])


def _combination(*terms: tuple[float, Any]) -> Any:
    """The sum of the terms, those of a sum within it among them; NotImplemented for what is no target."""
    found: list[tuple[float, Target]] = []
    for factor, given in terms:
        if not callable(given):
            return NotImplemented
        target: Any = given
        if isinstance(target, _Combination):
            found += [(factor * inner, part) for inner, part in target.terms]
        else:
            found.append((factor, target if isinstance(target, Target) else _Function(target)))
    return _Combination(tuple(found))


def _added(parts: list[Tensor]) -> Tensor:
    """The sum of scores (P,) and (P, n), the former counting for each of n classes."""
    shapes = {part.shape for part in parts}
    if len({shape[0] for shape in shapes}) > 1 or len({shape[1:] for shape in shapes if len(shape) > 1}) > 1:
        raise ValueError(
            "cls: targets that are added up return shapes "
            f"{', '.join(str(tuple(part.shape)) for part in parts)}; expected one score for each image, or n "
            "for each, from all"
        )
    many = any(part.ndim == 2 for part in parts)
    total = parts[0][:, None] if many and parts[0].ndim == 1 else parts[0]
    for part in parts[1:]:
        total = total + (part[:, None] if many and part.ndim == 1 else part)
    return total


def resolve(cls: Classes, default: Callable[[Classes], Target] = logit) -> Score:
    """The target that `cls` means: itself where it is callable, else `default` of the classes.

    Args:
        cls: as for every method.
        default: what is explained of a class.
    """
    return cls if callable(cls) else default(cls)
