"""What annotations say of arguments, held to: the kinds of numbers that options are, and one check of all."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import numpy as np
import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from xcam_fn import checks

Function = TypeVar("Function", bound=Callable[..., Any])

Count = Annotated[int, ("at_least", 1)]
Length = Annotated[int, ("at_least", 0)]
Positive = Annotated[float, ("above", 0)]
NonNegative = Annotated[float, ("at_least", 0)]
Share = Annotated[float, ("at_least", 0), ("at_most", 1)]
Percentile = Annotated[float, ("at_least", 0), ("at_most", 100)]

_WORDS: dict[Any, str] = {
    bool: "True or False", int: "an integer", float: "a number", str: "a name", type(None): "None",
    Callable: "a callable", Sequence: "a list", Iterable: "an iterable",
}  # fmt: skip


class ReadableSignature(inspect.Signature):
    """A signature that prints functions by name, without addresses, and annotations without quotes."""

    @classmethod
    def of(cls, signature: inspect.Signature) -> ReadableSignature:
        """The same parameters and return type."""
        return cls(list(signature.parameters.values()), return_annotation=signature.return_annotation)

    def __str__(self) -> str:
        return _readable(super().__str__())

    def format(self, **how: Any) -> str:
        """As `help` asks for it from Python 3.13 on."""
        return _readable(super().format(**how))  # pyright: ignore[reportAttributeAccessIssue]


def _readable(signature: str) -> str:
    named = re.sub(r"<function ([\w.]+) at 0x\w+>", r"\1", signature)
    return re.sub(r"(?<=: |> )(ForwardRef\()?'([^']*)'(?(1)\))", r"\2", named)


def checked(function: Function) -> Function:
    """The function, what it is given held to its annotations first; not where it is compiled.

    What it returns is finite. It is itself as it was in `unchecked(function)`.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **options)
        hints, given = _hints(function), dict(zip(names, args, strict=False)) | options
        tensors = [(name, value) for name, value in given.items() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for _, value in tensors):
            for name, value in tensors:
                if value.is_inference():
                    raise ValueError(f"{name} was created in torch.inference_mode; pass {name}.clone()")
        with jaxtyped("context"):  # axes of one name are as long in all arguments
            for name, value in given.items():
                check(name, value, hints.get(name, Any))
        found = function(*args, **options)
        if isinstance(found, Tensor):
            checks.check_finite(found, f"what {function.__name__} returns")
        return found

    called.__dict__["unchecked"] = function
    return cast(Function, called)


def unchecked(function: Function) -> Function:
    """The function without the checks of `checked`, for arguments that are known to be right."""
    return getattr(function, "unchecked", function)


@functools.lru_cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    return hints_of(function)


def hints_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """A function's annotations by the names of its parameters; none where they cannot be resolved."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a user's own, of names that only a type checker imports
        return {}


def check(name: str, value: Any, hint: Any) -> None:
    """Raise where an argument is not what its annotation says, as far as that says it."""
    if isinstance(value, Tensor):
        (checks.check_dense if hint is Tensor else checks.check_tensor)(name, value)
    kinds = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    fitting = [kind for kind in kinds if _fits(value, kind)]
    kind, bounds = _plain(fitting[0] if fitting else kinds[0])
    is_word = isinstance(value, str) and get_origin(kind) is Literal
    if not fitting and not is_word:
        raise TypeError(f"{name} must be {' or '.join(map(_words, kinds))}, got {_found(value)}")
    if is_word or get_origin(kind) is Literal:
        checks.check_choice(name, value, get_args(kind))
    elif kind is float:
        checks.check_number(name, value, **bounds)
    elif kind is int and bounds:
        checks.check_count(name, value, **bounds)
    elif get_origin(kind) is Sequence and len(fitting) == 1:
        if len(value) == 0:
            raise ValueError(f"{name} is empty; expected at least one entry")
        for one in value:
            check(name, one, get_args(kind)[0])
    elif get_origin(kind) is tuple and len(fitting) == 1:
        each = get_args(kind)
        each = each[:1] * len(value) if each[-1] is ... else each
        if len(value) != len(each):
            raise ValueError(f"{name} has {len(value)} entries; expected {len(each)}")
        for one, of_one in zip(value, each, strict=True):
            check(name, one, of_one)


def _plain(hint: Any) -> tuple[Any, dict[str, Any]]:
    """A kind without its bounds, and these."""
    return (hint.__origin__, dict(hint.__metadata__)) if get_origin(hint) is Annotated else (hint, {})


def _fits(value: Any, hint: Any) -> bool:
    kind, _ = _plain(hint)
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(choice) for choice in get_args(kind))
    if origin is Sequence:
        is_array = isinstance(value, np.ndarray) and value.ndim > 0
        return is_array or (isinstance(value, Sequence) and not isinstance(value, str))
    if origin in (int, float):  # a bool is a number to Python alone
        return isinstance(value, (int, origin, torch.SymInt)) and not isinstance(value, bool)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _found(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} and {value.dtype}"
    return repr(value) if type(value) in _WORDS else type(value).__name__


def _words(hint: Any) -> str:
    kind, bounds = _plain(hint)
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return f"{'a floating-point' if 'float32' in kind.dtypes else 'an integer'} tensor ({kind.dim_str})"
    bound = f" ≥ {bounds['at_least']}" if "at_least" in bounds else ""
    return _WORDS.get(origin, f"a {origin.__name__.lower()}") + bound
