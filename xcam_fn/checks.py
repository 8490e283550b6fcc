"""What is asked of the arguments, and errors that say what was wrong and what to do."""

from __future__ import annotations

import contextlib
import difflib
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from xcam_fn.torch_state import is_readable

_RANKS = {
    3: "(B, C, L), a batch of signals",
    4: "(B, C, H, W), a batch of images",
    5: "(B, C, D, H, W), a batch of volumes",
}
_ARRANGED = "lambda t: einops.rearrange(t[:, 1:], 'b (h w) d -> b d h w', h=14)"


class StructureError(ValueError):
    """A method needs a structure that this network does not have at this layer."""


def check_call(model: nn.Module, x: Tensor) -> None:
    """Raise where model is no module that can be split, or x no batch of finite floating-point values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {_kind(model)}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        remedy = "pass the module it was made from"
        raise TypeError(f"model is a TorchScript module, which cannot be split; {remedy}")
    check_input(x)


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raise where the model's mode or structure stands in the way of explaining x."""
    modules = list(model.modules())
    ranks = {len(module.kernel_size) + 2 for module in modules if isinstance(module, _ConvNd)}
    if len(ranks) == 1 and x.ndim not in ranks:
        (rank,) = ranks
        remedy = "; add the batch with x.unsqueeze(0)" if x.ndim == rank - 1 else ""
        raise ValueError(f"x has shape {tuple(x.shape)}; the model expects {_RANKS[rank]}{remedy}")
    for module in modules:
        if module.training and _is_random_in_training(module):
            raise ValueError(
                f"model is in training mode: its {_kind(module)} would make the answer depend on chance or "
                "on the batch; call model.eval() first"
            )
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"model has a {_kind(module)} that is not initialized; run the model once before"
            )


def check_input(x: Tensor) -> None:
    """Raise where x is not a non-empty batch of finite floating-point values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {_kind(x)}; expected a torch.Tensor (torch.as_tensor makes one)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a floating-point tensor, prepared as for the model")
    if x.ndim not in _RANKS:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected {', or '.join(_RANKS.values())}")
    if x.numel() == 0:
        what = "it holds no values" if x.shape[0] else "an empty batch"
        raise ValueError(f"x has shape {tuple(x.shape)}: {what}; pass at least one image")
    if is_readable(x) and not all(math.isfinite(end) for end in x.detach().aminmax()):
        what = "NaN" if torch.isnan(x.detach()).any() else "infinite values"
        raise ValueError(f"x holds {what}; expected finite values (check how the images were prepared)")


def _kind(value: Any) -> str:
    return type(value).__name__


def _is_random_in_training(module: nn.Module) -> bool:
    if "Drop" in _kind(module) or "StochasticDepth" in _kind(module):
        return getattr(module, "p", getattr(module, "drop_prob", 1.0)) != 0
    return isinstance(module, (_BatchNorm, nn.RReLU))


@contextlib.contextmanager
def explained(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Say in terms of x what a failing forward says in terms of its operations."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"x has shape {tuple(x.shape)}, which the model refuses: {error}") from error
    except RuntimeError as error:
        mismatch = _mismatch(model, x, error)
        if mismatch is None:
            raise
        raise mismatch from error


def _mismatch(model: nn.Module, x: Tensor, error: RuntimeError) -> Exception | None:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    shape = f"x has shape {tuple(x.shape)}"
    if parameter is not None and (device := parameter.device) != x.device:
        return ValueError(f"x is on {x.device}, but the model is on {device}; pass x.to({str(device)!r})")
    if parameter is not None and parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        has = f"the model has {parameter.dtype}"
        return TypeError(f"x has dtype {x.dtype}, but {has}; pass x.to({parameter.dtype})")
    if type(error) is not RuntimeError:  # out of memory, not implemented, …
        return None
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    if first is not None and first.in_channels != x.shape[1]:
        return ValueError(f"{shape}, {x.shape[1]} channels; the model expects {first.in_channels}")
    return ValueError(f"{shape}, on which the model fails: {error}")


def check_features(features: Any, x: Tensor, layer: str) -> None:
    """Raise where a layer's output is not one map (or more) with spatial axes for each image."""
    if not isinstance(features, Tensor):
        raise ValueError(f"layer {layer!r} returns a {_kind(features)} without a floating-point tensor")
    if features.ndim == x.ndim and features.shape[0] == x.shape[0] and features.numel() > 0:
        return
    shape, wanted = tuple(features.shape), f"({x.shape[0]}, K, {', '.join('DHW'[-(x.ndim - 2) :])})"
    if features.ndim == 3:
        size = " × ".join(map(str, x.shape[2:]))
        raise ValueError(
            f"layer {layer!r} returns tokens of shape {shape}, and no grid of patches of an image of {size} "
            f"has {shape[1]} of them; pass to_spatial=a function that arranges them as {wanted}, such as "
            f"{_ARRANGED}"
        )
    raise ValueError(
        f"layer {layer!r} returns shape {shape}, not the spatial maps {wanted} that a class activation map "
        "is made of; choose another layer (layer=None finds one, xcam_fn.layers(model, x) lists them)"
    )


def check_scores(scores: Any, batch: int, *, many: bool = False) -> None:
    """Raise where a target's scores are not B, or with `many` (B, n), floating-point numbers."""
    returned = "cls: the target returned"
    if not isinstance(scores, Tensor):
        raise TypeError(f"{returned} a {_kind(scores)}; expected a tensor of {batch} scores")
    if scores.ndim not in ((1, 2) if many else (1,)) or scores.shape[0] != batch:
        wanted = f"({batch},), one score for each image"
        raise ValueError(f"{returned} shape {tuple(scores.shape)}; expected {wanted}")
    if not scores.is_floating_point():
        raise TypeError(f"{returned} dtype {scores.dtype}; expected floating-point scores")


def check_to_spatial(to_spatial: Any) -> None:
    """Raise where what places a layer's output is no function."""
    if to_spatial is not None and not callable(to_spatial):
        wanted = f"a function from the layer's output to (B, K, H, W), such as {_ARRANGED}"
        raise TypeError(f"to_spatial is a {_kind(to_spatial)}; expected {wanted}")


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raise where an option is not a whole number of at least so many."""
    wanted = f"expected a whole number ≥ {at_least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {_kind(value)}; {wanted}")
    if value < at_least:
        raise ValueError(f"{name}={value} is out of range; {wanted}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise where an option is not one of a few words."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return "did you mean …?" with the names that are nearest to an unknown one, or else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


_BOUNDS = {"above": (">", operator.gt), "at_least": ("≥", operator.ge), "at_most": ("≤", operator.le)}


def check_number(name: str, value: Any, **bounds: int) -> None:
    """Raise where an option is not a finite number within bounds: above=, at_least=, at_most=."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {_kind(value)}; expected a number")
    if not math.isfinite(value) or not all(_BOUNDS[kind][1](value, bounds[kind]) for kind in bounds):
        words = " and ".join(f"{_BOUNDS[kind][0]} {bounds[kind]}" for kind in bounds)
        raise ValueError(f"{name}={value} is out of range; expected a number {words or 'that is finite'}")


def check_seed(seed: Any) -> None:
    """Raise where a seed is not a whole number."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} is a {_kind(seed)}; expected a whole number")
