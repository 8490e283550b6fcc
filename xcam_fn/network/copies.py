"""Module trees, copied out of place: what lets a model be traced, recorded and cut without touching it."""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
Intercept = Callable[[str, nn.Module, Forward], Forward | None]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size))


def is_wrapper(module: nn.Module) -> bool:
    """True for a module that only forwards to another: torch.compile's and the data-parallel ones."""
    return isinstance(module, _PARALLEL) or _is_compiled(module)


def _is_compiled(module: nn.Module) -> bool:
    """True for what `torch.compile(module)` returns.

    Importing torch._dynamo takes seconds, and where nobody has done so no module is compiled. While another
    thread imports it, the class may not be there yet.
    """
    dynamo = sys.modules.get("torch._dynamo")
    return isinstance(module, getattr(dynamo, "OptimizedModule", ()))


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside any nesting of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while is_wrapper(module):
        module = module.get_submodule("module" if isinstance(module, _PARALLEL) else "_orig_mod")
    return module


def is_leaf(module: nn.Module) -> bool:
    """True for a module of torch.nn that runs as one operation."""
    return _is_leaf_type(type(module))


@functools.cache
def _is_leaf_type(kind: type[nn.Module]) -> bool:
    builtin = kind.__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
    return builtin and not issubclass(kind, (*_CONTAINERS, *_PARALLEL))


def has_hooks(module: nn.Module) -> bool:
    """True where a forward or backward hook is registered on the module itself."""
    return any(module.__dict__.get(kind) for kind in _HOOKS)


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of the model once, with its first name, parents first: `named_modules`, but quicker."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        prefix = f"{name}." if name else ""
        own = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
        pending.extend(reversed(own))
    return found


def private_copy(
    model: nn.Module,
    intercept: Intercept | None = None,
    *,
    clone_buffers: bool = True,
    detached: bool = False,
) -> nn.Module:
    """A copy of the module tree that shares every parameter with the model and none of its mutable state.

    Args:
        model: the network; it is only read.
        intercept: called with each module's name, the module and the bound forward of its copy; what it
            returns runs in that forward's place (`None` leaves it).
        clone_buffers: give the copy buffers of its own where a user-written forward may write to them.
        detached: let the copy's parameters record nothing; they share the model's memory all the same.

    Returns:
        The copy of the (unwrapped) root. Parameters are read through the model's own dictionaries, so a
        value swapped in by `torch.func.functional_call` is seen. Hooks on forward are kept: they are part of
        what the model computes.
    """
    root = unwrap(model)
    modules = named(root)
    copies: dict[int, nn.Module] = {}
    changed: list[nn.Module] = []
    forwards: list[tuple[nn.Module, Forward]] = []
    for name, module in modules:
        if is_wrapper(module):
            continue
        leaf = is_leaf(module)
        copy = module
        if not leaf or intercept is not None or detached or module._modules or has_hooks(module):
            copy = _shallow_copy(module)
            changed.append(copy)
            if clone_buffers and module._buffers and not leaf:
                copy.__dict__["_buffers"] = {
                    k: v if v is None else v.clone() for k, v in module._buffers.items()
                }
            if detached and module._parameters:
                copy.__dict__["_parameters"] = {
                    k: v if v is None else v.detach() for k, v in module._parameters.items()
                }
            forward = intercept and intercept(name, module, _bound_forward(module, copy))
            if forward is not None:
                forwards.append((copy, forward))
        copies[id(module)] = copy
    for _, module in modules:
        if is_wrapper(module):
            copies[id(module)] = copies[id(unwrap(module))]
    for copy in changed:
        _relink(copy, copies)
    for copy, forward in forwards:
        copy.__dict__["forward"] = forward
    return copies[id(root)]


def _shallow_copy(module: nn.Module) -> nn.Module:
    copy = object.__new__(type(module))
    state = copy.__dict__
    state.update(module.__dict__)
    state["_modules"] = dict(module._modules)
    state["_compiled_call_impl"] = None  # module.compile() would run the original in the copy's place
    for hooks in ("_backward_hooks", "_backward_pre_hooks"):
        if state[hooks]:
            state[hooks] = OrderedDict()
    return copy


def _bound_forward(module: nn.Module, copy: nn.Module) -> Forward:
    """The module's forward as it runs on the copy, an instance's own `forward` included."""
    own = module.__dict__.get("forward")
    if own is None:
        return types.MethodType(type(module).forward, copy)
    return _rebind(own, {id(module): copy})


def _relink(copy: nn.Module, copies: dict[int, nn.Module]) -> None:
    """Point everything in the copy that refers to a module of the tree to that module's copy."""
    children = copy.__dict__["_modules"]
    for name, child in children.items():
        if child is not None:
            children[name] = copies[id(child)]
    state = copy.__dict__
    for name in ("forward",) if is_leaf(copy) else state.keys() - _INTERNALS:
        if type(state.get(name)) not in _PLAIN:
            state[name] = _rebind(state[name], copies)


def _rebind(value: Any, copies: dict[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _rebind(value.__self__, copies))
    if isinstance(value, functools.partial):
        args = [_rebind(a, copies) for a in value.args]
        return functools.partial(_rebind(value.func, copies), *args, **_rebind(value.keywords, copies))
    if type(value) in (list, tuple):
        return type(value)(_rebind(v, copies) for v in value)
    if type(value) is dict:
        return {k: _rebind(v, copies) for k, v in value.items()}
    return value
