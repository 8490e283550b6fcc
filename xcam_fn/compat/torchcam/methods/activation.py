"""TorchCAM's extractors of the activations and of the scores of masked images."""

from xcam_fn.compat.torchcam.methods.core import CAM, ISCAM, SSCAM, ScoreCAM

__all__ = ["CAM", "ISCAM", "SSCAM", "ScoreCAM"]
