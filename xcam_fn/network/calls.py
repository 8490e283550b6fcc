"""Runs a forward on a private copy, and lists every call of every module, in the order in which they end."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn import checks
from xcam_fn.network.copies import Forward, Tree, is_leaf, may_round, private_copy, tree, unwrap
from xcam_fn.network.turns import Turns, may_turn
from xcam_fn.network.vjp import detached as without_gradient
from xcam_fn.torch_state import is_readable, pytree

Change = Callable[..., Any]
Key = tuple[str, int]  # identifies a call: the first name of its module, and its number


class ModuleCall(NamedTuple):
    """One module run by a forward.

    Attributes:
        name: the module's name.
        number: which of its calls this is, from 1.
        module: the module itself.
        shape: the output's shape for one image; the first axis is 1 if the output has a row for each image.
        start: how many calls had ended when this one began.
        is_alone: its output holds only one floating-point tensor.
    """

    name: str
    number: int
    module: nn.Module
    shape: tuple[int, ...]
    start: int
    is_alone: bool

    @property
    def kind(self) -> str:
        """The name of the module's type."""
        return type(self.module).__name__

    @property
    def key(self) -> Key:
        """The key of the call in `run_changed`."""
        return self.name, self.number

    @property
    def shown(self) -> str:
        """The name of the call for users: `relu#2` is the second call of `relu`."""
        return f"{self.name}#{self.number}"


class Calls(list[ModuleCall]):
    """The calls of a forward, in the order in which they end.

    Attributes:
        turned_at: how many had ended when the image, or maps as large, were mirrored, turned or warped; None
            where they were not.
    """

    turned_at: int | None = None

    def note_turn(self) -> None:
        """Take up that the image is turned now."""
        self.turned_at = len(self)


def run_changed(
    model: nn.Module,
    x: Tensor,
    change: Mapping[Key, Change] | None = None,
    calls: list[ModuleCall] | None = None,
    *,
    watched: Callable[[str], bool] | None = None,
    see: Callable[[ModuleCall, Any], None] | None = None,
    detached: bool = False,
) -> Any:
    """The model's output for x, computed by a private copy in which calls of modules can be replaced.

    Args:
        model: the network; it is only read.
        x: (B, C, *size); the forward gets a copy that it may write to.
        change: maps the key of a call to its replacement, `(forward, *args, **kwargs) -> output`.
        calls: a list to append every call to as it ends, or None.
        watched: whether to record the calls of a module with this name; None for all.
        see: called with every call and its output as it ends.
        detached: parameters record no gradient.

    Raises:
        ValueError: the forward fails (explained in terms of x), or random numbers change its output.
        TypeError: x is not of the model's dtype.
    """
    changes = dict(change or {})
    changed = {name for name, _ in changes}
    counts: dict[str, int] = {}
    intercepted: list[Any] = []
    batch = x.shape[0]

    def intercept(name: str, module: nn.Module) -> Callable[[Forward], Forward] | None:
        taken = calls if watched is None or watched(name) else None
        if taken is None and see is None and name not in changed:
            return None

        def counted(forward: Forward) -> Forward:
            if isinstance(forward, types.MethodType):
                intercepted.append(forward.__self__)

            def called(*args: Any, **kwargs: Any) -> Any:
                counts[name] = number = counts.get(name, 0) + 1
                start = 0 if calls is None else len(calls)
                new = changes.get((name, number))
                output = forward(*args, **kwargs) if new is None else new(forward, *args, **kwargs)
                call = ModuleCall(name, number, module, *_kind_of(output, batch, start))
                if taken is not None:
                    taken.append(call)
                if see is not None:
                    see(call, output)
                return output

            return called

        return counted

    is_watched = calls is not None or see is not None or bool(changes)
    modules = tree(unwrap(model))
    drawn, rounding = _random_state(x), _Rounding() if may_round(modules) else None
    copied = private_copy(model, intercept if is_watched else None, detached=detached, modules=modules)
    try:
        with rounding or contextlib.nullcontext(), _noting_turns(calls, x, modules):
            output = copied(x.clone())
    except Exception as error:
        _put_back(drawn, x)
        checks.fail(model, x, error, private_copy(model))
    finally:
        changes.clear()
        for module in intercepted:  # break the reference cycle with its forward
            vars(module).pop("forward", None)
    if drawn and not all(map(torch.equal, drawn, _random_state(x))):
        _check_repeats(model, x, drawn)
    if rounding is not None and rounding.found:  # any gradient left is that of other paths only
        return without_gradient(output)
    return output


def _noting_turns(
    calls: list[ModuleCall] | None, x: Tensor, modules: Tree
) -> contextlib.AbstractContextManager[Any]:
    if isinstance(calls, Calls) and may_turn(modules):
        return Turns(tuple(x.shape[2:]), calls.note_turn)
    return contextlib.nullcontext()


class _Rounding(TorchFunctionMode):
    """Notes whether values with a gradient are rounded to integers, which stops the gradient."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_recorded = torch.is_grad_enabled() and isinstance(args[0] if args else None, Tensor)
        if not self.found and is_recorded and args[0].requires_grad:
            self.found = "quantize" in str(func) and "fake" not in str(func)
            if func in _LINEAR:  # a special weight type may round its input
                weights, named = without_gradient((args[1:], kwargs or {}))
                self.found = not func(args[0], *weights, **named).requires_grad
        return func(*args, **(kwargs or {}))


_LINEAR = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def _random_state(x: Tensor) -> list[Tensor]:
    """The states of the generators that a forward may draw from; empty if values cannot be read."""
    if not is_readable(x):
        return []
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


def _put_back(drawn: list[Tensor], x: Tensor) -> None:
    """Restore the states of the generators."""
    if drawn:
        torch.set_rng_state(drawn[0])
    if len(drawn) > 1:
        torch.cuda.set_rng_state(drawn[1], x.device)


def _check_repeats(model: nn.Module, x: Tensor, drawn: list[Tensor]) -> None:
    """Raise if two forwards of x differ, naming the module that drew; restore the generators."""
    drawing: list[str] = []

    def intercept(name: str, module: nn.Module) -> Callable[[Forward], Forward]:
        def watching(forward: Forward) -> Forward:
            def called(*args: Any, **kwargs: Any) -> Any:
                before, known = _random_state(x), len(drawing)
                output = forward(*args, **kwargs)
                if len(drawing) == known and not all(map(torch.equal, before, _random_state(x))):
                    drawing.append(f"{name or 'its own forward'} ({type(module).__name__})")
                return output

            return called

        return watching

    try:
        with torch.no_grad():
            first, second = private_copy(model, intercept)(x.clone()), private_copy(model)(x.clone())
    finally:
        _put_back(drawn, x)
    if not outputs_agree(first, second):
        raise ValueError(
            f"model: {drawing[0]} draws random numbers in evaluation mode, so results differ; turn this "
            "off (for F.dropout, pass training=self.training)"
        )


def leaves_of(output: Any) -> list[Any]:
    """All values in an output, including the attributes of dataclasses and other objects."""
    leaves = pytree.tree_leaves(output)
    is_object = [hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor) for leaf in leaves]
    if not any(is_object):
        return leaves
    return pytree.tree_leaves([vars(v) if opens else v for v, opens in zip(leaves, is_object, strict=True)])


def outputs_agree(found: Any, expected: Any) -> bool:
    """Whether two outputs of a network are equal up to rounding."""
    left, right = leaves_of(found), leaves_of(expected)
    return len(left) == len(right) and all(map(_agree, left, right))


def _agree(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    scale = float(other.detach().double().nan_to_num().abs().max())
    return torch.allclose(one.to(other), other, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def first_rows(output: Any, count: int, length: int) -> Any:
    """The output for the first `count` images of a batch of `length`."""
    if isinstance(output, list) and all(isinstance(image, dict) for image in output):
        return output[:count]  # detections, a dict for each image
    is_batched = lambda v: isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == length  # noqa: E731
    return pytree.tree_map(lambda v: v[:count] if is_batched(v) else v, output)


def first_agrees(output: Any, length: int, alone: Any) -> bool:
    """Whether the first row of a batch's output equals the output for that image alone."""
    return outputs_agree(first_rows(leaves_of(first_rows(output, 1, length)), 1, length), alone)


def keeps_rows_apart(run: Callable[[Tensor], Any], one: Tensor) -> bool:
    """Whether `run` computes the same for a row alone and in a batch with a very different row."""
    try:
        with torch.no_grad():
            together = run(torch.cat([one, 1 - 2 * one]))
            return first_agrees(together, 2, run(one.clone()))
    except Exception as error:  # a network may fail in any way on two rows
        if checks.is_out_of_memory(error):
            raise
        return False


def _kind_of(output: Any, batch: int, start: int) -> tuple[tuple[int, ...], int, bool]:
    """The shape of an output for one image, the call's start, and whether the output is one tensor."""
    if isinstance(output, Tensor):
        return _for_one(output.shape, batch) if _holds_maps(output) else (), start, True
    maps = list(_floats(pytree.tree_leaves(output)).values())
    return _for_one(maps[0].shape, batch) if maps else (), start, len(maps) == 1


def _for_one(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The shape with 1 instead of B; outputs with another number of rows, such as windows, get 2 or more."""
    if not shape:
        return ()
    return (1 if shape[0] == batch else max(2, shape[0]), *shape[1:])


def run_model(model: nn.Module, x: Tensor, *, detached: bool = False) -> Any:
    """The model's output for x; its forward cannot write to the model or to x."""
    return run_changed(model, x, detached=detached)


def module_calls(model: nn.Module, x: Tensor) -> Calls:
    """All calls of a forward of x."""
    calls = Calls()
    run_changed(model, x, None, calls, detached=True)
    return calls


def is_in_place(module: nn.Module) -> bool:
    """True for a module of torch that overwrites its input, so callers may ignore its return value."""
    return is_leaf(module) and bool(getattr(module, "inplace", False))


def _holds_maps(value: Any) -> bool:
    """Whether a value is a floating-point or a quantized tensor."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_quantized)


def _floats(leaves: list[Any]) -> dict[int, Tensor]:
    """The leaves that may be maps, by index."""
    return {i: v for i, v in enumerate(leaves) if _holds_maps(v)}


def features_of(output: Any) -> Tensor | None:
    """The features in a layer's output: the first tensor that may be maps, in floats, or None."""
    found = next(iter(_floats(pytree.tree_leaves(output)).values()), None)
    return found.dequantize() if found is not None and found.is_quantized else found


def with_features(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output with its features changed, and quantized again if they were quantized."""
    if isinstance(output, Tensor):
        return _changed(output, change)
    leaves, spec = pytree.tree_flatten(output)
    for position, features in list(_floats(leaves).items())[:1]:
        leaves[position] = _changed(features, change)
    return pytree.tree_unflatten(leaves, spec)


def _changed(features: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not features.is_quantized:
        return change(features)
    new = change(features.dequantize())
    return torch.quantize_per_tensor(new, features.q_scale(), features.q_zero_point(), features.dtype)
