"""What is explained: functions from a model's output to one score for each image."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks

Target = Callable[[Any], Tensor]
Classes = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | Target | None


class ClassScore(NamedTuple):
    """The target that reads one class (or n) of each image off the logits.

    Attributes:
        cls: None for the predicted class, an int, B ints or (B, n) ints.
        of: logits (B, classes) to the values that the class is read off.
    """

    cls: Classes
    of: Callable[[Tensor], Tensor]

    def __call__(self, output: Any) -> Tensor:
        values = self.of(logits(output))
        index = class_index(self.cls, values)
        scores = values.gather(-1, index.reshape(values.shape[0], -1))
        return scores if index.ndim == 2 else scores.squeeze(-1)


def logit(cls: Classes = None) -> ClassScore:
    """The target that is a class's logit.

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.

    Returns:
        A callable from the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, _unchanged)


def probability(cls: Classes = None) -> ClassScore:
    """The target that is a class's probability, softmax over the last axis of the logits, in [0, 1].

    Args:
        cls: None for the predicted class of each image, an int, B ints, or (B, n) ints for n classes each.

    Returns:
        A callable from the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, _softmax)


def sigmoid(cls: Classes = None) -> ClassScore:
    """The target that is a class's own probability in a multi-label network, in [0, 1].

    Args:
        cls: None for the most probable label of each image, an int, B ints, or (B, n) ints for n labels each.

    Returns:
        A callable from the model's output to (B,) scores, or (B, n).
    """
    return ClassScore(cls, torch.sigmoid)


def _unchanged(values: Tensor) -> Tensor:
    return values


def _softmax(values: Tensor) -> Tensor:
    return values.softmax(-1)


def logits(output: Any) -> Float[Tensor, "B classes"]:
    """The logits in a model's output: the output itself, its `.logits`, or its `"logits"` or `"out"`.

    Args:
        output: what the model returned.

    Raises:
        ValueError: no rule covers the output; a target callable does.
    """
    found = output
    if isinstance(output, dict):
        found = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ValueError(
            f"the model's output is {describe(output)}; expected logits of shape (B, classes), an object "
            "with .logits or a dict with 'logits' or 'out'. Pass cls=a callable from it to B scores, "
            "such as cls=lambda output: output[0][:, 3]"
        )
    return found


def describe(output: Any) -> str:
    """The kind and shape of a model's output, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        return "a dict with " + ", ".join(f"{key!r}: {describe(value)}" for key, value in output.items())
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}: " + ", ".join(
            describe(value) for value in output
        )
    found = getattr(output, "logits", None)
    return f"a {type(output).__name__}" + ("" if found is None else f" with .logits, {describe(found)}")


def class_index(cls: Classes, values: Float[Tensor, "B classes"]) -> Tensor:
    """The classes as indices (B,), or (B, n) for n classes of each image.

    Args:
        cls: None for the highest value of each image, an int, B ints, or (B, n) ints.
        values: (B, classes), what the index is for.

    Raises:
        ValueError: a class out of range, or a wrong number of classes for the batch.
        TypeError: cls holds something else than whole numbers.
    """
    batch, count = values.shape
    if cls is None:
        return values.argmax(-1)
    if isinstance(cls, Tensor):
        return _checked_tensor(cls, batch, count).to(values.device, torch.int64)
    if _is_sequence(cls):
        index = _checked_sequence(cls, batch, count)
        return torch.tensor(index, device=values.device)
    return torch.full((batch,), _checked_class(cls, count), device=values.device)


def _is_sequence(cls: Any) -> bool:
    return hasattr(cls, "__len__") and hasattr(cls, "__getitem__") and not isinstance(cls, (str, bytes, dict))


def _checked_sequence(cls: Any, batch: int, count: int) -> list[Any]:
    if len(cls) != batch:
        raise ValueError(
            f"cls={cls!r} holds {len(cls)} classes for a batch of {batch}; expected an int, {batch} ints, or "
            f"{batch} rows of n ints"
        )
    rows = [list(row) if _is_sequence(row) else row for row in cls]
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(widths) != 1 or (widths == {0} and any(isinstance(row, list) for row in rows)):
        raise ValueError(f"cls={cls!r}: expected the same number of classes, one or more, for every image")
    return [
        [_checked_class(c, count) for c in row] if isinstance(row, list) else _checked_class(row, count)
        for row in rows
    ]


def _checked_class(cls: Any, count: int) -> int:
    if isinstance(cls, bool):
        raise TypeError(f"cls={cls!r} is a bool; expected a class index")
    try:
        index = operator.index(cls)
    except TypeError:
        raise TypeError(
            f"cls={cls!r} is a {type(cls).__name__}; expected None, an int, ints, or a callable "
            "from the model's output to scores"
        ) from None
    if not 0 <= index < count:
        raise ValueError(f"cls={index} is out of range: the model has {count} classes, 0 to {count - 1}")
    return index


def _checked_tensor(cls: Tensor, batch: int, count: int) -> Tensor:
    if cls.is_floating_point() or cls.is_complex() or cls.dtype == torch.bool:
        raise TypeError(f"cls has dtype {cls.dtype}; expected whole numbers (cls.long() makes them)")
    if cls.ndim == 0:
        cls = cls.expand(batch)
    if cls.ndim not in (1, 2) or len(cls) != batch or cls.numel() == 0:
        raise ValueError(
            f"cls has shape {tuple(cls.shape)} for a batch of {batch}; expected ({batch},) or ({batch}, n)"
        )
    if checks.is_readable(cls):
        for index in cls.flatten().tolist():
            _checked_class(index, count)
    return cls


def resolve(cls: Classes, default: Callable[[Classes], Target] = logit) -> Target:
    """The target that `cls` means: itself where it is callable, else `default` of the classes.

    Args:
        cls: as for every method.
        default: what is explained of a class.
    """
    return cls if callable(cls) else default(cls)
