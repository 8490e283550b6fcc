"""The targets of classification, and classes as they are asked for, made into indices."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import check, unchecked
from xcam_fn.targets import outputs
from xcam_fn.targets.target import Fixed, Reading, Score, Target

logits = unchecked(outputs.logits)  # a class that is masked has a logit of -inf
Classes = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | Score | None
Weighting = Literal["mean", "probability"]


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
        chosen = class_index(self.cls, logits(output))

        def scores(output: Any, which: Tensor | None) -> Tensor:
            index = chosen if which is None else chosen[which]
            rows = index if index.ndim == 2 else index[:, None]
            return self.of(logits(output), rows).reshape(index.shape)

        return scores

    def pinned(self, output: Any) -> ClassScore:
        return dataclasses.replace(self, cls=class_index(self.cls, logits(output)))


def logit(cls: Classes = None) -> ClassScore:
    """The logit of a class as a target.

        logits    1.5  4.0  -2.0  3.1
        cls=3                     ▲     score 3.1

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.

    Returns:
        A target: a function from the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, _logit)


def probability(cls: Classes = None) -> ClassScore:
    """The probability of a class as a target, softmax over the logits, in [0, 1]; cls is as for `logit`.

    For a network with one logit it is the sigmoid, since the softmax of one number is always 1.

    logits     1.5   4.0  -2.0   3.1
    softmax   0.06  0.67  0.00  0.27
    cls=3                        ▲     score 0.27
    """
    return ClassScore(cls, _probability)


def sigmoid(cls: Classes = None) -> ClassScore:
    """The sigmoid of a class's logit as a target, for multi-label networks; cls is as for `logit`.

    logits     1.5   4.0  -2.0   3.1
    sigmoid   0.82  0.98  0.12  0.96
    cls=3                        ▲     score 0.96
    """
    return ClassScore(cls, _sigmoid)


def log_odds(cls: Classes = None) -> ClassScore:
    """The log odds of a class as a target, log p/(1 − p): its logit minus the logsumexp of all others.

    Unlike the logit, it is invariant to a shift of all logits; unlike the probability, its gradient does not
    vanish if the network is certain.

        logits    1.5  4.0  -2.0  3.1
                  └─── others ──┘  ▲    score 3.1 − log(e^1.5 + e^4.0 + e^−2.0) = −0.98

    Args:
        cls: as for `logit`.

    Raises:
        ValueError: when called on the logits of one class.
    """
    return ClassScore(cls, _log_odds)


def resolve(cls: Classes, default: Callable[[Classes], Target] = logit) -> Score:
    """The target that `cls` stands for: `cls` itself if it is callable, else `default` of the classes.

    Args:
        cls: as for every method.
        default: the target to use for classes.
    """
    check("default", default, Callable)
    return cls if callable(cls) else default(cls)


def _logit(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index)


def _probability(values: Tensor, index: Tensor) -> Tensor:
    return (values.softmax(-1) if values.shape[-1] > 1 else values.sigmoid()).gather(-1, index)


def _sigmoid(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).sigmoid()


def _log_odds(values: Tensor, index: Tensor) -> Tensor:
    if values.shape[-1] == 1:
        remedy = "one logit is already log-odds; pass cls=xcam_fn.targets.regression()"
        raise ValueError(f"log_odds: the model has 1 class; {remedy}")
    return values.gather(-1, index) - _without(values[:, None], index, -torch.inf).logsumexp(-1)


def _without(values: Tensor, index: Tensor, filled: float) -> Tensor:
    """Values (B, n or 1, classes) as (B, n, classes), filled where each of the classes (B, n) is itself."""
    own = torch.arange(values.shape[-1], device=values.device) == index[..., None]
    return values.masked_fill(own, filled)


def contrast(
    cls: Classes = None,
    others: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    weight: int | float = 0.6,
    *,
    count: int = 3,
    weighting: Weighting = "mean",
) -> Target:
    """The target that contrasts a class with similar ones: y_c − weight · mean of their logits.

    What the classes share cancels; what separates them remains. With a gradient method this is Finer-CAM.

        logits    1.5  4.0  -2.0  3.1  3.6
                   ▼         far   ▼    ▼
        cls=1     └── the 3 nearest ────┘     score 4.0 − 0.6 · (1.5 + 3.1 + 3.6) / 3 = 2.36

    Args:
        cls: as for `logit`.
        others: None for the classes with the logits nearest to the class's, an int or ints for the same
            classes for all images, or (B, m) ints.
        weight: the fraction of the others to subtract; 0 leaves the logit unchanged, 1 cancels what they
            share.
        count: the number of nearest classes, ≥ 1; at most all others are used.
        weighting: "mean" as in the paper, or "probability" to weight each by its probability among the
            others, as pytorch-grad-cam does (with weight=1).

    Raises:
        ValueError: weight, count or weighting is out of range; when called, a class is out of range or
            compared with itself.
        TypeError: an argument has the wrong type.

    References:
        Zhang et al., Finer-CAM (arXiv:2501.11309).
    """
    checks.check_number("weight", weight)
    checks.check_count("count", count)
    checks.check_choice("weighting", weighting, get_args(Weighting))
    choose = functools.partial(_compared, cls, others, count)
    return Reading(logits, choose, functools.partial(_contrast, float(weight), weighting))


def _compared(cls: Classes, others: Classes, count: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The classes, (B,) or (B, n), and those that each of them is compared with, (B, n, m)."""
    index = class_index(cls, values)
    batch, classes = values.shape
    rows = index.reshape(batch, -1)
    if classes == 1:
        raise ValueError("contrast: the model has 1 class; expected at least 2 to compare")
    if isinstance(others, Tensor):
        checks.check_dense("others", others)
    if others is None:
        return index, _nearest(values.detach(), rows, count)
    each: Any = others
    if is_sequence(others) and not any(map(is_sequence, each)):  # the same for all images
        each = others.expand(batch, -1) if isinstance(others, Tensor) else [others] * batch
    among = class_index(each, values, "others").reshape(batch, 1, -1).expand(-1, rows.shape[1], -1)
    is_own = (among == rows[..., None]).flatten(1).any(1)
    if checks.is_readable(among) and bool(is_own.any()):
        image = int(is_own.nonzero()[0])
        holds = f"others={others!r} holds the explained class, {rows[image].tolist()} for image {image}"
        raise ValueError(f"{holds}; expected other classes, or None for the most similar ones")
    return index, among


def _contrast(weight: float, weighting: Weighting, values: Tensor, index: Tensor, others: Tensor) -> Tensor:
    """The logits of classes (B,) or (B, n) less a part of those of the others, (B, n, m)."""
    compared = values.gather(-1, others.flatten(1)).reshape(others.shape)
    by_probability = weighting == "probability"
    average = (compared.softmax(-1) * compared).sum(-1) if by_probability else compared.mean(-1)
    return (values.gather(-1, index.reshape(index.shape[0], -1)) - weight * average).reshape(index.shape)


def _nearest(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The classes whose values (B, classes) are nearest to those of (B, n) classes, (B, n, count)."""
    distance = (values[:, None] - values.gather(-1, rows)[..., None]).abs()
    order = _without(distance, rows, torch.inf).sort(dim=-1, stable=True).indices
    return order[..., : min(count, values.shape[-1] - 1)]


def class_index(cls: Classes, values: Float[Tensor, "B classes"], name: str = "cls") -> Tensor:
    """The classes as indices (B,), or (B, n) for n classes of each image.

    Args:
        cls: None for the highest value of each image, an int, B ints, or (B, n) ints.
        values: (B, classes), the values to index.
        name: the name of the argument, for errors.

    Raises:
        ValueError: a class is out of range, or the number of classes does not match the batch.
        TypeError: cls holds something other than integers.
    """
    fits = lambda values: values.ndim == 2 and values.numel() > 0  # noqa: E731
    batch, count = checks.check_returned("the model", values, "logits (B, classes)", fits).shape
    if cls is None:
        return values.argmax(-1)
    if isinstance(cls, Tensor):
        checks.check_dense(name, cls)
    if not isinstance(cls, Tensor):
        index = torch.tensor(_numbers(cls, batch, count, name))
    elif is_whole(cls):
        index = cls
    else:
        raise TypeError(f"{name} has dtype {cls.dtype}; expected integers ({name}.long() converts it)")
    index = index.expand(batch) if index.ndim == 0 else index
    if index.ndim not in (1, 2) or index.shape[0] != batch or index.numel() == 0:
        shape, wanted = tuple(index.shape), f"({batch},) or ({batch}, n)"
        raise ValueError(f"{name} has shape {shape} for a batch of {batch}; expected {wanted}")
    for one in index.flatten().tolist() if checks.is_readable(index) else ():
        _number(one, count, name)
    return index.to(values.device, torch.int64)


def is_sequence(cls: Any) -> bool:
    """True for lists, tuples, arrays and the like; not for words and for arrays of no axes."""
    is_one = isinstance(cls, (str, bytes, dict)) or getattr(cls, "ndim", 1) == 0
    return hasattr(cls, "__len__") and hasattr(cls, "__getitem__") and not is_one


def is_whole(cls: Tensor) -> bool:
    """True for a tensor of integers."""
    return not (cls.is_floating_point() or cls.is_complex() or cls.dtype == torch.bool)


def _numbers(cls: Any, batch: int, count: int, name: str) -> Any:
    """One class, or those in a sequence for each of B images, as plain numbers."""
    if not is_sequence(cls):
        return _number(cls, count, name)
    if len(cls) != batch:
        wanted = f"an int, {batch} ints, or {batch} rows of n ints"
        raise ValueError(f"{name}={cls!r} holds {len(cls)} classes for a batch of {batch}; expected {wanted}")
    widths = {len(row) if is_sequence(row) else None for row in cls}
    if len(widths) != 1 or widths == {0}:
        raise ValueError(f"{name}={cls!r}; expected the same number of classes, at least one, for each image")
    number = functools.partial(_number, count=count, name=name)
    return [[*map(number, row)] if is_sequence(row) else number(row) for row in cls]


def _number(cls: Any, count: int, name: str) -> int:
    if isinstance(cls, bool) or not isinstance(cls, SupportsIndex):
        wanted = "None, an int, ints, or a callable from the model's output to scores"
        raise TypeError(f"{name} must be {wanted}, got {cls!r}")
    if not 0 <= (index := operator.index(cls)) < count:
        raise ValueError(f"{name}={index} is out of range: the model has {count} classes, 0 to {count - 1}")
    return index
