"""TorchCAM's `explain`, which is not here."""

from typing import Any


def explain(*_: Any, **__: Any) -> Any:
    """Raise, and say what does the same.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "torchcam.explain has no counterpart in xcam_fn.compat: call an extractor for each class, and "
        "xcam_fn.plot.heatmaps to draw the maps; `xcam explain` does both on the command line"
    )
