"""The methods, and the registry `METHODS` that names them."""

from xcam_fn.methods.fusion import agree, combine, denoise, fuse, fusioncam, gain, unioncam
from xcam_fn.methods.gradient import (
    from_gradients,
    gradcam,
    gradcam_pp,
    hirescam,
    integrated_gradients,
    layercam,
    xgradcam,
)
from xcam_fn.methods.method import Method
from xcam_fn.methods.perturbation import ablationcam, groupcam, iscam, rise, scorecam, sscam
from xcam_fn.methods.registry import METHODS, VARIANTS, find_method
from xcam_fn.methods.together import explain_all

__all__ = [
    "METHODS",
    "VARIANTS",
    "Method",
    "ablationcam",
    "agree",
    "combine",
    "denoise",
    "explain_all",
    "find_method",
    "from_gradients",
    "fuse",
    "fusioncam",
    "gain",
    "gradcam",
    "gradcam_pp",
    "groupcam",
    "hirescam",
    "integrated_gradients",
    "iscam",
    "layercam",
    "rise",
    "scorecam",
    "sscam",
    "unioncam",
    "xgradcam",
]
