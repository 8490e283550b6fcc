"""Docstrings completed: what is said once of the parameters that many functions share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_TITLES = ("Args", "Returns", "Raises", "Example", "References")


class Shared:
    """What a parameter means wherever a docstring says nothing else of it.

    Args:
        model: the network, in evaluation mode; it is never modified.
        layer: the layer to explain: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        cls: None for the predicted class of each image, an int, B ints, (B, n) ints for n classes of each
            image at once, or a target, a callable from the model's output to B scores.
        to_spatial: for a layer that returns tokens (B, T, K) or channels last, the function that selects and
            arranges them as (B, K, *spatial); None finds it automatically.
        postprocess: `heatmap`, a callable `(cam, size) -> map`, or None for the raw map: signed, at the
            layer's own size.
        create_graph: record the computation, so that the result can also be differentiated with respect to
            the parameters (it can always be differentiated with respect to an x that requires grad).
        baseline: the value used for hidden pixels, x₀: a number, a tensor or a callable of x.
        score: the class score to explain, "probability" or "logit".
        projection: replaces the sum of the weighted features over channels, `(B, K, *spatial) ->
            (B, *spatial)`, such as `projections.principal_component`.
        chunk_size: copies of images or features per run, ≥ 1; it changes memory use, not the map.
        progress: show a progress bar that counts runs.
        seed: any integer; the random numbers are a function of it and their index.

    Raises:
        ValueError: a value is out of range or does not fit the model, the batch or the layer.
        TypeError: an argument has the wrong type.
    """


def documented(function: Function, *known: Any) -> Function:
    """The function, its docstring completed by those of `known` and by `Shared`."""
    function.__doc__ = composed(sections(function), inspect.signature(function).parameters, *known)
    return function


def composed(parts: Mapping[str, str], names: Iterable[str], *known: Any) -> str:
    """A docstring of sections that says of every parameter what they, or else the first of `known`, say."""
    said = entries(parts.get("Args", ""))
    for one in (*known, Shared):
        said = entries(sections(one).get("Args", "")) | said
    args = "".join(said[name] for name in names if name in said)
    raises = sections(Shared).get("Raises", "") + parts.get("Raises", "")
    filled = {**parts, "Args": args, "Raises": raises}
    titled = [f"{title}:\n{filled[title]}" for title in _TITLES if filled.get(title)]
    return "\n".join([f"{parts['']}\n", *titled])


def entries(args: str) -> dict[str, str]:
    """What an Args section says of each parameter, by its name."""
    found = re.split(r"^(?=    [*\w])", args, flags=re.M)
    return {entry.partition(":")[0].strip(" *"): entry for entry in found if entry}


def sections(documented: Any) -> dict[str, str]:
    """The parts of a docstring by their headings, the first under ""."""
    doc = inspect.cleandoc(documented.__doc__ or "")
    head, *rest = re.split(rf"^({'|'.join(_TITLES)}):\n", doc, flags=re.M)
    found = {"": head.strip()}
    return found | {name: text.rstrip() + "\n" for name, text in zip(rest[::2], rest[1::2], strict=True)}
