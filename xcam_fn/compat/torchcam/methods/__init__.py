"""TorchCAM's extractors: `core` has their shared code, `activation` and `gradient` the classes."""

from xcam_fn.compat.torchcam.methods.activation import *  # noqa: F403
from xcam_fn.compat.torchcam.methods.core import *  # noqa: F403
from xcam_fn.compat.torchcam.methods.gradient import *  # noqa: F403
