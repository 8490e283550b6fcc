"""Which score of a network's output is explained, fixed for each image of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.targets import Classes, ClassScore, Target, logit, probability

TARGETS: dict[str, Callable[[Classes], ClassScore]] = {"probability": probability, "logit": logit}


class Explained(NamedTuple):
    """A score that is fixed for each image of a batch, whatever the images are changed into.

    Attributes:
        of: an output and the images that its rows stand for, (P,), to scores (P, n).
        own: the scores of the images as they are, (B, n).
        many: whether n classes of each image were asked for.
        cls: the class as it was fixed: indices where it was None or whole numbers, else the target.
    """

    of: Callable[[Any, Tensor], Tensor]
    own: Tensor
    many: bool
    cls: Classes

    @property
    def logit_of(self) -> Classes:
        """The class without what is read off for it, so that a gradient is that of the logit."""
        return self.cls.cls if isinstance(self.cls, ClassScore) else self.cls


def explained_score(
    output: Any, batch: int, cls: Classes, default: Callable[[Classes], ClassScore] = probability
) -> Explained:
    """The score of each image, its class fixed on the image as it is.

    Args:
        output: the network's, for the unperturbed images.
        batch: how many images there are.
        cls: as for every method.
        default: what is explained of a class.

    Raises:
        ValueError: a class out of range, or a target that returns another shape than one score an image.
        TypeError: cls or what a target returns is of a wrong kind.
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
        assert isinstance(target, ClassScore)  # as every default is
        chosen = target.cls
    elif isinstance(cls, Target):
        chosen = target
    return Explained(of_target, own if many else own[:, None], many=many, cls=chosen)


def check_score(score: str) -> None:
    """Raise where `score` names nothing that is explained of a class."""
    checks.check_choice("score", score, tuple(TARGETS))
