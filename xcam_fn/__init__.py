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
    from xcam_fn import (
        dataset,
        evaluate,
        export,
        images,
        latency,
        metrics,
        models,
        perturb,
        plot,
        projections,
        report,
        targets,
        testing,
        weights,
    )
    from xcam_fn.bind import bind
    from xcam_fn.heatmap import heatmap
    from xcam_fn.methods import (
        METHODS,
        VARIANTS,
        Concepts,
        Method,
        ablationcam,
        agree,
        cam,
        combine,
        concepts,
        deep_feature_factorization,
        denoise,
        eigen_smooth,
        eigencam,
        eigengradcam,
        explain_all,
        fem,
        find_method,
        finercam,
        from_features,
        from_gradients,
        fullgrad,
        fuse,
        fusioncam,
        gain,
        gradcam,
        gradcam_elementwise,
        gradcam_pp,
        groupcam,
        guided_backprop,
        hirescam,
        integrated_gradients,
        iscam,
        kpcacam,
        layercam,
        legrad,
        multi_layer,
        randomcam,
        reciprocam,
        refinecam,
        rise,
        scorecam,
        segeigencam,
        sess,
        shapleycam,
        smooth,
        smoothgradcam_pp,
        sscam,
        unioncam,
        xgradcam,
    )
    from xcam_fn.metrics import (
        Curve,
        adcc,
        average_drop,
        coherency,
        complexity,
        deletion,
        energy_pointing_game,
        increase_in_confidence,
        insertion,
        max_sensitivity,
        parameter_randomization,
        pointing_game,
        road,
    )
    from xcam_fn.perturb import perturbation_scores
    from xcam_fn.split import FeatureAndGrad, Split, default_layer, feature_and_grad, features, layers, split

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "VARIANTS",
    "Concepts",
    "Curve",
    "FeatureAndGrad",
    "Method",
    "Split",
    "ablationcam",
    "adcc",
    "agree",
    "average_drop",
    "bind",
    "cam",
    "coherency",
    "combine",
    "complexity",
    "concepts",
    "dataset",
    "deep_feature_factorization",
    "default_layer",
    "deletion",
    "denoise",
    "eigen_smooth",
    "eigencam",
    "eigengradcam",
    "energy_pointing_game",
    "evaluate",
    "explain_all",
    "export",
    "feature_and_grad",
    "features",
    "fem",
    "find_method",
    "finercam",
    "from_features",
    "from_gradients",
    "fullgrad",
    "fuse",
    "fusioncam",
    "gain",
    "gradcam",
    "gradcam_elementwise",
    "gradcam_pp",
    "groupcam",
    "guided_backprop",
    "heatmap",
    "hirescam",
    "images",
    "increase_in_confidence",
    "insertion",
    "integrated_gradients",
    "iscam",
    "kpcacam",
    "latency",
    "layercam",
    "layers",
    "legrad",
    "max_sensitivity",
    "metrics",
    "models",
    "multi_layer",
    "parameter_randomization",
    "perturb",
    "perturbation_scores",
    "plot",
    "pointing_game",
    "projections",
    "randomcam",
    "reciprocam",
    "refinecam",
    "report",
    "rise",
    "road",
    "scorecam",
    "segeigencam",
    "sess",
    "shapleycam",
    "smooth",
    "smoothgradcam_pp",
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
_MODULES = (
    "dataset",
    "evaluate",
    "export",
    "images",
    "latency",
    "metrics",
    "models",
    "perturb",
    "plot",
    "projections",
    "report",
    "targets",
    "testing",
    "weights",
)
_HOMES = {
    "Curve": "metrics",
    "FeatureAndGrad": "split",
    "Split": "split",
    "adcc": "metrics",
    "average_drop": "metrics",
    "bind": "bind",
    "coherency": "metrics",
    "complexity": "metrics",
    "default_layer": "split",
    "deletion": "metrics",
    "energy_pointing_game": "metrics",
    "feature_and_grad": "split",
    "features": "split",
    "heatmap": "heatmap",
    "increase_in_confidence": "metrics",
    "insertion": "metrics",
    "layers": "split",
    "max_sensitivity": "metrics",
    "parameter_randomization": "metrics",
    "perturbation_scores": "perturb",
    "pointing_game": "metrics",
    "road": "metrics",
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
    """The package, in which `split`, `heatmap` and `bind` are functions, although modules are called so."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOMES.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)  # the import system binds a module in its package when it is loaded
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
