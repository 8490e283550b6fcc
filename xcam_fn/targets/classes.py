"""Classes as they are asked for, made into indices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks

Score = Callable[[Any], Tensor]
Classes = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | Score | None


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
        return _checked_tensor(cls, batch, count, name).to(values.device, torch.int64)
    if is_sequence(cls):
        index = _checked_sequence(cls, batch, count, name)
        return torch.tensor(index, device=values.device)
    return torch.full((batch,), _checked_class(cls, count, name), device=values.device)


def is_sequence(cls: Any) -> bool:
    """True for lists, tuples, arrays and the like; not for words."""
    return hasattr(cls, "__len__") and hasattr(cls, "__getitem__") and not isinstance(cls, (str, bytes, dict))


def _checked_sequence(cls: Any, batch: int, count: int, name: str) -> list[Any]:
    if len(cls) != batch:
        raise ValueError(
            f"{name}={cls!r} holds {len(cls)} classes for a batch of {batch}; expected an int, {batch} ints, "
            f"or {batch} rows of n ints"
        )
    rows = [list(row) if is_sequence(row) else row for row in cls]
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(widths) != 1 or (widths == {0} and any(isinstance(row, list) for row in rows)):
        raise ValueError(f"{name}={cls!r}: expected the same number of classes, one or more, for every image")
    return [
        [_checked_class(c, count, name) for c in row]
        if isinstance(row, list)
        else _checked_class(row, count, name)
        for row in rows
    ]


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
