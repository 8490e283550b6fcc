"""Which call of which module is the target layer: found by name, by module, or by default."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from xcam_fn.network.bound import Bound
from xcam_fn.network.calls import ModuleCall
from xcam_fn.network.copies import named, unwrap
from xcam_fn.network.places import default_position, placed_shape

Layer = str | nn.Module | None


def find(root: nn.Module, layer: str | nn.Module) -> tuple[nn.Module, int | None]:
    """The module that a layer names, and which of its calls is meant (None: the last).

    Raises:
        ValueError: the layer is not in the model.
        TypeError: layer is neither a name nor a module.
    """
    if isinstance(layer, nn.Module):
        found = unwrap(layer)
        if not any(module is found for _, module in named(root)):
            raise ValueError(
                f"layer={type(layer).__name__}(...) is not a module of this {type(root).__name__}; "
                "pass one of its own modules, or a name"
            )
        return found, None
    if not isinstance(layer, str):
        raise TypeError(f"layer={layer!r} is a {type(layer).__name__}; expected a name, a module or None")
    path, marked, number = layer.partition("#")
    if marked and not number.isdecimal():
        raise ValueError(f"layer {layer!r}: expected a call number after '#', such as {path + '#1'!r}")
    found = _submodule(root, path)
    if found is None and isinstance(root, Bound):
        found = _submodule(root.model, path)  # a bound model's layers go by the names that they have in it
    if found is None:
        raise ValueError(_unknown_layer(root, path))
    return found, int(number) if marked else None


def position_of(root: nn.Module, layer: Layer, calls: Sequence[ModuleCall], size: tuple[int, ...]) -> int:
    """The position of the target layer among the calls of a forward.

    Args:
        root: the network.
        layer: as for every method.
        calls: all calls of a forward.
        size: of the images, pixels.

    Raises:
        ValueError: the layer does not run, or not so often, or there is no default layer.
    """
    if layer is None:
        module, number = calls[default_call(root, calls, size)].module, None
    else:
        module, number = find(root, layer)
    positions = [i for i, call in enumerate(calls) if call.module is module]
    if not positions:
        raise _never_reached(root, module)
    if number is not None and not 1 <= number <= len(positions):
        name = calls[positions[0]].name
        names = ", ".join(f"{name}#{i + 1}" for i in range(len(positions)))
        raise ValueError(
            f"layer {layer!r}: {name!r} runs {len(positions)} time(s) in a forward; expected one of {names}"
        )
    return positions[-1] if number is None else positions[number - 1]


def default_call(root: nn.Module, calls: Sequence[ModuleCall], size: tuple[int, ...]) -> int:
    """The position of the default layer, see `default_layer`.

    Raises:
        ValueError: there is none.
    """

    def grid_of(position: int) -> tuple[int, ...] | None:
        shape = placed_shape(root, calls, position, size)
        is_placed = bool(calls[position].name) and len(shape) == len(size) + 2 and max(shape[2:]) > 1
        return shape[2:] if is_placed else None

    try:
        return default_position(calls, size, grid_of)
    except ValueError:
        raise ValueError(
            f"layer=None: {type(root).__name__} runs no convolution and no attention over patches, so there "
            "is no default layer; name the layer to explain"
        ) from None


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path; the names that wrappers add to the path may be there or not."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = unwrap(module)
        child = module._modules.get(part)
        if child is None and part not in ("module", "_orig_mod"):
            return None
        module = module if child is None else child
    return None if module is root or module is None else unwrap(module)


def _unknown_layer(root: nn.Module, path: str) -> str:
    names = [name for name, _ in named(root) if name]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    top = ", ".join(repr(name) for name, _ in root.named_children()) or "none"
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its top modules are {top}"
    return f"layer {path!r} is not in {type(root).__name__}; {hint} (xcam_fn.layers(model, x) lists them all)"


def _never_reached(root: nn.Module, module: nn.Module) -> ValueError:
    name = next(name for name, other in named(root) if other is module)
    remedy = "; xcam_fn.layers(model, x) lists the layers that run"
    if isinstance(root, Bound):
        remedy += (
            ". fn has to call the model that it is handed, as `lambda net, x: net(x)` does, and not one that "
            "it finds in a variable outside"
        )
    return ValueError(f"layer {name!r} is in {type(root).__name__} but its forward never runs it{remedy}")
