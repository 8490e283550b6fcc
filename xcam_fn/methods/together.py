"""Many methods on one batch, with shared work done once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.docstrings import documented
from xcam_fn.methods.call import Call, fixed_class
from xcam_fn.methods.catalog import METHODS, as_method, find_method, heatmaps_of, name_of, with_accepted
from xcam_fn.methods.method import Method
from xcam_fn.names import nearest
from xcam_fn.network.target_layer import Layer
from xcam_fn.targets import Classes

__all__ = ["explain_all"]

Run = Callable[..., Tensor]
Methods = Sequence[str | Callable[..., Tensor]] | Mapping[str, str | Callable[..., Tensor]]


@documented
def explain_all(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    methods: Methods | None = None,
    *,
    variant: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the heatmaps of several methods, with shared work done once.

    Each equals what the method returns on its own. `scorecam`, `unioncam` and `fusioncam` together cost one
    Score-CAM and a few forward passes.

    Args:
        cls: as for every method; it is resolved once, so that all explain the same class.
        methods: names ("gradcam", or "gradcam+sscam" for a fusion), methods as functions, or a mapping from
            your own names to these; None for all of `METHODS` that fit the network's structure.
        variant: a library of `VARIANTS` whose definitions to use; None for the papers'.
        **options: passed to the methods that accept them, such as chunk_size=8; at least one must.

    Returns:
        {name: heatmaps}, in the order of `methods`; (B, *size) each, or (B, n, *size) for n classes.

    Raises:
        ValueError: a method is not known.
        TypeError: no method accepts an option.
    """
    checks.check_call(model, x)
    chosen = named_methods(list(METHODS) if methods is None else methods, variant, **options)
    found, lacking = explained_where_possible(model, layer, x, cls, chosen)
    if lacking and methods is not None:
        raise next(iter(lacking.values()))
    return found


def explained_where_possible(
    model: nn.Module, layer: Layer, x: Tensor, cls: Classes, chosen: Mapping[str, Run]
) -> tuple[dict[str, Tensor], dict[str, checks.StructureError]]:
    """The heatmaps by method name, and the reasons for methods that do not fit the network."""
    call = Call(model, layer, x, fixed_class(model, x, cls), records=len(chosen) > 1)
    found: dict[str, Tensor] = {}
    lacking: dict[str, checks.StructureError] = {}
    for name, run in chosen.items():
        try:
            found[name] = heatmaps_of(run, call)
        except checks.StructureError as error:
            lacking[name] = error
    return found, lacking


def named_methods(methods: Methods, variant: str | None = None, **options: Any) -> dict[str, Run]:
    """The methods as functions, by name, each with the options that it takes; at least one must take each."""
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Iterable):
        raise TypeError(f"methods must be names or functions, got {type(methods).__name__}")
    named = isinstance(methods, Mapping)
    pairs = methods.items() if named else [(name_of(given), given) for given in methods]
    found: dict[str, Run] = {}
    for name, given in pairs:
        if not (isinstance(given, str) or callable(given)):
            raise TypeError(f"methods: {given!r} must be a name or a function, got {type(given).__name__}")
        if name in found:
            raise ValueError(f"methods: two are called {name!r}; pass a dict from your own names to methods")
        if isinstance(given, str):
            found[name] = find_method(given, variant=variant, **options)
        else:
            found[name] = with_accepted(as_method(given), options)
    if not found:
        raise ValueError(f"methods is empty; expected at least one of {', '.join(METHODS)}")
    for option in options:
        if not any(_gives(run, option) for run in found.values()):
            known = {name for run in found.values() for name in inspect.signature(run).parameters}
            hint = nearest(option, known, f"the methods are {', '.join(found)}")
            raise TypeError(f"no method takes the option {option!r}; {hint}")
    return found


def _gives(run: Any, option: str) -> bool:
    """True if a method or a partial, or one that it wraps, has the option set."""
    given = run.options if isinstance(run, Method) else getattr(run, "keywords", {})
    return option in given or any(_gives(value, option) for value in given.values() if callable(value))
