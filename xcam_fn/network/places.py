"""The layout of a layer's output on the image: channels first, channels last, or a row of tokens."""

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
    """The channel axis of its output as far as the module itself determines it: "first" or "last"."""
    module, shape = call.module, call.shape
    if isinstance(module, nn.Linear):
        return "last"
    if isinstance(module, nn.LayerNorm):
        channels = module.normalized_shape
        first = len(channels) == 1 and len(shape) > 2 and shape[1] == channels[0] != shape[-1]
        return "first" if first or "2d" in type(module).__name__ else "last"
    return "first" if isinstance(module, _CHANNELS_FIRST) or _convolves(module) else None


def pools(module: nn.Module) -> bool:
    """Whether the module pools, by the name of its type; a PoolFormer's layers do more."""
    return "pool" in type(module).__name__.lower().replace("poolformer", "")


class UnplacedError(ValueError):
    """A layer's output was not found to lie on the image."""


def to_spatial_of(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool = False
) -> ToSpatial | None:
    """The function that arranges a call's output as (B, K, *spatial); None if it is already, or is no map.

    The positions of tokens are measured, and in case of doubt the layout of maps too.

    Raises:
        UnplacedError: no positions on the image were found.
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
    return _channels_first if is_last else None  # too small to measure: decided by its shape


def _to_spatial_of_frames(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool
) -> ToSpatial | None:
    """The function that arranges frames run as separate images, (B * T, K, H, W), as clips."""
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
        f"layer {call.name!r} returns {what} for one image, but changing a patch of the image does not "
        "change its values most at that place; choose another layer or call (xcam_fn.layers(model, x) lists "
        f"them), or pass to_spatial=a function that rearranges the output to {checks.maps_of(probe.x)}, such "
        f"as {checks.ARRANGED}{checks.frames_first(probe.x)}"
    )


def _is_narrow(shape: tuple[int, ...], axes: int) -> bool:
    """True for maps with extra axes of length 1 that x lacks, as from 2-D convolutions of audio."""
    return len(shape) > axes and set(shape[axes:]) == {1}


def telling_path(root: nn.Module, layer: nn.Module, name: str) -> set[str]:
    """The names of modules whose children's outputs determine where a layer's output lies, see `is_settled`.

    These are the layer and the nested modules in it that are likely to run last. An activation has no
    children: its path is the modules around it, and the lists of modules in those.
    """
    if layer._modules or isinstance(layer, _TELLING):
        return _path_inward(layer, name)
    found = {name}
    while name:
        name = name.rpartition(".")[0]
        found |= {name, *_lists_in(root.get_submodule(name), name)}
    return found


def _path_inward(layer: nn.Module, name: str) -> set[str]:
    for key, child in reversed(list(layer.named_children())):
        if isinstance(child, _TELLING):
            break
        if child._modules:
            return {name, *_path_inward(child, _joined(name, key))}
    return {name}


def _lists_in(module: nn.Module, name: str) -> Iterator[str]:
    """The names of the lists and dictionaries of modules in a module, which have no forward."""
    for key, child in module.named_children():
        if _is_list(child):
            yield _joined(name, key)
            yield from _lists_in(child, _joined(name, key))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def is_settled(
    root: nn.Module,
    calls: Sequence[ModuleCall],
    position: int,
    size: tuple[int, ...],
    path: Collection[str],
) -> bool:
    """Whether these calls determine where a call's output lies, without any other calls.

    Args:
        root: the network.
        calls: the calls of the layer, and of the children of the modules in `path`.
        position: the index of the layer's call.
        size: the images' size in pixels.
        path: from `telling_path`.
    """
    axes, rank = len(size) + 2, len(calls[position].shape)
    axes = rank if (rank, axes) == (4, 5) else axes  # frames in the batch are maps too
    if rank != axes or own_layout(calls[position]) is not None:
        return True  # tokens are measured
    for before in reversed(calls[:position]):
        if len(before.shape) == axes and own_layout(before) is not None:
            return _all_run(root, calls, path)
        if before.module._modules and before.name not in path:  # its inner calls are unknown
            return False
    return False


def _all_run(root: nn.Module, calls: Sequence[ModuleCall], path: Collection[str]) -> bool:
    """Whether each child that has children ran as a whole; if not, these may have run unseen."""
    called = {call.name for call in calls}
    inside = {
        _joined(name, key)
        for name in path
        for key, child in root.get_submodule(name).named_children()
        if child._modules
    }
    return inside <= called.union(path)


def placed_shape(
    calls: Sequence[ModuleCall], position: int, probe: Probe, *, in_doubt: bool = False
) -> tuple[int, ...]:
    """The shape of a call's output for one image, arranged on the image, or () if it is not on the image."""
    shape = calls[position].shape
    try:
        place = to_spatial_of(calls, position, probe, in_doubt=in_doubt)
    except UnplacedError:
        return ()
    return shape if place is None else (1, *place(torch.empty(shape, device="meta")).shape[1:])


def place_tokens(tokens: Tensor, *, prefix: int, grid: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Arrange tokens (B, prefix + patches + others, K) as maps (B, K, *grid) of the patches only."""
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
    """A layer's own output with the values that `to_spatial` takes from it replaced, and the rest unchanged.

    `to_spatial` selects and rearranges values, so its transpose puts each value back in its place.
    """
    with_back: Any = torch.func.vjp(to_spatial, raw)
    _, back = with_back
    (taken,) = back(torch.ones_like(spatial))
    (placed,) = back(spatial)
    return raw * (1 - taken) + placed


def _layout(calls: Sequence[ModuleCall], position: int) -> tuple[bool, bool]:
    """Whether a call returns its channels last, and whether modules say so or only its shape.

    The nearest earlier call that determines it is used; a later permutation of the axes shows in the shape.
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
        if is_first == is_last:  # a block may have more channels inside: the grid stays
            grid = near.shape[2:] if layout == "first" else near.shape[1:-1]
            is_first, is_last = call.shape[2:] == grid, call.shape[1:-1] == grid
        if is_first == is_last or near.shape == call.shape:
            return layout == "last", True
        return is_last, is_last == (layout == "last") or (is_first and turns_first)
    return False, True


def _turns_first(call: ModuleCall) -> bool:
    """Whether a module, such as torchvision's Permute, moves the last axis to the channels-first position."""
    dims, last = getattr(call.module, "dims", None), len(call.shape) - 1
    return isinstance(dims, (list, tuple)) and list(dims) == [0, last, *range(1, last)]


def default_candidates(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> Iterator[int]:
    """The candidates for the default layer, best first.

    In a network of tokens, it is the input of the last attention (the output of the norm before it): there
    every patch still affects the score. Elsewhere it is the last convolution's activation as the network uses
    it: the last module run, before pooling or flattening, whose output has the last convolution's size.
    """
    attentions = _attentions(calls)
    maps = _activations(calls, size, attentions)
    last_map = next(maps, -1)
    attentions = [i for i in attentions if i > last_map]
    for i in reversed(attentions):
        yield calls[i].start - 1
    if attentions and len(size) == 3:  # attention may alternate between frames and positions of one row
        yield from [i for i in reversed(range(calls[attentions[-1]].start)) if _is_row(calls, i)]
    if not attentions:
        after = range(last_map + 1, len(calls))
        rows = [i for i in after if _is_row(calls, i) and calls[i].is_alone and not pools(calls[i].module)]
        yield from rows[:-2:-1]
    if last_map >= 0:
        yield last_map
    yield from maps


def has_tokens(calls: Sequence[ModuleCall], size: tuple[int, ...]) -> bool:
    """Whether a network has attention, or ends in tokens: shapes then do not determine what is a map."""
    return bool(_attentions(calls)) or (len(size) > 1 and any(_is_row(calls, i) for i in range(len(calls))))


def _attentions(calls: Sequence[ModuleCall]) -> list[int]:
    """The attentions over patches; of nested ones, the innermost."""
    named = _named_attentions(calls)
    return [i for i in named if len(calls[i].shape) > 2 and not any(calls[i].start <= j < i for j in named)]


def _named_attentions(calls: Sequence[ModuleCall]) -> list[int]:
    """The calls of modules that are an attention by type, or by name if they return tokens."""
    kinds = {kind: kind.__name__.lower() for kind in {type(call.module) for call in calls}}
    attend = {
        kind
        for kind, name in kinds.items()
        if any(word in name for word in _ATTENTION_KINDS) and "projection" not in name
    }

    def is_named(call: ModuleCall) -> bool:
        return len(call.shape) == 3 and call.name.rpartition(".")[2] in _ATTENTION_NAMES

    return [
        i
        for i, call in enumerate(calls)
        if call.start > 0 and (type(call.module) in attend or is_named(call))
    ]


def _activations(
    calls: Sequence[ModuleCall], size: tuple[int, ...], attentions: Sequence[int]
) -> Iterator[int]:
    """For each convolution, and each map made by attention, the last activation of its size; last first."""
    axes = len(size) + 2
    convolutions = [i for i, call in enumerate(calls) if _convolves(call.module) and call.name]
    shapes = {i: calls[i].shape for i in convolutions}
    ranks = {axes, 4} if axes == 5 else {axes}  # frames of clips may run as images
    spatial = [i for i, s in shapes.items() if (len(s) in ranks or _is_narrow(s, axes)) and max(s[2:]) > 1]
    made = [next((j for j in _around(calls, i) if _is_map(calls, j, size)), -1) for i in attentions]
    found: set[int] = set()
    for last in sorted({*(spatial or convolutions), *made} - {-1}, reverse=True):
        grid = calls[last].shape[2:]
        for i in reversed(range(last, len(calls))):
            if i not in found and calls[i].name and _goes_on(calls[i], grid):
                found.add(i)
                yield i


def _around(calls: Sequence[ModuleCall], position: int) -> Iterator[int]:
    """The calls around a call, the innermost first."""
    start = calls[position].start
    return (i for i in range(position + 1, len(calls)) if calls[i].start <= start)


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution, quantized ones included."""
    return isinstance(module, Convolution) or (is_quantized(module) and hasattr(module, "kernel_size"))


def _goes_on(call: ModuleCall, grid: tuple[int, ...]) -> bool:
    """True for maps of that size on which the score depends.

    The score need not depend on maps that are returned together with something else, such as a class token or
    pooled maps: the network may go on to use only the latter.
    """
    return len(call.shape) > 2 and call.shape[2:] == grid and not pools(call.module) and call.is_alone


def _is_map(calls: Sequence[ModuleCall], position: int, size: tuple[int, ...]) -> bool:
    call, shape = calls[position], calls[position].shape
    is_spatial = len(shape) == len(size) + 2 and max(shape[2:]) > 1
    return is_spatial and bool(call.name) and call.is_alone and not _layout(calls, position)[0]


def _is_row(calls: Sequence[ModuleCall], position: int) -> bool:
    """True for a row of tokens, which networks without attention may have too."""
    call = calls[position]
    return bool(call.name) and len(call.shape) == 3 and call.shape[0] == 1


def attention_positions(calls: Sequence[ModuleCall]) -> list[int]:
    """The calls that are blocks of tokens, (1, T, K), around one attention each, in order.

    A block is the outermost module around a single attention; if the network has only one attention, the
    innermost module around it.
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
