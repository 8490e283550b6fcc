"""Figures of heatmaps, curves and concepts."""

from xcam_fn.plot.draw import *  # noqa: F403
