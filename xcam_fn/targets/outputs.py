"""Where in a model's output the values are that a target reads, and an output in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

_LOGITS = ("logits", "out")
_EMBEDDINGS = ("image_embeds", "pooler_output", "embedding")
_DETECTIONS = ("boxes", "labels", "scores")
_WITH_LOGITS = "an object with .logits or a dict with 'logits' or 'out'"


def logits(output: Any) -> Float[Tensor, "B classes"]:
    """The logits in a model's output: the output itself, its `.logits`, or its `"logits"` or `"out"`.

    Args:
        output: what the model returned.

    Raises:
        ValueError: no rule covers the output; another target or a callable does.
    """
    return _read(output, _LOGITS, lambda y: y.ndim == 2, f"logits of shape (B, classes), {_WITH_LOGITS}")


def dense_logits(output: Any) -> Float[Tensor, "B classes *size"]:
    """The logits of every pixel, found as by `logits`; ValueError where there are none."""
    expected = f"logits of shape (B, classes, H, W), {_WITH_LOGITS}"
    return _read(output, _LOGITS, lambda y: y.ndim > 2, expected, "segment: ")


def embeddings(output: Any) -> Float[Tensor, "B D"]:
    """The output itself, or its image_embeds, pooler_output or embedding; ValueError where there are none."""
    expected = f"embeddings of shape (B, D), or a dict or an object with {str(_EMBEDDINGS)[1:-1]}"
    # A pooled output may have kept its spatial axes.
    found = _read(
        output, _EMBEDDINGS, lambda y: y.ndim > 1 and set(y.shape[2:]) <= {1}, expected, "similarity: "
    )
    return found.flatten(1)


def numbers(output: Any) -> Float[Tensor, "B n"]:
    """The numbers that a regression returns, n = 1 for shape (B,); ValueError where there are none."""
    expected = f"shape (B,) or (B, n), {_WITH_LOGITS}"
    found = _read(output, _LOGITS, lambda y: y.ndim in (1, 2), expected, "regression: ")
    return found if found.ndim == 2 else found[:, None]


def detections(output: Any) -> list[dict[str, Tensor]]:
    """Boxes, labels and scores of each image, as torchvision's detectors return; ValueError where not."""
    if not _is_detections(output):
        keys = str(_DETECTIONS)[1:-1]
        expected = f"a list with one dict for each image, with keys {keys}, as torchvision's detectors return"
        raise _misfit(_entry(output, _LOGITS), output, expected, "detection: ")
    return list(output)


def describe(output: Any) -> str:
    """The kind and shape of a model's output, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        kind = "dict" if type(output).__name__ in ("dict", "OrderedDict") else type(output).__name__
        parts = ", ".join(f"{key!r} ({describe(value)})" for key, value in output.items())
        return f"a {kind} with keys {parts}"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}" + _describe_parts(output)
    found = getattr(output, "logits", None)
    return f"a {type(output).__name__}" + ("" if found is None else f" with .logits, {describe(found)}")


def _describe_parts(parts: Any) -> str:
    if parts and all(isinstance(part, dict) and set(part) == set(parts[0]) for part in parts):
        return f" dict{'s' * (len(parts) > 1)} with keys {', '.join(map(repr, parts[0]))}"
    return ": " + ", ".join(describe(part) for part in parts) if parts else ""


def _entry(output: Any, names: tuple[str, ...]) -> Any:
    """The output where it is a tensor, else the first of its entries or attributes with one of the names."""
    if isinstance(output, Tensor):
        return output
    for name in names:
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if found is not None:
            return found
    return None


def _is_detections(output: Any) -> bool:
    images = output if isinstance(output, (list, tuple)) else ()
    return bool(images) and all(isinstance(one, dict) and set(_DETECTIONS) <= set(one) for one in images)


def _read(
    output: Any, names: tuple[str, ...], fits: Callable[[Tensor], bool], expected: str, target: str = ""
) -> Tensor:
    """The tensor under one of the names in an output; ValueError where there is none, or none that fits."""
    found = _entry(output, names)
    if not isinstance(found, Tensor) or not fits(found):
        raise _misfit(found, output, expected, target)
    return found


def _misfit(found: Any, output: Any, expected: str, target: str) -> ValueError:
    """The error for an output that is not what a target reads, with what to pass for it."""
    if _is_detections(output):
        remedy = "xcam_fn.targets.detection(box, label)"
    elif isinstance(found, Tensor) and found.ndim == 2:
        remedy = "a class, or xcam_fn.targets.regression(index)"
    elif isinstance(found, Tensor) and found.ndim > 0:
        remedy = f"xcam_fn.targets.{'regression()' if found.ndim == 1 else 'segment(cls, mask)'}"
    elif isinstance(_entry(output, _EMBEDDINGS), Tensor):
        remedy = "xcam_fn.targets.similarity(embedding)"
    else:
        remedy = (
            "a callable to B scores, such as lambda output: output[0][:, 3], or use xcam_fn.bind(model, fn)"
        )
    has = describe(output)
    return ValueError(f"{target}the model's output is {has}; expected {expected}. Pass cls={remedy}")
