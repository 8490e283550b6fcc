"""Shared by the packages: objects that remember arguments, and helpers for models and maps."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any, ClassVar

from torch import Tensor, nn

from xcam_fn.maps import last_axes
from xcam_fn.network.calls import module_calls
from xcam_fn.network.copies import private_copy, unwrap


def signature(*required: str, rest: str | None = None, **defaults: Any) -> Signature:
    """Return a signature; parameters with defaults come last, `rest` collects other keywords."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, kind) for name in required]
    parameters += [Parameter(name, kind, default=value) for name, value in defaults.items()]
    return Signature(parameters + ([Parameter(rest, Parameter.VAR_KEYWORD)] if rest else []))


class Remembers:
    """An object that remembers the arguments of its class's signature; its context manager does nothing."""

    __signature__: ClassVar[Any]

    def __init__(self, *args: Any, **arguments: Any) -> None:
        given = self.__signature__.bind(*args, **arguments)
        given.apply_defaults()
        vars(self).update(given.arguments)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def evaluated(model: nn.Module) -> nn.Module:
    """Return the model if it is in evaluation mode, else a copy in that mode that shares its parameters.

    The other libraries switch the model itself.
    """
    root = unwrap(model)
    trains = isinstance(root, nn.Module) and any(module.training for module in root.modules())
    return private_copy(root, clone_buffers=False).eval() if trains else root


def last_spatial_layer(model: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    """Return the name of the last module whose output has more than one position, or None."""
    zeros = next(model.parameters()).new_zeros(1, *input_shape)
    calls = module_calls(evaluated(model), zeros)
    spatial = [call.name for call in calls if len(call.shape) == zeros.ndim and set(call.shape[2:]) != {1}]
    return next((name for name in reversed(spatial) if name), None)


def unit(maps: Tensor) -> Tensor:
    """Scale each map from 0 to nearly 1: the range has 1e-8 added, which lowers maps of a tiny range."""
    over = last_axes(maps, maps.ndim - 1)
    above = maps - maps.amin(over, keepdim=True)
    return above / (above.amax(over, keepdim=True) + 1e-8)
