"""Attention in plain operations: it can be differentiated twice, and its probabilities can be reached."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Change = Callable[[Tensor], Tensor]

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class StepByStep(TorchFunctionMode):
    """While it is entered, by this thread alone, attention is computed in plain operations.

    The fused kernels have no second derivative and hide the probabilities.

    Args:
        change: applied to the probabilities (B, heads, queries, keys) of every attention; None leaves them.
    """

    def __init__(self, change: Change | None = None) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.change, *args, **kwargs)
        output = func(*args, **kwargs)
        if self.change is not None and func in _SOFTMAX and _is_attention(output):
            return self.change(output)
        return output


def _is_attention(probabilities: Tensor) -> bool:
    """True for what a softmax outside the fused kernel makes: (B, heads, queries, keys), as many of both."""
    return probabilities.ndim == 4 and probabilities.shape[-1] == probabilities.shape[-2]


def _attention(
    change: Change | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V; dropout is that of training, which no model explained here is in."""
    if enable_gqa:
        key, value = (
            part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3) for part in (key, value)
        )
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        kept = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~kept, -torch.inf)
    if attn_mask is not None:
        is_kept = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if is_kept else logits + attn_mask
    probabilities = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    return (probabilities if change is None else change(probabilities)) @ value


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Attention in operations that can be differentiated again, where what is computed is being recorded."""
    with StepByStep() if torch.is_grad_enabled() else contextlib.nullcontext():
        yield
