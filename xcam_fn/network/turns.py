"""Networks whose own code mirrors, turns or warps the image: shapes do not tell where their maps lie."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn.network.copies import Tree, has_hooks, is_leaf

_MATRIX: Any = Tensor.mT
_MOVING = {F.grid_sample, torch.roll, Tensor.roll}
_ORDERS = {
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "rot90", "flip", "fliplr",
    "flipud",
}  # fmt: skip
_ARRANGING = {getattr(home, name) for home in (torch, Tensor) for name in _ORDERS}
_ARRANGING |= _MOVING | {_MATRIX.__get__}
_KNOWN = {"torch", "builtins", "math", "typing", "functools", "itertools", "copy"}
_NAMES = _ORDERS | {"grid_sample", "roll", "mT", "rearrange"}


class Turns(TorchFunctionMode):
    """Notes whether maps of the image's size are mirrored, turned or warped while it is entered.

    Args:
        size: the images' size.
        noted: called the first time.
    """

    def __init__(self, size: tuple[int, ...], noted: Callable[[], None]) -> None:
        super().__init__()
        self.size, self.noted, self.is_over = size, noted, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ARRANGING and not self.is_over and args and _spans(args[0], self.size):
            self.is_over = func in _MOVING or _rearranges(func, args[1:], kwargs, len(self.size))
            if self.is_over:
                self.noted()
        return func(*args, **kwargs)


def _spans(values: Any, size: tuple[int, ...]) -> bool:
    is_map = isinstance(values, Tensor) and values.ndim == len(size) + 2
    return is_map and size in (tuple(values.shape[2:]), tuple(values.shape[1:-1]))


def _rearranges(func: Any, others: tuple[Any, ...], named: dict[str, Any], axes: int) -> bool:
    """Whether a function changes more of maps than the place of the channel axis and the channels' order."""
    index = torch.arange(math.prod((2, 3, 5, 7)[: axes + 1])).reshape(1, *(2, 3, 5, 7)[: axes + 1])
    maps = {tuple(one.flatten().tolist()) for one in index[0]}
    found = func(index, *others, **named)
    return all(
        placed.shape != index.shape or {tuple(one.flatten().tolist()) for one in placed[0]} != maps
        for placed in (found, found.movedim(-1, 1))
    )


def may_turn(modules: Tree) -> bool:
    """Whether a network's code names a function that may turn an image, so that `Turns` has to look.

    The mode costs a network of many small layers up to 7 %; reading the names takes 0.1 ms. The code is that
    of the modules' types and of the functions that it reaches, those of torch left out; where code is not
    known, as of other callable objects and of hooks, it may turn.
    """
    own = [module for _, module, _ in modules if not is_leaf(module)]
    pending = [function for kind in {type(module) for module in own} for function in _functions_of(kind)]
    pending += _foreign([value for module in own for value in vars(module).values() if callable(value)])
    seen: set[types.CodeType] = set()
    while pending:
        function = pending.pop()
        code = getattr(function, "__code__", None)
        if _arranges(function) or (code is None and not isinstance(function, types.BuiltinFunctionType)):
            return True
        if code is None or code in seen:
            continue
        seen.add(code)
        names = _names_in(code)
        if names & _NAMES:
            return True
        pending += _reached(function, names)
    return any(has_hooks(module) for _, module, _ in modules)


def _functions_of(kind: type) -> Iterator[Any]:
    for base in kind.__mro__:
        if not _is_known(base):
            for value in vars(base).values():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(function, types.FunctionType):
                    yield function


@functools.cache
def _names_in(code: types.CodeType) -> frozenset[str]:
    """The names of attributes and globals in code, which cannot change."""
    inner = (_names_in(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _reached(function: Any, names: frozenset[str]) -> Iterator[Any]:
    """What a function may call by its globals, the modules among these, and its closure."""
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    for value in list(named):
        if isinstance(value, types.ModuleType) and not _is_known(value):
            named += [vars(value)[name] for name in names if name in vars(value)]
    named += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    return _foreign([value for value in named if callable(value)])


def _foreign(values: Iterable[Any]) -> Iterator[Any]:
    """The callables that may turn an image: of modules, types and torch's own only those that arrange."""
    for value in values:
        called = value.func if isinstance(value, functools.partial) else value
        if _arranges(called) or not (isinstance(called, (nn.Module, type)) or _is_known(called)):
            yield called


def _arranges(function: Any) -> bool:
    return isinstance(function, Hashable) and function in _ARRANGING


def _is_known(value: Any) -> bool:
    """Whether something is of torch or Python itself, and turns no image under another name."""
    home = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    return str(home).partition(".")[0] in _KNOWN
