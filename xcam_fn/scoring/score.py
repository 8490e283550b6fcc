"""The score of a network's output to explain, fixed for each image of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.targets import Classes, ClassScore, Target, logit, probability

TARGETS: dict[str, Callable[[Classes], ClassScore]] = {"probability": probability, "logit": logit}


class Explained(NamedTuple):
    """A score that is fixed for each image of a batch, also for perturbed copies.

    Attributes:
        of: maps an output, and the image that each of its rows is a copy of, (P,), to scores (P, n).
        own: the scores of the original images, (B, n).
        many: whether n classes per image were requested.
        cls: the fixed class: indices if it was None or integers, else the target.
    """

    of: Callable[[Any, Tensor], Tensor]
    own: Tensor
    many: bool
    cls: Classes

    @property
    def logit_of(self) -> Classes:
        """The class alone, without the kind of its score, so its gradient is that of the logit."""
        return self.cls.cls if isinstance(self.cls, ClassScore) else self.cls


def explained_score(
    output: Any, batch: int, cls: Classes, default: Callable[[Classes], ClassScore] = probability
) -> Explained:
    """The score of each image, with its class fixed on the original image.

    Args:
        output: the network's output for the original images.
        batch: the number of images.
        cls: as for every method.
        default: the kind of score that explains a class.

    Raises:
        ValueError: a class is out of range, or a target does not return one score per image.
        TypeError: cls, or a target's return value, has the wrong type.
    """
    if callable(cls) and not isinstance(cls, Target):

        def of_function(output: Any, which: Tensor) -> Tensor:
            return checks.scores_of(cls, output, len(which))[:, None]

        return Explained(of_function, of_function(output, torch.arange(batch)), many=False, cls=cls)
    target = (cls if isinstance(cls, Target) else default(cls)).pinned(output)
    fixed = target.fixed(output)
    own = checks.scores_of(lambda output: fixed(output, None), output, batch, many=True)
    many = own.ndim == 2

    def of_target(output: Any, which: Tensor) -> Tensor:
        scores = fixed(output, which)
        return scores if many else scores[:, None]

    chosen: Classes = cls
    if cls is None:
        assert isinstance(target, ClassScore)  # every default is one
        chosen = target.cls
    elif isinstance(cls, Target):
        chosen = target
    return Explained(of_target, own if many else own[:, None], many=many, cls=chosen)


def check_score(score: str) -> None:
    """Raise if `score` is not the name of a class's score."""
    checks.check_choice("score", score, tuple(TARGETS))
