"""Groups of keywords that methods share: flat and typed, with their defaults and meanings declared once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import Tensor

from xcam_fn.arguments import Count
from xcam_fn.maps import resized_minmax
from xcam_fn.perturb import Baseline
from xcam_fn.scoring.running import Running, RunningOptions
from xcam_fn.weights import Projection

MaskOf = Callable[[Tensor, Sequence[int]], Tensor]
Score = Literal["probability", "logit"]
Groups = Mapping[Any, Mapping[str, Any]]
Channels = Count | Annotated[float, ("above", 0), ("at_most", 1)] | None


class MaskOptions(RunningOptions, total=False):
    """How channels are turned into masks, scored and summed.

    Args:
        increase: subtract the baseline's score.
        softmax: apply a softmax over the channels to the scores.
        summed: "features" sums w_k A_k, "masks" sums w_k M_k.
        mask: `(maps, size) -> masks`, turns maps into masks; `maps.resized_minmax` is n(U(A)).
        channels: how many channels to score: None for all, an int, or a fraction, a float in (0, 1]. By
            default, those with the largest standard deviation. The others have weight 0 and are excluded from
            the softmax; channels with equal rank are scored or left out together.
    """

    baseline: Baseline
    score: Score
    increase: bool
    softmax: bool
    summed: Literal["features", "masks"]
    mask: MaskOf
    projection: Projection | None
    channels: Channels


MASKING: Mapping[str, Any] = {
    "baseline": 0.0, "score": "probability", "increase": True, "softmax": False, "summed": "features",
    "mask": resized_minmax, "projection": None, "channels": None,
}  # fmt: skip
GROUPS: Groups = {RunningOptions: Running._field_defaults, MaskOptions: MASKING | Running._field_defaults}
"""For each group its defaults."""
