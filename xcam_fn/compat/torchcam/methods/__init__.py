"""TorchCAM's extractors, all of `core`."""

from xcam_fn.compat.torchcam.methods.activation import *  # noqa: F403
from xcam_fn.compat.torchcam.methods.core import OutputTarget as OutputTarget
from xcam_fn.compat.torchcam.methods.gradient import *  # noqa: F403
