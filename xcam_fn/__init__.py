"""Class activation maps for PyTorch as pure functions over torch.func: no hook, no state, any batch.

import xcam_fn as xf
heatmaps = xf.gradcam(model, "layer4", x)      # (B, h, w) in [0, 1]
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcam_fn import images, models, plot, targets, testing, weights
    from xcam_fn.heatmap import heatmap
    from xcam_fn.methods import (
        METHODS,
        VARIANTS,
        Method,
        ablationcam,
        agree,
        combine,
        denoise,
        explain_all,
        find_method,
        from_gradients,
        fuse,
        fusioncam,
        gain,
        gradcam,
        gradcam_pp,
        groupcam,
        hirescam,
        integrated_gradients,
        iscam,
        layercam,
        rise,
        scorecam,
        sscam,
        unioncam,
        xgradcam,
    )
    from xcam_fn.perturb import perturbation_scores
    from xcam_fn.split import FeatureAndGrad, Split, default_layer, feature_and_grad, features, layers, split

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "VARIANTS",
    "FeatureAndGrad",
    "Method",
    "Split",
    "ablationcam",
    "agree",
    "combine",
    "default_layer",
    "denoise",
    "explain_all",
    "feature_and_grad",
    "features",
    "find_method",
    "from_gradients",
    "fuse",
    "fusioncam",
    "gain",
    "gradcam",
    "gradcam_pp",
    "groupcam",
    "heatmap",
    "hirescam",
    "images",
    "integrated_gradients",
    "iscam",
    "layercam",
    "layers",
    "models",
    "perturbation_scores",
    "plot",
    "rise",
    "scorecam",
    "split",
    "sscam",
    "targets",
    "testing",
    "unioncam",
    "weights",
    "xgradcam",
]

# A name is imported when it is first used, so that torch is loaded with the first of them and not for
# `xcam --help`. A public name stands in three places: above for type checkers, in __all__, and either among
# the modules or, where it comes from one of these and not from `methods`, in _HOMES.
_MODULES = ("images", "models", "plot", "targets", "testing", "weights")
_HOMES = {
    "FeatureAndGrad": "split",
    "Split": "split",
    "default_layer": "split",
    "feature_and_grad": "split",
    "features": "split",
    "heatmap": "heatmap",
    "layers": "split",
    "perturbation_scores": "perturb",
    "split": "split",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'methods')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which `split` and `heatmap` are the functions, although modules are called so too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOMES.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)  # the import system binds a module in its package when it is loaded
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
