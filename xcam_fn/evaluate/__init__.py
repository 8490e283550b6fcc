"""A data set × methods × metrics: the run, its store, its report, and how long methods take."""

from xcam_fn.evaluate.run import METRICS, STANDARD, Explain, Metric, Outcome, judged, run

__all__ = ["METRICS", "STANDARD", "Explain", "Metric", "Outcome", "judged", "run"]
