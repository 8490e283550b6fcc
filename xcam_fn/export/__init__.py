"""A model and its explanation in one file."""

from xcam_fn.export.program import *  # noqa: F403
