"""Where in a model's output the values are that a target reads, and an output in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import checked

_LOGITS = ("logits", "out")
_EMBEDDINGS = ("image_embeds", "pooler_output", "embedding")
DETECTIONS = ("boxes", "labels", "scores")
_WITH_LOGITS = "an object with .logits or a dict with 'logits' or 'out'"


@checked
def logits(output: Any) -> Float[Tensor, "B classes"]:
    """The logits in a model's output: the output itself, its `.logits`, or its `"logits"` or `"out"`.

    In a tuple or a list they are the one tensor of shape (B, classes). Logits of shape (B, classes, 1, 1), as
    a convolution after pooling returns them, lose their spatial axes.

    Args:
        output: what the model returned.

    Raises:
        ValueError: no rule covers the output; another target or a callable does.
    """
    fits = lambda y: y.ndim == 2 or (y.ndim > 3 and set(y.shape[2:]) == {1})  # noqa: E731
    expected = f"logits of shape (B, classes), {_WITH_LOGITS}"
    return _read(output, _LOGITS, fits, expected, in_parts=True).flatten(1)


def dense_logits(output: Any) -> Float[Tensor, "B classes *size"]:
    """The logits of every pixel, found as by `logits`; ValueError where there are none."""
    expected = f"logits of shape (B, classes, H, W), {_WITH_LOGITS}"
    return _read(output, _LOGITS, lambda y: y.ndim > 2, expected, "segment: ")


def embeddings(output: Any) -> Float[Tensor, "B D"]:
    """The output itself, or its image_embeds, pooler_output or embedding; ValueError where there are none."""
    fits = lambda y: y.ndim > 1 and set(y.shape[2:]) <= {1}  # noqa: E731  (pooling may keep spatial axes)
    expected = f"embeddings of shape (B, D), or a dict or an object with {str(_EMBEDDINGS)[1:-1]}"
    return _read(output, _EMBEDDINGS, fits, expected, "similarity: ").flatten(1)


def numbers(output: Any) -> Float[Tensor, "B n"]:
    """The numbers that a regression returns, n = 1 for shape (B,); ValueError where there are none."""
    expected = f"shape (B,) or (B, n), {_WITH_LOGITS}"
    found = _read(output, _LOGITS, lambda y: y.ndim in (1, 2), expected, "regression: ", in_parts=True)
    return found if found.ndim == 2 else found[:, None]


def describe(output: Any) -> str:
    """The kind and shape of a model's output, in words."""
    kind = "dict" if type(output).__name__ == "OrderedDict" else type(output).__name__
    if output is None:
        return "None"
    if isinstance(output, Tensor):
        return "a nested tensor" if output.is_nested else f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        parts = ", ".join(f"{key!r} ({describe(value)})" for key, value in output.items())
        return f"a {kind} with keys {parts}"
    if isinstance(output, (list, tuple)):
        if output and all(isinstance(part, dict) and set(part) == set(output[0]) for part in output):
            parts = f" dict{'s' * (len(output) > 1)} with keys {', '.join(map(repr, output[0]))}"
        else:
            parts = ": " * bool(output) + ", ".join(map(describe, output))
        return f"a {kind} of {len(output)}{parts}"
    found = getattr(output, "logits", None)
    return f"a {kind}" + ("" if found is None else f" with .logits, {describe(found)}")


def is_listed(output: Any) -> bool:
    """Whether an output is a list of detections, a dict for each image, as torchvision's detectors return."""
    images = output if isinstance(output, (list, tuple)) else ()
    return bool(images) and all(isinstance(one, dict) and set(DETECTIONS) <= set(one) for one in images)


def part_of(output: Any, *names: str) -> Tensor | None:
    """The first tensor among an output's entries or attributes of the names."""
    is_mapping = isinstance(output, Mapping)
    parts = (output.get(name) if is_mapping else getattr(output, name, None) for name in names)
    return next((y for y in parts if isinstance(y, Tensor)), None)


def _read(
    output: Any,
    names: tuple[str, ...],
    fits: Callable[[Tensor], bool],
    expected: str,
    target: str = "",
    *,
    in_parts: bool = False,
) -> Tensor:
    """The tensor under one of the names or, with `in_parts`, the one part of a tuple or list that fits."""
    found = output if isinstance(output, Tensor) else part_of(output, *names)
    if found is None and in_parts and isinstance(output, (list, tuple)):
        parts = [y for y in output if isinstance(y, Tensor) and y.is_floating_point() and not y.is_nested]
        parts = [y for y in parts if fits(y)]
        found = parts[0] if len(parts) == 1 else None
        expected += f" ({len(parts)} parts have this shape)" * (len(parts) > 1)
    if found is not None:
        found = checks.check_returned("the model", found, expected)
    # The queries of a detector are no pixels.
    if found is None or not fits(found) or part_of(output, "pred_boxes") is not None:
        raise misfit(output, names, expected, target)
    if found.numel() == 0:
        raise ValueError(f"{target}the model's output is {describe(output)}, which holds no values")
    return found


def misfit(output: Any, names: tuple[str, ...], expected: str, target: str) -> ValueError:
    """The error for an output that is not what a target reads, with what to pass for it."""
    found = output if isinstance(output, Tensor) else part_of(output, *names)
    if is_listed(output) or part_of(output, "pred_boxes") is not None:
        remedy = "xcam_fn.targets.detection(box, label)"
    elif found is not None and found.ndim == 2:
        remedy = "a class, or xcam_fn.targets.regression(index)"
    elif found is not None and found.ndim > 0:
        remedy = f"xcam_fn.targets.{'regression()' if found.ndim == 1 else 'segment(cls, mask)'}"
    elif part_of(output, *_EMBEDDINGS) is not None:
        remedy = "xcam_fn.targets.similarity(embedding)"
    else:
        example = "lambda output: output[0][:, 3]"
        remedy = f"a callable that returns B scores, such as {example}, or use xcam_fn.bind(model, fn)"
    has = describe(output)
    return ValueError(f"{target}the model's output is {has}; expected {expected}. Pass cls={remedy}")
