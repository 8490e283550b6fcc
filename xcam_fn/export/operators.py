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
_BACKWARD = (
    _aten.avg_pool2d_backward,
    _aten.elu_backward,
    _aten.gelu_backward,
    _aten.glu_backward,
    _aten.hardsigmoid_backward,
    _aten.hardswish_backward,
    _aten.hardtanh_backward,
    _aten.leaky_relu_backward,
    _aten.max_pool2d_with_indices_backward,
    _aten.mish_backward,
    _aten.native_batch_norm_backward,
    _aten.native_dropout_backward,
    _aten.native_group_norm_backward,
    _aten.native_layer_norm_backward,
    _aten.select_backward,
    _aten.sigmoid_backward,
    _aten.silu_backward,
    _aten.slice_backward,
    _aten.softplus_backward,
    _aten.tanh_backward,
    _aten.threshold_backward,
    _aten._softmax_backward_data,
    _aten._log_softmax_backward_data,
)


class PlainMean(TorchFunctionMode):
    """Global average pooling as the mean that it is: its own kernel also sets strides, which ONNX has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.adaptive_avg_pool2d and (args[1:] or tuple((kwargs or {}).values()))[0] in (
            1,
            (1, 1),
            [1, 1],
        ):
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


def table() -> dict[Any, Callable[..., Any]]:
    """What each operator is decomposed into."""
    table = decompositions(_BACKWARD)
    table[_aten._adaptive_avg_pool2d_backward.default] = _adaptive_average_backward
    table[_aten.convolution_backward.default] = _convolution_backward
    return table


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    __: list[int],
    groups: int,
    wanted: list[bool],
) -> Any:
    """The gradient to the input alone, which is a transposed convolution."""
    if transposed or wanted[1] or wanted[2]:
        return NotImplemented
    left_over = [
        int(x.shape[i + 2])
        - (
            (int(grad.shape[i + 2]) - 1) * stride[i]
            - 2 * padding[i]
            + dilation[i] * (weight.shape[i + 2] - 1)
            + 1
        )
        for i in range(len(stride))
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
