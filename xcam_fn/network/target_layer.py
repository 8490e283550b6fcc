"""Finds the target layer, a call of a module, by name, by module, or by default."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from xcam_fn import checks
from xcam_fn.names import nearest
from xcam_fn.network.bound import Bound
from xcam_fn.network.calls import Calls, Key, ModuleCall
from xcam_fn.network.copies import name_of, tree, unwrap
from xcam_fn.network.places import default_candidates, has_tokens, placed_shape
from xcam_fn.network.probe import Probe
from xcam_fn.torch_state import Convolution

Layer = str | nn.Module | None
Found = tuple[str, int | None]  # a module's first name, and which of its calls (None: the last)
Carrying = Collection[Key] | None


def find(root: nn.Module, layer: str | nn.Module) -> Found:
    """The first name of a layer's module, and which of its calls (None: the last).

    Raises:
        ValueError: the layer is not in the model.
        TypeError: layer is neither a name nor a module.
    """
    path, number = "", None
    if isinstance(layer, nn.Module):
        found = unwrap(layer)
    elif isinstance(layer, str):
        path, marked, digits = layer.partition("#")
        if marked and not digits.isdecimal():
            raise ValueError(f"layer {layer!r}: expected a number after '#', such as {path + '#1'!r}")
        number = int(digits) if marked else None
        found = _submodule(root, path)
    else:
        raise TypeError(f"layer must be a name, a module or None, got {layer!r}")
    name = name_of(root, found)
    if name is not None:
        return name, number
    if isinstance(layer, str):
        raise ValueError(_unknown_layer(root, path))
    raise ValueError(
        f"layer={type(layer).__name__}(...) is not a module of this {type(root).__name__}; pass one of its "
        "own modules, or a name"
    )


def position_of(
    root: nn.Module, found: Found | None, calls: Sequence[ModuleCall], probe: Probe, carrying: Carrying = None
) -> int:
    """The position of the target layer among the calls of a forward.

    Args:
        root: the network.
        found: the layer, from `find`; None for the default layer.
        calls: all calls of a forward.
        probe: the images' probe.
        carrying: the calls that the score depends on, if known.

    Raises:
        ValueError: the layer does not run, or not that often, or there is no default layer.
    """
    if found is None:
        return default_call(root, calls, probe, carrying)
    name, number = found
    positions = [i for i, call in enumerate(calls) if call.name == name]
    if not positions:
        raise _never_reached(root, name)
    if number is not None and not 1 <= number <= len(positions):
        names = ", ".join(f"{name}#{i + 1}" for i in range(len(positions)))
        raise ValueError(
            f"layer '{name}#{number}': {name!r} runs {len(positions)} time(s) in a forward pass; expected "
            f"one of {names}"
        )
    if number is not None:
        return positions[number - 1]
    if is_in_doubt(root, calls, positions[-1], probe):  # one of two streams may process another image
        return next((i for i in reversed(positions) if probe.moves(calls[i])), positions[-1])
    return positions[-1]


def is_in_doubt(root: nn.Module, calls: Sequence[ModuleCall], position: int, probe: Probe) -> bool:
    """Whether a call may process something other than the image, or several calls process it."""
    name = calls[position].name
    twice = [call.module for call in calls if call.number > 1 and is_within(name, call.name)]
    has_weights = any(any(True for _ in module.parameters()) for module in twice)
    return isinstance(root, Bound) or has_weights or _may_be_frames_first(root, probe)


def _may_be_frames_first(root: nn.Module, probe: Probe) -> bool:
    """Whether x may be clips (B, T, C, H, W), whose axes the network swaps itself."""
    if len(probe.size) != 3:
        return False
    channels, frames = probe.x.shape[1:3]
    first = next((m for m in root.modules() if isinstance(m, Convolution)), None)
    return channels == frames or first is None or first.in_channels != channels


def is_within(name: str, outer: str) -> bool:
    """Whether a name is that of the other module, or of a module inside it."""
    return not outer or f"{name}.".startswith(f"{outer}.")


def is_measured(root: nn.Module, calls: Sequence[ModuleCall], probe: Probe) -> bool:
    """Whether shapes alone do not tell what is a map: bound networks, turned images, attention, tokens."""
    is_other = isinstance(root, Bound) or is_turned(calls, len(calls))
    return is_other or has_tokens(calls, probe.size) or _may_be_frames_first(root, probe)


def is_turned(calls: Sequence[ModuleCall], position: int) -> bool:
    """Whether the image, or maps of its size, were mirrored, turned or warped before a call ended."""
    return isinstance(calls, Calls) and calls.turned_at is not None and calls.turned_at <= position


def default_call(
    root: nn.Module, calls: Sequence[ModuleCall], probe: Probe, carrying: Carrying = None
) -> int:
    """The position of the default layer, see `default_layer`.

    Raises:
        ValueError: there is none.
    """
    in_doubt = is_measured(root, calls, probe)
    single: list[int] = []
    for position in default_candidates(calls, probe.size):
        call = calls[position]
        if not call.name or not call.is_alone or (carrying is not None and call.key not in carrying):
            continue
        shape = placed_shape(calls, position, probe, in_doubt=in_doubt)
        if len(shape) == len(probe.size) + 2 and max(shape[2:]) > 1:
            if shape[1] > 1:
                return position
            single.append(position)  # a gate, or the scores of one class
    if single:
        return single[0]
    if not any(call.shape for call in calls if call.name):
        raise checks.NoDefaultLayerError(
            f"layer=None: {type(root).__name__} runs functions and no modules, like a graph of torch.export, "
            "so it has no layers; explain the original network or torch.export.unflatten(program), or use a "
            "method that needs no layer, such as rise"
        )
    remedy = checks.frames_first(probe.x)
    if not remedy and is_turned(calls, len(calls)):
        remedy = "; it mirrors, turns or warps the image: pass to_spatial too, which undoes that"
    raise checks.NoDefaultLayerError(
        f"layer=None: {type(root).__name__} runs no convolution and no attention over patches of the image "
        "that the score depends on, so there is no default layer; name the layer to explain"
        f"{remedy}"
    )


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, with or without the names that wrappers and `bind` add."""
    module: nn.Module = root
    for part in path.split(".") if path else ():
        module = unwrap(module)
        child = dict(module._modules.items()).get(part)  # a TorchScript module's has no get
        while child is None and isinstance(module, Bound):
            module = unwrap(module.model)
            child = dict(module._modules.items()).get(part)
        if child is None and part not in ("module", "_orig_mod"):
            return None
        module = module if child is None else child
    return None if module is root or module is None else unwrap(module)


def _unknown_layer(root: nn.Module, path: str) -> str:
    names = [name for name, _, _ in tree(root) if name]
    top = ", ".join(repr(name) for name, _ in root.named_children()) or "none"
    hint = nearest(path, names, f"its top modules are {top}", cutoff=0.5)
    return f"layer {path!r} is not in {type(root).__name__}; {hint} (xcam_fn.layers(model, x) lists them all)"


def _never_reached(root: nn.Module, name: str) -> ValueError:
    remedy = "; xcam_fn.layers(model, x) lists the layers that run"
    if isinstance(root, Bound):
        remedy += (
            ". fn must call the model passed to it, as `lambda net, x: net(x)` does, not one from an outer "
            "variable"
        )
    return ValueError(f"layer {name!r} is in {type(root).__name__} but its forward never runs it{remedy}")
