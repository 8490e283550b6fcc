"""What a method is: a pure function from a model, a layer and images to heatmaps, with a name."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor, nn

from xcam_fn.network.places import ToSpatial
from xcam_fn.network.split import Layer, Same, at, layer_of, once
from xcam_fn.targets import Classes

Postprocess = Callable[[Tensor, tuple[int, ...]], Tensor]
Run = TypeVar("Run", bound=Callable[..., Tensor])

ARGUMENTS = """Args:
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
PROJECTION = """    projection: what is made of the weighted features in place of their sum over channels,
        `(B, K, *spatial) -> (B, *spatial)`, such as `projections.principal_component`.
"""
RETURNS = """Returns:
    (B, *size) in [0, 1], or (B, n, *size) for n classes; with postprocess=None (B, *spatial) and signed.

Raises:
    ValueError: a value is out of range or does not fit the model, the batch or the layer.
    TypeError: an argument is of the wrong kind.
"""


@runtime_checkable
class Method(Protocol):
    """A method of explanation, called as `method(model, layer, x, cls, **options)`.

    Attributes:
        name: its key in `METHODS`.
        title: its name in print, such as "Grad-CAM".
        family: "gradient", "perturbation", "fusion", "activation" (a map of the features and of the network's
            own weights) or "baseline".
        paper: where it was published.
        summary: what it does, in one line.
        needs: what a network has to have for it, where not every network has; on one without it the method
            raises `checks.StructureError`.
    """

    name: str
    title: str
    family: str
    paper: str
    summary: str
    needs: str

    def __call__(
        self, model: Any, layer: Layer, x: Tensor, cls: Classes = None, **options: Any
    ) -> Tensor: ...


def method(
    run: Callable[..., Tensor],
    *,
    name: str,
    title: str,
    family: str,
    paper: str,
    summary: str,
    module: str,
    doc: str | None = None,
    arguments: str = ARGUMENTS,
    needs: str = "",
) -> Method:
    """`run` at any layer, tokens included, with what the registry, the command line and `help` say of it."""

    def called(
        model: Any,
        layer: Layer,
        x: Tensor,
        cls: Classes = None,
        *,
        to_spatial: ToSpatial | None = None,
        **options: Any,
    ) -> Tensor:
        return run(model, at(layer, to_spatial), x, cls, **options)

    signature = inspect.signature(run)
    own = list(signature.parameters.values())
    shared = inspect.signature(called).parameters["to_spatial"]
    called.__dict__["__signature__"] = signature.replace(parameters=[*own[:4], shared, *own[4:]])
    called.__name__ = called.__qualname__ = name
    called.__module__ = module  # together with the name this is what pickles it by reference
    called.__doc__ = doc or (
        f"{title}: {summary}\n\n{arguments}\n{RETURNS}\nReferences:\n    {paper or 'none'}\n"
    )
    called.__dict__.update(name=name, title=title, family=family, paper=paper, summary=summary, needs=needs)
    return cast(Method, called)


def method_of(
    run: Callable[..., Tensor], *, title: str, family: str, paper: str, summary: str, needs: str = ""
) -> Method:
    """The method that a private function computes, under its name and with its docstring, filled in."""
    return method(
        run,
        name=run.__name__.lstrip("_"),
        title=title,
        family=family,
        paper=paper,
        summary=summary,
        module=run.__module__,
        doc=documented(run),
        needs=needs,
    )


def documented(run: Callable[..., Tensor]) -> str:
    """The function's docstring with the arguments and returns that all methods share filled in."""
    doc = inspect.cleandoc(run.__doc__ or "")
    parts = {"{arguments}": ARGUMENTS, "{projection}": PROJECTION, "{returns}": RETURNS}
    for key, text in parts.items():
        doc = doc.replace(key, text)
    return doc


def described(function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> str:
    """What a function's docstring says of some of its parameters, lines for the Args of another."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(function.__doc__ or ""), re.M | re.S)
    entries = re.split(r"^(?=    \w)", section[1].rstrip() + "\n", flags=re.M) if section else []
    names = {parameter.name for parameter in parameters}
    return "".join(entry for entry in entries if entry.partition(":")[0].strip() in names)


def with_options(run: Method, title: str | None = None, name: str | None = None, **options: Any) -> Method:
    """The method with other defaults, which is a method too."""
    found = functools.partial(run, **options)
    about = {key: getattr(run, key, "") for key in ("name", "title", "family", "paper", "summary", "needs")}
    found.__dict__.update(about | {k: v for k, v in (("title", title), ("name", name)) if v is not None})
    return cast(Method, found)


def with_parameters(
    run: Callable[..., Tensor], parameters: Iterable[inspect.Parameter], *, hidden: str | None = None
) -> None:
    """Let the function's signature name what its `**options` stand for."""
    signed = inspect.signature(run).parameters.values()
    own = [p for p in signed if p.kind is not p.VAR_KEYWORD and p.name != hidden]
    names = {p.name for p in own}
    more = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in names]
    run.__dict__["__signature__"] = inspect.Signature([*own, *more])


def parameters_of(function: Callable[..., Any], given_by_caller: int) -> list[inspect.Parameter]:
    """A function's named parameters after those that its caller gives by position."""
    after = list(inspect.signature(function).parameters.values())[given_by_caller:]
    return [p for p in after if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def base_of(run: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function under partials, and the keywords that they give it."""
    if not isinstance(run, functools.partial):
        return run, {}
    base, given = base_of(run.func)
    return base, given | run.keywords


def run_once(
    run: Callable[..., Tensor],
    model: nn.Module,
    layer: Layer,
    x: Tensor,
    cls: Classes,
    options: dict[str, Any],
) -> Tensor:
    """What the method returns, computed once for one and the same call where the layer is shared."""
    base, given = base_of(run)
    if not isinstance(base, Method):  # a function of the user's own may look at its layer
        return run(model, layer_of(layer), x, cls, **options)
    parameters = inspect.signature(base).parameters
    own = {
        (name, comparable(value))
        for name, value in (given | options).items()
        if name not in parameters or comparable(parameters[name].default) != comparable(value)
    }
    return once(layer, (base, Same(cls), frozenset(own)), lambda: run(model, layer, x, cls, **options))


def comparable(value: Any) -> Any:
    """A value that compares by what it is where it is a plain one, and else by its identity."""
    return (type(value), value) if isinstance(value, (bool, int, float, str, type(None))) else Same(value)


def accepted(run: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the method takes and that its own partials do not give."""
    _, given = base_of(run)
    names = [name for name in inspect.signature(run).parameters if name not in given]
    return {name: value for name, value in options.items() if name in names}


def check_options(name: str, options: Collection[str], known: Collection[str]) -> None:
    """Raise where an option is not one of the known ones."""
    for option in options:
        if option not in known:
            raise TypeError(f"{name}() has no option {option!r}; its options are {', '.join(sorted(known))}")
