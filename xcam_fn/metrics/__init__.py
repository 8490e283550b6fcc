"""How good a heatmap or a method is: formulas over a scored heatmap, `METRICS` by name, tables of scores.

Data sets, files and statistics belong in `evaluate`, figures in `plot`.
"""

from xcam_fn.metrics.curves import Curve, deletion, insertion, step_pixels
from xcam_fn.metrics.imputation import Road, road
from xcam_fn.metrics.judged import Judged, Metric, pearson, relevance_rank, spearman
from xcam_fn.metrics.of_map import (
    average_drop,
    complexity,
    energy_pointing_game,
    increase_in_confidence,
    pointing_game,
)
from xcam_fn.metrics.of_method import adcc, coherency, max_sensitivity, parameter_randomization
from xcam_fn.metrics.table import METRICS, STANDARD

__all__ = [
    "METRICS", "STANDARD", "Curve", "Judged", "Metric", "Road", "adcc", "average_drop", "coherency",
    "complexity", "deletion", "energy_pointing_game", "increase_in_confidence", "insertion",
    "max_sensitivity", "parameter_randomization", "pearson", "pointing_game", "relevance_rank", "road",
    "spearman", "step_pixels",
]  # fmt: skip
