"""What a forward runs: every call of every module, in the order in which they end."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from xcam_fn.network.copies import is_leaf, private_copy
from xcam_fn.torch_state import pytree

Change = Callable[..., Any]


class ModuleCall(NamedTuple):
    """One module run by a forward.

    Attributes:
        name: of the module.
        number: which of its calls this is, from 1.
        module: the module itself.
        shape: of its output for one image: its first axis is 1 where the output has a row for each image.
        start: how many calls had ended when this one began.
        is_alone: its output holds no other floating-point tensor than its first.
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
    def key(self) -> tuple[int, int]:
        """What the call is asked for by in `run_changed`."""
        return id(self.module), self.number

    @property
    def shown(self) -> str:
        """The name under which the call is asked for: `relu#2` is the second call of `relu`."""
        return f"{self.name}#{self.number}"


def run_changed(
    model: nn.Module,
    x: Tensor,
    change: Mapping[tuple[int, int], Change] | None = None,
    calls: list[ModuleCall] | None = None,
    *,
    watched: Container[int] | None = None,
    detached: bool = False,
) -> Any:
    """The model's output for x, computed by a private copy, where calls of its modules may be replaced.

    Args:
        model: the network; it is only read.
        x: (B, C, *size); the forward may write to the copy that it is given.
        change: the key of a call to what runs in its place, `(forward, *args, **kwargs) -> output`.
        calls: takes up every call as it ends; None where nobody asks.
        watched: the ids of the modules whose calls are taken up; None for all.
        detached: let parameters record nothing.
    """
    changes = dict(change or {})
    changed = {identity for identity, _ in changes}
    counts: dict[int, int] = {}
    batch = x.shape[0]

    def intercept(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
        identity = id(module)
        taken = calls if watched is None or identity in watched else None
        if taken is None and identity not in changed:
            return None

        def called(*args: Any, **kwargs: Any) -> Any:
            counts[identity] = number = counts.get(identity, 0) + 1
            start = 0 if calls is None else len(calls)
            new = changes.get((identity, number))
            output = forward(*args, **kwargs) if new is None else new(forward, *args, **kwargs)
            if taken is not None:
                taken.append(ModuleCall(name, number, module, *_kind_of(output, batch, start)))
            return output

        return called

    copied = private_copy(model, intercept if calls is not None or changes else None, detached=detached)
    try:
        return copied(x.clone())
    finally:
        changes.clear()  # the copy and its forwards refer to each other; no tensor is to wait with them


def _kind_of(output: Any, batch: int, start: int) -> tuple[tuple[int, ...], int, bool]:
    """The shape of an output for one image, the call's start, and whether the output is one tensor."""
    if isinstance(output, Tensor):
        return _for_one(output.shape, batch) if output.is_floating_point() else (), start, True
    maps = [
        leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return _for_one(maps[0].shape, batch) if maps else (), start, len(maps) == 1


def _for_one(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The shape with 1 in place of B; what has another number of rows, as windows have, gets another one."""
    if not shape:
        return ()
    return (1 if shape[0] == batch else max(2, shape[0]), *shape[1:])


def run_model(model: nn.Module, x: Tensor, *, detached: bool = False) -> Any:
    """The model's own output for x, without letting its forward write to the model or to x."""
    return run_changed(model, x, detached=detached)


def module_calls(model: nn.Module, x: Tensor) -> list[ModuleCall]:
    """Every call of a forward of x."""
    calls: list[ModuleCall] = []
    run_changed(model, x, None, calls, detached=True)
    return calls


def is_in_place(module: nn.Module) -> bool:
    """True for a module of torch that overwrites its input, so that what it returns may be ignored."""
    return is_leaf(module) and bool(getattr(module, "inplace", False))


def feature_position(output: Any) -> int | None:
    """Which leaf of a layer's output is the features: the first floating-point tensor, or None."""
    for position, value in enumerate(pytree.tree_leaves(output)):
        if isinstance(value, Tensor) and value.is_floating_point():
            return position
    return None


def with_features(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output with its features, the first floating-point tensor, changed."""
    if isinstance(output, Tensor):
        return change(output)
    leaves, spec = pytree.tree_flatten(output)
    position = feature_position(output)
    if position is not None:
        leaves[position] = change(leaves[position])
    return pytree.tree_unflatten(leaves, spec)
