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

_ALL = (gradcam, gradcam_pp, xgradcam, layercam, hirescam, integrated_gradients)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""Every method by its name, for the command line and for users."""

__all__ = [
    "METHODS",
    "Method",
    "from_gradients",
    "gradcam",
    "gradcam_pp",
    "hirescam",
    "integrated_gradients",
    "layercam",
    "xgradcam",
]
