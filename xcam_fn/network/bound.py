"""Networks that take or return more than one tensor, as functions of the image alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Bound(nn.Module):
    """A model as a function of one tensor; `bind` makes it.

    Attributes:
        model: the network itself.
        fn: maps the model and x to an output.
    """

    def __init__(self, model: nn.Module, fn: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model = model
        self.fn = fn
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        output = self.fn(self.model, x)
        if isinstance(output, Tensor) and output.ndim > 0 and len(output) != len(x):
            raise ValueError(
                f"bind: fn returned shape {tuple(output.shape)} for {len(x)} image(s); expected one row "
                "each; expand other inputs to the batch of x, such as age.expand(len(x), 1)"
            )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """A copy with its own model and the same fn, which may read values that change."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = value if name == "fn" else copy.deepcopy(value, memo)
        return copied


def bind(model: nn.Module, fn: Callable[[Any, Tensor], Any]) -> nn.Module:
    """Return the model as a network of the image alone, whose forward is `fn(model, x)`.

        xf.bind(net, lambda net, x: net(x, age.expand(len(x), 1)))             # two tensors
        xf.bind(net, lambda net, x: net(pixel_values=x, interpolate=True))     # keywords
        xf.bind(net, lambda net, x: net({"image": x, "age": age})["risk"])     # dicts

    It is explained like any other network, and its layers keep the names that they have in the model.

    Args:
        model: the network, in evaluation mode; it is neither copied nor modified.
        fn: a function of the model and of x, (P, C, *size), to an output. It must call the model that it is
            passed, and work for any number P of images, since perturbation methods run many copies of one
            image at a time. Other inputs are the same for all of them: `age.expand(len(x), 1)`. If each image
            has its own, explain one image at a time.

    Returns:
        A module whose only child is the model. It always runs as a whole and is never traced, so fn may use
        any part of the model; methods that otherwise run only the layers after the target layer run all of
        it, and it cannot be compiled.

    Raises:
        TypeError: model is not a module, or fn is not callable.
        ValueError: when it runs: fn returns a tensor whose number of rows differs from that of images.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(fn):
        raise TypeError(
            "fn must be a function of the model and x, such as lambda net, x: net(x, other), got "
            f"{type(fn).__name__}"
        )
    return Bound(model, fn)
