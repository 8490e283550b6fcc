"""Where a layer's output lies on the image: channels first, channels last, or tokens in a row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from xcam_fn.network.calls import ModuleCall
from xcam_fn.torch_state import BatchNorm, Convolution

ToSpatial = Callable[[Tensor], Tensor]

_CHANNELS_FIRST = (Convolution, BatchNorm, nn.GroupNorm)
# What models call the parameters that they put before (or after) the patches.
_PREFIX_TOKENS = (
    "cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "reg_token",
    "register_tokens",
)  # fmt: skip
_ATTENTION_KINDS = ("attention", "attn", "mhsa", "mla")
_ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")
_AXES = {1: "l", 2: "h w", 3: "d h w"}


def own_layout(call: ModuleCall) -> str | None:
    """Which axis of its output is the channels' as far as the module itself tells: "first" or "last"."""
    module, shape = call.module, call.shape
    if isinstance(module, nn.Linear):
        return "last"
    if isinstance(module, nn.LayerNorm):
        channels = module.normalized_shape
        first = len(channels) == 1 and len(shape) > 2 and shape[1] == channels[0] != shape[-1]
        return "first" if first or "2d" in type(module).__name__ else "last"
    return "first" if isinstance(module, _CHANNELS_FIRST) else None


def pools(module: nn.Module) -> bool:
    """Whether its type's name says that the module pools; a PoolFormer's layers do more."""
    return "pool" in type(module).__name__.lower().replace("poolformer", "")


def to_spatial_of(
    root: nn.Module, calls: Sequence[ModuleCall], position: int, size: tuple[int, ...]
) -> ToSpatial | None:
    """What places a call's output as (B, K, *spatial); None where it is so placed already, or cannot be.

    Args:
        root: the network.
        calls: all calls of a forward.
        position: which of them.
        size: the image's, pixels.
    """
    shape = calls[position].shape
    if len(shape) == len(size) + 2:
        return _channels_first if _layout(calls, position) == "last" else None
    if len(shape) != 3 or shape[0] != 1:
        return None
    for dropped in _prefix_tokens(root, calls[position].name):
        grid = _grid(calls[:position], shape[1] - dropped, size)
        if grid is not None:
            return functools.partial(place_tokens, prefix=dropped, grid=grid)
    return None


def is_settled(calls: Sequence[ModuleCall], position: int, size: tuple[int, ...]) -> bool:
    """Whether these calls tell where a call's output lies, so that no earlier ones have to be known."""
    axes = len(size) + 2
    before = (own_layout(call) for call in calls[:position] if len(call.shape) == axes)
    return len(calls[position].shape) == axes and (
        own_layout(calls[position]) is not None or any(layout is not None for layout in before)
    )


def placed_shape(
    root: nn.Module, calls: Sequence[ModuleCall], position: int, size: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a call's output for one image, placed on the image where it can be."""
    shape = calls[position].shape
    place = to_spatial_of(root, calls, position, size)
    return shape if place is None else tuple(place(torch.empty(shape, device="meta")).shape)


def place_tokens(tokens: Tensor, *, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """Tokens (B, prefix + patches, K) as maps (B, K, *grid), those before the patches left out."""
    axes = _AXES[len(grid)]
    sizes = dict(zip(axes.split(), grid, strict=True))
    return rearrange(tokens[:, prefix:], f"b ({axes}) k -> b k {axes}", **sizes)


def _channels_first(values: Tensor) -> Tensor:
    return values.movedim(-1, 1)


def replaced(to_spatial: ToSpatial, raw: Tensor, spatial: Tensor) -> Tensor:
    """A layer's own output with what `to_spatial` takes from it put in anew, and the rest as it was.

    `to_spatial` selects and arranges, so that its transpose puts each value back in its place.
    """
    with_back: Any = torch.func.vjp(to_spatial, raw)
    _, back = with_back
    (taken,) = back(torch.ones_like(spatial))
    (placed,) = back(spatial)
    return raw * (1 - taken) + placed


def _layout(calls: Sequence[ModuleCall], position: int) -> str:
    """Whether a call returns its channels first or last, from the nearest call before that tells.

    A block that turns its axes around after the last module that tells is seen by its shape.
    """
    call = calls[position]
    own = own_layout(call)
    if own is not None:
        return own
    for near in reversed(calls[:position]):
        layout = own_layout(near)
        if layout is None or len(near.shape) != len(call.shape):
            continue
        channels = near.shape[1] if layout == "first" else near.shape[-1]
        is_first, is_last = call.shape[1] == channels, call.shape[-1] == channels
        if is_first == is_last:  # as where a block has more channels inside: the grid stays
            grid = near.shape[2:] if layout == "first" else near.shape[1:-1]
            is_first, is_last = call.shape[2:] == grid, call.shape[1:-1] == grid
        if is_first == is_last or near.shape == call.shape:
            return layout
        return "first" if is_first else "last"
    return "first"


def _prefix_tokens(root: nn.Module, name: str) -> list[int]:
    """How many tokens may stand before the patches: as the model says it, or none.

    A network of several branches has a class token for each (`cls_token_0`, `cls_token_1`).
    """
    path = name.split(".")
    for depth in range(len(path), -1, -1):
        count = getattr(root.get_submodule(".".join(path[:depth])), "num_prefix_tokens", None)
        if isinstance(count, int):
            return list(dict.fromkeys((count, 0)))
    found = [
        1 if parameter.ndim < 2 else parameter.shape[-2]
        for name, parameter in root.named_parameters()
        if name.rpartition(".")[2].rstrip("_0123456789") in _PREFIX_TOKENS
    ]
    return list(dict.fromkeys((sum(found), *found, 0)))


def are_maps(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> list[bool]:
    """Whether each call returns maps or tokens of whole images, as far as its shape and place tell.

    Windows of an image do not. Nor do the heads of an attention, (1, heads, tokens, …): what is inside an
    attention has to have the grid of its output or of a convolution in it.
    """
    axes = len(size) + 2
    no_maps = {i for i, call in enumerate(calls) if call.shape[:1] != (1,) or "bias" in call.kind.lower()}
    for i in _named_attentions(calls):
        inside = [j for j in range(calls[i].start, i + 1) if len(calls[j].shape) == axes]
        known = {_grid_of(calls, j) for j in inside if j == i or own_layout(calls[j]) == "first"}
        no_maps |= {j for j in inside if _grid_of(calls, j) not in known}
    return [i not in no_maps for i in range(len(calls))]


def _grid_of(calls: Sequence[ModuleCall], position: int) -> tuple[int, ...]:
    """The spatial size of maps, wherever their channels are."""
    shape = calls[position].shape
    return shape[2:] if _layout(calls, position) == "first" else shape[1:-1]


def _grid(calls: Sequence[ModuleCall], patches: int, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of so many patches: one that the forward has been at, else the image's size in patches."""
    has_maps = are_maps(calls, size)
    for i in range(len(calls) - 1, -1, -1):
        if len(calls[i].shape) == len(size) + 2 and has_maps[i]:
            grid = _grid_of(calls, i)
            if math.prod(grid) == patches:
                return grid
    for stride in range(1, max(size) + 1):
        grid = tuple(math.ceil(length / stride) for length in size)
        if math.prod(grid) == patches:
            return grid
    return None


def default_position(
    calls: Sequence[ModuleCall], size: tuple[int, ...], grid_of: Callable[[int], tuple[int, ...] | None]
) -> int:
    """The call whose output class activation maps are usually taken at.

    In a network of tokens it is what the last attention reads (the norm before it): there every patch still
    has a say in the score. Elsewhere it is the last convolution's activation as the network goes on to use
    it: the last module run, before pooling or flattening, whose output has the last convolution's size.

    Args:
        calls: all calls of a forward of one image.
        size: the image's, pixels.
        grid_of: a call to the spatial size of its output; None where it has no place or but one.

    Raises:
        ValueError: there is neither.
    """
    last_map = _last_map(calls, size)
    attentions = [i for i in _attentions(calls) if last_map is None or i > last_map]
    for i in reversed(attentions):
        if grid_of(calls[i].start - 1) is not None:
            return calls[i].start - 1
    first = 0 if last_map is None else last_map + 1
    tokens = [i for i in range(first, len(calls)) if _is_row(calls, i) and calls[i].is_alone]
    if not attentions and tokens and grid_of(tokens[-1]) is not None:
        return tokens[-1]
    if last_map is None:
        raise ValueError("neither maps nor tokens")
    return last_map


def _attentions(calls: Sequence[ModuleCall]) -> list[int]:
    """The attentions over patches, the innermost where one is made of another."""
    named = _named_attentions(calls)
    return [i for i in named if len(calls[i].shape) > 2 and not any(calls[i].start <= j < i for j in named)]


def _named_attentions(calls: Sequence[ModuleCall]) -> list[int]:
    """The calls of modules that are an attention by their type, or by their name where they return tokens."""

    def is_named(call: ModuleCall) -> bool:
        kind, name = call.kind.lower(), call.name.rpartition(".")[2]
        by_name = name in _ATTENTION_NAMES and len(call.shape) == 3
        by_kind = any(word in kind for word in _ATTENTION_KINDS) and "projection" not in kind
        return by_name or by_kind

    return [i for i, call in enumerate(calls) if call.start > 0 and is_named(call)]


def _last_map(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> int | None:
    """The last activation of the size of the last convolution, or of the last maps that attention made."""
    convolutions = [i for i, call in enumerate(calls) if isinstance(call.module, Convolution) and call.name]
    spatial = [i for i in convolutions if max(calls[i].shape[2:]) > 1] or convolutions
    around = [
        next(
            (
                j
                for j in range(i + 1, len(calls))
                if calls[j].start <= calls[i].start and _is_map(calls, j, size)
            ),
            -1,
        )
        for i in _attentions(calls)
    ]
    last = max([*spatial[-1:], *around], default=-1)
    if last < 0:
        return None
    grid = calls[last].shape[2:]
    return [i for i in range(last, len(calls)) if calls[i].name and _goes_on(calls[i], grid)][-1]


def _goes_on(call: ModuleCall, grid: tuple[int, ...]) -> bool:
    """True for maps of that size, on which the score rests.

    It need not rest on maps that are returned beside something else: what is read further on may be that, a
    class token or maps already pooled.
    """
    return len(call.shape) > 2 and call.shape[2:] == grid and not pools(call.module) and call.is_alone


def _is_map(calls: Sequence[ModuleCall], position: int, size: tuple[int, ...]) -> bool:
    call = calls[position]
    shape = call.shape
    return (
        bool(call.name)
        and len(shape) == len(size) + 2
        and max(shape[2:]) > 1
        and call.is_alone
        and _layout(calls, position) == "first"
    )


def _is_row(calls: Sequence[ModuleCall], position: int) -> bool:
    """True for tokens in a row, as networks without attention may have them too."""
    call = calls[position]
    return bool(call.name) and len(call.shape) == 3 and call.shape[0] == 1


def attention_positions(calls: Sequence[ModuleCall]) -> list[int]:
    """The calls that are blocks of tokens, (1, T, K), around one attention each, in order.

    A block is the outermost module around one attention alone; where there is but one attention, the
    innermost that is more than that attention.
    """
    inside = _attentions(calls)
    found = []
    for i in inside:
        around = [
            j
            for j in range(i + 1, len(calls))
            if calls[j].start <= calls[i].start and calls[j].name and _is_row(calls, j)
            and not isinstance(calls[j].module, nn.Sequential) and calls[j].shape[1] > 1
            and sum(calls[j].start <= k < j for k in inside) == 1
        ]  # fmt: skip
        blocks = [j for j in around if "attention" not in calls[j].kind.lower()] or around
        if blocks:
            found.append(blocks[0] if len(inside) == 1 else blocks[-1])
    last = calls[found[-1]].shape if found else ()
    return [j for j in dict.fromkeys(found) if calls[j].shape == last]
