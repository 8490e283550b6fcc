"""A data set × methods × metrics: the photographs, the run, its store, its report, how long methods take.

What one heatmap scores belongs in `metrics`, a figure that is no part of a report in `plot`.
"""

from xcam_fn.evaluate.batch import Explain
from xcam_fn.evaluate.items import hugging_face
from xcam_fn.evaluate.mosaic import Drawn, Mosaic, mosaics_of
from xcam_fn.evaluate.regions import Located, Region, located
from xcam_fn.evaluate.run import Outcome, run
from xcam_fn.evaluate.shards import Merged, merge
from xcam_fn.metrics.judged import Metric
from xcam_fn.metrics.table import GRID, LOCALIZATION, METRICS, STANDARD, judged

__all__ = [
    "GRID", "LOCALIZATION", "METRICS", "STANDARD", "Drawn", "Explain", "Located", "Merged", "Metric",
    "Mosaic", "Outcome", "Region", "hugging_face", "judged", "located", "merge", "mosaics_of", "run",
]  # fmt: skip
