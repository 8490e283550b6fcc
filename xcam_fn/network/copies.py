"""Module trees, copied out of place: what lets a model be traced, recorded and cut without touching it."""

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
_DEEPEST = 2  # objects within objects that are copied; a trainer's data and the like are shared


def _is_wrapper(kind: type[nn.Module]) -> bool:
    """True for the type of a module that only forwards to another: torch.compile's, the data-parallel ones.

    Importing torch._dynamo takes seconds, and where nobody has done so no module is compiled. While another
    thread imports it, the class may not be there yet.
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
    """True for a module of torch.ao that computes with whole numbers."""
    return "quantized" in type(module).__module__


def may_round(modules: Tree) -> bool:
    """Whether a network may compute with whole numbers: by its modules, an exported graph or its weights."""
    weights = {type(p) for _, module, _ in modules for p in module._parameters.values()}
    files = {kind.__module__ for kind in {type(module) for _, module, _ in modules}}
    exported = any(file.startswith(("torch.fx", "torch.export")) for file in files)
    return exported or any("quantized" in file for file in files) or not weights <= _PLAIN_TENSORS


def has_hooks(module: nn.Module) -> bool:
    """True where a forward or backward hook is registered on the module itself."""
    own = vars(module)
    return any(map(own.get, _HOOKS)) and any(
        hook is not _does_nothing for kind in _HOOKS if own.get(kind) for hook in list(own[kind].values())
    )


def name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The first name of a module of the model, None where it is not in it."""
    return next((name for name, other, _ in tree(model) if other is module), None)


def tree(model: nn.Module) -> Tree:
    """Every module once, with its first name and its children, parents first: `named_modules`, but quicker.

    The children are read once: another thread may swap them meanwhile.
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
        intercept: called with each module's name and the module; what it returns makes of the forward of the
            module's copy the one that runs in its place (`None` leaves it).
        clone_buffers: give the copy buffers of its own where a forward may write to them.
        detached: let the copy's parameters record nothing; they share the model's memory all the same.
        modules: the `tree` of the model where it is known; its lists of children become the copy's.

    Returns:
        The copy of the (unwrapped) root. Parameters are read through the model's own dictionaries, so a
        value swapped in by `torch.func.functional_call` is seen. Hooks on forward are kept: they are part of
        what the model computes. TorchScript parts are shared.
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
            if change and has_hooks(module):  # hooks belong to what the module returns
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
    if isinstance(module, _FUSED):  # a hook keeps torch from the fused kernel, which runs no module inside
        state["_forward_pre_hooks"] = OrderedDict(state["_forward_pre_hooks"])
        state["_forward_pre_hooks"][-1] = _does_nothing
    return twin


def _does_nothing(*_: Any) -> None:
    pass


def _bound_forward(module: nn.Module, twin: nn.Module, copies: dict[int, Any]) -> Forward:
    """The module's forward as it runs on its copy, an instance's own `forward` included."""
    own = module.__dict__.get("forward")
    if own is None:
        return types.MethodType(type(module).forward, twin)
    return lambda *args, **kwargs: _private(own, copies)(*args, **kwargs)  # noqa: PLW0108, copies fills up


def _relink(twin: nn.Module, copies: dict[int, Any]) -> None:
    """Give the copy state of its own, in which everything that refers to a module refers to its copy."""
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
        elif not leaf:  # a forward of the user's own may register some
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
    """The value as a forward may write to it: what is mutable is copied, a module stands for its own copy.

    Args:
        value: of an attribute, or what one refers to.
        copies: by the id of what was copied; those of modules are there beforehand.
        depth: in how many objects the value lies.
    """
    if type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value))):
        return value
    if id(value) not in copies:
        return _anew(value, copies, depth)
    return copies[id(value)]


@functools.singledispatch
def _anew(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """A copy of an object, its attributes copied too; the object itself where it has none or is a lock."""
    if depth == _DEEPEST or not getattr(value, "__dict__", None):
        return value
    new = _copied(value, copies)
    if new is not value:
        vars(new).update({name: _private(part, copies, depth + 1) for name, part in vars(value).items()})
    return new


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    with contextlib.suppress(Exception):  # anything may go wrong in foreign code; the value is shared then
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
    """A function whose closure, and what it reads of its module's modules and containers, is copied."""
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
