"""Odd values of every kind, by name: what is put in the place of one argument of a right call."""

import decimal
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

import xcam_fn as xf


class TheirError(Exception):
    """What a function of the user's own raises."""


class Sub(Tensor):
    """A tensor subclass that does nothing of its own."""


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise TheirError("a function of the user's own")


def theirs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one of the user's own: what it raises by itself is known as theirs."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise TheirError(str(error)) from error

    return called


def _with_first(value: float) -> Callable[[Tensor], Tensor]:
    def changed(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[0] = value
        return t

    return changed


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "an array": lambda t: t.numpy(),
    "lists": lambda t: t.tolist(),
    "a tuple": tuple,
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "uint8": lambda t: (t * 9).to(torch.uint8),
    "int64": lambda t: (t * 9).to(torch.int64),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "no channels": lambda t: t[:, :0],
    "one number": lambda t: t.flatten()[0],
    "the first row": lambda t: t[0],
    "another axis": lambda t: t[None],
    "another axis at the end": lambda t: t[..., None],
    "flat": lambda t: t.flatten(),
    "six axes": lambda t: t.reshape(*[1] * (6 - t.ndim), *t.shape),
    "twice as many": lambda t: torch.cat([t, t]),
    "one column less": lambda t: t[..., 1:],
    "one column": lambda t: t[..., :1],
    "one channel": lambda t: t[:, :1],
    "transposed": lambda t: t.transpose(-1, -2),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "stride 0": lambda t: torch.full((), 0.25).expand(t.shape),
    "not contiguous": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a subclass": lambda t: t.clone().as_subclass(Sub),
    "a tv_tensor": tv_tensors.Image,
    "a parameter": lambda t: nn.Parameter(t.clone()),
    "a parameter of integers": lambda t: nn.Parameter(t.to(torch.int64), requires_grad=False),
    "recorded": lambda t: t.clone().requires_grad_(),
    "recorded, not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "made in inference mode": _inference,
    "with NaN": _with_first(float("nan")),
    "with infinity": _with_first(float("inf")),
    "with -infinity": _with_first(float("-inf")),
    "NaN": lambda t: torch.full_like(t, float("nan")),
    "huge": lambda t: t.sign() * 3e38,
    "tiny": lambda t: t * 1e-42,
    "zeros": torch.zeros_like,
    "constant": lambda t: torch.full_like(t, 0.5),
    "negative": lambda t: -t.abs() - 1,
    "conjugated": lambda t: torch.complex(t, t).conj().imag,
}

NUMBERS: dict[str, Callable[[], Any]] = {
    repr(value): lambda value=value: value
    for value in (
        0, 1, -1, 2, 7, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.0, -0.5, 1.5, 1e-300, 1e300,
        -1e300, float("nan"), float("inf"), float("-inf"), True, False, None, 1j,
    )
} | {
    "np.int64(2)": lambda: np.int64(2),
    "np.float32(0.5)": lambda: np.float32(0.5),
    "np.float64(nan)": lambda: np.float64("nan"),
    "np.bool_(True)": lambda: np.bool_(True),
    "Decimal(2)": lambda: decimal.Decimal(2),
    "array(3)": lambda: np.array(3),
    "tensor(2)": lambda: torch.tensor(2),
    "tensor(0.5)": lambda: torch.tensor(0.5),
    "tensor(nan)": lambda: torch.tensor(float("nan")),
    "tensor(True)": lambda: torch.tensor(True),
}  # fmt: skip

ANYTHING: dict[str, Callable[[], Any]] = {
    repr(value): lambda value=value: value
    for value in (
        "", "rubbish", "gradcam", "mean", "a#b", "1", b"bytes", (), [], {}, [1, 2], [[1], [2, 3]], [[1, 2], [3, 4]],
        [None], ["a", "b"], {"a": 1}, {1, 2}, (0.5, float("nan")), [float("inf")], [0], [-1, 2], range(3), slice(None), ...,
        NotImplemented, int, Tensor, [[]], (2, 2, 2, 2), "nan", "\0", "\ud800", (True, False),
    )
} | {
    "an object": object,
    "an iterator": lambda: iter([1, 2]),
    "array of words": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, {}], dtype=object),
    "empty array": lambda: np.zeros((0, 3)),
    "array (2, 2)": lambda: np.eye(2),
    "array of int64": lambda: np.array([1, 2]),
    "empty tensor": lambda: torch.zeros(0),
    "tensor (2, 2)": lambda: torch.eye(2),
    "tensor (7,)": lambda: torch.ones(7),
    "tensor of int64": lambda: torch.tensor([1, 2]),
    "tensor of bool": lambda: torch.tensor([True, False]),
    "meta tensor": lambda: torch.ones(2, device="meta"),
    "complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
    "NaN tensor": lambda: torch.tensor([float("nan"), 1.0]),
    "sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a module": nn.Identity,
    "a module class": lambda: nn.ReLU,
    "a lambda": lambda: lambda: None,
    "a raising function": lambda: _raises,
    "a target": lambda: xf.targets.logit(1),
    "a method": lambda: xf.gradcam,
}  # fmt: skip


def _of_first(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of anything that returns something made of its first argument."""

    return theirs(
        lambda *args, **kwargs: make(next((a for a in args if isinstance(a, Tensor)), torch.ones(2)))
    )


CALLABLES: dict[str, Callable[..., Any]] = {
    "raises": _raises,
    "takes nothing": lambda: None,
    "returns None": lambda *args, **kwargs: None,
    "returns a word": lambda *args, **kwargs: "rubbish",
    "returns 3": lambda *args, **kwargs: 3,
    "returns nan": lambda *args, **kwargs: float("nan"),
    "returns its argument": _of_first(lambda t: t),
    "returns a tuple": _of_first(lambda t: (t, t)),
    "returns a dict": _of_first(lambda t: {"logits": t}),
    "returns NaN": _of_first(lambda t: t * float("nan")),
    "returns infinity": _of_first(lambda t: t + float("inf")),
    "returns zeros": _of_first(lambda t: t * 0),
    "returns new zeros": _of_first(torch.zeros_like),
    "returns detached": _of_first(lambda t: t.detach()),
    "returns an array": _of_first(lambda t: t.detach().numpy()),
    "returns integers": _of_first(lambda t: t.detach().to(torch.int64)),
    "returns bools": _of_first(lambda t: t > 0),
    "returns complex": _of_first(lambda t: t.to(torch.complex64)),
    "returns float64": _of_first(lambda t: t.double()),
    "returns float16": _of_first(lambda t: t.half()),
    "returns meta": _of_first(lambda t: t.detach().to("meta")),
    "returns sparse": _of_first(lambda t: t.detach().to_sparse()),
    "returns a subclass": _of_first(lambda t: t.as_subclass(Sub)),
    "returns the sum": _of_first(lambda t: t.sum()),
    "returns nothing": _of_first(lambda t: t.flatten()[:0]),
    "returns no rows": _of_first(lambda t: t[:0]),
    "returns flat": _of_first(lambda t: t.flatten()),
    "returns row sums": _of_first(lambda t: t.reshape(len(t), -1).sum(1) if t.ndim else t),
    "returns another axis": _of_first(lambda t: t[None]),
    "returns twice": _of_first(lambda t: torch.cat([t, t]) if t.ndim else t),
    "returns half": _of_first(lambda t: t[..., ::2] if t.ndim else t),
    "returns a list": _of_first(lambda t: list(t) if t.ndim else [t]),
    "is a type": int,
    "is a module": nn.Identity(),
    "is a raising module": type("Raising", (nn.Module,), {"forward": _raises})(),
}
# What these return is the result, or part of it, whatever it holds.
RUBBISH = {"returns nan", "returns NaN", "returns infinity", "returns meta"}


class Odd(nn.Module):
    """A network whose output is changed by a function."""

    def __init__(self, model: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.model(x))


class NoGrad(Odd):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.model(x)


def _script(model: nn.Module) -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()))


MODELS: dict[str, Callable[[nn.Module], Any]] = {
    "its forward": lambda m: m.forward,
    "a function": lambda m: lambda x: m(x) * 1,
    "its class": type,
    "its name": lambda m: "resnet18",
    "its weights": lambda m: m.state_dict(),
    "itself in training": lambda m: m.train(),
    "itself in float64": lambda m: m.double(),
    "itself in bfloat16": lambda m: m.bfloat16(),
    "itself in float16": lambda m: m.half(),
    "itself on meta": lambda m: m.to("meta"),
    "itself without gradients": lambda m: m.requires_grad_(False),
    "its children": lambda m: nn.ModuleList(m.children()),
    "an empty Sequential": lambda m: nn.Sequential(),
    "Identity": lambda m: nn.Identity(),
    "a Linear": lambda m: nn.Linear(16, 5),
    "a Conv2d": lambda m: nn.Conv2d(3, 5, 3),
    "a Conv3d": lambda m: nn.Conv3d(3, 5, 3),
    "a lazy Conv2d": lambda m: nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten()),
    "a Module without forward": lambda m: nn.Module(),
    "a script": _script,
    "DataParallel": nn.DataParallel,
    "in no_grad": lambda m: NoGrad(m, _raises).eval(),
    "bound": lambda m: xf.bind(m, lambda net, x: net(x)),
    "bound to rubbish": lambda m: xf.bind(m, lambda net, x: 3),
}
MODELS |= {
    f"output {name}": lambda m, change=change: Odd(m, change).eval()
    for name, change in CALLABLES.items()
    if name not in ("is a type", "is a module")
}

TARGETS: dict[str, Callable[[], Any]] = {
    "logit(99)": lambda: xf.targets.logit(99),
    "logit([0])": lambda: xf.targets.logit([0, 1, 2]),
    "probability(1)": lambda: xf.targets.probability(1),
    "log_odds()": xf.targets.log_odds,
    "contrast(1, 1)": lambda: xf.targets.contrast(1, 1),
    "contrast(1, 2)": lambda: xf.targets.contrast(1, 2),
    "contrast(count=99)": lambda: xf.targets.contrast(count=99),
    "segment(1)": lambda: xf.targets.segment(1),
    "detection": lambda: xf.targets.detection([0, 0, 4, 4]),
    "similarity": lambda: xf.targets.similarity([1.0, 2.0]),
    "similarity of 5": lambda: xf.targets.similarity(torch.ones(5)),
    "regression(1)": lambda: xf.targets.regression(1),
    "regression(9)": lambda: xf.targets.regression(9),
    "logit - word": lambda: xf.targets.logit(1) - (lambda y: "a"),
    "logit * 1e300": lambda: xf.targets.logit(1) * 1e300,
    "sigmoid": lambda: xf.targets.sigmoid(2),
    "a target class": lambda: xf.targets.Target,
    "[1.5]": lambda: [1.5],
    "[[0, 1], [1, 2]]": lambda: [[0, 1], [1, 2]],
    "array of float": lambda: np.array([0.5, 1.0]),
    "tensor on meta": lambda: torch.tensor([1, 2], device="meta"),
    "tensor (2, 2, 2)": lambda: torch.zeros(2, 2, 2, dtype=torch.int64),
    "tensor uint8": lambda: torch.tensor([1, 0], dtype=torch.uint8),
    "tensor int8": lambda: torch.tensor(1, dtype=torch.int8),
}


def layers_of(model: Any) -> dict[str, Callable[[], Any]]:
    """Layers of a model and what is none."""
    inside = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    names = [
        "nope",
        "",
        ".",
        "#",
        "relu#2",
        "relu#0",
        "relu#-1",
        "relu#99",
        "relu#x",
        "relu#1#2",
        "fc.weight",
        *inside,
    ]
    found: dict[str, Callable[[], Any]] = {repr(name): lambda name=name: name for name in names}
    found |= {f"module {name!r}": lambda module=module: module for name, module in inside.items()}
    found |= {"another model's": lambda: nn.Conv2d(3, 4, 3), "names": lambda: list(inside)}
    found |= {"a parameter": lambda: nn.Parameter(torch.ones(2)), "a number": lambda: 3}
    return found


def _made(rng: random.Random, pool: dict[str, Callable[..., Any]], *given: Any) -> tuple[str, Any] | None:
    """One of the pool, where it can be made of what is given."""
    name = rng.choice(list(pool))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return name, pool[name](*given)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None


_FUNCTIONS = {"to_spatial", "postprocess", "projection", "each", "scorer", "similarity", "combine", "mask", "perturb",
              "weighting", "gain", "fn", "baseline", "method", "gradient", "region"}  # fmt: skip


def odd_value(rng: random.Random, name: str, right: Any, model: Any) -> tuple[str, Any]:
    """An odd value for an argument, in words and itself.

    Args:
        rng: what is drawn from.
        name: the argument's.
        right: the value that it has in a right call.
        model: the call's network.
    """
    while True:
        draw = rng.random()
        found = None
        if draw < 0.2:
            found = _made(rng, ANYTHING)
        elif draw < 0.4:
            found = _made(rng, NUMBERS)
        elif isinstance(right, nn.Module):
            found = _made(rng, MODELS, right)
        elif isinstance(right, Tensor):
            found = _made(rng, TENSORS, right)
        elif name == "layer":
            found = _made(rng, layers_of(model))
        elif name == "cls" and draw < 0.7:
            found = _made(rng, TARGETS)
        elif name == "cls" or name in _FUNCTIONS or callable(right):
            key = rng.choice(list(CALLABLES))
            found = key, CALLABLES[key]
        elif isinstance(right, (list, tuple)) and right:
            found = _in_sequence(rng, right, model)
        elif isinstance(right, dict) and right:
            key = rng.choice(list(right))
            words, value = odd_value(rng, name, right[key], model)
            found = f"{{{key!r}: {words}}}", {**right, key: value}
        else:
            found = _made(rng, NUMBERS)
        if found is not None:
            return found


def _in_sequence(rng: random.Random, right: Any, model: Any) -> tuple[str, Any]:
    """The sequence with another element, or another sequence of its elements."""
    place = rng.randrange(len(right))
    words, value = odd_value(rng, "", right[place], model)
    changes: dict[str, Callable[[], Any]] = {
        f"[{place}] = {words}": lambda: type(right)([*right[:place], value, *right[place + 1 :]]),
        "an array": lambda: np.array(right),
        "a tensor": lambda: torch.tensor(right),
        "backwards": lambda: right[::-1],
        "twice": lambda: right + right,
        "empty": lambda: right[:0],
        "an iterator": lambda: iter(right),
        "a set": lambda: set(right),
        "in a list": lambda: [right],
        "one of it": lambda: right[0],
    }
    name = rng.choice([f"[{place}] = {words}", *changes])
    try:
        return name, changes[name]()
    except (TypeError, ValueError, RuntimeError):
        return "empty", right[:0]
