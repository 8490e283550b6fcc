"""Networks, checkpoints, classes and images by name, and what is said of them; nothing that explains."""

from xcam_fn.models import describe as describe
from xcam_fn.models import images as images
from xcam_fn.models.load import *  # noqa: F403
