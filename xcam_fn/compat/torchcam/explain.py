"""TorchCAM's `explain`, which has no counterpart here."""

from typing import Any


def explain(*_: Any, **__: Any) -> Any:
    """Raise an error that names the alternatives.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "torchcam.explain has no counterpart in xcam_fn.compat: call an extractor for each class, and draw "
        "the maps with xcam_fn.plot.heatmaps; `xcam explain` does both on the command line"
    )
