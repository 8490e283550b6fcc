"""Activation functions changed as they run; DeepLIFT's rescale rule, their slopes from a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn import checks

_NAMES = (
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh",
    "tanhshrink", "threshold",
)  # fmt: skip
_IN_PLACE = {
    getattr(home, f"{name}_") for home in (torch, F, Tensor) for name in _NAMES if hasattr(home, f"{name}_")
}
_ACTIVATIONS = _IN_PLACE | {
    getattr(home, name) for home in (torch, F, Tensor) for name in _NAMES if hasattr(home, name)
}


class Activations(TorchFunctionMode):
    """While it is entered, by this thread alone, activation functions return something else."""

    # (function, x, what else it is given by position, by name) to what it returns; None leaves it as it is.
    changed: Callable[[Any, Tensor, tuple[Any, ...], dict[str, Any]], Tensor | None]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ACTIVATIONS:
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["input"]
        named = {name: value for name, value in kwargs.items() if name not in ("input", "inplace")}
        output = self.changed(func, given, args[1:], named)
        if output is None:
            return func(*args, **kwargs)
        in_place = func in _IN_PLACE or kwargs.get("inplace") or any(value is True for value in args[1:])
        return given.copy_(output) if in_place else output


class Rescale(Activations):
    """Activation functions have DeepLIFT's multipliers as slopes.

    Without a reference it keeps what goes into and comes out of each; with one, of a forward that ran the
    same functions in the same order, they are differentiated as Δout / Δin. Where Δin is too small to divide
    by, a function keeps its own slope. Nothing is changed before `begin` is called.

    Args:
        reference: what was kept, pairs of input and output; None keeps it, in the attribute of that name.
    """

    def __init__(self, reference: list[tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__()
        self.keeps, self.has_begun, self.count = reference is None, False, 0
        self.reference = [] if reference is None else reference

    def begin(self) -> None:
        """Let the functions that follow be changed."""
        self.has_begun = True

    def changed(self, func: Any, x: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        if not self.has_begun:
            return None
        x = x.clone()
        y = func(x.clone(), *others, **named)
        if not self.keeps:
            return self._rescaled(x, y)
        self.reference.append((x, y))
        return y

    def _rescaled(self, x: Tensor, y: Tensor) -> Tensor:
        if self.count >= len(self.reference) or self.reference[self.count][0].shape != x.shape:
            raise checks.StructureError(
                "the network runs other activation functions where its features are zero, so that there are "
                "no differences from a reference; use gradcam"
            )
        output: Any = _Rescaled.apply(x, y, *self.reference[self.count])
        self.count += 1
        return output


class _Rescaled(torch.autograd.Function):
    """y, whose gradient passes to x by the slope from the reference, and to y where there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, x0: Tensor, y0: Tensor) -> Tensor:  # noqa: ARG004
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, x0, y0 = ctx.saved_tensors
        difference = x - x0
        least = torch.finfo(x.dtype).eps ** 0.5 * torch.maximum(x.abs(), x0.abs())
        is_apart = difference.abs() > least
        slope = (y - y0) / torch.where(is_apart, difference, 1.0)
        return torch.where(is_apart, grads[0] * slope, 0.0), torch.where(is_apart, 0.0, grads[0]), None, None
