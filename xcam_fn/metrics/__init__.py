"""How good a heatmap or a method is: formulas over a scored heatmap, `METRICS` by name, tables of scores.

Data sets, files and statistics belong in `evaluate`, figures in `plot`.
"""

from xcam_fn.metrics.curves import Curve, deletion, insertion, step_pixels
from xcam_fn.metrics.imputation import Road, road
from xcam_fn.metrics.judged import Judged, Metric, pearson, relevance_rank, spearman
from xcam_fn.metrics.localization import (
    energy_pointing_game,
    grid_pointing,
    mask_iou,
    pixel_auc,
    pointing_game,
    relevance_rank_accuracy,
)
from xcam_fn.metrics.mosaic import Mosaics, mosaics
from xcam_fn.metrics.of_map import average_drop, complexity, increase_in_confidence
from xcam_fn.metrics.of_method import adcc, coherency, max_sensitivity, parameter_randomization
from xcam_fn.metrics.table import GRID, LOCALIZATION, METRICS, STANDARD

__all__ = [
    "GRID", "LOCALIZATION", "METRICS", "STANDARD", "Curve", "Judged", "Metric", "Mosaics", "Road", "adcc",
    "average_drop", "coherency", "complexity", "deletion", "energy_pointing_game", "grid_pointing",
    "increase_in_confidence", "insertion", "mask_iou", "max_sensitivity", "mosaics",
    "parameter_randomization", "pearson", "pixel_auc", "pointing_game", "relevance_rank",
    "relevance_rank_accuracy", "road", "spearman", "step_pixels",
]  # fmt: skip
