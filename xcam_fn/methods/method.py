"""What a method is: a formula over a `Call`, with a name and what is said of it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec

import torch
from torch import Tensor, nn

from xcam_fn.maps import heatmap
from xcam_fn.methods.call import Call
from xcam_fn.methods.options import GROUPS
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.target_layer import Layer
from xcam_fn.targets import Classes

P = ParamSpec("P")
Postprocess = Callable[[Tensor, tuple[int, ...]], Tensor]

_ARGS = """\
    model: the network, in evaluation mode; it is never touched.
    layer: a name, a module of the model, or None for `default_layer`.
    x: (B, C, *size), prepared images.
    cls: None for the predicted class of each image, an int, B ints, (B, n) ints for n classes of each
        image at once, or a target, a callable from the model's output to B scores.
    to_spatial: where the layer returns tokens (B, T, K) or channels last, the function that selects and
        arranges them as (B, K, *spatial); None finds it.
    postprocess: `heatmap`, a callable `(cam, size) -> map`, or None for the raw map: signed, at the layer's
        own size.
    create_graph: record the computation, so that the result can be differentiated with respect to the
        parameters as well (with respect to an x that requires grad it always can).
"""
_PROJECTION = """\
    projection: what is made of the weighted features in place of their sum over channels,
        `(B, K, *spatial) -> (B, *spatial)`, such as `projections.principal_component`.
"""
_RETURNS = """\
Returns:
    (B, *size) in [0, 1], or (B, n, *size) for n classes; with postprocess=None (B, *spatial) and signed.

Raises:
    ValueError: a value is out of range or does not fit the model, the batch or the layer.
    TypeError: an argument is of the wrong kind.
"""


@dataclass(frozen=True, eq=False, repr=False)
class Method(Generic[P]):
    """A method of explanation, called as `method(model, layer, x, cls, **options)`.

    Attributes:
        run: the formula: a call and options to raw maps, (B, n, *spatial).
        name: its key in `METHODS`.
        title: its name in print, such as "Grad-CAM".
        family: "gradient", "perturbation", "fusion", "activation" (a map of the features and of the network's
            own weights) or "baseline".
        paper: where it was published.
        summary: what it does, in one line.
        needs: what a network has to have for it, where not every network has; on one without it the method
            raises `checks.StructureError`.
        variants: for each library that defines it otherwise, the keywords that compute its map.
        cost: the options to how many images the method runs through the network for one photograph, given the
            layer's channels; None where they are few.
        options: keywords given beforehand.
        attributes: the formula returns what each value of x adds, (B, n, C, *size).
        finishes: the formula postprocesses by itself.
        keywords: those that the formula takes as `**options` and passes on, beside the groups that it names.
        explains: a function or method whose docstring says what these keywords mean.
        base: the method that this one is with other options.
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
    attributes: bool = False
    finishes: bool = False
    keywords: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    explains: Callable[..., Any] | None = None
    base: Method[...] | None = None
    module: str = ""

    def __init_subclass__(cls) -> None:
        cls.__doc__ = _Composed(_doc, cls.__doc__)  # pyright: ignore[reportAttributeAccessIssue]

    def __post_init__(self) -> None:
        names = {
            "__module__": self.module or self.run.__module__,
            "__name__": self.name,
            "__qualname__": self.name,
        }
        for name, value in names.items():
            object.__setattr__(self, name, value)

    if TYPE_CHECKING:

        def __call__(
            self,
            model: Any,
            layer: Layer,
            x: Tensor,
            cls: Classes = None,
            to_spatial: ToSpatial | None = None,
            postprocess: Postprocess | None = heatmap,
            create_graph: bool = False,
            *args: P.args,
            **options: P.kwargs,
        ) -> Tensor:
            """Return the heatmaps of a batch."""
            ...

    else:

        def __call__(self, model, layer, x, cls=None, **options):
            """Return the heatmaps of a batch."""
            given = {**self.options, **options}
            if not torch.compiler.is_compiling():
                self.check_options(options)
            if model is None and "scorer" in self.own_options:
                if given.get("scorer") is None:
                    expected = "expected a model, or a scorer=callable from images to outputs in its place"
                    raise ValueError(f"model=None: {expected}")
                model = nn.Identity().eval()
            to_spatial, create_graph = given.pop("to_spatial", None), given.pop("create_graph", False)
            call = Call(model, layer, x, cls, to_spatial=to_spatial, create_graph=create_graph)
            return self._map(call, given)

    def on(self, call: Call, **options: Any) -> Tensor:
        """The heatmaps of a call that other methods share; what was computed before is not computed again.

        Args:
            call: the question.
            **options: the method's own, and `postprocess`.
        """
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
        if self.finishes:
            options["postprocess"] = postprocess
        run: Any = self.run
        with call.running():
            maps = run(call, **options)
            if self.attributes:
                maps = (maps if postprocess is None else maps.abs()).sum(2)
            if self.finishes:
                return maps
            maps = maps if call.many else maps.squeeze(1)
            return maps if postprocess is None else postprocess(maps, tuple(call.x.shape[2:]))

    def check_options(self, options: Collection[str]) -> None:
        """Raise where an option is not one of the method's."""
        unknown = [name for name in options if name not in _SHARED]
        unknown = [name for name in unknown if name not in self.own_options] if unknown else []
        if unknown:
            known = ", ".join(sorted({*self.own_options, *_SHARED}))
            raise TypeError(f"{self.name}() has no option {unknown[0]!r}; its options are {known}")

    @functools.cached_property
    def own_options(self) -> dict[str, inspect.Parameter]:
        """The method's own keywords, by name, those of groups among them."""
        return {**own_options(self.run), **self.keywords}

    def forwards(self, channels: int) -> int | None:
        """How many images the method runs through the network for one photograph, at most and but for a few.

        Args:
            channels: of the layer.

        Returns:
            The number; None for methods that need a few forwards, or whose number is not known beforehand.
        """
        if self.cost is None:
            return None
        _, *names = inspect.signature(self.cost).parameters
        own = self.own_options
        return self.cost(channels, **{name: self.options.get(name, own[name].default) for name in names})

    def with_options(self, *, name: str | None = None, title: str | None = None, **options: Any) -> Method[P]:
        """The method with other defaults, which is a method too."""
        return replace(
            self, name=name or self.name, title=title or self.title, options={**self.options, **options},
            base=self.base or self,
        )  # fmt: skip

    def variant(self, library: str) -> Method[P]:
        """The method as a library defines it.

        Args:
            library: a key of `VARIANTS` that has this method.
        """
        return self.with_options(**self.variants[library])

    def __repr__(self) -> str:
        parameters = inspect.signature(self).parameters.values()
        return f"{self.name}{inspect.Signature([p.replace(annotation=p.empty) for p in parameters])}"

    def __reduce__(self) -> Any:
        if getattr(sys.modules.get(self.__module__), self.name, None) is self:
            return self.name  # by reference, as a function
        if self.base is not None:
            return _with_options, (self.base, self.name, self.title, dict(self.options))
        return _restored, (type(self), dict(vars(self)))


_SHARED = ("to_spatial", "postprocess", "create_graph")


def _with_options(base: Method[...], name: str, title: str, options: dict[str, Any]) -> Method[...]:
    return base.with_options(name=name, title=title, **options)


def _restored(kind: type[Method[...]], state: dict[str, Any]) -> Method[...]:
    method = object.__new__(kind)
    vars(method).update(state)
    return method


class _Composed:
    """An attribute of instances that is composed when it is asked for; the class has its own, or none."""

    def __init__(self, compose: Callable[[Any], Any], of_class: Any = None) -> None:
        self.compose, self.of_class = compose, of_class

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is not None:
            return self.compose(instance)
        if self.of_class is None:
            raise AttributeError
        return self.of_class


def _signature(method: Method[...]) -> inspect.Signature:
    named = inspect.signature(_called).parameters
    own = [p.replace(default=method.options.get(n, p.default)) for n, p in method.own_options.items()]
    *positional, to_spatial, postprocess, create_graph = named.values()
    postprocess = postprocess.replace(default=method.options.get("postprocess", heatmap))
    parameters = [*positional, to_spatial, *own, postprocess, create_graph]
    return inspect.Signature(parameters, return_annotation=Tensor)


def _called(
    model: nn.Module,
    layer: Layer,
    x: Tensor,
    cls: Classes = None,
    *,
    to_spatial: ToSpatial | None = None,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """What all methods are called with; only its signature is used."""
    raise AssertionError


def _doc(method: Method[...]) -> str:
    """The formula's docstring, its Args completed by those that methods, groups and functions share."""
    own = sections(method.run)
    more = [group_args(group) for group in groups(method.run)]
    if method.explains is not None and method.keywords:
        more.append(described(method.explains, method.keywords))
    args = [_ARGS, *more, own.get("Args", "")]
    if "projection" in method.own_options and "projection:" not in "".join(args):
        args.insert(1, _PROJECTION)
    head = own[""] or f"{method.title}: {method.summary}"
    references = own.get("References") or f"    {method.paper or 'none'}\n"
    return f"{head}\n\nArgs:\n{''.join(args)}\n{_RETURNS}{own.get('Raises', '')}\nReferences:\n{references}"


def described(function: Callable[..., Any], names: Collection[str]) -> str:
    """What a docstring says of some of a function's parameters."""
    entries = re.split(r"^(?=    \w)", sections(function).get("Args", ""), flags=re.M)
    return "".join(entry for entry in entries if entry.partition(":")[0].strip() in names)


Method.__doc__ = _Composed(_doc, Method.__doc__)  # pyright: ignore[reportAttributeAccessIssue]
Method.__signature__ = _Composed(_signature)  # pyright: ignore[reportAttributeAccessIssue]


def sections(function: Callable[..., Any] | type) -> dict[str, str]:
    """The parts of a docstring by their headings, the first under ""."""
    doc = inspect.cleandoc(function.__doc__ or "")
    head, *rest = re.split(r"^(Args|Returns|Raises|References|Example):\n", doc, flags=re.M)
    found = {"": head.strip()}
    return found | {name: text.rstrip() + "\n" for name, text in zip(rest[::2], rest[1::2], strict=True)}


def groups(run: Callable[..., Any]) -> list[Any]:
    """The groups of keywords that a formula takes as `**options: Unpack[Group]`."""
    *_, last = inspect.signature(run).parameters.values()
    if last.kind is not last.VAR_KEYWORD or last.annotation is last.empty:
        return []
    hint = typing.get_type_hints(run).get(last.name)
    return [group for group in typing.get_args(hint) if group in GROUPS]


def group_args(group: Any) -> str:
    """What the docstrings of a group, and of the groups that it is built on, say of its keywords."""
    built_on = [one for one in GROUPS if set(typing.get_type_hints(one)) <= set(typing.get_type_hints(group))]
    return "".join(sections(one).get("Args", "") for one in built_on)


def own_options(run: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A formula's keywords by name, those of its groups among them."""
    _, *own = inspect.signature(run).parameters.values()
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = {p.name: p for p in own if p.kind in named and p.name not in (*_SHARED, "inner")}
    for group in groups(run):
        for name, hint in typing.get_type_hints(group).items():
            default = next(d._field_defaults[name] for d in GROUPS[group] if name in d._field_defaults)
            given = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            found.setdefault(name, given)
    return found


def options_of(function: Callable[..., Any], given_by_caller: int) -> dict[str, inspect.Parameter]:
    """A function's named parameters after those that its caller gives by position, as keywords."""
    after = list(inspect.signature(function).parameters.values())[given_by_caller:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in after if p.kind not in kinds}


_PLAIN = (bool, int, float, str, type(None))


def comparable(value: Any) -> Any:
    """A value that compares by what it is where it is a plain one, and else by its identity."""
    return (type(value), value) if isinstance(value, _PLAIN) else _Identity(value)


class _Identity:
    """A key that equals another where both are of one and the same object, which it keeps alive."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)
