"""What is explained: functions from a model's output to one score for each image."""

from xcam_fn.targets.target import *  # noqa: F403
from xcam_fn.targets.target import __all__ as __all__
