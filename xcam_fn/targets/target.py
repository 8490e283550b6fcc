"""What every target is: a function of an output whose choices can be kept, and sums of such functions."""

from __future__ import annotations

import abc
import functools
import operator
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

    @property
    def whole(self) -> Target | None:
        """All that is read for the target, where a default layer is to have all of it, as of detections."""
        return None

    @property
    def is_placed(self) -> bool:
        """Whether it reads given places of an image, which lie elsewhere where that is mirrored or scaled."""
        return False

    @abc.abstractmethod
    def fixed(self, output: Any) -> Fixed:
        """The target with every choice made by this output, of the B images as they are.

        It takes an output of P rows and the images (P,) that they stand for (None: the same B) to scores
        (P,), or (P, n) where n classes of each image were asked for.
        """

    def __call__(self, output: Any) -> Tensor:
        scores = self.fixed(output)(output, None)
        checks.check_finite(scores, "the score")
        return scores

    def pinned(self, output: Any) -> Target:
        """The target itself with every choice made by this output, whatever output it is given then."""
        return Chosen(self.fixed(output), self.is_placed)

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
class Reading(Target):
    """A target in three steps: find values in an output, choose by them, score the values by the choice."""

    find: Callable[[Any], Any]
    choose: Callable[[Any], tuple[Tensor | None, ...]]  # a row for each image
    scores: Callable[..., Tensor]
    placed: bool = False

    @property
    def is_placed(self) -> bool:
        """Whether what it finds are places of the image."""
        return self.placed

    def fixed(self, output: Any) -> Fixed:
        chosen = self.choose(self.find(output))

        def scores(output: Any, which: Tensor | None) -> Tensor:
            rows = (part if part is None or which is None else part[which] for part in chosen)
            return self.scores(self.find(output), *rows)

        return scores


@dataclass(frozen=True, eq=False)
class Chosen(Target):
    """A target that has nothing to choose, or whose choices were made by an earlier output."""

    scores: Fixed
    placed: bool = False

    @property
    def is_placed(self) -> bool:
        """Whether what was chosen are places of the image."""
        return self.placed

    def fixed(self, output: Any) -> Fixed:  # noqa: ARG002
        return self.scores


def _of_function(function: Score, output: Any, which: Tensor | None) -> Tensor:
    """The scores that a callable of the user's own gives, checked."""
    found = function(output)
    length = found.shape[0] if isinstance(found, Tensor) and found.ndim else 1
    checks.check_scores(found, length if which is None else len(which))
    return found


@dataclass(frozen=True, eq=False)
class _Combination(Target):
    """Multiples of targets, added up."""

    terms: tuple[tuple[float, Target], ...]

    @property
    def whole(self) -> Target | None:
        """All that is read for the terms."""
        found = [(1.0, target.whole or target) for _, target in self.terms]
        return _Combination(tuple(found)) if any(target.whole for _, target in self.terms) else None

    @property
    def is_placed(self) -> bool:
        """Whether one of its terms is."""
        return any(target.is_placed for _, target in self.terms)

    def pinned(self, output: Any) -> Target:
        """The same with the choices of its terms made by this output."""
        return _Combination(tuple((factor, target.pinned(output)) for factor, target in self.terms))

    def fixed(self, output: Any) -> Fixed:
        terms = [(factor, target.fixed(output)) for factor, target in self.terms]
        return lambda output, which: _added([factor * scores(output, which) for factor, scores in terms])


def _combination(*terms: tuple[float, Any]) -> Any:
    """The sum of the terms, targets or callables; NotImplemented for anything else."""
    if not all(callable(part) for _, part in terms):
        return NotImplemented
    parts = [p if isinstance(p, Target) else Chosen(functools.partial(_of_function, p)) for _, p in terms]
    return _Combination(tuple(zip((factor for factor, _ in terms), parts, strict=True)))


def _added(parts: list[Tensor]) -> Tensor:
    """The sum of scores (P,) and (P, n), the former counting for each of n classes."""
    columns = [part[:, None] if part.ndim == 1 else part for part in parts]
    widths = {column.shape[1] for part, column in zip(parts, columns, strict=True) if part.ndim > 1}
    if len({part.shape[0] for part in parts}) > 1 or len(widths) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        wanted = "one score for each image from all, or n from all"
        raise ValueError(f"cls: summed targets return shapes {shapes}; expected {wanted}")
    total = functools.reduce(operator.add, columns)
    return total if widths else total.squeeze(1)
