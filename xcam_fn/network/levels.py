"""Finds the layers through which a score depends on the image, in the graph of its gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from xcam_fn import checks
from xcam_fn.network.calls import Calls, Key, ModuleCall, features_of, run_changed
from xcam_fn.network.copies import unwrap
from xcam_fn.network.places import UnplacedError, own_layout, to_spatial_of
from xcam_fn.network.probe import Probe
from xcam_fn.network.target_layer import is_in_doubt, is_measured, is_turned
from xcam_fn.network.vjp import by_autograd, differentiated
from xcam_fn.torch_state import Convolution

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its outputs
_REGIONS = re.compile("roi_?(align|pool)", re.IGNORECASE)  # in the name of a node that cuts boxes out of maps


class _Maps(NamedTuple):
    """A call whose output lies on the image, or could not be located on it, and its node in the graph."""

    call: ModuleCall
    size: tuple[int, ...]
    edge: Edge
    is_placed: bool


def score_levels(model: nn.Module, x: Tensor, score: Callable[[Any], Tensor]) -> list[str]:
    """The layers through which a score depends on the image: the last of each resolution, shallow to deep.

    Every path of the score's gradient to the image passes through one of them. A layer is left out if a path
    leads around it to an earlier layer of the same resolution, as in parallel heads for the class and the
    box.

    Args:
        model: the network; it is only read.
        x: (B, C, *size).
        score: maps the output to scores, (B,) or (B, n).

    Raises:
        ValueError: there is no such layer, or the scores depend on different ones.
    """
    if torch.compiler.is_dynamo_compiling() or not by_autograd(x):
        raise ValueError(
            "layer=None: the layers of a detection are found in autograd's graph, which does not exist in "
            "torch.func and torch.compile; name the layer (xcam_fn.layers(model, x) lists them)"
        )
    root, calls, edges = unwrap(model), Calls(), {}
    leaf, probe = x.detach().requires_grad_(), Probe(root, x)

    def see(call: ModuleCall, output: Any) -> None:
        values = features_of(output)
        if values is not None and values.grad_fn is not None:
            edges[call.key] = get_gradient_edge(values)

    with torch.enable_grad():
        scores = score(run_changed(root, leaf, None, calls, see=see, detached=True))
        columns = scores.sum(0).unbind() if scores.ndim == 2 else [scores.sum()]
    if scores.grad_fn is None:
        raise checks.lost_gradient("x")
    found, start = set(), get_gradient_edge(leaf)[:2]
    for column in columns:
        grads = differentiated(column, [*edges.values()], retain_graph=True)
        for image in range(len(x)):
            own = {key: _of_image(grad, image, len(x)) for key, grad in zip(edges, grads, strict=True)}
            maps = _maps(calls, own, {key: edge[:2] for key, edge in edges.items()}, probe)
            dead = {edges[key][:2] for key, grad in own.items() if grad is None or not grad.any()}
            found.add(_front(column.grad_fn, maps, dead, start, probe))
    if len(found) > 1:
        listed = "; ".join(sorted(", ".join(names) for names in found))
        raise ValueError(
            f"layer=None: the detections come from different layers ({listed}); explain them one at a time, "
            "or name the layer"
        )
    return list(found.pop())


def _of_image(grad: Tensor | None, image: int, batch: int) -> Tensor | None:
    return grad if grad is None or not grad.ndim or len(grad) != batch else grad[image : image + 1]


def _maps(
    calls: list[ModuleCall], grads: dict[Key, Tensor | None], edges: dict[Key, Edge], probe: Probe
) -> list[_Maps]:
    """The calls with maps on which an image's score depends, in execution order."""
    found, in_doubt = [], is_measured(probe.root, calls, probe)
    grids = {call.shape[2:] for call in calls if isinstance(call.module, Convolution)}
    for i, call in enumerate(calls):
        grad = grads.get(call.key)
        if grad is None or not call.name or not call.is_alone or call.shape[0] != 1:
            continue
        is_placed = True
        try:
            place = to_spatial_of(calls, i, probe, in_doubt=in_doubt)
        except UnplacedError:
            if call.shape[2:] not in grids:  # tokens, or rows of heads
                continue
            unsure = is_in_doubt(probe.root, calls, i, probe) or is_turned(calls, i)
            is_placed, place = _ends_in_convolution(calls, i) and not unsure, None
        placed = grad if place is None else place(grad)
        size = tuple(placed.shape[2:])
        # Tokens made from maps keep the maps' size; outputs of heads, or of several levels at once, do not.
        is_map = placed.ndim == probe.x.ndim and (grad.ndim == placed.ndim or size in grids)
        if is_map and placed.shape[1] > 1 and max(size) > 1 and placed.any():
            found.append(_Maps(call, tuple(sorted(size)), edges[call.key], is_placed))
    return found


def _ends_in_convolution(calls: Sequence[ModuleCall], position: int) -> bool:
    """Whether a call returns what a convolution, or a norm of channels, in it returns: maps as they are."""
    call = calls[position]
    last = next((one for one in reversed(calls[call.start : position + 1]) if own_layout(one)), None)
    return last is not None and own_layout(last) == "first" and last.shape == call.shape


def _front(
    node: Any, maps: list[_Maps], dead: Collection[Edge], start: Edge, probe: Probe
) -> tuple[str, ...]:
    """The names of the last maps of each size: every path to earlier maps of that size leads through them."""
    regions = {edge for edge in _reached(node, ()) if _REGIONS.search(type(edge[0]).__name__)}
    of_regions = _reached(node, regions) if regions else set()  # maps of boxes, not of the image
    of_size: dict[tuple[int, ...], list[_Maps]] = {}
    for one in maps:
        if one.edge not in of_regions:
            of_size.setdefault(one.size, []).append(one)
    while True:
        reached = _reached(node, {group[-1].edge for group in of_size.values() if group} | set(dead))
        front = [group[-1] for group in of_size.values() if group and group[-1].edge in reached]
        passed = [
            group
            for group in of_size.values()
            if any(one.edge in reached and one.edge != group[-1].edge for one in group)
        ] or [of_size[one.size] for one in maps if one in front and _is_after_another(one, front, dead)][-1:]
        if not passed:
            break
        for group in passed:
            group.pop()
    if start in reached or not front:
        raise checks.NoDefaultLayerError(
            "layer=None: no layers with spatial maps account for the whole score; name the layer "
            "to explain (xcam_fn.layers(model, x) lists them)"
        )
    once = {one.call.name for one in maps if one.call.number > 1}
    names = tuple(one.call.shown if one.call.name in once else one.call.name for one in front)
    for name, one in zip(names, front, strict=True):
        if not one.is_placed:
            raise ValueError(
                f"layer=None: the score depends on {', '.join(names)}, but changing a patch of the image "
                f"does not change the values of {name}, shape {one.call.shape}, most at that place; pass a "
                f"larger image, or name the layers, as in multi_layer(method, {[*names]}), and pass "
                f"to_spatial=lambda maps: maps if they are maps {checks.maps_of(probe.x)}"
            )
    return names


def _is_after_another(one: _Maps, front: list[_Maps], dead: Collection[Edge]) -> bool:
    """Whether maps are computed of others of the front, whose gradient would count theirs again."""
    behind = _reached(one.edge[0], dead)
    return any(other.edge in behind for other in front if other is not one)


def _reached(node: Any, stops: Collection[Edge]) -> set[Edge]:
    """The nodes reached from a node towards the inputs, without going past the stops."""
    reached, stack, visited = set(), [node], set()
    while stack:
        for edge in stack.pop().next_functions:
            if edge[0] is not None and edge not in reached:
                reached.add(edge)
                if edge not in stops and edge[0] not in visited:
                    visited.add(edge[0])
                    stack.append(edge[0])
    return reached
