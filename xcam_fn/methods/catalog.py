"""The registry of methods and of other libraries' variants; each family registers its own."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import checked
from xcam_fn.maps import heatmap
from xcam_fn.methods.call import Call
from xcam_fn.methods.method import Method
from xcam_fn.names import letters, unknown_method

P = ParamSpec("P")
Value = TypeVar("Value")
AnyMethod = TypeVar("AnyMethod", bound=Method[...])
Wrapper = Callable[..., Method[...]]


class _Registry(Mapping[str, Value]):
    """A mapping that is read-only once frozen; unlike a mapping proxy it can be pickled."""

    def __init__(self, entries: Mapping[str, Value] = MappingProxyType({})) -> None:
        self._entries = dict(entries)
        self.frozen = False

    def __getitem__(self, name: str) -> Value:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


METHODS: Mapping[str, Method[...]] = _Registry()
"""Every method by its name, for the command line and for users."""
WRAPPERS: Mapping[str, Wrapper] = _Registry()
"""What "smooth(gradcam)" and the like stand for."""
_LIBRARIES = ("xplaincam", "torchcam", "pytorch-grad-cam")


def method(
    title: str, *, family: str, summary: str, **about: Any
) -> Callable[[Callable[Concatenate[Call, P], Tensor]], Method[P]]:
    """Register a formula as one of the library's methods, under its own name; `about` as for `Method`."""

    def entered(run: Callable[Concatenate[Call, P], Tensor]) -> Method[P]:
        return enter(Method(run, name=run.__name__, title=title, family=family, summary=summary, **about))

    return entered


def enter(method: AnyMethod) -> AnyMethod:
    """Add one of the library's own methods to `METHODS`."""
    return _entered(METHODS, method.name, method)


def enter_wrapper(wrapper: Wrapper) -> Wrapper:
    """Register one of the library's own wrappers for `find_method`."""
    return _entered(WRAPPERS, wrapper.__name__, wrapper)


def _entered(registry: Any, name: str, value: Value) -> Value:
    if registry.frozen:
        raise TypeError(f"METHODS cannot be extended; pass your method {name!r} as a function")
    registry._entries[name] = value
    return value


def freeze(*families: ModuleType) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Close the registries, in the families' order, and return `VARIANTS`, keywords by library and method."""
    listed = [value for family in families for value in vars(family).values() if isinstance(value, Method)]
    vars(METHODS)["_entries"] = {m.name: m for m in listed if METHODS.get(m.name) is m}
    for registry in (METHODS, WRAPPERS):
        vars(registry)["frozen"] = True
    found: dict[str, dict[str, Any]] = {library: {} for library in _LIBRARIES}
    for method in METHODS.values():
        for library, options in method.variants.items():
            found[library][method.name] = _Registry(options)
    return _Registry({library: _Registry(methods) for library, methods in found.items()})


@checked
def find_method(name: str, *, variant: str | None = None, **options: Any) -> Method[...]:
    """Return the method with this name: "gradcam", "gradcam+sscam" for a fusion, "smooth(gradcam)".

    Args:
        name: a key of `METHODS`, or two of them joined by a plus: a gradient method and a perturbation
            method. Either can be wrapped in "smooth(…)", "smoothgrad(…)", "eigen_smooth(…)", "multi_layer(…)"
            or "sess(…)". Case, hyphens and spaces are ignored: "Grad-CAM++" is "gradcam_pp".
        variant: a library of `VARIANTS` whose definitions to use; None for the papers'.
        **options: other defaults, such as num_samples=10, for the method and the parts of a fusion. Those
            that neither accepts are ignored.

    Returns:
        The method, called as `method(model, layer, x, cls, **options)`.

    Raises:
        ValueError: the name or the variant is not known, or the library has no such method; a value is out of
            range.
        TypeError: a value has the wrong type.
    """
    if variant is not None and variant not in _LIBRARIES:
        raise ValueError(f"variant {variant!r} is not known; expected one of {', '.join(_LIBRARIES)}")
    name = own_name(name)
    around, inner = _parsed(name)
    if around == "+":
        gradient, region = (find_method(part, variant=variant, **options) for part in inner)
        title = f"Fusion-CAM of {gradient.title} and {region.title}"
        fused = METHODS["fusioncam"].with_options(name=name, title=title, gradient=gradient, region=region)
        return with_accepted(fused, options)
    if around is not None and around in WRAPPERS:
        return with_accepted(WRAPPERS[around](find_method(*inner, variant=variant, **options)), options)
    if name not in METHODS:
        raise ValueError(_unknown(name))
    found = METHODS[name]
    if variant is not None and variant not in found.variants:
        known = ", ".join(m.name for m in METHODS.values() if variant in m.variants)
        raise ValueError(f"variant {variant!r} has no method {name!r}; it has {known}")
    if variant is not None:
        defined = {key: value for key, value in found.variants[variant].items() if key not in options}
        found = found.with_options(**defined)
    return with_accepted(found, options)


def own_name(name: str) -> str:
    """The library's name of a method, such as "gradcam_pp" for "Grad-CAM++"; unknown names are unchanged."""
    spelled = name.replace("++", "pp")
    around, inner = _parsed(spelled)
    if around == "+":
        return "+".join(map(own_name, inner))
    if around is not None:
        return f"{_by_letters(WRAPPERS).get(letters(around), around)}({own_name(*inner)})"
    return _by_letters(METHODS).get(letters(spelled), name)


def _by_letters(registry: Mapping[str, Any]) -> dict[str, str]:
    return {letters(name): name for name in registry}


def as_method(given: str | Callable[..., Any]) -> Any:
    """A method from its name or a function: partials of methods become methods, other functions stay."""
    if isinstance(given, str):
        return find_method(given)
    if not callable(given):
        raise TypeError(f"method must be a method or its name, got {type(given).__name__}")
    if isinstance(given, functools.partial) and not given.args:
        inner = as_method(given.func)
        if isinstance(inner, Method):
            named = {key: vars(given)[key] for key in ("name", "title") if key in vars(given)}
            return inner.with_options(**named, **given.keywords)
    return given


def with_raw_maps(given: str | Callable[..., Any]) -> Method[...]:
    """A method, given by name or itself, whose raw maps a formula needs."""
    found = as_method(given)
    if not isinstance(found, Method):
        raise TypeError(f"method must be a method or its name, got {given!r}")
    return found


def name_of(method: Any) -> str:
    """The name of a method or a function, which may be a name itself."""
    named = getattr(method, "name", getattr(method, "__name__", repr(method)))
    return method if isinstance(method, str) else named


def heatmaps_of(method: Any, call: Call, options: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
    """The heatmaps of a method for a shared call, or of a user's function."""
    if not isinstance(method, Method):
        found, x = method(call.model, call.layer, call.x, call.cls, **options), call.x
        fits = lambda maps: maps.ndim in (x.ndim - 1, x.ndim) and len(maps) == len(x)  # noqa: E731
        is_heatmap = options.get("postprocess", heatmap) is heatmap
        expected = f"({len(x)}, *size) {'heatmaps in [0, 1]' if is_heatmap else 'maps'}"
        checks.check_returned("method", found, expected, fits)
        if checks.is_readable(found):
            low, high = (float(end) for end in found.detach().aminmax())
            if not math.isfinite(high - low):
                raise ValueError("the heatmap holds NaN or infinite values")
            if is_heatmap and not (low >= 0 and high <= 1 + 1e-5):
                raise ValueError(f"method returned values from {low:.4g} to {high:.4g}; expected {expected}")
        return found
    return method.on(call, **{name: value for name, value in options.items() if name != "create_graph"})


def accepted(method: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the method takes and that it does not have already."""
    names = set(inspect.signature(method).parameters)
    if isinstance(method, Method):
        names -= {"model", "layer", "x", "cls", *method.options}
    return {name: value for name, value in options.items() if name in names}


def with_accepted(method: Any, options: Mapping[str, Any]) -> Any:
    """The method, or the user's function, with the options that it takes."""
    taken = accepted(method, options) if options else {}
    if not taken:
        return method
    return method.with_options(**taken) if isinstance(method, Method) else functools.partial(method, **taken)


def _parsed(name: str) -> tuple[str | None, list[str]]:
    """The operator in a name, a plus or a wrapper, and its methods; None for a single method."""
    for i, character in enumerate(name[:-1]):
        if character == "+" and name[:i].count("(") == name[:i].count(")"):
            return "+", [name[:i], name[i + 1 :]]
    wrapper, opened, inner = name.strip().removesuffix(")").partition("(")
    return (wrapper, [inner]) if opened and name.rstrip().endswith(")") else (None, [name])


def _unknown(name: str) -> str:
    if "(" in name:
        around = ", ".join(f"{wrapper}(…)" for wrapper in WRAPPERS)
        return f"method {name!r} is not known; expected one of {around} around a method"
    return unknown_method(name, METHODS)
