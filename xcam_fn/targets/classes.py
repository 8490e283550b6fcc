"""The targets of classification, and classes as they are asked for, made into indices."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks
from xcam_fn.targets.outputs import logits
from xcam_fn.targets.target import Reading, Score, Target

Classes = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | Score | None
Weighting = Literal["mean", "probability"]


@dataclass(frozen=True, eq=False)
class ClassScore(Reading):
    """The target that reads one class (or n) of each image off the logits.

    Attributes:
        cls: None for the predicted class, an int, B ints or (B, n) ints.
        of: logits (B, classes) and an index (B, n) to (B, n) scores.
    """

    cls: Classes
    of: Callable[[Tensor, Tensor], Tensor]
    find = staticmethod(logits)

    def choose(self, values: Tensor) -> tuple[Tensor]:
        return (class_index(self.cls, values),)

    def scores(self, values: Tensor, chosen: tuple[Tensor]) -> Tensor:
        (index,) = chosen
        return self.of(values, index) if index.ndim == 2 else self.of(values, index[:, None]).squeeze(-1)

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
        cls: as for `logit`.
    """
    return ClassScore(cls, _probability)


def sigmoid(cls: Classes = None) -> ClassScore:
    """The target that is a class's own probability in a multi-label network, in [0, 1].

        logits     1.5   4.0  -2.0   3.1
        sigmoid   0.82  0.98  0.12  0.96
        cls=3                        ▲     score 0.96

    Args:
        cls: as for `logit`; None for the most probable label of each image.
    """
    return ClassScore(cls, _sigmoid)


def log_odds(cls: Classes = None) -> ClassScore:
    """The target that is a class's log-odds, log p/(1 − p): its logit minus the logsumexp of all others.

    Unlike the logit it does not change when all logits do, and unlike the probability its gradient does not
    vanish where the network is sure.

        logits    1.5  4.0  -2.0  3.1
                  └─── others ──┘  ▲    score 3.1 − log(e^1.5 + e^4.0 + e^−2.0) = −0.98

    Args:
        cls: as for `logit`.

    Raises:
        ValueError: when called on the logits of one class.
    """
    return ClassScore(cls, _log_odds)


def resolve(cls: Classes, default: Callable[[Classes], Target] = logit) -> Score:
    """The target that `cls` means: itself where it is callable, else `default` of the classes.

    Args:
        cls: as for every method.
        default: what is explained of a class.
    """
    return cls if callable(cls) else default(cls)


def _logit(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index)


def _probability(values: Tensor, index: Tensor) -> Tensor:
    return values.softmax(-1).gather(-1, index)


def _sigmoid(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).sigmoid()


def _log_odds(values: Tensor, index: Tensor) -> Tensor:
    if values.shape[-1] == 1:
        raise ValueError(
            "log_odds: the model has 1 class; expected two or more. One logit alone is the log-odds of its "
            "class: pass cls=xcam_fn.targets.regression()"
        )
    others = values[:, None].masked_fill(_is_own(values, index), -torch.inf)
    return values.gather(-1, index) - others.logsumexp(-1)


def _is_own(values: Tensor, index: Tensor) -> Tensor:
    """Which of all classes each of (B, n) is, (B, n, classes)."""
    return torch.arange(values.shape[-1], device=values.device) == index[..., None]


@dataclass(frozen=True, eq=False)
class _Contrast(Reading):
    """The target of `contrast`."""

    cls: Classes
    others: Classes
    weight: float
    count: int
    weighting: Weighting
    find = staticmethod(logits)

    def choose(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The classes, (B,) or (B, n), and those that each of them is compared with, (B, n, m)."""
        index = class_index(self.cls, values)
        rows = index.reshape(index.shape[0], -1)
        if values.shape[-1] == 1:
            raise ValueError("contrast: the model has 1 class; expected another to compare it with")
        if self.others is None:
            return index, _nearest(values.detach(), rows, self.count)
        batch, n = rows.shape
        others = class_index(_for_every_image(self.others, batch), values, "others")
        others = others.reshape(batch, 1, -1).expand(-1, n, -1)
        is_own = others == rows[..., None]
        if checks.is_readable(others) and bool(is_own.any()):
            image = int(is_own.flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"others={self.others!r} holds the class itself, {rows[image].tolist()} for image {image}; "
                "expected classes to compare it with, or None for those most like it"
            )
        return index, others

    def scores(self, values: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
        index, others = chosen
        own = values.gather(-1, index.reshape(index.shape[0], -1))
        compared = values.gather(-1, others.flatten(1)).reshape(others.shape)
        by_probability = self.weighting == "probability"
        average = (compared.softmax(-1) * compared).sum(-1) if by_probability else compared.mean(-1)
        found = own - self.weight * average
        return found if index.ndim == 2 else found.squeeze(-1)


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
        cls: as for `logit`.
        others: None for the classes whose logits are nearest to the class's, an int or ints for the same
            classes for all images, or (B, m) ints.
        weight: how much of the others is taken away; 0 leaves the logit alone, at 1 what they share cancels.
        count: how many classes are nearest, ≥ 1; no more than there are are taken.
        weighting: "mean" as in the paper, or "probability": each counts by its probability among the others,
            as pytorch-grad-cam does (with weight=1).

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
    order = distance.masked_fill(_is_own(values, rows), torch.inf).sort(dim=-1, stable=True).indices
    return order[..., : min(count, values.shape[-1] - 1)]


def _for_every_image(others: Classes, batch: int) -> Classes:
    """The classes (B, m), also where they are given once for all images."""
    if isinstance(others, Tensor) and others.ndim < 2:
        return others.reshape(1, -1).expand(batch, -1)
    if is_sequence(others) and not any(is_sequence(row) for row in others):  # type: ignore[union-attr]
        return [list(others)] * batch  # type: ignore[arg-type]
    return others


def class_index(cls: Classes, values: Float[Tensor, "B classes"], name: str = "cls") -> Tensor:
    """The classes as indices (B,), or (B, n) for n classes of each image.

    Args:
        cls: None for the highest value of each image, an int, B ints, or (B, n) ints.
        values: (B, classes), what the index is for.
        name: what the argument is called where it was passed.

    Raises:
        ValueError: a class out of range, or a wrong number of classes for the batch.
        TypeError: cls holds something else than whole numbers.
    """
    batch, count = values.shape
    if cls is None:
        return values.argmax(-1)
    if isinstance(cls, Tensor):
        index = _checked_tensor(cls, batch, count, name)
    elif is_sequence(cls):
        index = torch.tensor(_checked_sequence(cls, batch, count, name), device=values.device)
    else:
        index = torch.full((batch,), _checked_class(cls, count, name), device=values.device)
    return index.to(values.device, torch.int64)


def is_sequence(cls: Any) -> bool:
    """True for lists, tuples, arrays and the like; not for words."""
    return hasattr(cls, "__len__") and hasattr(cls, "__getitem__") and not isinstance(cls, (str, bytes, dict))


def _checked_sequence(cls: Any, batch: int, count: int, name: str) -> list[Any]:
    if len(cls) != batch:
        raise ValueError(
            f"{name}={cls!r} holds {len(cls)} classes for a batch of {batch}; expected an int, {batch} ints, "
            f"or {batch} rows of n ints"
        )
    widths = {len(row) if is_sequence(row) else None for row in cls}
    if len(widths) != 1 or widths == {0}:
        raise ValueError(f"{name}={cls!r}: expected the same number of classes, one or more, for every image")
    if widths == {None}:
        return [_checked_class(c, count, name) for c in cls]
    return [[_checked_class(c, count, name) for c in row] for row in cls]


def _checked_class(cls: Any, count: int, name: str) -> int:
    if isinstance(cls, bool):
        raise TypeError(f"{name}={cls!r} is a bool; expected a class index")
    try:
        index = operator.index(cls)
    except TypeError:
        raise TypeError(
            f"{name}={cls!r} is a {type(cls).__name__}; expected None, an int, ints, or a callable "
            "from the model's output to scores"
        ) from None
    if not 0 <= index < count:
        raise ValueError(f"{name}={index} is out of range: the model has {count} classes, 0 to {count - 1}")
    return index


def _checked_tensor(cls: Tensor, batch: int, count: int, name: str) -> Tensor:
    if cls.is_floating_point() or cls.is_complex() or cls.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {cls.dtype}; expected whole numbers ({name}.long() makes them)")
    if cls.ndim == 0:
        cls = cls.expand(batch)
    if cls.ndim not in (1, 2) or len(cls) != batch or cls.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(cls.shape)} for a batch of {batch}; expected ({batch},) or ({batch}, n)"
        )
    if checks.is_readable(cls):
        for index in cls.flatten().tolist():
            _checked_class(index, count, name)
    return cls
