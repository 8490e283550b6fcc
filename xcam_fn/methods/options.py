"""Groups of keywords that methods share: flat and typed, with their defaults and meanings declared once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from xcam_fn import checks
from xcam_fn.maps import resized_minmax
from xcam_fn.perturb import Baseline
from xcam_fn.scoring.running import Running, RunningOptions
from xcam_fn.weights import Projection

MaskOf = Callable[[Tensor, Sequence[int]], Tensor]
Group = TypeVar("Group")


class MaskOptions(RunningOptions, total=False):
    """How channels are turned into masks, scored and added up.

    Args:
        baseline: the value used for hidden pixels: a number, a tensor or a callable of x.
        score: what is explained of a class, "probability" or "logit".
        increase: subtract the baseline's score.
        softmax: take the softmax over channels of what is left.
        summed: "features" adds up w_k A_k, "masks" adds up w_k M_k.
        mask: `(maps, size) -> masks`, what makes a mask of a map; `maps.resized_minmax` is n(U(A)).
        projection: what is made of the weighted features w_k A_k in place of their sum,
            `(B, K, *spatial) -> (B, *spatial)`, such as `projections.principal_component`.
    """

    baseline: Baseline
    score: Literal["probability", "logit"]
    increase: bool
    softmax: bool
    summed: Literal["features", "masks"]
    mask: MaskOf
    projection: Projection | None


class Masking(NamedTuple):
    """The defaults of `MaskOptions`."""

    baseline: Baseline = 0.0
    score: Literal["probability", "logit"] = "probability"
    increase: bool = True
    softmax: bool = False
    summed: Literal["features", "masks"] = "features"
    mask: MaskOf = resized_minmax
    projection: Projection | None = None

    def check(self) -> None:
        """Raise where values do not go together."""
        checks.check_choice("summed", self.summed, ("features", "masks"))
        if self.summed == "masks" and self.projection is not None:
            raise ValueError(
                "summed='masks' with a projection: masks are only added up; use summed='features'"
            )


GROUPS: Mapping[Any, tuple[Any, ...]] = {RunningOptions: (Running,), MaskOptions: (Masking, Running)}
"""For each group what holds its defaults."""


def taken(kind: Callable[..., Group], options: Mapping[str, Any]) -> Group:
    """The options of one kind, with the defaults of those that are not given."""
    fields: Any = kind
    return kind(**{name: value for name, value in options.items() if name in fields._fields})
