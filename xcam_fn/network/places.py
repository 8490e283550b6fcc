"""Where a layer's output lies on the image: channels first, channels last, or tokens in a row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network.calls import ModuleCall
from xcam_fn.network.copies import is_quantized
from xcam_fn.network.probe import Fold, Probe
from xcam_fn.torch_state import BatchNorm, Convolution

ToSpatial = Callable[[Tensor], Tensor]

_CHANNELS_FIRST = (Convolution, BatchNorm, nn.GroupNorm)
_TELLING = (nn.Linear, nn.LayerNorm, *_CHANNELS_FIRST)
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
    return "first" if isinstance(module, _CHANNELS_FIRST) or _convolves(module) else None


def pools(module: nn.Module) -> bool:
    """Whether its type's name says that the module pools; a PoolFormer's layers do more."""
    return "pool" in type(module).__name__.lower().replace("poolformer", "")


class UnplacedError(ValueError):
    """A layer's output was not found to lie on the image."""


def to_spatial_of(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool = False
) -> ToSpatial | None:
    """What places a call's output as (B, K, *spatial); None where it is so placed already, or no map.

    Where tokens lie is measured, and where maps lie in case of doubt.

    Raises:
        UnplacedError: they were not found to lie on the image.
    """
    call, shape, axes = calls[position], calls[position].shape, len(probe.size) + 2
    if (len(shape), axes) == (4, 5):
        return _to_spatial_of_frames(calls, position, probe, in_doubt=in_doubt)
    if shape[:1] != (1,):  # as windows of an image
        return None
    if len(shape) == axes:
        return _to_spatial_of_maps(calls, position, probe, in_doubt=in_doubt)
    if _is_narrow(shape, axes):
        if probe.maps(call, shape[2:axes], is_last=False) is None:
            raise _unplaced(call, probe)
        return functools.partial(torch.flatten, start_dim=axes - 1)
    if len(shape) != 3 or axes == 3:  # values without places
        return None
    place = probe.tokens(call)
    if place is None:
        raise _unplaced(call, probe)
    if probe.holds_levels(call, place):
        raise UnplacedError(
            f"layer {call.name!r} returns tokens of shape {shape} for one image: a grid of {place.grid}, and "
            "as many others as smaller maps of the network have places; explain the layers that make these "
            "maps, as with multi_layer(method, layers=[...]), or pass to_spatial=a function that takes "
            f"one of them and arranges it as {checks.maps_of(probe.x)}"
        )
    return functools.partial(place_tokens, **place._asdict())


def _to_spatial_of_maps(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool
) -> ToSpatial | None:
    call, shape = calls[position], calls[position].shape
    is_last, is_told = _layout(calls, position)
    place = None
    if in_doubt or not is_told:
        measured = is_last if is_told else probe.is_last(call)
        place = probe.maps(call, shape[1:-1] if measured else shape[2:], is_last=measured)
        is_last = is_last if place is None else measured
    if place is None and in_doubt:
        raise _unplaced(call, probe)
    if place is not None and place.turned:
        return functools.partial(_turned, is_last=is_last)
    return _channels_first if is_last else None  # too small to be measured, its shape has to do


def _to_spatial_of_frames(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool
) -> ToSpatial | None:
    """What arranges frames that run as images of their own, (B * T, K, H, W), as clips."""
    call = calls[position]
    fold = probe.folded(call)
    if fold is None:
        return None
    is_last, is_told = _layout(calls, position)
    if in_doubt or not is_told:
        is_last = is_last if is_told else probe.is_last(call)
        grid = call.shape[1:-1] if is_last else call.shape[2:]
        place = probe.maps(call, (fold.frames, *grid), is_last=is_last)
        if place is None or place.turned:
            raise _unplaced(call, probe)
    return functools.partial(_clips, fold=fold, is_last=is_last)


def _clips(values: Tensor, *, fold: Fold, is_last: bool) -> Tensor:
    rows, maps = "b t" if fold.by_clip else "t b", "h w k" if is_last else "k h w"
    return rearrange(values, f"({rows}) {maps} -> b k t h w", t=fold.frames)


def _unplaced(call: ModuleCall, probe: Probe) -> UnplacedError:
    what = f"tokens of shape {call.shape}" if len(call.shape) == 3 else f"shape {call.shape}"
    return UnplacedError(
        f"layer {call.name!r} returns {what} for one image, and its values do not move most where a patch "
        "of the image is changed; choose another layer or call (xcam_fn.layers(model, x) lists them), or "
        f"pass to_spatial=a function that arranges what it returns as {checks.maps_of(probe.x)}, such as "
        f"{checks.ARRANGED}{checks.frames_first(probe.x)}"
    )


def _is_narrow(shape: tuple[int, ...], axes: int) -> bool:
    """True for maps with axes that x has not, of one place each, as 2-D convolutions make of sounds."""
    return len(shape) > axes and set(shape[axes:]) == {1}


def path_inward(layer: nn.Module, name: str) -> set[str]:
    """The names of a layer and of the modules in it, one in the other, that are likely to run last.

    What their own modules return tells where the layer's output lies, see `is_settled`.
    """
    for key, child in reversed(list(layer.named_children())):
        if isinstance(child, _TELLING):
            break
        if child._modules:
            return {name, *path_inward(child, f"{name}.{key}" if name else key)}
    return {name}


def is_settled(
    calls: Sequence[ModuleCall], position: int, size: tuple[int, ...], path: Collection[str]
) -> bool:
    """Whether these calls tell where a call's output lies, so that no others have to be known.

    Args:
        calls: of the layer, and in it of the modules right within those of `path`.
        position: of the layer's call.
        size: of the images, pixels.
        path: as `path_inward` finds it.
    """
    axes, rank = len(size) + 2, len(calls[position].shape)
    axes = rank if (rank, axes) == (4, 5) else axes  # frames in the batch are maps too
    if rank != axes or own_layout(calls[position]) is not None:
        return True  # tokens are measured
    for before in reversed(calls[:position]):
        if len(before.shape) == axes and own_layout(before) is not None:
            return True
        if before.module._modules and before.name not in path:  # what it ran is not known
            return False
    return False


def placed_shape(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool = False
) -> tuple[int, ...]:
    """The shape of a call's output for one image, placed on the image where it lies on it, else ()."""
    shape = calls[position].shape
    try:
        place = to_spatial_of(calls, position, probe, in_doubt=in_doubt)
    except UnplacedError:
        return ()
    return shape if place is None else (1, *place(torch.empty(shape, device="meta")).shape[1:])


def place_tokens(tokens: Tensor, *, prefix: int, grid: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Tokens (B, prefix + patches + others, K) as maps (B, K, *grid), those that are no patches left out."""
    names = _AXES[len(grid)].split()
    patches = tokens[:, prefix : prefix + math.prod(grid)]
    row = " ".join(names[axis] for axis in order)
    return rearrange(patches, f"b ({row}) k -> b k {' '.join(names)}", **dict(zip(names, grid, strict=True)))


def _channels_first(values: Tensor) -> Tensor:
    return values.movedim(-1, 1)


def _turned(values: Tensor, *, is_last: bool) -> Tensor:
    values = _channels_first(values) if is_last else values
    return values.permute(0, 1, *reversed(range(2, values.ndim)))


def replaced(to_spatial: ToSpatial, raw: Tensor, spatial: Tensor) -> Tensor:
    """A layer's own output with what `to_spatial` takes from it put in anew, and the rest as it was.

    `to_spatial` selects and arranges, so that its transpose puts each value back in its place.
    """
    with_back: Any = torch.func.vjp(to_spatial, raw)
    _, back = with_back
    (taken,) = back(torch.ones_like(spatial))
    (placed,) = back(spatial)
    return raw * (1 - taken) + placed


def _layout(calls: Sequence[ModuleCall], position: int) -> tuple[bool, bool]:
    """Whether a call returns its channels last, and whether modules tell so, or only its shape.

    The nearest call before that tells is taken; a block that turns its axes around after it is seen by its
    shape.
    """
    call = calls[position]
    own = own_layout(call)
    if own is not None:
        return own == "last", True
    turns_first = False
    for near in reversed(calls[:position]):
        layout = own_layout(near)
        turns_first = turns_first or _turns_first(near)
        if layout is None or len(near.shape) != len(call.shape):
            continue
        channels = near.shape[1] if layout == "first" else near.shape[-1]
        is_first, is_last = call.shape[1] == channels, call.shape[-1] == channels
        if is_first == is_last:  # as where a block has more channels inside: the grid stays
            grid = near.shape[2:] if layout == "first" else near.shape[1:-1]
            is_first, is_last = call.shape[2:] == grid, call.shape[1:-1] == grid
        if is_first == is_last or near.shape == call.shape:
            return layout == "last", True
        return is_last, is_last == (layout == "last") or (is_first and turns_first)
    return False, True


def _turns_first(call: ModuleCall) -> bool:
    """Whether a module such as torchvision's Permute moves the last axis to where channels are first."""
    dims, last = getattr(call.module, "dims", None), len(call.shape) - 1
    return isinstance(dims, (list, tuple)) and list(dims) == [0, last, *range(1, last)]


def default_candidates(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> Iterator[int]:
    """The calls whose output class activation maps are usually taken at, the first that fits to be taken.

    In a network of tokens it is what the last attention reads (the norm before it): there every patch still
    has a say in the score. Elsewhere it is the last convolution's activation as the network goes on to use
    it: the last module run, before pooling or flattening, whose output has the last convolution's size.
    """
    maps = _activations(calls, size)
    last_map = maps[0] if maps else -1
    attentions = [i for i in _attentions(calls) if i > last_map]
    for i in reversed(attentions):
        yield calls[i].start - 1
    if attentions and len(size) == 3:  # frames and places may be attended to in turn, out of one row
        yield from [i for i in reversed(range(calls[attentions[-1]].start)) if _is_row(calls, i)]
    if not attentions:
        after = range(last_map + 1, len(calls))
        rows = [i for i in after if _is_row(calls, i) and calls[i].is_alone and not pools(calls[i].module)]
        yield from rows[:-2:-1]
    yield from maps


def has_tokens(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> bool:
    """Whether a network attends, or ends in tokens: what is a map then is not told by shapes."""
    return bool(_attentions(calls)) or (len(size) > 1 and any(_is_row(calls, i) for i in range(len(calls))))


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


def _activations(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> list[int]:
    """For each convolution, and each map that attention made, the last activation of its size; last first."""
    axes = len(size) + 2
    convolutions = [i for i, call in enumerate(calls) if _convolves(call.module) and call.name]
    shapes = {i: calls[i].shape for i in convolutions}
    ranks = {axes, 4} if axes == 5 else {axes}  # frames of clips may run as images
    spatial = [i for i, s in shapes.items() if (len(s) in ranks or _is_narrow(s, axes)) and max(s[2:]) > 1]
    made = [next((j for j in _around(calls, i) if _is_map(calls, j, size)), -1) for i in _attentions(calls)]
    found = {}
    for last in sorted({*(spatial or convolutions), *made} - {-1}, reverse=True):
        grid = calls[last].shape[2:]
        same = [i for i in range(last, len(calls)) if calls[i].name and _goes_on(calls[i], grid)]
        found |= dict.fromkeys(reversed(same))
    return list(found)


def _around(calls: Sequence[ModuleCall], position: int) -> Iterator[int]:
    """The calls that ran a call, the innermost first."""
    start = calls[position].start
    return (i for i in range(position + 1, len(calls)) if calls[i].start <= start)


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution, in floats or quantized."""
    return isinstance(module, Convolution) or (is_quantized(module) and hasattr(module, "kernel_size"))


def _goes_on(call: ModuleCall, grid: tuple[int, ...]) -> bool:
    """True for maps of that size, on which the score rests.

    It need not rest on maps that are returned beside something else: what is read further on may be that, a
    class token or maps already pooled.
    """
    return len(call.shape) > 2 and call.shape[2:] == grid and not pools(call.module) and call.is_alone


def _is_map(calls: Sequence[ModuleCall], position: int, size: tuple[int, ...]) -> bool:
    call, shape = calls[position], calls[position].shape
    is_spatial = len(shape) == len(size) + 2 and max(shape[2:]) > 1
    return is_spatial and bool(call.name) and call.is_alone and not _layout(calls, position)[0]


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
            for j in _around(calls, i)
            if _is_row(calls, j) and calls[j].shape[1] > 1 and not isinstance(calls[j].module, nn.Sequential)
            and sum(calls[j].start <= k < j for k in inside) == 1
        ]  # fmt: skip
        blocks = [j for j in around if "attention" not in calls[j].kind.lower()] or around
        if blocks:
            found.append(blocks[0] if len(inside) == 1 else blocks[-1])
    last = calls[found[-1]].shape if found else ()
    return [j for j in dict.fromkeys(found) if calls[j].shape == last]
