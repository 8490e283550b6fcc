"""Networks and images by name."""

from xcam_fn.models.load import *  # noqa: F403
