"""A data set × methods × metrics: the photographs, the run, its store, its report, how long methods take.

What one heatmap scores belongs in `metrics`, a figure that is no part of a report in `plot`.
"""

from xcam_fn.evaluate.run import Explain, Outcome, run
from xcam_fn.metrics.judged import Metric
from xcam_fn.metrics.table import METRICS, STANDARD, judged

__all__ = ["METRICS", "STANDARD", "Explain", "Metric", "Outcome", "judged", "run"]
