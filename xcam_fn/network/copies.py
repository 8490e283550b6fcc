"""Private copies of module trees, so a model can be traced, recorded and cut without modifying it."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Intercept = Callable[[str, nn.Module], Callable[[Forward], Forward] | None]
Tree = list[tuple[str, nn.Module, dict[str, nn.Module | None]]]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
_FORWARD_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = (*_FORWARD_HOOKS, *_BACKWARD_HOOKS)
_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_PLAIN_TENSORS = {nn.Parameter, Tensor, type(None)}
_WRITTEN = (nn.Module, dict, list, deque, set)
_DEEPEST = 2  # levels of nested objects that are copied; deeper ones, such as a trainer's data, are shared


def _is_wrapper(kind: type[nn.Module]) -> bool:
    """True for a module type that only wraps another: of torch.compile or data parallelism.

    Importing torch._dynamo takes seconds; if it is not imported yet, no module is compiled. While another
    thread imports it, the class may be missing.
    """
    dynamo = sys.modules.get("torch._dynamo")
    return issubclass(kind, (*_PARALLEL, getattr(dynamo, "OptimizedModule", nn.DataParallel)))


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside any nesting of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while _is_wrapper(type(module)):
        module = module.get_submodule("module" if isinstance(module, _PARALLEL) else "_orig_mod")
    return module


def is_leaf(module: nn.Module) -> bool:
    """True for a module of torch.nn that runs as one operation."""
    return _is_leaf_type(type(module))


@functools.cache
def _is_leaf_type(kind: type[nn.Module]) -> bool:
    builtin = kind.__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
    return builtin and not issubclass(kind, (*_CONTAINERS, *_PARALLEL))


def is_quantized(module: nn.Module) -> bool:
    """True for a module of torch.ao that computes with integers."""
    return "quantized" in type(module).__module__


def may_round(modules: Tree) -> bool:
    """Whether a network may compute with integers, judged by its modules, exported graphs and weights."""
    weights = {type(p) for _, module, _ in modules for p in module._parameters.values()}
    files = {kind.__module__ for kind in {type(module) for _, module, _ in modules}}
    exported = any(file.startswith(("torch.fx", "torch.export")) for file in files)
    return exported or any("quantized" in file for file in files) or not weights <= _PLAIN_TENSORS


def has_hooks(module: nn.Module) -> bool:
    """True if a forward or backward hook is registered on the module itself."""
    own = vars(module)
    return any(map(own.get, _HOOKS)) and any(
        hook is not _does_nothing for kind in _HOOKS if own.get(kind) for hook in list(own[kind].values())
    )


def name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The first name of a module in the model, or None if it is not part of it."""
    return next((name for name, other, _ in tree(model) if other is module), None)


def tree(model: nn.Module) -> Tree:
    """Every module once, with its first name and its children, parents first: a faster `named_modules`.

    Children are read only once, since another thread may swap them.
    """
    seen: set[int] = set()
    found: Tree = []
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = {} if isinstance(module, torch.jit.ScriptModule) else module._modules.copy()
        found.append((name, module, children))
        prefix = f"{name}." if name else ""
        for key in reversed(children):
            child = children[key]
            if child is not None:
                pending.append((prefix + key, child))
    return found


def private_copy(
    model: nn.Module,
    intercept: Intercept | None = None,
    *,
    clone_buffers: bool = True,
    detached: bool = False,
    modules: Tree | None = None,
) -> nn.Module:
    """A copy of the module tree that shares every parameter with the model and none of its mutable state.

    Args:
        model: the network; it is only read.
        intercept: called with each module's name and the module; it returns a function that wraps the forward
            of the module's copy, or `None` to keep it.
        clone_buffers: give the copy its own buffers where a forward may write to them.
        detached: the copy's parameters record no gradient; they still share the model's memory.
        modules: the `tree` of the model, if known; its dicts of children become the copy's.

    Returns:
        The copy of the (unwrapped) root. Parameters are read through the model's own dictionaries, so values
        swapped in by `torch.func.functional_call` take effect. Forward hooks are kept: they are part of the
        model's computation. TorchScript parts are shared.
    """
    root = unwrap(model)
    modules = tree(root) if modules is None else modules
    own = [tensor for _, module, _ in modules for tensor in module._parameters.values()]
    is_inference = any(tensor is not None and tensor.is_inference() for tensor in own)
    detached = detached or is_inference
    copies: dict[int, Any] = {}
    changed: list[nn.Module] = []
    forwards: list[tuple[nn.Module, Forward]] = []
    wrapping = tuple(filter(_is_wrapper, {type(module) for _, module, _ in modules}))
    wrappers = [module for _, module, _ in modules if wrapping and isinstance(module, wrapping)]
    for name, module, children in modules:
        if wrappers and module in wrappers:
            continue
        leaf, twin = is_leaf(module), module
        change = intercept and intercept(name, module)
        is_read = leaf and not (change or detached or children or module.training or has_hooks(module))
        if not is_read and not isinstance(module, torch.jit.ScriptModule):
            twin = _shallow_copy(module, children)
            changed.append(twin)
            if clone_buffers and module._buffers and (not leaf or module.training):
                twin.__dict__["_buffers"] = _each(Tensor.clone, module._buffers)
            if detached and module._parameters:
                # torch cannot record inference tensors
                apart = Tensor.clone if is_inference else Tensor.detach
                twin.__dict__["_parameters"] = _each(apart, module._parameters)
            if change and has_hooks(module):  # hooks are part of the module's output
                inner = _shallow_copy(twin, dict(children))
                changed.append(inner)
                vars(twin).update({hooks: OrderedDict() for hooks in _FORWARD_HOOKS})
                forwards.append((twin, change(inner)))
            elif change:
                forwards.append((twin, change(_bound_forward(module, twin, copies))))
        copies[id(module)] = twin
    for module in wrappers:
        copies[id(module)] = copies[id(unwrap(module))]
    for twin in changed:
        _relink(twin, copies)
    for twin, forward in forwards:
        twin.__dict__["forward"] = forward
    return copies[id(root)]


def _each(change: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else change(tensor) for name, tensor in tensors.items()}


def _shallow_copy(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    twin = object.__new__(type(module))
    state = twin.__dict__
    state.update(module.__dict__)
    state["_modules"] = children
    state["_compiled_call_impl"] = None  # module.compile() would run the original in the copy's place
    for hooks in _BACKWARD_HOOKS:
        if state[hooks]:
            state[hooks] = OrderedDict()
    if isinstance(module, _FUSED):  # a hook disables the fused kernel, which skips the modules inside
        state["_forward_pre_hooks"] = OrderedDict(state["_forward_pre_hooks"])
        state["_forward_pre_hooks"][-1] = _does_nothing
    return twin


def _does_nothing(*_: Any) -> None:
    pass


def _bound_forward(module: nn.Module, twin: nn.Module, copies: dict[int, Any]) -> Forward:
    """The module's forward, bound to its copy; this may be an instance's own `forward`."""
    own = module.__dict__.get("forward")
    if own is None:
        return types.MethodType(type(module).forward, twin)
    return lambda *args, **kwargs: _private(own, copies)(*args, **kwargs)  # noqa: PLW0108, copies fills up


def _relink(twin: nn.Module, copies: dict[int, Any]) -> None:
    """Give the copy its own state, with references to modules replaced by references to their copies."""
    state = twin.__dict__
    children = state["_modules"]
    for name, child in children.items():
        if child is not None:
            children[name] = copies[id(child)]
    leaf = is_leaf(twin)
    if leaf and "forward" not in state and not any(map(state.get, _FORWARD_HOOKS)):
        return
    for hooks in _FORWARD_HOOKS:
        if state[hooks]:
            state[hooks] = OrderedDict((key, _private(hook, copies)) for key, hook in state[hooks].items())
        elif not leaf:  # a user's forward may register some
            state[hooks] = OrderedDict()
    if leaf:
        if "forward" in state:
            state["forward"] = _private(state["forward"], copies)
        return
    own = [(name, value) for name, value in state.items() if name not in _INTERNALS]
    for name, value in own:
        if type(value) not in _PLAIN:
            state[name] = _private(value, copies)


def _private(value: Any, copies: dict[int, Any], depth: int = 0) -> Any:
    """Return a value that a forward may write to: mutable values are copied, modules become their copies.

    Args:
        value: an attribute's value, or a value that it refers to.
        copies: the copies by the id of the original; those of modules are there already.
        depth: how many objects the value is nested in.
    """
    if type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value))):
        return value
    if id(value) not in copies:
        return _anew(value, copies, depth)
    return copies[id(value)]


@functools.singledispatch
def _anew(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """Copy an object and its attributes; return the object itself if it has none or cannot be copied."""
    if depth == _DEEPEST or not getattr(value, "__dict__", None):
        return value
    new = _copied(value, copies)
    if new is not value:
        vars(new).update({name: _private(part, copies, depth + 1) for name, part in vars(value).items()})
    return new


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    with contextlib.suppress(Exception):  # foreign code may raise anything; then the value is shared
        copies[id(value)] = copy.copy(value)
    return copies.get(id(value), value)


for _kind in (nn.Module, nn.Parameter, type, types.ModuleType, enum.Enum):
    _anew.register(_kind, lambda value, copies, depth: value)  # noqa: ARG005
for _kind in (set, np.ndarray):
    _anew.register(_kind, lambda value, copies, depth: _copied(value, copies))  # noqa: ARG005


@_anew.register(Tensor)
@_anew.register(torch.Generator)
def _(value: Any, copies: dict[int, Any], depth: int) -> Any:  # noqa: ARG001
    copies[id(value)] = new = value.clone() if isinstance(value, Tensor) else value.clone_state()
    return new


@_anew.register(dict)
@_anew.register(list)
@_anew.register(deque)
def _(value: Any, copies: dict[int, Any], depth: int) -> Any:
    new = _copied(value, copies)
    if new is not value:
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new[key] = _private(part, copies, depth)
    return new


@_anew.register
def _(value: tuple, copies: dict[int, Any], depth: int) -> Any:
    parts = [_private(part, copies, depth) for part in value]
    same = all(new is old for new, old in zip(parts, value, strict=True))
    return value if same else getattr(type(value), "_make", type(value))(parts)


@_anew.register
def _(value: types.MethodType, copies: dict[int, Any], depth: int) -> Any:
    return types.MethodType(value.__func__, _private(value.__self__, copies, depth))


@_anew.register
def _(value: functools.partial, copies: dict[int, Any], depth: int) -> Any:
    func, args, keywords = (_private(p, copies, depth) for p in (value.func, value.args, value.keywords))
    return functools.partial(func, *args, **keywords)


@_anew.register
def _(value: types.FunctionType, copies: dict[int, Any], depth: int) -> Any:
    """Copy a function, its closure, and the modules and containers among the globals that it reads."""
    if (value.__module__ or "").startswith("torch"):
        return value
    copies[id(value)] = value  # it may refer to itself
    read = {name: value.__globals__.get(name) for name in value.__code__.co_names}
    read = {name: part for name, part in read.items() if isinstance(part, _WRITTEN)}
    anew = {name: _private(part, copies, depth) for name, part in read.items()}
    if not value.__closure__ and all(anew[name] is read[name] for name in read):
        return value
    cells = tuple(_private(cell, copies, depth) for cell in value.__closure__ or ())
    scope = value.__globals__ | anew if anew else value.__globals__
    defaults = _private(value.__defaults__, copies, depth)
    new = types.FunctionType(value.__code__, scope, value.__name__, defaults, cells)
    new.__kwdefaults__ = value.__kwdefaults__
    new.__dict__.update(value.__dict__)
    copies[id(value)] = new
    return new


@_anew.register
def _(value: types.CellType, copies: dict[int, Any], depth: int) -> Any:
    copies[id(value)] = new = types.CellType()
    with contextlib.suppress(ValueError):  # an empty cell
        new.cell_contents = _private(value.cell_contents, copies, depth)
    return new
