"""What is asked of the arguments, and errors that say what was wrong and what to do."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from xcam_fn.torch_state import BatchNorm, Convolution, is_readable

_RANKS = {
    3: "(B, C, L), a batch of signals",
    4: "(B, C, H, W), a batch of images",
    5: "(B, C, D, H, W), a batch of volumes or, D being time, of clips",
}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ARRANGED = "lambda t: einops.rearrange(t[:, 1:], 'b (h w) d -> b d h w', h=14)"


class StructureError(ValueError):
    """A method needs a structure that this network does not have at this layer."""


def check_call(model: nn.Module, x: Tensor) -> None:
    """Raise where model is no module that can be explained, or x no batch of finite floating-point values."""
    if not isinstance(model, nn.Module):
        remedy = "one of another runtime goes into scorer=, with model=None (rise, occlusion, insertion)"
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
                f"model is in training mode: its {_kind(module)} would make the answer depend on chance or "
                "on the batch; call model.eval() first"
            )
        if isinstance(module, BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model: {name!r}, a {_kind(module)} without running statistics, would make the answer "
                "depend on the batch in evaluation mode too; use track_running_stats=True, or another norm"
            )
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"model has a {_kind(module)} that is not initialized; run the model once before"
            )


def check_input(x: Tensor) -> None:
    """Raise where x is not a non-empty batch of finite floating-point values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {_kind(x)} (torch.as_tensor makes one)")
    if not holds_numbers(x):
        kinds = {"nested": x.is_nested, "meta": x.is_meta, f"{x.layout}": x.layout != torch.strided}
        also = "".join(f", in a {kind} tensor" for kind, is_so in kinds.items() if is_so)
        raise TypeError(
            f"x has dtype {x.dtype}{also}; expected a floating-point tensor, dense, prepared as for the model"
        )
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


def kind_of(value: Any) -> str:
    """What a layer or a function returns, in words."""
    return f"{value.dtype} values" if isinstance(value, Tensor) else f"a {_kind(value)}"


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
    remedy = "where x goes in by another name or beside something else, xcam_fn.bind(model, fn) says how"
    found: Exception = ValueError(f"{shape}, on which the model fails: {said}; {remedy}")
    if has.device != x.device:
        found = ValueError(f"x is on {x.device}, but the model is on {has.device}; pass x.to('{has.device}')")
    elif _runs(run, x):
        found = LostGradientError(
            f"the model fails where a gradient is recorded ({said}) and runs without; use a method without "
            "gradients, such as eigencam, scorecam or rise"
        )
    elif len(x) > 1 and _runs(run, x[:1]):
        found = ValueError(
            f"{shape}: the model fails on {len(x)} images at once ({said}) and runs on one; pass one image, "
            "with chunk_size=1 where the method takes it"
        )
    elif has.dtype != x.dtype and _runs(run, x.detach().to(has.dtype)):
        found = TypeError(f"x has dtype {x.dtype}, but the model has {has.dtype}; pass x.to({has.dtype})")
    elif x.ndim + 1 in _RANKS and _runs(run, x[None]):
        found = ValueError(
            f"{shape}; the model expects {_RANKS[x.ndim + 1]}; add the batch with x.unsqueeze(0)"
        )
    elif channels != x.shape[1] and _runs(run, x[:, :1].expand(-1, channels, *x.shape[2:])):
        found = ValueError(f"{shape}, {x.shape[1]} channels; the model expects {channels}")
    elif isinstance(error, (ValueError, TypeError)):
        found = error
    return found


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
        "; where the network takes clips with their frames first, (B, T, C, H, W), explain "
        "xcam_fn.bind(model, lambda net, x: net(x.transpose(1, 2))) and pass x as (B, C, T, H, W)"
    )


def check_features(features: Any, x: Tensor, layer: str) -> None:
    """Raise where a layer's output is not one map (or more) with spatial axes for each image."""
    if not isinstance(features, Tensor):
        raise ValueError(f"layer {layer!r} returns a {_kind(features)} without a floating-point tensor")
    if features.ndim == x.ndim and features.shape[0] == x.shape[0] and features.numel() > 0:
        return
    raise ValueError(
        f"layer {layer!r} returns shape {tuple(features.shape)}, not the spatial maps {maps_of(x)} that a "
        "class activation map is made of; choose another layer (layer=None finds one, "
        "xcam_fn.layers(model, x) lists them), or pass to_spatial=a function that arranges it so, such as "
        f"{ARRANGED}"
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
            f"{what} holds NaN or infinite values, as a root or a logarithm at 0 makes, or a sum that is too "
            f"large for {values.dtype}; explain the network in float32, or at another layer"
        )


class NoDefaultLayerError(ValueError):
    """A network has no layer that is taken by default."""


class LostGradientError(StructureError):
    """No gradient passes from the score to where it is asked for."""


def lost_gradient(where: str) -> LostGradientError:
    """The error for a score that does not depend on something, as far as autograd knows."""
    return LostGradientError(
        f"no gradient passes from the score to {where}: the score is of another branch, a target of your own "
        "(cls) detaches it, or the forward does, in torch.no_grad, torch.inference_mode or the whole numbers "
        "of a quantized network; explain a layer that the score depends on, the network before it was "
        "quantized, or use a method without gradients, such as eigencam, scorecam, ablationcam or rise"
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
        raise TypeError(f"{returned} a {_kind(scores)}; expected a tensor of {batch} scores")
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
    """Raise where an option is not a whole number of at least so many."""
    wanted = f"a whole number ≥ {at_least}"
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
    largest = _LARGEST if isinstance(value, float) else 2**63 - 1  # of whole numbers torch takes no larger
    if not abs(value) <= largest or not all(_BOUNDS[kind][1](value, bounds[kind]) for kind in bounds):
        words = " and ".join(f"{_BOUNDS[kind][0]} {bounds[kind]}" for kind in bounds)
        raise ValueError(f"{name}={value} is out of range; expected a number {words or 'that is finite'}")


def check_tensor(name: str, value: Tensor) -> None:
    """Raise where a tensor is not a dense one of finite real numbers, one or more."""
    check_dense(name, value)
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it holds no values; expected one or more")
    if value.is_floating_point() and not _is_finite(value):
        raise ValueError(f"{name} holds NaN or infinite values; expected finite ones")


def check_unit(what: str, values: Tensor) -> None:
    """Raise where values, as far as they can be read, are not in [0, 1]."""
    if is_readable(values):
        low, high = (float(end) for end in values.detach().aminmax())
        if not (low >= 0 and high <= 1):  # so that NaN is refused as well
            remedy = "(xcam_fn.heatmap(cam, size) makes that of a raw map)"
            raise ValueError(f"{what} from {low:.4g} to {high:.4g}; expected [0, 1] {remedy}")


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
        raise TypeError(f"{name} returned a {_kind(found)}; expected {expected}")
    check_dense(f"what {name} returned", found)
    if not (found.is_floating_point() and fits(found)):
        raise ValueError(f"{name} returned shape {tuple(found.shape)} and {found.dtype}; expected {expected}")
    return found


def check_amount(name: str, value: Any, *lengths: int) -> None:
    """Raise where an argument asks for more numbers than any picture has."""
    if math.prod(lengths) > 2**31:
        raise ValueError(f"{name}={value} is out of range: {math.prod(lengths)} numbers at once")
