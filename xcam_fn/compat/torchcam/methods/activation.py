"""TorchCAM's extractors without gradients: CAM and the Score-CAM family."""

from xcam_fn.compat.torchcam.methods.core import extractor

__all__ = ["CAM", "ISCAM", "SSCAM", "ScoreCAM"]

CAM = extractor(__name__, "CAM", "cam", fc_layer=None)
ScoreCAM = extractor(__name__, "ScoreCAM", "scorecam", batch_size=32)
SSCAM = extractor(__name__, "SSCAM", "sscam", batch_size=32, num_samples=35, std=2.0)
ISCAM = extractor(__name__, "ISCAM", "iscam", batch_size=32, num_samples=10)
