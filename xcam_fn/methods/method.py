"""A method: a formula over a `Call`, with its name and description."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import ReadableSignature, check, hints_of, unchecked
from xcam_fn.docstrings import composed, sections
from xcam_fn.maps import heatmap
from xcam_fn.methods.call import Call
from xcam_fn.methods.options import GROUPS, Groups
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.target_layer import Layer
from xcam_fn.scoring.running import model_or_stand_in
from xcam_fn.targets import Classes

P = ParamSpec("P")
Postprocess = Callable[[Tensor, tuple[int, ...]], Tensor]
_MaybePostprocess = Postprocess | None

_RETURNS = """\
    (B, *size) in [0, 1], or (B, n, *size) for n classes; with postprocess=None (B, *spatial) and signed.
"""
_SHARED: Mapping[str, Any] = {"to_spatial": Any, "postprocess": _MaybePostprocess, "create_graph": bool}


@dataclass(frozen=True, eq=False, repr=False)
class Method(Generic[P]):
    """A method of explanation, called as `method(model, layer, x, cls, **options)`.

    Attributes:
        run: the formula: maps a call and options to raw maps, (B, n, *spatial), or (B, *spatial) if n is 1.
        name: its key in `METHODS`.
        title: its name in print, such as "Grad-CAM".
        family: "gradient", "perturbation", "optimized" (an optimized map), "fusion", "activation" (a map of
            the features and the network's own weights) or "baseline".
        paper: where it was published.
        summary: what it does, in one line.
        needs: the structure that it requires, if not every network has it; without it the method raises
            `checks.StructureError`.
        variants: for each library with another definition, the keywords that reproduce its map.
        cost: maps the number of channels and the options to the number of images that the method runs through
            the network for one photograph; None if there are few.
        options: keywords set in advance.
        returns: what the formula returns: "maps"; "scores" of positions, whose zero is arbitrary, so heatmaps
            are scaled from their minimum to their maximum; "attributions", the contribution of each value of
            x, (B, n, C, *size); or "heatmaps", already postprocessed.
        keywords: keywords that the formula takes as `**options` and passes on, besides its groups.
        explains: functions or methods whose docstrings describe keywords that its own does not.
        single: the formula reads only the features and gradients of one forward.
        made: a function and its arguments that create the method again, for pickling.
    """

    run: Callable[Concatenate[Call, P], Tensor]
    name: str
    title: str
    family: str
    paper: str = ""
    summary: str = ""
    needs: str = ""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: Callable[..., int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    returns: Literal["maps", "scores", "attributions", "heatmaps"] = "maps"
    keywords: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    explains: tuple[Callable[..., Any], ...] = ()
    made: tuple[Any, ...] = ()
    module: str = ""
    single: bool = False

    def __post_init__(self) -> None:
        module = self.module or self.run.__module__
        vars(self).update(__module__=module, __name__=self.name, __qualname__=self.name)

    if TYPE_CHECKING:

        def __call__(
            self, model: Any, layer: Layer, x: Tensor, cls: Classes = None,
            to_spatial: ToSpatial | None = None, postprocess: Postprocess | None = heatmap,
            create_graph: bool = False, *args: P.args, **options: P.kwargs,
        ) -> Tensor:  # fmt: skip
            """Return the heatmaps of a batch."""
            ...

    else:

        def __call__(self, model, layer, x, cls=None, **options):
            """Return the heatmaps of a batch."""
            given = {**self.options, **options}
            if not torch.compiler.is_compiling():
                self.check_options(options)
            if model is None and "scorer" in self.own_options:
                model = model_or_stand_in(model, given.get("scorer"))
            to_spatial, create_graph = given.pop("to_spatial", None), given.pop("create_graph", False)
            call = Call(model, layer, x, cls, to_spatial=to_spatial, create_graph=create_graph)
            return self._map(call, given)

    def on(self, call: Call, **options: Any) -> Tensor:
        """The heatmaps for a call that methods share; work done before is reused."""
        self.check_options(options)
        given = {**self.options, **options}
        defaults = self.own_options
        key = frozenset(
            (name, comparable(value))
            for name, value in given.items()
            if name not in defaults or comparable(defaults[name].default) != comparable(value)
        )
        return call.once(("map", self.run, key), lambda: self._map(call, given))

    def raw(self, call: Call) -> Tensor:
        """The raw maps, (B, n, *spatial), as the formula returns them."""
        run: Any = self.run
        return run(call, **{name: value for name, value in self.options.items() if name not in _SHARED})

    def _map(self, call: Call, given: dict[str, Any]) -> Tensor:
        postprocess = given.get("postprocess", heatmap)
        options = {name: value for name, value in given.items() if name not in _SHARED}
        if self.returns == "heatmaps":
            options["postprocess"] = postprocess
        run: Any = self.run
        with call.running(once=self.single and not call.records):
            maps = self._returned(run(call, **options), options)
            if self.returns == "attributions":
                maps = (maps if postprocess is None else maps.abs()).sum(2)
            maps = maps.squeeze(1) if maps.ndim == call.x.ndim and not call.many else maps
            if not torch.compiler.is_compiling():
                self._check_maps(maps, call)
            if postprocess is None or self.returns == "heatmaps":
                return maps
            size = tuple(call.x.shape[2:])
            if self.returns == "scores":
                maps = maps - maps.amin(tuple(range(-len(size), 0)), keepdim=True)
            found = unchecked(postprocess)(maps, size)
            if not isinstance(found, Tensor):
                raise TypeError(f"postprocess must return a tensor, got {type(found).__name__}")
            checks.check_dense("what postprocess returned", found)
            return found.to(call.x.dtype) if found.dtype == maps.dtype else found

    def _returned(self, maps: Any, options: Mapping[str, Any]) -> Tensor:
        """The formula's result, with its type checked."""
        own = [name for name, value in options.items() if callable(value)]
        what = f"{self.name}{' with ' if own else ''}{', '.join(own)}"
        return checks.check_returned(what, maps, "maps (B, *spatial) or (B, n, *spatial)")

    def _check_maps(self, maps: Tensor, call: Call) -> None:
        """Raise if there is not one raw map, or n, for each image, or if maps are not finite."""
        batch = call.x.shape[0]
        if maps.ndim != call.x.ndim - 1 + call.many or maps.shape[0] != batch or maps.numel() == 0:
            raise ValueError(
                f"{self.name}: the raw maps have shape {tuple(maps.shape)}; expected {batch} with "
                f"{call.x.ndim - 2} spatial axes; check the functions passed to it"
            )
        checks.check_finite(maps, f"{self.name}: the raw map")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise if an option is not one of the method's, or has the wrong type."""
        for name, value in options.items():
            if name not in _SHARED and name not in self.own_options:
                known = ", ".join(sorted({*self.own_options, *_SHARED}))
                raise TypeError(f"{self.name}() has no option {name!r}; its options are {known}")
            check(name, value, _SHARED[name] if name in _SHARED else self.own_options[name].annotation)

    @functools.cached_property
    def own_options(self) -> dict[str, inspect.Parameter]:
        """The method's own keywords, by name, including those of groups."""
        return {**options_of(self.run, 1), **self.keywords}

    def forwards(self, channels: int) -> int | None:
        """The maximum number of images that the method runs through the network for one photograph, roughly.

        None for methods with few forwards, or with a number that is not known in advance.
        """
        if self.cost is None:
            return None
        _, *names = inspect.signature(self.cost).parameters
        own = self.own_options
        return self.cost(channels, **{name: self.options.get(name, own[name].default) for name in names})

    def with_options(self, *, name: str | None = None, title: str | None = None, **options: Any) -> Method[P]:
        """The method with other defaults, as a new method."""
        self.check_options(options)
        named = {"name": name or self.name, "title": title or self.title}
        anew = (operator.methodcaller("with_options", **named, **options), self)
        return replace(self, **named, options={**self.options, **options}, made=anew)

    def variant(self, library: str) -> Method[P]:
        """The method as a library defines it, a key of `VARIANTS` that has this method."""
        return self.with_options(**self.variants[library])

    def __get__(self, instance: Any, owner: type | None = None) -> Method[P]:
        return self  # not bound in a class; `help` shows a signature only for objects with a __get__

    def __repr__(self) -> str:
        parameters = inspect.signature(self).parameters.values()
        return f"{self.name}{ReadableSignature([p.replace(annotation=p.empty) for p in parameters])}"

    def __reduce__(self) -> Any:
        if getattr(sys.modules.get(self.__module__), self.name, None) is self:
            return self.name  # pickled by reference, like a function
        return (self.made[0], self.made[1:]) if self.made else super().__reduce__()


def method_of(
    function: Callable[..., Tensor],
    count: int,
    run: Callable[..., Tensor],
    family: str,
    maker: types.FrameType,
    name: str | None,
    title: str | None,
    paper: str,
    summary: str,
    variants: Mapping[str, Mapping[str, Any]] | None,
) -> Method[...]:
    """Make a method of one forward from a function of `count` tensors, whose keywords become the method's.

    Its module is that of the calling frame.
    """
    check("variants", variants, Mapping | None)
    for key, value in {"name": name, "title": title, "paper": paper, "summary": summary}.items():
        check(key, value, str | None)
    name = name or str(getattr(function, "__name__", type(function).__name__))
    return Method(
        run, name, title or name, family, paper, summary, variants=variants or {}, explains=(function,),
        single=True, keywords=options_of(function, count),
        module=maker.f_globals.get("__name__", "__main__"),
    )  # fmt: skip


class _Composed:
    """An attribute of instances that is computed on access; the class keeps its own value, if any."""

    def __init__(self, compose: Callable[[Any], Any], of_class: Any = None) -> None:
        self.compose, self.of_class = compose, of_class

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is not None:
            return self.compose(instance)
        if self.of_class is None:
            raise AttributeError
        return self.of_class


def _signature(method: Method[...]) -> inspect.Signature:
    of_call = inspect.signature(Call).parameters
    positional = [of_call[name] for name in ("model", "layer", "x", "cls")]
    own = [p.replace(default=method.options.get(n, p.default)) for n, p in method.own_options.items()]
    default = method.options.get("postprocess", heatmap)
    postprocess = inspect.Parameter("postprocess", inspect.Parameter.KEYWORD_ONLY, default=default)
    parameters = [*positional, of_call["to_spatial"], *own, postprocess, of_call["create_graph"]]
    return ReadableSignature(parameters, return_annotation=Tensor)


def _doc(method: Method[...]) -> str:
    """The formula's docstring, with Args added from shared methods, groups and functions."""
    own = sections(method.run)
    of_weights = sections(method.explains[0]) if method.explains and not own.get("") else own
    head, paper = f"{method.title}: {method.summary}", f"    {method.paper or 'none'}\n"
    parts = {"References": of_weights.get("References", paper)} | own | {"Returns": _RETURNS}
    parts[""] = own.get("") or f"{head}.\n\n{of_weights.get('', '')}"
    groups = groups_of(method.run, GROUPS)
    return composed(parts, inspect.signature(method).parameters, *method.explains, *groups)


Method.__doc__ = _Composed(_doc, Method.__doc__)  # pyright: ignore[reportAttributeAccessIssue]
Method.__signature__ = _Composed(_signature)  # pyright: ignore[reportAttributeAccessIssue]


def groups_of(function: Callable[..., Any], groups: Groups) -> list[Any]:
    """The group that a formula takes as `**options: Unpack[Group]`, and the groups that it contains."""
    last = list(inspect.signature(function).parameters.values())[-1:]
    hints = [hints_of(function).get(p.name) for p in last if p.kind is p.VAR_KEYWORD]
    taken = [groups[group].keys() for hint in hints for group in typing.get_args(hint) if group in groups]
    return [group for group, defaults in groups.items() if any(defaults.keys() <= names for names in taken)]


def options_of(
    function: Callable[..., Any], given_by_caller: int, groups: Groups = GROUPS
) -> dict[str, inspect.Parameter]:
    """A function's parameters, without the first positional ones, and with those of its groups."""
    hints, only = hints_of(function), inspect.Parameter.KEYWORD_ONLY
    after = list(inspect.signature(function).parameters.values())[given_by_caller:]
    found = {
        p.name: p.replace(kind=only, annotation=hints.get(p.name, Any))
        for p in after
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in _SHARED
    }
    for group in groups_of(function, groups):
        for name, hint in typing.get_type_hints(group, include_extras=True).items():
            shared = inspect.Parameter(name, only, default=groups[group][name], annotation=hint)
            found.setdefault(name, shared)
    return found


_PLAIN = (bool, int, float, str, type(None))


def comparable(value: Any) -> Any:
    """A key for a value: the value itself if it is plain, else its identity."""
    return (type(value), value) if isinstance(value, _PLAIN) else _Identity(value)


class _Identity:
    """A key that is equal to another if both refer to the same object, which it keeps alive."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)
