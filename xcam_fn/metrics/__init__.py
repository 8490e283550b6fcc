"""How good a heatmap is."""

from xcam_fn.metrics.of_map import *  # noqa: F403
