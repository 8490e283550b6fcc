"""How good a heatmap or a method is: formulas over a scored heatmap, `METRICS` by name, tables of scores.

Data sets, files and statistics belong in `evaluate`, figures in `plot`.
"""

from xcam_fn.metrics.accumulated import torchmetric
from xcam_fn.metrics.curves import (
    Curve,
    Road,
    deletion,
    insertion,
    irof,
    road,
    step_pixels,
    symmetric_relevance_gain,
)
from xcam_fn.metrics.judged import Explainer, Judged, Metric, pearson, relevance_rank, spearman
from xcam_fn.metrics.localization import (
    energy_pointing_game,
    grid_pointing,
    mask_iou,
    pixel_auc,
    pointing_game,
    relevance_rank_accuracy,
)
from xcam_fn.metrics.mosaic import Mosaics, mosaics
from xcam_fn.metrics.of_map import (
    average_drop,
    average_gain,
    complexity,
    entropy,
    increase_in_confidence,
    sparseness,
)
from xcam_fn.metrics.of_method import adcc, average_sensitivity, coherency, local_lipschitz, max_sensitivity
from xcam_fn.metrics.randomization import efficient_mprt, parameter_randomization, random_logit
from xcam_fn.metrics.subsets import SensitivityN, faithfulness_correlation, infidelity, sensitivity_n
from xcam_fn.metrics.table import GRID, LOCALIZATION, METRICS, STANDARD

__all__ = [
    "GRID", "LOCALIZATION", "METRICS", "STANDARD", "Curve", "Explainer", "Judged", "Metric", "Mosaics",
    "Road", "SensitivityN", "adcc", "average_drop", "average_gain", "average_sensitivity", "coherency",
    "complexity", "deletion", "efficient_mprt", "energy_pointing_game", "entropy",
    "faithfulness_correlation", "grid_pointing", "increase_in_confidence", "infidelity", "insertion",
    "irof", "local_lipschitz", "mask_iou", "max_sensitivity", "mosaics", "parameter_randomization",
    "pearson", "pixel_auc", "pointing_game", "random_logit", "relevance_rank", "relevance_rank_accuracy",
    "road", "sensitivity_n", "sparseness", "spearman", "step_pixels", "symmetric_relevance_gain",
    "torchmetric",
]  # fmt: skip
