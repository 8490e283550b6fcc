"""Classes, layers and explanations in words, for the command and the app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn.methods.method import Method
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.calls import run_model
from xcam_fn.network.split import default_layer, layers
from xcam_fn.targets import logits, probability


def percent(probability: float) -> str:
    """A probability as people read it."""
    return f"{probability:.1%}" if probability >= 0.0005 else "<0.1%"


def class_name(cls: int, categories: Sequence[str]) -> str:
    """The class by its name and index."""
    name = categories[cls]
    return f"{name} (class {cls})" if name != str(cls) else f"class {cls}"


def probabilities(loaded: LoadedModel, x: Float[Tensor, "1 C *size"]) -> Float[Tensor, " classes"]:
    """The probability of each class of one image."""
    with torch.no_grad():
        output = run_model(loaded.model, x)
    every = torch.arange(logits(output).shape[-1], device=x.device)
    return probability(every[None])(output)[0]


def likeliest(found: Float[Tensor, " classes"]) -> list[tuple[int, float]]:
    """The five likeliest classes, or all where there are fewer, with their probabilities."""
    top = found.topk(min(5, len(found)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def caption(loaded: LoadedModel, cls: int, probability: float, layer: str) -> str:
    """What was explained, and of which network."""
    return f"{class_name(cls, loaded.categories)}, {percent(probability)}; {loaded.name}, layer {layer}"


def layers_and_default(loaded: LoadedModel, device: str = "cpu") -> tuple[dict[str, tuple[int, ...]], str]:
    """The layers that have maps with their shapes, and the default one; a name alone is of the last call."""
    blank = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop, device=device)
    shapes, default = layers(loaded.model, blank), default_layer(loaded.model, blank)
    last = {name.partition("#")[0]: name for name in shapes}
    plain = {call: name for name, call in last.items()}
    return {plain.get(name, name): shape for name, shape in shapes.items()}, default


def why_empty(method: Method, model: nn.Module, layer: str | None, x: Tensor, cls: Any) -> str:
    """What a heatmap of zeros comes from. The raw map tells, where making it once more is cheap."""
    empty = "the heatmap is zero everywhere"
    if method.family != "gradient":
        return f"{empty}, likely because no region adds to the class"
    raw = method(model, layer, x, cls, postprocess=None)
    if not raw.any():
        return f"{empty}, likely because the gradient vanished: the layer does not change the class's score"
    if raw.max() <= 0:
        return f"{empty}: all contributions are negative and clipped, so the layer speaks against the class"
    return f"{empty}: every position contributes the same"


def values_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores of one image as numbers, of a curve its area."""
    return {name: float(getattr(value, "auc", value)) for name, value in scores.items()}
