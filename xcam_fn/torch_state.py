"""Every private name of torch that the library uses, each with the public one that will replace it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torch._C import (
        _len_torch_dispatch_stack,
    )  # torch.overrides has no public count of dispatch modes yet
    from torch._C._functorch import peek_interpreter_stack  # a fresh thread has none: threading.Thread
    from torch._decomp import (
        get_decompositions,  # torch.export.default_decompositions, once it has backward passes
    )
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # likewise
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # nn.BatchNorm1d to 3d and SyncBatchNorm
    from torch.nn.modules.conv import _ConvNd as Convolution  # nn.Conv1d to 3d and their transposed kinds
    from torch.utils import _pytree as pytree  # torch.utils.pytree, once the lowest torch that we take has it
    from torch.utils._python_dispatch import _disable_current_modes  # a fresh thread again
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} lacks a private name that xcam_fn uses ({error}); xcam_fn is tested with "
        "torch 2.12 to 2.15: install one of these, or a newer xcam-fn"
    ) from error

__all__ = [
    "BatchNorm", "Convolution", "decompositions", "in_strides", "in_transform", "is_batch_norm",
    "is_readable", "is_traced", "is_wrapped", "mark_constant", "outside_transforms", "pytree",
]  # fmt: skip


def in_transform() -> bool:
    """True inside a torch.func transform, where x.requires_grad says nothing about what is differentiated."""
    return peek_interpreter_stack() is not None


def is_wrapped(tensor: Tensor) -> bool:
    """True for a tensor that a torch.func transform has wrapped, whose values cannot be read."""
    return torch.func.debug_unwrap(tensor) is not tensor


def is_traced() -> bool:
    """True where operations are recorded by a trace or a compilation."""
    return torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0


def is_readable(x: Tensor) -> bool:
    """True where the values of x can be read: not under a transform, a trace or a compilation."""
    return not is_traced() and not is_wrapped(x)


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute plainly, whatever transform or tracing mode is at work around the call."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def is_batch_norm(node: Any) -> bool:
    """True for a node of autograd's graph that is torch's own batch norm."""
    return node.name().startswith("NativeBatchNormBackward")


def in_strides(node: Any) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    """A hook that orders the gradient of a batch norm's node like the node's saved input.

    The hook does not hold the node: nothing would ever free a graph with such a cycle.
    """
    stride = node._saved_input.stride()
    order = sorted(range(len(stride)), key=stride.__getitem__, reverse=True)
    back = sorted(range(len(stride)), key=order.__getitem__)

    def hook(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        given = grads[0]
        if given is None or given.shape[0] != 1 or given.stride() == stride:
            return None
        return (given.permute(order).contiguous().permute(back), *grads[1:])

    return hook


def mark_constant(function: object) -> None:
    """Let torch.compile run the function while it compiles and keep what it returns as a constant.

    `torch.compiler.assume_constant_result` does the same, but imports torch._dynamo, which takes seconds.
    """
    function.__dict__["_dynamo_marked_constant"] = True


def decompositions(operators: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """What torch decomposes operators into."""
    return dict(get_decompositions(operators))
