"""Networks that take or return more than one tensor: how an image goes in and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Bound(nn.Module):
    """A model as a function of one tensor; `bind` makes it.

    Attributes:
        model: the network itself.
        fn: the model and x to an output.
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
                f"bind: fn returned shape {tuple(output.shape)} for {len(x)} image(s), not a row for each. "
                "What goes in besides x has to serve any number of images, as age.expand(len(x), 1) does"
            )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """A copy with a model of its own and the same fn, which may read what changes."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = value if name == "fn" else copy.deepcopy(value, memo)
        return copied


def bind(model: nn.Module, fn: Callable[[Any, Tensor], Any]) -> nn.Module:
    """The model as a function of the image alone: `fn(model, x)` says how x goes in and what comes out.

        xf.bind(net, lambda net, x: net(x, age.expand(len(x), 1)))             # two tensors
        xf.bind(net, lambda net, x: net(pixel_values=x, interpolate=True))     # keywords
        xf.bind(net, lambda net, x: net({"image": x, "age": age})["risk"])     # dicts

    It is explained like any other network, and its layers go by the names that they have in the model.

    Args:
        model: the network, in evaluation mode; it is not copied and not touched.
        fn: a function of the model and of x, (P, C, *size), to an output. It has to call the model that it
            is handed, and to work for any number P of images: methods that perturb run many copies of one
            image at a time. What goes in besides x is the same for all of them: `age.expand(len(x), 1)`.
            Where each image has its own, explain one at a time.

    Returns:
        A module whose only child is the model. It is run as a whole and never traced, so that fn may read
        what it likes: where methods run the part behind the layer only, they run all of it here, and it
        cannot be compiled.

    Raises:
        TypeError: model is no module, or fn cannot be called.
        ValueError: when it runs: fn returns a tensor with another number of rows than there are images.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(fn):
        raise TypeError(
            "fn must be a function of the model and x, such as lambda net, x: net(x, other), got "
            f"{type(fn).__name__}"
        )
    return Bound(model, fn)
