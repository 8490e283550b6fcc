"""Where in a model's output the numbers are that a target reads, and an output in words."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

_LOGITS = ("logits", "out")
_EMBEDDINGS = ("image_embeds", "pooler_output", "embedding")
DETECTIONS = ("boxes", "labels", "scores")


def logits(output: Any) -> Float[Tensor, "B classes"]:
    """The logits in a model's output: the output itself, its `.logits`, or its `"logits"` or `"out"`.

    Args:
        output: what the model returned.

    Raises:
        ValueError: no rule covers the output; another target or a callable does.
    """
    found = _entry(output, _LOGITS)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ValueError(
            f"the model's output is {describe(output)}; expected logits of shape (B, classes), an object "
            f"with .logits or a dict with 'logits' or 'out'. {_remedy(output, found)}"
        )
    return found


def dense_logits(output: Any) -> Float[Tensor, "B classes *size"]:
    """The logits of every pixel: the output itself, its `.logits`, or its `"logits"` or `"out"`.

    Args:
        output: what the model returned.

    Raises:
        ValueError: the output holds none.
    """
    found = _entry(output, _LOGITS)
    if not isinstance(found, Tensor) or found.ndim < 3:
        raise ValueError(
            f"segment: the model's output is {describe(output)}; expected logits of shape (B, classes, H, "
            f"W), an object with .logits or a dict with 'logits' or 'out'. {_remedy(output, found)}"
        )
    return found


def embeddings(output: Any) -> Float[Tensor, "B D"]:
    """The embeddings in a model's output: the output itself, or its image_embeds, pooler_output or embedding.

    Args:
        output: what the model returned.

    Raises:
        ValueError: the output holds none.
    """
    found = _entry(output, _EMBEDDINGS)
    if isinstance(found, Tensor) and found.ndim > 2 and set(found.shape[2:]) == {1}:
        found = found.flatten(1)  # pooled, its spatial axes kept
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ValueError(
            f"similarity: the model's output is {describe(output)}; expected embeddings of shape (B, D), or "
            f"a dict or an object with {', '.join(map(repr, _EMBEDDINGS))}. {_remedy(output, found)}"
        )
    return found


def numbers(output: Any) -> Float[Tensor, "B n"]:
    """The numbers that a regression returns, (B, n), with n = 1 for an output of shape (B,).

    Args:
        output: what the model returned.

    Raises:
        ValueError: the output holds none.
    """
    found = _entry(output, _LOGITS)
    if isinstance(found, Tensor) and found.ndim == 1:
        found = found[:, None]
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ValueError(
            f"regression: the model's output is {describe(output)}; expected shape (B,) or (B, n), an object "
            f"with .logits or a dict with 'logits' or 'out'. {_remedy(output, found)}"
        )
    return found


def detections(output: Any) -> list[dict[str, Tensor]]:
    """What torchvision's detectors return: a dict of boxes, labels and scores for each image.

    Args:
        output: what the model returned.

    Raises:
        ValueError: the output is something else.
    """
    if not _is_detections(output):
        found = _entry(output, _LOGITS)
        raise ValueError(
            f"detection: the model's output is {describe(output)}; expected a list with one dict for each "
            f"image, with keys {', '.join(map(repr, DETECTIONS))}, as torchvision's detectors return. "
            f"{_remedy(output, found)}"
        )
    return list(output)


def _is_detections(output: Any) -> bool:
    return (
        isinstance(output, (list, tuple))
        and len(output) > 0
        and all(isinstance(image, dict) and set(DETECTIONS) <= set(image) for image in output)
    )


def _entry(output: Any, names: tuple[str, ...]) -> Any:
    """The output where it is a tensor, else the first of its entries or attributes with one of the names."""
    if isinstance(output, Tensor):
        return output
    for name in names:
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if found is not None:
            return found
    return None


def _remedy(output: Any, found: Any) -> str:
    """What to pass for an output that is not what a target reads."""
    if _is_detections(output):
        return "Pass cls=xcam_fn.targets.detection(box, label)"
    if isinstance(found, Tensor) and found.ndim == 1:
        return "Pass cls=xcam_fn.targets.regression()"
    if isinstance(found, Tensor) and found.ndim == 2:
        return "Pass cls=a class, or xcam_fn.targets.regression(index)"
    if isinstance(found, Tensor) and found.ndim > 2:
        return "Pass cls=xcam_fn.targets.segment(cls, mask)"
    if isinstance(_entry(output, _EMBEDDINGS), Tensor):
        return "Pass cls=xcam_fn.targets.similarity(embedding)"
    return (
        "Pass cls=a callable from it to B scores, such as cls=lambda output: output[0][:, 3], or have "
        "xcam_fn.bind(model, fn) return the part of it that counts"
    )


def describe(output: Any) -> str:
    """The kind and shape of a model's output, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        kind = "dict" if type(output).__name__ in ("dict", "OrderedDict") else type(output).__name__
        return f"a {kind} with keys " + ", ".join(
            f"{key!r} ({describe(value)})" for key, value in output.items()
        )
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}" + _described_parts(output)
    found = getattr(output, "logits", None)
    return f"a {type(output).__name__}" + ("" if found is None else f" with .logits, {describe(found)}")


def _described_parts(parts: Any) -> str:
    if parts and all(isinstance(part, dict) and set(part) == set(parts[0]) for part in parts):
        return f" dict{'s' * (len(parts) > 1)} with keys {', '.join(map(repr, parts[0]))}"
    return ": " + ", ".join(describe(part) for part in parts) if parts else ""
