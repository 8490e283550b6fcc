"""TorchCAM's extractors: `core` has what they share, `activation` and `gradient` the classes."""

from xcam_fn.compat.torchcam.methods.activation import *  # noqa: F403
from xcam_fn.compat.torchcam.methods.core import *  # noqa: F403
from xcam_fn.compat.torchcam.methods.gradient import *  # noqa: F403
