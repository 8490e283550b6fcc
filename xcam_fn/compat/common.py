"""What the packages share: objects that remember arguments, and what is done to models and maps there."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any, ClassVar

from torch import Tensor, nn

from xcam_fn.maps import last_axes
from xcam_fn.network.calls import module_calls
from xcam_fn.network.copies import private_copy, unwrap


def signature(*required: str, rest: str | None = None, **defaults: Any) -> Signature:
    """Parameters by position or name, those with defaults last; `rest` takes what else is named."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, kind) for name in required]
    parameters += [Parameter(name, kind, default=value) for name, value in defaults.items()]
    return Signature(parameters + ([Parameter(rest, Parameter.VAR_KEYWORD)] if rest else []))


class Remembers:
    """An object that remembers the arguments of its class's signature; as a context it does nothing."""

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
    """The model, or in its place a copy in evaluation mode that shares its parameters; theirs switch it."""
    root = unwrap(model)
    trains = isinstance(root, nn.Module) and any(module.training for module in root.modules())
    return private_copy(root, clone_buffers=False).eval() if trains else root


def last_spatial_layer(model: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    """The name of the last module whose output for one image has more than one position, None without one."""
    zeros = next(model.parameters()).new_zeros(1, *input_shape)
    calls = module_calls(evaluated(model), zeros)
    spatial = [call.name for call in calls if len(call.shape) == zeros.ndim and set(call.shape[2:]) != {1}]
    return next((name for name in reversed(spatial) if name), None)


def unit(maps: Tensor) -> Tensor:
    """Each map from 0 to nearly 1: what it is divided by has 1e-8 added, which maps of a tiny range show."""
    over = last_axes(maps, maps.ndim - 1)
    above = maps - maps.amin(over, keepdim=True)
    return above / (above.amax(over, keepdim=True) + 1e-8)
