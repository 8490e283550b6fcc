"""Networks that take or return more than one tensor: how an image goes in and what comes out."""

from __future__ import annotations

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
        return self.fn(self.model, x)


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
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if not callable(fn):
        raise TypeError(
            f"fn is a {type(fn).__name__}; expected a function of the model and x, such as "
            "lambda net, x: net(x, other)"
        )
    return Bound(model, fn)
