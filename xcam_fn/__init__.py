"""Class activation maps for PyTorch as pure functions over torch.func: no hook, no state, any batch.

import xcam_fn as xf
heatmaps = xf.gradcam(model, "layer4", x)      # (B, h, w) in [0, 1]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xcam_fn import targets, weights
from xcam_fn.heatmap import heatmap
from xcam_fn.methods import (
    METHODS,
    Method,
    from_gradients,
    gradcam,
    gradcam_pp,
    hirescam,
    integrated_gradients,
    layercam,
    xgradcam,
)
from xcam_fn.split import FeatureAndGrad, Split, default_layer, feature_and_grad, features, layers, split

if TYPE_CHECKING:
    from xcam_fn import images, models, plot, testing

__version__ = "0.1.0"

_ON_USE = ("images", "models", "plot", "testing")

__all__ = [
    "METHODS",
    "FeatureAndGrad",
    "Method",
    "Split",
    "default_layer",
    "feature_and_grad",
    "features",
    "from_gradients",
    "gradcam",
    "gradcam_pp",
    "heatmap",
    "hirescam",
    "images",
    "integrated_gradients",
    "layercam",
    "layers",
    "models",
    "plot",
    "split",
    "targets",
    "testing",
    "weights",
    "xgradcam",
]


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
