"""The targets of dense outputs, embeddings and numbers, and of a function for each image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.targets.classes import class_index
from xcam_fn.targets.outputs import dense_logits, describe, embeddings, numbers
from xcam_fn.targets.target import Chosen, Fixed, Reading, Target


def segment(cls: int | Sequence[int] | Tensor, mask: Any = None) -> Target:
    """The target for dense outputs: the mean logit of a class over the pixels of a mask.

        logits of cls      mask         score
        ┌─────────┐     ┌─────────┐
        │ 0 1 2 0 │     │ . # # . │
        │ 0 3 4 1 │  ×  │ . # # . │  →  (1 + 2 + 3 + 4) / 4 = 2.5
        │ 0 0 1 0 │     │ . . . . │
        └─────────┘     └─────────┘

    The output is (B, classes, H, W), torchvision's dict with 'out', or a dict or an object with logits.

    Args:
        cls: a class, or one per image.
        mask: (H, W) or (B, H, W), the pixels of the output that count (bool, or weights ≥ 0); None for the
            pixels where the class has the highest logit in the original image, or where the logit is positive
            if the output has one channel.

    Raises:
        TypeError: mask is not an array of numbers, or cls is None.
        ValueError: when called: the output is not dense, the mask has another size or holds no pixel, or the
            class has the highest logit nowhere.

    References:
        Vinogradova et al., Towards Interpretable Semantic Segmentation via Gradient-weighted Class Activation
        Mapping (arXiv:2002.11434).
    """
    if cls is None:
        raise TypeError("segment: cls is None; expected a class, or one for each image")
    counted = None if mask is None else finite("mask", mask)
    if counted is not None and checks.is_readable(counted) and bool((counted < 0).any()):
        raise ValueError("segment: mask holds negative values; expected weights ≥ 0")
    choose = functools.partial(_pixels, cls, counted)
    return Reading(dense_logits, choose, _mean_over_pixels, placed=True)


def _pixels(cls: int | Sequence[int] | Tensor, given: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each image, and what each pixel counts, (B, pixels), 1 for each image in all."""
    (batch, channels, *size), index = values.shape, class_index(cls, values.flatten(2)[..., 0])
    if index.ndim == 2:
        wanted = f"one class, or {batch}, one for each image"
        raise ValueError(f"segment: cls has shape {tuple(index.shape)}; expected {wanted}")
    if given is None:
        found = values.detach().flatten(2)
        mask = found[:, 0] > 0 if channels == 1 else found.argmax(1) == index[:, None]
    elif list(given.shape) in (size, [batch, *size]):
        mask = given.to(values.device).expand(batch, *size).flatten(1)
    else:
        shape, own = tuple(given.shape), tuple(size)
        has = f"mask has shape {shape}, but the output has {own} pixels for each of {batch} image(s)"
        remedy = f"expected {own} or {(batch, *own)} (resize it to the output, mode='nearest')"
        raise ValueError(f"segment: {has}; {remedy}")
    mask = mask.to(values.dtype)
    if checks.is_readable(mask) and not bool(mask.any(1).all()):
        image = int((~mask.any(1)).nonzero()[0])
        if given is not None:
            raise ValueError(f"segment: mask selects no pixel of image {image}; expected at least one")
        if channels == 1:
            nowhere = f"the logit of the only class is positive at no pixel of image {image}"
            raise ValueError(f"segment: {nowhere}; pass mask=pixels to explain")
        there = values[image].argmax(0).unique().tolist()
        raise ValueError(
            f"segment: class {index[image]} is predicted at no pixel of image {image}; pass one of its "
            f"predicted classes {there}, or mask=pixels to explain"
        )
    return index, mask / mask.sum(1, keepdim=True)


def _mean_over_pixels(values: Tensor, index: Tensor, share: Tensor) -> Tensor:
    values = values.flatten(2)
    rows = index[:, None, None].expand(-1, 1, values.shape[-1])
    return (values.gather(1, rows).squeeze(1) * share).sum(-1)


def similarity(embedding: Any) -> Target:
    """The target for embeddings: the cosine similarity to a given embedding, in [−1, 1].

            ▲ the image's
           ╱
          ╱ θ
         ╱──────▶ embedding        score cos θ

    The embedding may be that of another image, or of a sentence for vision-language networks. The output is
    (B, D), or a dict or an object with image_embeds, pooler_output or embedding. The image's own embedding
    explains nothing: the cosine is at its maximum there, and its gradient is zero.

    Args:
        embedding: (D,) for all images, or (B, D); (B, n, D), or (1, n, D) for all images, for n maps each.
            The norm does not matter.

    Raises:
        ValueError: embedding is zero, not finite or has another shape; when called: the output holds no
            embedding, or one of another width.
        TypeError: embedding is not an array of numbers.
    """
    wanted = finite("embedding", embedding)
    if wanted.ndim not in (1, 2, 3) or wanted.numel() == 0:
        expected = "(D,), (B, D) or (B, n, D)"
        raise ValueError(f"embedding has shape {tuple(wanted.shape)}; expected {expected}")
    if checks.is_readable(wanted) and not bool(wanted.ne(0).any(-1).all()):
        raise ValueError("embedding is zero everywhere, so it has no direction; expected a nonzero vector")
    return Reading(embeddings, functools.partial(_wanted_embedding, wanted), _cosine)


def _cosine(values: Tensor, wanted: Tensor) -> Tensor:
    """The cosines (P,) of values (P, D) to one vector each, or (P, n) to n."""
    return torch.cosine_similarity(values if wanted.ndim == 2 else values[:, None], wanted, dim=-1)


def _wanted_embedding(wanted: Tensor, values: Tensor) -> tuple[Tensor]:
    batch, width = values.shape
    if wanted.shape[-1] != width:
        has = f"embedding has shape {tuple(wanted.shape)}, but the model's output is {describe(values)}"
        raise ValueError(f"similarity: {has}; expected an embedding of the same model, {width} numbers")
    rows = wanted[None] if wanted.ndim == 1 else wanted
    if len(rows) not in (1, batch):
        has = f"embedding has shape {tuple(wanted.shape)} for a batch of {batch}"
        expected = f"{(width,)} for all images, {(batch, width)}, or embedding[None] for several maps each"
        raise ValueError(f"similarity: {has}; expected {expected}")
    return (rows.expand(batch, *rows.shape[1:]).to(values),)


def regression(index: int = 0) -> Target:
    """The target for networks that return numbers: one of the numbers.

        output (B, n)    0.3  17.2  -4.0
        index=1               ▲            score 17.2

    Use `-regression()` to see what makes the number smaller.

    Args:
        index: the index of the number, from 0; an output of shape (B,) has one.

    Raises:
        ValueError: index is negative; when called: it is out of range, or the output has another shape.
        TypeError: index is not an integer.
    """
    checks.check_count("index", index, at_least=0)
    return Chosen(functools.partial(_number, index))


def _number(index: int, output: Any, which: Tensor | None) -> Tensor:  # noqa: ARG001
    values = numbers(output)
    if index >= (count := values.shape[1]):
        has = f"the model's output is {describe(values)}"
        raise ValueError(f"regression: index={index} is out of range: {has}; expected 0 to {count - 1}")
    return values[:, index]


def finite(name: str, value: Any) -> Tensor:
    """Something like an array as a tensor of finite floating-point numbers."""
    try:
        found = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}") from error
    checks.check_tensor(name, found)
    return found if found.is_floating_point() else found.to(torch.float32)


def per_image(functions: Sequence[Callable[[Any], Tensor]]) -> Target:
    """The target that scores each image's part of the output by that image's own function.

        output      y₀      y₁      y₂
                    ▼       ▼       ▼
        functions   f₀      f₁      f₂     scores f₀(y₀), f₁(y₁), f₂(y₂)

    The output is a tensor with one row per image, or a list with one entry per image.

    Args:
        functions: one per image, from its part of the output to one score, a tensor with one value.

    Raises:
        TypeError: an entry of functions is not callable; when called, one does not return a tensor.
        ValueError: when called: the number of functions differs from that of images, or one returns several
            values.
    """
    given = tuple(functions)
    for function in given:
        if not callable(function):
            raise TypeError(f"per_image: functions holds {function!r}; expected one function for each image")
    return _PerImage(given)


@dataclass(frozen=True, eq=False)
class _PerImage(Target):
    """A function for each image, of its own part of the output."""

    functions: tuple[Callable[[Any], Tensor], ...]

    def fixed(self, output: Any) -> Fixed:
        has_rows = isinstance(output, Tensor) and output.ndim > 0 and output.layout == torch.strided
        if not (has_rows or isinstance(output, list)):
            expected = "a tensor with one row for each image, or a list with one entry for each"
            raise TypeError(f"per_image: the model's output is {describe(output)}; expected {expected}")
        if len(output) != len(self.functions):
            has = f"{len(self.functions)} function(s) for a batch of {len(output)}"
            raise ValueError(f"per_image: functions holds {has}; expected one function for each image")
        return self._scores

    def _scores(self, output: Any, which: Tensor | None) -> Tensor:
        images = range(len(self.functions)) if which is None else which.tolist()
        return torch.stack([_one_score(self.functions[i](o)) for i, o in zip(images, output, strict=True)])


def _one_score(found: Any) -> Tensor:
    returned = "per_image: a function returned"
    if not isinstance(found, Tensor):
        raise TypeError(f"{returned} {checks.kind_of(found)}; expected a scalar tensor")
    if found.numel() != 1:
        raise ValueError(f"{returned} a tensor of shape {tuple(found.shape)}; expected a scalar tensor")
    return found.reshape(())
