"""Operations that run otherwise while a mode is entered: attention in plain steps, activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn import checks

Change = Callable[[Tensor, Tensor], Tensor]

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)  # of attention outside the fused kernels
_AXES = 4  # of its probabilities: (B, heads, queries, keys)


class StepByStep(TorchFunctionMode):
    """While it is entered, by this thread alone, attention is computed in plain operations.

    The fused kernels have no second derivative and hide the probabilities.

    Args:
        change: of every attention its probabilities (B, heads, queries, keys), and the logits that they are
            the softmax of, to what takes the probabilities' place; None leaves them.
    """

    def __init__(self, change: Change | None = None) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.change, *args, **kwargs)[0]
        if func is F.multi_head_attention_forward:  # by itself it would call the former where no mode sees it
            return _multi_head(self.change, *args, **kwargs)
        output = func(*args, **kwargs)
        if self.change is not None and func in _SOFTMAX and output.ndim == _AXES:
            return self.change(output, args[0] if args else kwargs["input"])
        return output


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
) -> tuple[Tensor, Tensor]:
    """P V and P = softmax(Q Kᵀ · scale + mask); dropout is that of training, which no model here is in."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        kept = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~kept, -torch.inf)
    if attn_mask is not None:
        is_kept = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if is_kept else logits + attn_mask
    probabilities = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    if change is not None:
        probabilities = change(probabilities, logits)
    return probabilities @ value, probabilities


_MULTI_HEAD = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
    "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
)  # fmt: skip


def _multi_head(change: Change | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What `F.multi_head_attention_forward` returns; unusual settings are left to it."""
    given = dict(zip(_MULTI_HEAD, args, strict=False)) | kwargs
    unusual = [given.get(name) is not None for name in ("bias_k", "static_k", "static_v")]
    if given["in_proj_weight"] is None or any(unusual) or given["add_zero_attn"] or given["query"].ndim != 3:
        return F.multi_head_attention_forward(*args, **kwargs)
    bias, heads = given["in_proj_bias"], given["num_heads"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        rearrange(F.linear(given[name], weight, bias), "t b (h d) -> b h t d", h=heads)
        for name, weight, bias in zip(_MULTI_HEAD[:3], given["in_proj_weight"].chunk(3), biases, strict=True)
    )
    attended, probabilities = _attention(change, q, k, v, _mask(**given))
    tokens = rearrange(attended, "b h t d -> t b (h d)")
    output = F.linear(tokens, given["out_proj_weight"], given["out_proj_bias"])
    if not given.get("need_weights", True):
        return output, None
    return output, probabilities.mean(1) if given.get("average_attn_weights", True) else probabilities


def _mask(
    num_heads: int, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """What is added to the logits; a mask of booleans says what not to attend to."""
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = rearrange(attn_mask, "(b h) t s -> b h t s", h=num_heads)
    padding = None if key_padding_mask is None else rearrange(key_padding_mask, "b s -> b 1 1 s")
    added = [_added(mask) for mask in (attn_mask, padding) if mask is not None]
    return sum(added[1:], added[0]) if added else None


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)


# -- axes exchanged or reversed ------------------------------------------------------------------------------

_MATRIX: Any = Tensor.mT
_MOVING = {F.grid_sample, torch.roll, Tensor.roll}
_NAMES_OF_ORDERS = [
    "transpose",
    "permute",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
    "flip",
    "fliplr",
    "flipud",
    "rot90",
]
_ARRANGING = {getattr(home, name) for home in (torch, Tensor) for name in _NAMES_OF_ORDERS}
_ARRANGING |= _MOVING | {_MATRIX.__get__}


class Turns(TorchFunctionMode):
    """Notes whether maps as large as the image are mirrored, turned or warped while it is entered.

    Args:
        size: of the images.
        noted: called the first time.
    """

    def __init__(self, size: tuple[int, ...], noted: Callable[[], None]) -> None:
        super().__init__()
        self.size, self.noted, self.is_over = size, noted, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ARRANGING and not self.is_over and args and _spans(args[0], self.size):
            self.is_over = func in _MOVING or _rearranges(func, args[1:], kwargs, len(self.size))
            if self.is_over:
                self.noted()
        return func(*args, **kwargs)


def _spans(values: Any, size: tuple[int, ...]) -> bool:
    is_map = isinstance(values, Tensor) and values.ndim == len(size) + 2
    return is_map and size in (tuple(values.shape[2:]), tuple(values.shape[1:-1]))


def _rearranges(func: Any, others: tuple[Any, ...], named: dict[str, Any], axes: int) -> bool:
    """Whether a function changes more of maps than the order and the axis of their channels."""
    index = torch.arange(math.prod((2, 3, 5, 7)[: axes + 1])).reshape(1, *(2, 3, 5, 7)[: axes + 1])
    maps = {tuple(one.flatten().tolist()) for one in index[0]}
    found = func(index, *others, **named)
    return all(
        placed.shape != index.shape or {tuple(one.flatten().tolist()) for one in placed[0]} != maps
        for placed in (found, found.movedim(-1, 1))
    )


# -- activation functions -----------------------------------------------------------------------------------

_NAMES = (
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh",
    "tanhshrink", "threshold",
)  # fmt: skip


def _functions(ending: str) -> set[Any]:
    names = [name + ending for name in _NAMES]
    return {getattr(home, name) for home in (torch, F, Tensor) for name in names if hasattr(home, name)}


_IN_PLACE = _functions("_")
_ACTIVATIONS = _IN_PLACE | _functions("")


class Activations(TorchFunctionMode):
    """While it is entered, by this thread alone, activation functions return something else."""

    # (function, x, what else it is given by position, by name) to what it returns; None leaves it as it is.
    changed: Callable[[Any, Tensor, tuple[Any, ...], dict[str, Any]], Tensor | None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
