"""What every target is: a function of an output whose choices can be kept, and sums of such functions."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xcam_fn import checks

Score = Callable[[Any], Tensor]
# Scores of an output whose rows stand for the images that the second argument says; None: row i for image i.
Fixed = Callable[[Any, Tensor | None], Tensor]


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


class Reading(Target):
    """A target in three steps: find values in an output, choose by them, score the values by the choice."""

    @staticmethod
    @abc.abstractmethod
    def find(output: Any) -> Any:
        """The values that are read; ValueError where the output holds none."""

    @abc.abstractmethod
    def choose(self, values: Any) -> tuple[Tensor | None, ...]:
        """What is chosen by the values: tensors with a row for each image, or None."""

    @abc.abstractmethod
    def scores(self, values: Any, chosen: tuple[Any, ...]) -> Tensor:
        """The scores of the values, with a row of each choice for each of them."""

    def fixed(self, output: Any) -> Fixed:
        chosen = self.choose(self.find(output))

        def scores(output: Any, which: Tensor | None) -> Tensor:
            rows = (part if part is None or which is None else part[which] for part in chosen)
            return self.scores(self.find(output), tuple(rows))

        return scores


@dataclass(frozen=True, eq=False)
class _Pinned(Target):
    """A target whose choices were made by an earlier output."""

    scores: Fixed

    def fixed(self, output: Any) -> Fixed:  # noqa: ARG002
        return self.scores


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
        if isinstance(given, _Combination):
            found += [(factor * inner, part) for inner, part in given.terms]
        elif isinstance(given, Target):
            found.append((factor, given))
        elif callable(given):
            found.append((factor, _Function(given)))  # type: ignore[arg-type]
        else:
            return NotImplemented
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
    total, *others = (part[:, None] if many and part.ndim == 1 else part for part in parts)
    for part in others:
        total = total + part
    return total
