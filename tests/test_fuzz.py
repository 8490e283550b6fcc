"""Random wrong calls of every public function: a right result or a documented error, and nothing left behind."""

import contextlib
import os
import random
import signal
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

# Its first import draws from the random module.
import sklearn.decomposition  # noqa: F401  # pyright: ignore[reportUnusedImport]
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import odd_values
import right_calls
import xcam_fn as xf
from right_calls import CALLS, World

# XCAM_EXAMPLES=20000 draws that many, for once by hand.
EXAMPLES = int(os.environ.get("XCAM_EXAMPLES", "1500"))
SECONDS = 10  # a call on a tiny network that takes longer hangs
DOCUMENTED = (ValueError, TypeError, MemoryError)
# Counts of which each one more is one more piece of work: what is huge takes as long as was asked for.
WORK = {"count", "num_masks", "num_samples", "steps", "rounds", "num_scales", "max_iter"}

pytestmark = pytest.mark.usefixtures("unchecked")


class Hang(BaseException):
    """Raised by the alarm; no `except Exception` holds it."""


class Verdict(NamedTuple):
    kind: str  # "fine", "documented", or what is wrong
    why: str
    call: str
    error: BaseException | None = None


# -- one call, bent ---------------------------------------------------------------------------------------------


class Bent(NamedTuple):
    """A call with one to three odd arguments."""

    name: str
    arguments: dict[str, Any]
    odd: dict[str, str]

    def __str__(self) -> str:
        right = [key for key in self.arguments if key not in self.odd]
        odd = ", ".join(f"{key}=<{words}>" for key, words in self.odd.items())
        return f"{self.name}({odd}; right: {', '.join(right)})"


def bent(seed: int, count: int | None = None) -> Bent:
    """The seed's call with `count` odd arguments, or one to three."""
    world = World(seed)
    rng = world.rng
    name = rng.choice(list(CALLS))
    right = CALLS[name]
    arguments, odd = right.arguments(world), {}
    names = list(dict.fromkeys([*arguments, *right.others]))
    number = rng.choice([1, 1, 1, 2, 2, 3]) if count is None else count
    for key in rng.sample(names, min(number, len(names))):
        while key not in odd:
            words, value = odd_values.odd_value(rng, key, arguments.get(key), arguments.get("model"))
            if not _is_work(key, value):
                odd[key] = words
                arguments[key] = value
    if number and rng.random() < 0.02:
        odd["unknown"] = "1"
        arguments["unknown"] = 1
    return Bent(name, arguments, odd)


def _is_work(key: str, value: Any) -> bool:
    if key == "compile":  # seconds for each call where it is taken; tests/test_inference.py has it
        return value is True
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and value > 100 and key in WORK


# -- the verdict -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judged(call: Bent, seconds: float = SECONDS) -> Verdict:
    """Make the call and say what came of it."""
    before = state(call)
    found: Verdict | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with alarm(seconds):
                result = CALLS[call.name].function(**call.arguments)
        except Hang as error:
            found = Verdict("HANG", f"over {seconds} s", str(call), error)
        except Exception as error:
            found = _of_error(call, error)
        else:
            found = _of_result(call, result)
    after = state(call)
    changed = [key for key in before if before[key] != after.get(key)]
    if changed:
        restore()
        found = Verdict("STATE", f"{', '.join(changed[:4])}", str(call), found.error)
    return found


def _of_error(call: Bent, error: Exception) -> Verdict:
    allowed = (*DOCUMENTED, OSError) if call.name.startswith("images.") else DOCUMENTED
    if isinstance(error, (*allowed, odd_values.TheirError)):
        return Verdict("documented", f"{type(error).__name__}: {error}", str(call), error)
    return Verdict("UNDOCUMENTED", f"{type(error).__name__}: {error}", str(call), error)


LAST = {
    "postprocess",
    "combine",
    "similarity",
    "each",
    "gain",
    "weighting",
    "projection",
    "score",
    "perturb",
    "mask",
}


def _of_result(call: Bent, result: Any) -> Verdict:
    theirs = call.name in ("targets.resolve", "split") or any(  # what the network itself returns
        words in odd_values.RUBBISH for key, words in call.odd.items() if key in LAST
    )
    if not theirs and not all(_is_finite(leaf) for leaf in leaves(result)):
        return Verdict("NON-FINITE", _said(result), str(call))
    x, own = call.arguments.get("x"), call.arguments.keys() & {"postprocess", "each", "combine"}
    is_map = call.name in xf.METHODS or call.name in right_calls.WRAPPERS or call.name.startswith("from_")
    if is_map and not own:
        fits = isinstance(result, Tensor) and result.ndim in (x.ndim - 1, x.ndim)
        if not fits or (len(result), *result.shape[-(x.ndim - 2) :]) != (len(x), *x.shape[2:]):
            return Verdict("SHAPE", _said(result), str(call))
        if result.is_complex() or not result.is_floating_point():
            return Verdict("SHAPE", str(result.dtype), str(call))
        if not theirs and not (
            float(result.detach().min()) >= 0 and float(result.detach().max()) <= 1 + 1e-6
        ):
            return Verdict("RANGE", _said(result), str(call))
    return Verdict("fine", _said(result), str(call))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def _is_finite(leaf: Any) -> bool:
    if isinstance(leaf, Tensor) and leaf.is_meta:
        return False
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        leaf = leaf.detach()
        leaf = leaf.values() if leaf.is_nested else leaf.to_dense() if leaf.layout != torch.strided else leaf
        return bool(torch.isfinite(leaf.float() if leaf.is_floating_point() else leaf).all())
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fc":
        return bool(np.isfinite(leaf).all())
    return not isinstance(leaf, (float, np.floating)) or bool(np.isfinite(leaf))


def _said(value: Any) -> str:
    def words(leaf: Any) -> str:
        is_plain = isinstance(leaf, np.ndarray) or (isinstance(leaf, Tensor) and not leaf.is_nested)
        return type(leaf).__name__ + (str(tuple(leaf.shape)) if is_plain else "")

    return "; ".join(words(leaf) for leaf in list(leaves(value))[:3])


# -- state -------------------------------------------------------------------------------------------------------

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
GLOBAL_HOOKS = [
    name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and "hooks" in name
]


def state(call: Bent) -> dict[str, Any]:
    """All that a call is not to change: its arguments, the models among them, and what is global."""
    found: dict[str, Any] = {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "random's generator": hash(random.getstate()),
        "numpy's generator": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "transforms": torch._C._functorch.peek_interpreter_stack() is None,
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "global hooks": [
            len(h) for n in GLOBAL_HOOKS if isinstance(h := getattr(nn.modules.module, n), dict)
        ],
        "Module.__call__": nn.Module.__call__,
    }
    for key, value in call.arguments.items():
        for i, leaf in enumerate(leaves(value)):
            found |= {f"{key}[{i}] {what}": seen for what, seen in _state_of(leaf)}
    return found


def restore() -> None:
    """Undo what is global, so that one bad call is not found again in the next."""
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


def _state_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        for name, module in value.named_modules():
            own = vars(module)
            yield (
                f"{name} module",
                (id(module), module.training, *(len(own[kind]) for kind in HOOKS), "forward" in own),
            )
        for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
            yield f"{name} tensor", (id(tensor), *(seen for _, seen in _state_of(tensor)))
    elif isinstance(value, Tensor) and not is_lazy(value):
        yield "requires_grad", value.requires_grad
        yield "grad", value.is_leaf and value.grad is not None
        yield "version", None if value.is_inference() else value._version
        yield "shape", (type(value), value.dtype, None if value.is_nested else tuple(value.shape))
        with contextlib.suppress(Exception):
            yield "values", value.detach().contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield "values", value.tobytes()


# -- tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_the_right_calls_are_right(name):
    """Else the calls that are bent would not begin right."""
    for seed in range(4):
        call = Bent(name, CALLS[name].arguments(World(seed)), {})
        found = judged(call)
        assert found.kind == "fine", found


def test_every_public_function_is_called():
    called = set(CALLS)
    not_called = {name for name in xf.__all__ if name not in called}
    assert not_called == {
        "Concepts", "Curve", "FeatureAndGrad", "METHODS", "Method", "Mosaics", "Split", "VARIANTS",  # what is returned
        "dataset", "evaluate", "export", "images", "latency", "metrics", "models", "perturb", "plot", "projections",
        "report", "targets", "testing", "weights",  # modules
    }  # fmt: skip
    for room in ("plot", "targets", "projections", "weights"):
        functions = {
            n for n, f in vars(getattr(xf, room)).items() if isinstance(f, types.FunctionType) and n[0] != "_"
        }
        own = {n for n in functions if getattr(xf, room).__dict__[n].__module__.startswith(f"xcam_fn.{room}")}
        listed = set(getattr(getattr(xf, room), "__all__", own))
        assert {f"{room}.{n}" for n in own & listed} - called <= {
            "plot.check_style", "plot.curve_figure", "plot.curves_figure", "plot.panels_figure",
        }  # fmt: skip


def _touching(x: Tensor, model: nn.Module) -> None:
    torch.rand(1)
    x.add_(1)
    model.conv.register_forward_hook(lambda *args: None)


def test_what_is_left_behind_is_found(monkeypatch):
    world = World(0)
    world.is_transformer = False
    monkeypatch.setitem(CALLS, "touching", right_calls.Right(_touching, World.network))
    found = judged(Bent("touching", {"x": world.x, "model": world.model}, {}))
    assert found.kind == "STATE"
    assert found.why == "torch's generator, x[0] version, x[0] values, model[0] conv module"


def test_wrong_calls_are_refused_in_words():
    """Every kind of bad verdict is listed with the first seed that shows it."""
    counts: Counter[str] = Counter()
    bad: dict[tuple[str, str, str], tuple[int, Verdict]] = {}

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 1500, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        call = bent(seed)
        found = judged(call)
        counts[found.kind] += 1
        if found.kind not in ("fine", "documented"):
            bad.setdefault((found.kind, call.name, found.why[:60]), (seed, found))

    run()
    print(counts)
    listed = "\n".join(f"seed {seed}: {v.kind} in {v.call}: {v.why[:300]}" for seed, v in bad.values())
    assert not bad, f"{dict(counts)}\n{listed}"
