"""Class activation maps for PyTorch as pure functions over torch.func: no hook, no state, any batch.

import xcam_fn as xf
heatmaps = xf.gradcam(model, "layer4", x)      # (B, h, w) in [0, 1]

A name is imported when it is first used, so that `xcam --help` does not wait for torch. `__init__.pyi` tells
type checkers where each name stands.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from xcam_fn.names import names_of_methods as _names_of_methods

__version__ = "0.1.0"

# For each name of the stub the module that it stands in; None for a module of the package itself.
_HOMES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.name != "*"
}
_MODULES_OF_ROOMS = {"dataset": "evaluate.dataset", "images": "models.images", "latency": "evaluate.latency",
                     "report": "evaluate.report"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES_OF_ROOMS:
        return importlib.import_module(f"{__name__}.{_MODULES_OF_ROOMS[name]}")
    if name in _HOMES:
        home = importlib.import_module(f"{__name__}.{_HOMES[name] or name}")
        return getattr(home, name) if _HOMES[name] else home
    if name == "__all__":
        return sorted({*_HOMES, *_names_of_methods()})
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
