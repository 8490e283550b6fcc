"""Operators of backward passes that ONNX lacks, each as operators that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn.torch_state import decompositions

_aten = torch.ops.aten


class PlainMean(TorchFunctionMode):
    """Global average pooling as the mean that it is: its own kernel also sets strides, which ONNX has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sizes = (1, (1, 1), [1, 1])
        if func is F.adaptive_avg_pool2d and [*args[1:], *(kwargs or {}).values()][0] in sizes:
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


def table() -> dict[Any, Callable[..., Any]]:
    """What each operator is decomposed into: torch's own for every backward pass that it has one for."""
    return {
        **decompositions([getattr(_aten, name) for name in dir(_aten) if "_backward" in name]),
        _aten._adaptive_avg_pool2d_backward.default: _adaptive_average_backward,
        _aten.convolution_backward.default: _convolution_backward,
    }


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, _: Any, *options: Any) -> Any:
    """The gradient to the input alone, which is a transposed convolution."""
    stride, padding, dilation, transposed, _, groups, wanted = options
    if transposed or wanted[1] or wanted[2]:
        return NotImplemented
    sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    left_over = [
        int(size) - ((int(out) - 1) * s - 2 * p + d * (kernel - 1) + 1)
        for size, out, kernel, s, p, d in sizes
    ]
    back = _aten.convolution.default(grad, weight, None, stride, padding, dilation, True, left_over, groups)
    return back, None, None


def _adaptive_average_backward(grad: Tensor, pooled: Tensor) -> Tensor:
    """Each output position's gradient, spread evenly over the positions that it is the mean of."""
    for axis in (-2, -1):
        positions, size = int(grad.shape[axis]), int(pooled.shape[axis])
        ends = [(i * size // positions, -(-(i + 1) * size // positions)) for i in range(positions)]
        rows = [[(start <= i < end) / (end - start) for i in range(size)] for start, end in ends]
        spread = torch.tensor(rows, dtype=grad.dtype, device=grad.device)
        grad = (grad.transpose(axis, -1) @ spread).transpose(axis, -1)
    return grad
