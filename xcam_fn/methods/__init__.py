"""The methods, and the registry `METHODS` that names them."""

from collections.abc import Mapping
from types import MappingProxyType

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

_ALL = (
    gradcam, gradcam_pp, xgradcam, layercam, hirescam, integrated_gradients,
    scorecam, sscam, iscam, ablationcam, groupcam, rise,
)  # fmt: skip


METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""Every method by its name, for the command line and for users."""

__all__ = [
    "METHODS",
    "Method",
    "ablationcam",
    "from_gradients",
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
    "xgradcam",
]
