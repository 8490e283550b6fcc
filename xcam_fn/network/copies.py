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
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


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


def canonical_names(model: nn.Module) -> dict[int, str]:
    """`id(module)` to its first name, for every module of the model."""
    return {id(module): name for name, module in model.named_modules()}


def private_copy(
    model: nn.Module, intercept: Intercept | None = None, *, clone_buffers: bool = True
) -> nn.Module:
    """A copy of the module tree that shares every parameter with the model and none of its mutable state.

    Args:
        model: the network; it is only read.
        intercept: called with each module's name, the module and the bound forward of its copy; what it
            returns runs in that forward's place (`None` leaves it).
        clone_buffers: give the copy buffers of its own where a user-written forward may write to them.

    Returns:
        The copy of the (unwrapped) root. Parameters are read through the model's own dictionaries, so a
        value swapped in by `torch.func.functional_call` is seen. Hooks on forward are kept: they are part of
        what the model computes.
    """
    root = unwrap(model)
    names = canonical_names(root)
    copies: dict[int, nn.Module] = {}
    forwards: list[tuple[nn.Module, Forward]] = []
    for module in root.modules():
        if id(module) in copies or is_wrapper(module):
            continue
        shared = is_leaf(module) and not module._modules and not has_hooks(module)
        if shared and intercept is None:
            copies[id(module)] = module
            continue
        copy = _shallow_copy(module)
        if clone_buffers and module._buffers and not is_leaf(module):
            own = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
            copy.__dict__["_buffers"] = own
        forward = intercept and intercept(names[id(module)], module, _bound_forward(module, copy))
        if forward is not None:
            forwards.append((copy, forward))
        copies[id(module)] = module if shared and forward is None else copy
    for module in root.modules():
        if is_wrapper(module):
            copies[id(module)] = copies[id(unwrap(module))]
    for module in root.modules():
        copy = copies[id(module)]
        if copy is not module and not is_wrapper(module):
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
    state["_backward_hooks"] = OrderedDict()
    state["_backward_pre_hooks"] = OrderedDict()
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
    for name, value in list(copy.__dict__.items()):
        if name not in _INTERNALS and not isinstance(value, _PLAIN):
            copy.__dict__[name] = _rebind(value, copies)


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


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """What a trace of the model depends on: its modules, their hooks, and what their forwards read."""
    marks: list[Any] = [_first_dtype_and_device(model)]
    pending, seen = [model], {id(model)}
    while pending:
        module = pending.pop()
        state = module.__dict__
        marks.append(id(module))
        marks.append(type(module))
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            marks.append("hooks")
        if state.get("training"):
            marks.append("training")
        if not is_leaf(module):
            marks.append(type(module).forward)
            marks.append(tuple(state["_modules"]))
            for key, value in state.items():
                if key not in _INTERNALS:
                    marks.append((key, value if type(value) in _PLAIN else _mark(value)))
        for child in state["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append(child)
    return tuple(marks)


def _first_dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    first = next(model.parameters(), None)
    return None if first is None else (first.dtype, first.device)


def _mark(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (list, tuple):
        return tuple(_mark(v) for v in value)
    return id(value)
