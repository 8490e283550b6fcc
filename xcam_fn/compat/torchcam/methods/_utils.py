"""The search for a default layer, where TorchCAM has it."""

from xcam_fn.compat.torchcam.methods.core import locate_candidate_layer

__all__ = ["locate_candidate_layer"]
