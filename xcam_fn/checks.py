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
from torch.nn.parameter import is_lazy

from xcam_fn.torch_state import is_readable

_RANKS = {
    3: "(B, C, L), a batch of signals",
    4: "(B, C, H, W), a batch of images",
    5: "(B, C, D, H, W), a batch of volumes",
}


class StructureError(ValueError):
    """A method needs a structure that this network does not have at this layer."""


def check_call(model: nn.Module, x: Tensor) -> None:
    """Raise where model is no module that can be split, or x no batch of finite floating-point values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a TorchScript module, which cannot be split; pass the module it was made from"
        )
    check_input(x)


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raise where the model's mode or structure stands in the way of explaining x."""
    modules = list(model.modules())
    _check_rank(modules, x)
    for module in modules:
        if module.training and _is_random_in_training(module):
            raise ValueError(
                f"model is in training mode: its {type(module).__name__} would make the answer depend on "
                "chance or on the batch; call model.eval() first"
            )
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"model has a {type(module).__name__} that is not initialized; run the model once before"
            )


def check_input(x: Tensor) -> None:
    """Raise where x is not a non-empty batch of finite floating-point values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor (torch.as_tensor makes one)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a floating-point tensor, prepared as for the model")
    if x.ndim not in _RANKS:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected {', or '.join(_RANKS.values())}")
    if x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: an empty batch; pass at least one image")
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: it holds no values")
    if is_readable(x) and not all(math.isfinite(end) for end in x.detach().aminmax()):
        what = "NaN" if torch.isnan(x.detach()).any() else "infinite values"
        raise ValueError(f"x holds {what}; expected finite values (check how the images were prepared)")


def _check_rank(modules: list[nn.Module], x: Tensor) -> None:
    ranks = {len(m.kernel_size) + 2 for m in modules if isinstance(m, nn.modules.conv._ConvNd)}
    if len(ranks) == 1 and x.ndim not in ranks:
        (rank,) = ranks
        remedy = "; add the batch with x.unsqueeze(0)" if x.ndim == rank - 1 else ""
        raise ValueError(f"x has shape {tuple(x.shape)}; the model expects {_RANKS[rank]}{remedy}")


def _is_random_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    name = type(module).__name__
    if "Drop" in name or "StochasticDepth" in name:
        return getattr(module, "p", getattr(module, "drop_prob", 1.0)) != 0
    return isinstance(module, nn.RReLU)


@contextlib.contextmanager
def explained(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Say in terms of x what a failing forward says in terms of its operations."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"x has shape {tuple(x.shape)}, which the model refuses: {error}") from error
    except RuntimeError as error:
        _raise_mismatch(model, x, error)
        raise


def _raise_mismatch(model: nn.Module, x: Tensor, error: RuntimeError) -> None:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None and parameter.device != x.device:
        raise ValueError(
            f"x is on {x.device}, but the model is on {parameter.device}; "
            f"pass x.to({str(parameter.device)!r})"
        ) from error
    if parameter is not None and parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"x has dtype {x.dtype}, but the model has {parameter.dtype}; pass x.to({parameter.dtype})"
        ) from error
    if type(error) is not RuntimeError:  # out of memory, not implemented, …
        return
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if first is not None and first.in_channels != x.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, {x.shape[1]} channels; the model expects {first.in_channels}"
        ) from error
    raise ValueError(f"x has shape {tuple(x.shape)}, on which the model fails: {error}") from error


def check_features(features: Any, x: Tensor, layer: str) -> None:
    """Raise where a layer's output is not one map (or more) with spatial axes for each image."""
    if not isinstance(features, Tensor):
        raise ValueError(
            f"layer {layer!r} returns a {type(features).__name__} without a floating-point tensor"
        )
    if features.ndim != x.ndim or features.shape[0] != x.shape[0] or features.numel() == 0:
        expected = f"({x.shape[0]}, K, {', '.join('DHW'[-(x.ndim - 2) :])})"
        if features.ndim == 3:
            size = " × ".join(str(length) for length in x.shape[2:])
            raise ValueError(
                f"layer {layer!r} returns tokens of shape {tuple(features.shape)}, and no grid of patches of "
                f"an image of {size} has {features.shape[1]} of them; pass to_spatial=a function that "
                f"arranges them as {expected}, such as "
                "lambda t: einops.rearrange(t[:, 1:], 'b (h w) d -> b d h w', h=14)"
            )
        raise ValueError(
            f"layer {layer!r} returns shape {tuple(features.shape)}, not the spatial maps {expected} that a "
            "class activation map is made of; choose another layer (layer=None finds one, "
            "xcam_fn.layers(model, x) lists them)"
        )


def check_scores(scores: Any, batch: int, *, many: bool = False) -> None:
    """Raise where a target's scores are not B, or with `many` (B, n), floating-point numbers."""
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"cls: the target returned a {type(scores).__name__}; expected a tensor of {batch} scores"
        )
    if scores.ndim not in ((1, 2) if many else (1,)) or scores.shape[0] != batch:
        raise ValueError(
            f"cls: the target returned shape {tuple(scores.shape)}; expected ({batch},), one score for each "
            "image"
        )
    if not scores.is_floating_point():
        raise TypeError(f"cls: the target returned dtype {scores.dtype}; expected floating-point scores")


def check_to_spatial(to_spatial: Any) -> None:
    """Raise where what places a layer's output is no function."""
    if to_spatial is not None and not callable(to_spatial):
        raise TypeError(
            f"to_spatial is a {type(to_spatial).__name__}; expected a function from the layer's output to "
            "(B, K, H, W), such as lambda t: einops.rearrange(t[:, 1:], 'b (h w) d -> b d h w', h=14)"
        )


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raise where an option is not a whole number of at least so many."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected a whole number ≥ {at_least}")
    if value < at_least:
        raise ValueError(f"{name}={value} is out of range; expected a whole number ≥ {at_least}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise where an option is not one of a few words."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return "did you mean …?" with the names that are nearest to an unknown one, or else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


def check_number(
    name: str,
    value: Any,
    *,
    above: int | None = None,
    at_least: int | None = None,
    at_most: int | None = None,
) -> None:
    """Raise where an option is not a finite number within its range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected a number")
    bounds = [(">", operator.gt, above), ("≥", operator.ge, at_least), ("≤", operator.le, at_most)]
    given = [(sign, holds, bound) for sign, holds, bound in bounds if bound is not None]
    if not math.isfinite(value) or not all(holds(value, bound) for _, holds, bound in given):
        words = " and ".join(f"{sign} {bound}" for sign, _, bound in given)
        raise ValueError(f"{name}={value} is out of range; expected a number {words}")


def check_seed(seed: Any) -> None:
    """Raise where a seed is not a whole number."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} is a {type(seed).__name__}; expected a whole number")
