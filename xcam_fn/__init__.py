"""Class activation maps for PyTorch as pure functions over torch.func: no hook, no state, any batch.

import xcam_fn as xf
heatmaps = xf.gradcam(model, "layer4", x)      # (B, h, w) in [0, 1]

A name is imported when it is first used, so that `xcam --help` does not wait for torch. `__init__.pyi` tells
type checkers where each name stands.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import lazy_loader

from xcam_fn.names import names_of_methods as _names_of_methods

__version__ = "0.1.0"

_named, _, _names = lazy_loader.attach(
    __name__,
    submodules=["evaluate", "export", "metrics", "models", "perturb", "plot", "projections", "targets",
                "testing", "weights"],
    submod_attrs={
        "maps": ["heatmap"],
        "metrics": ["Curve", "Mosaics", "adcc", "average_drop", "average_gain",
                    "average_sensitivity", "coherency", "complexity", "deletion", "efficient_mprt",
                    "energy_pointing_game", "entropy", "faithfulness_correlation", "grid_pointing",
                    "increase_in_confidence", "infidelity", "insertion", "irof", "local_lipschitz",
                    "mask_iou", "max_sensitivity", "mosaics", "parameter_randomization",
                    "pixel_auc", "pointing_game", "random_logit", "relevance_rank_accuracy", "road",
                    "sensitivity_n", "sparseness", "symmetric_relevance_gain"],
        "network.bound": ["bind"],
        "network.split": ["FeatureAndGrad", "Split", "default_layer", "feature_and_grad", "features",
                          "layers", "split"],
        "perturb": ["perturbation_scores"],
    },
)  # fmt: skip


_MODULES_OF_ROOMS = {"dataset": "evaluate.dataset", "images": "models.images", "latency": "evaluate.latency",
                     "report": "evaluate.report"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES_OF_ROOMS:
        return importlib.import_module(f"{__name__}.{_MODULES_OF_ROOMS[name]}")
    if name in _names:
        return _named(name)
    if name == "__all__":
        return sorted({*_names, *_MODULES_OF_ROOMS, *_names_of_methods()})
    is_module = importlib.util.find_spec(f"{__name__}.{name}") is not None
    if not name.startswith("_") and not is_module:
        methods = importlib.import_module(f"{__name__}.methods")
        if name in methods.__all__:
            return globals().setdefault(name, getattr(methods, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


# Old paths of modules, so that `from xcam_fn.heatmap import minmax` goes on working.
_MOVED = _MODULES_OF_ROOMS | {"bind": "network.bound", "heatmap": "maps", "split": "network.split"}


def _moved(home: str) -> ModuleType:
    def found(name: str) -> Any:
        if name.startswith("__"):  # what looks through all modules is not to import them
            raise AttributeError(name)
        return getattr(importlib.import_module(home), name)

    module = ModuleType(home)
    module.__dict__["__getattr__"] = found
    return module


sys.modules.update({f"{__name__}.{old}": _moved(f"{__name__}.{new}") for old, new in _MOVED.items()})
