"""Where in a model's output the values are that a target reads, and an output in words."""

from __future__ import annotations

from collections.abc import Collection
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
    return _of_rank((2,), _entry(output, _LOGITS), output, f"logits of shape (B, classes), {_WITH_LOGITS}")


def dense_logits(output: Any) -> Float[Tensor, "B classes *size"]:
    """The logits of every pixel, found as by `logits`; ValueError where there are none."""
    expected = f"logits of shape (B, classes, H, W), {_WITH_LOGITS}"
    return _of_rank(range(3, 9), _entry(output, _LOGITS), output, expected, "segment: ")


def embeddings(output: Any) -> Float[Tensor, "B D"]:
    """The output itself, or its image_embeds, pooler_output or embedding; ValueError where there are none."""
    found = _entry(output, _EMBEDDINGS)
    if isinstance(found, Tensor) and found.ndim > 2 and set(found.shape[2:]) == {1}:
        found = found.flatten(1)  # pooled, its spatial axes kept
    names = ", ".join(map(repr, _EMBEDDINGS))
    expected = f"embeddings of shape (B, D), or a dict or an object with {names}"
    return _of_rank((2,), found, output, expected, "similarity: ")


def numbers(output: Any) -> Float[Tensor, "B n"]:
    """The numbers that a regression returns, n = 1 for shape (B,); ValueError where there are none."""
    found = _entry(output, _LOGITS)
    if isinstance(found, Tensor) and found.ndim == 1:
        found = found[:, None]
    return _of_rank((2,), found, output, f"shape (B,) or (B, n), {_WITH_LOGITS}", "regression: ")


def detections(output: Any) -> list[dict[str, Tensor]]:
    """Boxes, labels and scores of each image, as torchvision's detectors return; ValueError where not."""
    if not _is_detections(output):
        expected = (
            f"a list with one dict for each image, with keys {', '.join(map(repr, _DETECTIONS))}, as "
            "torchvision's detectors return"
        )
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
    return (
        isinstance(output, (list, tuple))
        and len(output) > 0
        and all(isinstance(image, dict) and set(_DETECTIONS) <= set(image) for image in output)
    )


def _of_rank(ranks: Collection[int], found: Any, output: Any, expected: str, target: str = "") -> Tensor:
    """What was found in an output, where it is a tensor with so many axes; ValueError where not."""
    if not isinstance(found, Tensor) or found.ndim not in ranks:
        raise _misfit(found, output, expected, target)
    return found


def _misfit(found: Any, output: Any, expected: str, target: str) -> ValueError:
    """The error for an output that is not what a target reads, with what to pass for it."""
    if _is_detections(output):
        remedy = "xcam_fn.targets.detection(box, label)"
    elif isinstance(found, Tensor) and found.ndim > 0:
        remedy = {
            1: "xcam_fn.targets.regression()",
            2: "a class, or xcam_fn.targets.regression(index)",
        }.get(found.ndim, "xcam_fn.targets.segment(cls, mask)")
    elif isinstance(_entry(output, _EMBEDDINGS), Tensor):
        remedy = "xcam_fn.targets.similarity(embedding)"
    else:
        remedy = (
            "a callable from it to B scores, such as cls=lambda output: output[0][:, 3], or have "
            "xcam_fn.bind(model, fn) return the part of it that counts"
        )
    return ValueError(
        f"{target}the model's output is {describe(output)}; expected {expected}. Pass cls={remedy}"
    )
