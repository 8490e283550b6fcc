"""What is asked of the arguments, and errors that say what was wrong and what to do."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from xcam_fn.names import type_of
from xcam_fn.torch_state import BatchNorm, Convolution, is_readable

_RANKS = {
    3: "signals (B, C, L)",
    4: "images (B, C, H, W)",
    5: "volumes or clips (B, C, D, H, W)",
}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FROM_RAW = "xcam_fn.heatmap(cam, size) converts a raw map"
_WITHOUT_GRADIENTS = "eigencam or scorecam at a named layer, or rise"  # the default is found by a gradient
ARRANGED = "lambda t: einops.rearrange(t[:, 1:], 'b (h w) d -> b d h w', h=14)"


class StructureError(ValueError):
    """A method needs a structure that this network does not have at this layer."""


def check_call(model: nn.Module, x: Tensor) -> None:
    """Raise where model is no module that can be explained, or x no batch of finite floating-point values."""
    if not isinstance(model, nn.Module):
        remedy = "for another runtime, pass model=None and scorer=a function (rise, occlusion, insertion)"
        raise TypeError(f"model must be a torch.nn.Module, got {_kind(model)}; {remedy}")
    if isinstance(model, torch.jit.ScriptModule):
        remedy = "pass the module it was made from"
        raise TypeError(f"model is a TorchScript module, which cannot be split; {remedy}")
    check_input(x)


def check_model(model: nn.Module) -> None:
    """Raise where the model's mode or structure makes its answers depend on chance or on the batch."""
    for name, module in model.named_modules():
        if module.training and _is_random_in_training(module):
            raise ValueError(
                f"model is in training mode, where {_kind(module)} makes results depend on chance or on the "
                "batch; call model.eval() first"
            )
        if isinstance(module, BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model: {name!r} ({_kind(module)}) has no running statistics, so the result depends on the "
                "batch even in evaluation mode; use track_running_stats=True or another normalization"
            )
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(f"model: {name!r} ({_kind(module)}) is not initialized; run model(x) once first")


def check_input(x: Tensor) -> None:
    """Raise where x is not a non-empty batch of finite floating-point values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {_kind(x)}; torch.as_tensor(x) converts an array")
    if not holds_numbers(x):
        kinds = {"nested": x.is_nested, "meta": x.is_meta, f"{x.layout}": x.layout != torch.strided}
        also = "".join(f" and is a {kind} tensor" for kind, is_so in kinds.items() if is_so)
        raise TypeError(
            f"x has dtype {x.dtype}{also}; expected a dense floating-point tensor, preprocessed for the model"
        )
    if x.ndim not in _RANKS:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected a batch of {', or '.join(_RANKS.values())}")
    if x.numel() == 0:
        what = "it holds no values" if x.shape[0] else "an empty batch"
        raise ValueError(f"x has shape {tuple(x.shape)}: {what}; pass at least one image")
    if is_readable(x) and not all(math.isfinite(end) for end in x.detach().aminmax()):
        what = "NaN" if torch.isnan(x.detach()).any() else "infinite values"
        raise ValueError(f"x holds {what}; expected finite values; check the preprocessing")


def _kind(value: Any) -> str:
    return type(value).__name__


def kind_of(value: Any) -> str:
    """What a layer or a function returns, in words."""
    return f"{value.dtype} values" if isinstance(value, Tensor) else type_of(value)


def holds_numbers(value: Any) -> bool:
    """Whether something is a dense tensor of floating-point numbers."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return is_plain and value.dtype in _DTYPES and not value.is_meta


def _is_random_in_training(module: nn.Module) -> bool:
    if "Drop" in _kind(module) or "StochasticDepth" in _kind(module):
        return getattr(module, "p", getattr(module, "drop_prob", 1.0)) != 0
    return isinstance(module, (BatchNorm, nn.RReLU)) or getattr(module, "track_running_stats", False)


def fail(model: nn.Module, x: Tensor, error: Exception, run: Callable[[Tensor], Any]) -> NoReturn:
    """Raise the error of a model's forward, in terms of x where it is about x.

    Args:
        model: the network.
        x: (B, C, *size), what it failed on.
        error: what it raised.
        run: the network as a function of other images.
    """
    said = _in_terms_of_x(model, x, error, run)
    if said is error:  # its own cause it must not be: who follows the causes would not come to an end
        raise error
    raise said from error


def _in_terms_of_x(model: nn.Module, x: Tensor, error: Exception, run: Callable[[Tensor], Any]) -> Exception:
    if is_out_of_memory(error) or isinstance(error, StructureError) or not is_readable(x):
        return error  # a tracer's or a transform's own among them
    shape, said = f"x has shape {tuple(x.shape)}", f"{_kind(error)}: {error}"
    has = next((p for p in model.parameters() if p.is_floating_point()), x)
    first = next((m for m in model.modules() if isinstance(m, Convolution)), None)
    channels = x.shape[1] if first is None else first.in_channels
    remedy = "if the model takes other arguments, bind them with xcam_fn.bind(model, fn)"
    found: Exception = ValueError(f"{shape}, and the model fails on it: {said}; {remedy}")
    if has.device != x.device:
        found = ValueError(f"x is on {x.device}, but the model is on {has.device}; pass x.to('{has.device}')")
    elif _runs(run, x):
        found = LostGradientError(
            f"the model fails while autograd records it ({said}), but runs under no_grad; use a method "
            f"without gradients: {_WITHOUT_GRADIENTS}"
        )
    elif len(x) > 1 and _runs(run, x[:1]):
        found = ValueError(
            f"{shape}: the model fails on {len(x)} images at once ({said}), but runs on one; pass one image, "
            "and chunk_size=1 if the method has this option"
        )
    elif has.dtype != x.dtype and _runs(run, x.detach().to(has.dtype)):
        found = TypeError(f"x has dtype {x.dtype}, but the model has {has.dtype}; pass x.to({has.dtype})")
    elif x.ndim + 1 in _RANKS and _runs(run, x[None]):
        found = ValueError(f"{shape}; the model expects a batch of {_RANKS[x.ndim + 1]}; pass x.unsqueeze(0)")
    elif channels != x.shape[1] and _runs(run, x[:, :1].expand(-1, channels, *x.shape[2:])):
        found = ValueError(f"{shape}; the model expects {channels} channels")
    elif isinstance(error, (ValueError, TypeError)) and _takes_x(model, x):
        found = error
    return found


def _takes_x(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward can be called with the images alone."""
    with contextlib.suppress(TypeError, ValueError):
        return bool(inspect.signature(model.forward).bind(x))
    return False


def is_out_of_memory(error: Exception) -> bool:
    """True for what torch and Python raise where there is not enough memory."""
    said = ("not enough memory", "can't allocate memory")
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in said)


def _runs(run: Callable[[Tensor], Any], x: Tensor) -> bool:
    with contextlib.suppress(Exception), torch.no_grad():
        if is_readable(x):
            run(x.clone())  # a forward may write to it
            return True
    return False


def plain(x: Any) -> Any:
    """The images as a plain tensor: subclasses (of MONAI, of torchvision) change what operations return."""
    is_subclass = isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter) and not x.is_nested
    return x.as_subclass(Tensor) if is_subclass and is_readable(x) else x


def maps_of(x: Tensor) -> str:
    """The shape that maps of x have, in words."""
    return f"({x.shape[0]}, K, {', '.join('DHW'[-(x.ndim - 2) :])})"


def frames_first(x: Tensor) -> str:
    """What to do about clips that were given as (B, T, C, H, W), for a network that takes them so."""
    if x.ndim != 5:
        return ""
    return (
        "; if the network takes clips as (B, T, C, H, W), pass x as (B, C, T, H, W), and "
        "xcam_fn.bind(model, lambda net, x: net(x.transpose(1, 2))) as the model"
    )


def check_features(features: Any, x: Tensor, layer: str) -> None:
    """Raise where a layer's output is not one map (or more) with spatial axes for each image."""
    if not isinstance(features, Tensor):
        found = f"layer {layer!r} returns {kind_of(features)} without a floating-point tensor"
        raise ValueError(f"{found}; choose another layer (xcam_fn.layers(model, x) lists them)")
    if features.ndim == x.ndim and features.shape[0] == x.shape[0] and features.numel() > 0:
        return
    raise ValueError(
        f"layer {layer!r} returns shape {tuple(features.shape)}; expected spatial maps {maps_of(x)}; choose "
        "another layer (layer=None finds one, xcam_fn.layers(model, x) lists them), or pass to_spatial=a "
        f"function that rearranges the output to this shape, such as {ARRANGED}"
    )


def _is_finite(values: Tensor) -> bool:
    """Whether all values are finite, as far as they can be read; what is not stays in their sum."""
    if not is_readable(values) or math.isfinite(float(values.detach().sum())):
        return True
    return bool(torch.isfinite(values.detach()).all())


def check_finite(values: Tensor, what: str) -> None:
    """Raise where what a network computed is not finite."""
    if not _is_finite(values):
        raise ValueError(
            f"{what} holds NaN or infinite values, for example from a root or logarithm at 0, or overflow in "
            f"{values.dtype}; use float32 or another layer"
        )


class NoDefaultLayerError(ValueError):
    """A network has no default layer."""


class LostGradientError(StructureError):
    """No gradient passes from the score to where it is asked for."""


def lost_gradient(where: str) -> LostGradientError:
    """The error for a score that does not depend on something, as far as autograd knows."""
    return LostGradientError(
        f"no gradient reaches {where} from the score: the score does not depend on it, or the target (cls) "
        "or the forward pass detaches it (torch.no_grad, torch.inference_mode, a checkpoint with "
        "use_reentrant=True, integers of quantization); choose a layer that the score depends on, explain "
        f"the network before quantization, or use a method without gradients: {_WITHOUT_GRADIENTS}"
    )


def scores_of(target: Callable[[Any], Any], output: Any, batch: int, *, many: bool = False) -> Tensor:
    """A target's scores, checked; an error of its own is said to be the target's."""
    try:
        scores = target(output)
    except (ValueError, TypeError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"cls: the target fails on the model's output: {_kind(error)}: {error}") from error
    check_scores(scores, batch, many=many)
    return scores


def check_scores(scores: Any, batch: int, *, many: bool = False) -> None:
    """Raise where a target's scores are not B, or with `many` (B, n), floating-point numbers."""
    returned = "cls: the target returned"
    if not isinstance(scores, Tensor):
        raise TypeError(f"{returned} {kind_of(scores)}; expected a tensor of {batch} scores")
    check_dense("what the target in cls returned", scores)
    if scores.ndim not in ((1, 2) if many else (1,)) or scores.shape[0] != batch:
        wanted = f"({batch},), one score for each image"
        raise ValueError(f"{returned} shape {tuple(scores.shape)}; expected {wanted}")
    if not scores.is_floating_point():
        raise TypeError(f"{returned} dtype {scores.dtype}; expected floating-point scores")


def check_to_spatial(to_spatial: Any) -> None:
    """Raise where what places a layer's output is no function."""
    if to_spatial is not None and not callable(to_spatial):
        wanted = f"a function from the layer's output to (B, K, H, W), such as {ARRANGED}"
        raise TypeError(f"to_spatial must be {wanted}, got {_kind(to_spatial)}")


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raise where an option is not an integer of at least so many."""
    wanted = f"an integer ≥ {at_least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not at_least <= value < 2**63:
        raise ValueError(f"{name}={value} is out of range; expected {wanted}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise where an option is not one of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}")


_LARGEST = torch.finfo(torch.float32).max
_BOUNDS = {"above": (">", operator.gt), "at_least": ("≥", operator.ge), "at_most": ("≤", operator.le)}


def check_number(name: str, value: Any, **bounds: int) -> None:
    """Raise where an option is not a finite number within bounds: above=, at_least=, at_most=."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    largest = _LARGEST if isinstance(value, float) else 2**63 - 1  # torch takes no larger integers
    if not abs(value) <= largest or not all(_BOUNDS[kind][1](value, bounds[kind]) for kind in bounds):
        words = " and ".join(f"{_BOUNDS[kind][0]} {bounds[kind]}" for kind in bounds)
        wanted = f"a number {words}" if words else "a finite number"
        raise ValueError(f"{name}={value} is out of range; expected {wanted}")


def check_tensor(name: str, value: Tensor) -> None:
    """Raise where a tensor is not a dense one of finite real numbers, one or more."""
    check_dense(name, value)
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)} and no values; expected at least one")
    if value.is_floating_point() and not _is_finite(value):
        raise not_finite(name)


def not_finite(name: str) -> ValueError:
    """The error for an argument that holds NaN or infinite values."""
    return ValueError(f"{name} holds NaN or infinite values; expected finite values")


def check_unit(what: str, values: Tensor) -> None:
    """Raise where values, as far as they can be read, are not in [0, 1]."""
    if is_readable(values):
        low, high = (float(end) for end in values.detach().aminmax())
        if not (low >= 0 and high <= 1):  # so that NaN is refused as well
            raise ValueError(f"{what} from {low:.4g} to {high:.4g}; expected [0, 1] ({FROM_RAW})")


def check_dense(name: str, value: Tensor) -> None:
    """Raise where a tensor is not a dense one of real numbers, whatever these are."""
    kinds = {"nested": value.is_nested, "meta": value.is_meta, "quantized": value.is_quantized}
    kinds[f"{value.layout}"] = value.layout != torch.strided
    is_odd = value.is_complex() or (value.is_floating_point() and value.dtype not in _DTYPES)
    if is_odd or any(kinds.values()):
        found = " ".join(["a", *(kind for kind, is_so in kinds.items() if is_so), f"tensor of {value.dtype}"])
        raise TypeError(f"{name} is {found}; expected a dense tensor of real numbers")


def check_returned(
    name: str, found: Any, expected: str, fits: Callable[[Tensor], bool] = torch.is_tensor
) -> Tensor:
    """What a function returned, a dense floating-point tensor of a shape that fits."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} returned {kind_of(found)}; expected {expected}")
    check_dense(f"what {name} returned", found)
    if not (found.is_floating_point() and fits(found)):
        raise ValueError(f"{name} returned shape {tuple(found.shape)} and {found.dtype}; expected {expected}")
    return found


def check_amount(name: str, value: Any, *lengths: int) -> None:
    """Raise where an argument asks for more numbers than any picture has."""
    if (needed := math.prod(lengths)) > 2**31:
        raise ValueError(f"{name}={value} is out of range: {needed} values are needed; expected at most 2^31")
