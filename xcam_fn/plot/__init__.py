"""Figures of heatmaps, curves and concepts, of volumes, clips and signals."""

from xcam_fn.plot.draw import *  # noqa: F403
from xcam_fn.plot.slices import *  # noqa: F403
