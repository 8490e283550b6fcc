"""The model as functions: trunk and head at a layer, features, and their gradient."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from xcam_fn import _trace, checks
from xcam_fn._modules import canonical_names, fingerprint, private_copy, unwrap
from xcam_fn.bind import Bound
from xcam_fn.targets import Classes, Target, resolve


class Shared:
    """A layer at which several methods explain one batch: what one of them computed, the next finds here.

    It is made for one call, handed down in the layer's place and gone with it, so that nothing outlives the
    call or is seen by another.
    """

    def __init__(self, layer: str | nn.Module | None) -> None:
        self.layer = layer
        self._found: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What was computed under the key, or what `compute` returns, kept from now on."""
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]


class Same:
    """A key that equals another where both are of one and the same object, which it keeps alive."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


Layer = str | nn.Module | Shared | None


def layer_of(layer: Layer) -> str | nn.Module | None:
    """The layer itself, also where it is shared."""
    return layer.layer if isinstance(layer, Shared) else layer


def once(layer: Layer, key: Any, compute: Callable[[], Any]) -> Any:
    """What `compute` returns; where the layer is shared it is computed once for each key."""
    return layer.once(key, compute) if isinstance(layer, Shared) else compute()


class Split(NamedTuple):
    """A model cut at a layer into two pure functions, `head(*trunk(x)) == model(x)`.

    Attributes:
        trunk: x (B, C, *size) to the layer's output and the residual, what else of the trunk the head reads.
        head: the layer's output and the residual to the model's output.
    """

    trunk: Callable[[Tensor], tuple[Tensor, Any]]
    head: Callable[[Tensor, Any], Any]


class FeatureAndGrad(NamedTuple):
    """What a gradient method needs to know.

    Attributes:
        features: A, the layer's output, (B, K, *spatial).
        grads: G = ∂s/∂A, (B, K, *spatial), or (B, n, K, *spatial) for n classes of each image.
        output: whatever the model returned.
    """

    features: Tensor
    grads: Tensor
    output: Any


class Call(NamedTuple):
    """One module run by a forward: its name, the shape of its output and whether it is a convolution."""

    name: str
    shape: tuple[int, ...]
    kind: str
    is_convolution: bool
    is_pooling: bool


class _Plan(NamedTuple):
    """What is remembered of a model: valid for as long as its fingerprint is."""

    fingerprint: tuple[Any, ...]
    names: dict[int, str]  # by the id of the module
    trace: _trace.Trace | None
    calls: dict[tuple[int, ...], tuple[Call, ...]]  # by the input's shape without its batch
    cuts: dict[tuple[str, int], _trace.Cut]


class Parts(NamedTuple):
    """A model ready to be run in two halves, or in one pass with a value added to the layer's output."""

    model: nn.Module
    layer: str
    call: int
    cut: _trace.Cut | None
    name: str


# Remembered plans, by the id of the model; the weak reference removes an entry with its model.
_PLANS: dict[int, tuple[weakref.ref[nn.Module], _Plan]] = {}
# What compiled calls look up by key: `(layer, call, cut)`, removed with its model.
_COMPILING: dict[str, tuple[str, int, _trace.Cut]] = {}
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def split(model: nn.Module, layer: Layer, x: Float[Tensor, "B C *size"]) -> Split:
    """The model as two pure functions, cut at a layer's output.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name (`"layer4"`, `"layer4.2.relu#2"`), a module of the model, or None for `default_layer`.
        x: (B, C, *size), an input to find the layer with; only its shape matters.

    Returns:
        `Split(trunk, head)`: `trunk(x) -> (features, residual)` and `head(features, residual) -> output`.
        Where the model can be traced the head runs what comes after the layer and nothing else; where it
        cannot, the head runs the model with the layer's output replaced.

    Raises:
        ValueError: the layer is not in the model, is never reached, or is ambiguous.
        TypeError: an argument is of the wrong kind.
    """
    parts = prepare(model, layer, x)
    return Split(
        trunk=lambda x: run_trunk(parts, x),
        head=lambda features, residual: run_head(parts, features, residual),
    )


def features(model: nn.Module, layer: Layer, x: Float[Tensor, "B C *size"]) -> Tensor:
    """The layer's output for x, as the layer returned it (before anything changes it in place).

    Args:
        model: the network, in evaluation mode.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.

    Returns:
        (B, K, *spatial), detached unless x requires grad.

    Raises:
        ValueError: bad x, unknown layer, a layer without spatial maps, or a model in training mode.
        TypeError: an argument is of the wrong kind.
    """
    parts = prepare(model, layer, x)
    with recording(x), checks.explained(model, x):
        found, _ = trunk_of(layer, parts, x)
    return found


def feature_and_grad(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    *,
    create_graph: bool = False,
) -> FeatureAndGrad:
    """The layer's features and the gradient of the score with respect to them.

    One forward of the trunk, and one forward and backward of the head; n classes of each image cost one
    vmapped backward through the head.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        cls: what is explained: None for the predicted class of each image, an int, B ints, (B, n) ints for n
            classes of each image, or a target, a callable from the model's output to B scores.
        create_graph: record the computation, so that the result can be differentiated with respect to the
            parameters as well (it always can with respect to an x that requires grad).

    Returns:
        `FeatureAndGrad(features, grads, output)`.

    Raises:
        ValueError: bad x, layer or class, or a model in training mode.
        TypeError: an argument is of the wrong kind.

    References:
        Selvaraju et al., Grad-CAM (arXiv:1610.02391).
    """
    if not isinstance(layer, Shared):
        return _feature_and_grad(model, layer, x, cls, create_graph)
    key = ("feature_and_grad", Same(cls), create_graph)
    return layer.once(key, lambda: _feature_and_grad(model, layer, x, cls, create_graph))


def _feature_and_grad(
    model: nn.Module, layer: Layer, x: Tensor, cls: Classes, create_graph: bool
) -> FeatureAndGrad:
    parts = prepare(model, layer, x)
    target = resolve(cls)

    def score(output: Any) -> tuple[Tensor, Any]:
        scores = target(output)
        checks.check_scores(scores, x.shape[0], many=isinstance(target, Target))
        return scores, output

    with recording(x, create_graph), checks.explained(model, x):
        if parts.cut is None:
            scores, pullback, (found, output) = _one_pass_vjp(parts, guarded(x), score)
        else:
            found, residual = trunk_of(layer, parts, x)
            with_aux: Any = torch.func.vjp(lambda a: score(run_head(parts, a, residual)), found, has_aux=True)
            scores, pullback, output = with_aux
        checks.check_features(found, x, parts.name)
        grads = pulled_back(pullback, scores)
    return FeatureAndGrad(found, grads, output)


def pulled_back(pullback: Callable[..., tuple[Tensor]], scores: Tensor) -> Tensor:
    """The gradients of scores (B,) or (B, n) as (B, ...) or (B, n, ...), the n in one vmapped backward."""
    if scores.ndim == 1:
        return pullback(torch.ones_like(scores))[0]
    if scores.shape[1] == 1:
        return pullback(torch.ones_like(scores))[0][:, None]
    classes = torch.arange(scores.shape[1], device=scores.device)
    chosen = (classes[:, None, None] == classes) * torch.ones_like(
        scores
    )  # (n, B, n), traceable unlike one_hot
    return torch.vmap(lambda cotangent: pullback(cotangent)[0], out_dims=1)(chosen)


def _one_pass_vjp(
    parts: Parts, x: Tensor, score: Callable[[Any], tuple[Tensor, Any]]
) -> tuple[Tensor, Any, tuple[Tensor, Any]]:
    """The score, its pullback to the layer's output, to which a zero is added, and (features, output)."""
    by_autograd = not in_transform() and not torch.compiler.is_compiling()

    def run(zero: Tensor) -> tuple[Tensor, tuple[Tensor, Any]]:
        seen: list[Tensor] = []

        def perturbed(value: Tensor) -> Tensor:
            seen.append(value.clone())
            if by_autograd:
                torch.set_grad_enabled(True)  # until recorded_vjp puts the caller's own setting back
            return value + zero

        scores, output = score(_run_replaced(parts, x, perturbed))
        return scores, (seen[0], output)

    with torch.no_grad():
        shape_of = run_trunk(parts, x)[0]
    zero = torch.zeros_like(shape_of)
    if by_autograd:
        return recorded_vjp(run, zero)
    with_aux: Any = torch.func.vjp(run, zero, has_aux=True)
    return with_aux


def recorded_vjp(run: Callable[[Tensor], tuple[Tensor, Any]], at: Tensor) -> tuple[Tensor, Any, Any]:
    """What `torch.func.vjp(run, at, has_aux=True)` returns, by autograd.

    A detector's own C++ functions fail within torch.func. Where nothing is to be recorded but this gradient,
    `run` switches recording on when it comes to `at`, so that what is before it costs nothing.
    """
    create_graph = torch.is_grad_enabled()
    at = at if at.requires_grad else at.detach().requires_grad_()
    with torch.set_grad_enabled(create_graph):
        scores, seen = run(at)

    def pullback(cotangent: Tensor) -> tuple[Tensor]:
        if not scores.requires_grad:
            return (torch.zeros_like(at),)
        (gradient,) = torch.autograd.grad(
            scores, at, cotangent, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )
        return (gradient,)

    if create_graph:
        return scores, pullback, seen
    return scores, pullback, pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, seen)


def default_layer(model: nn.Module, x: Float[Tensor, "B C *size"]) -> str:
    """The name of the layer that class activation maps are usually taken at.

    It is the last convolution's activation as the network goes on to use it: the last module run, before
    pooling or flattening, whose output has the last convolution's spatial size (VGG-19: `features.35`,
    ResNet-50: `layer4`, EfficientNet: `features`).

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), an input; only its shape matters.

    Raises:
        ValueError: the model runs no convolution with spatial maps.
        TypeError: an argument is of the wrong kind.
    """
    checks.check_call(model, x)
    root = unwrap(model)
    return _default_name(root, _calls(_plan(root, x), root, x))


def layers(model: nn.Module, x: Float[Tensor, "B C *size"]) -> dict[str, tuple[int, ...]]:
    """The layers with spatial maps that the model runs for x, in order, and their shape for one image.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), an input; only its shape matters.

    Returns:
        Names to shapes; a module that runs several times is listed once per call, as `name#1`, `name#2`, ….

    Raises:
        ValueError: bad x or a model in training mode.
        TypeError: an argument is of the wrong kind.
    """
    checks.check_call(model, x)
    root = unwrap(model)
    calls = _calls(_plan(root, x), root, x)
    counts = _counts(calls)
    seen: dict[str, int] = {}
    listed: dict[str, tuple[int, ...]] = {}
    for call in calls:
        seen[call.name] = number = seen.get(call.name, 0) + 1
        if call.name and len(call.shape) == x.ndim:
            listed[f"{call.name}#{number}" if counts[call.name] > 1 else call.name] = call.shape
    return listed


def _default_name(model: nn.Module, calls: tuple[Call, ...]) -> str:
    mapped = [c for c in calls if len(c.shape) > 2 and c.name]
    convolutions = [c for c in mapped if c.is_convolution]
    spatial = [c for c in convolutions if max(c.shape[2:]) > 1] or convolutions
    if not spatial:
        raise ValueError(
            f"layer=None: {type(unwrap(model)).__name__} runs no convolution, so there is no default layer; "
            "name the layer to explain"
        )
    size = spatial[-1].shape[2:]
    start = max(i for i, call in enumerate(mapped) if call is spatial[-1])
    chosen = [c for c in mapped[start:] if c.shape[2:] == size and not c.is_pooling][-1]
    return chosen.name


def _counts(calls: tuple[Call, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    return counts


# ---------------------------------------------------------------------------------------------------------
# Running the two halves
# ---------------------------------------------------------------------------------------------------------


def trunk_of(layer: Layer, parts: Parts, x: Tensor) -> tuple[Tensor, Any]:
    """The layer's output for the whole batch, which is what a shared layer keeps, and the residual."""
    key = ("trunk", torch.is_grad_enabled())
    found, residual = once(layer, key, lambda: run_trunk(parts, guarded(x)))
    checks.check_features(found, x, parts.name)
    return found, residual


def run_trunk(parts: Parts, x: Tensor) -> tuple[Tensor, Any]:
    """The layer's output and the residual."""
    if parts.cut is not None:
        return parts.cut.trunk(parts.model, x)
    reached: list[Tensor] = []

    def stop(value: Tensor) -> Tensor:
        reached.append(value)
        raise _Reached

    with contextlib.suppress(_Reached):
        _run_replaced(parts, x, stop)
    if not reached:
        raise _never_reached(parts.name, parts.model)
    return reached[0], x


def run_head(parts: Parts, features: Tensor, residual: Any) -> Any:
    """The model's output for a layer's output."""
    if parts.cut is not None:
        return parts.cut.head(parts.model, features, *residual)
    return _run_replaced(parts, residual, lambda _: features.clone())


class _Reached(BaseException):
    """Ends a forward at the layer; not an Exception, so that no forward's own `except` swallows it."""


def _run_replaced(parts: Parts, x: Tensor, change: Callable[[Tensor], Tensor]) -> Any:
    """The model's output for x with the layer's output changed on its way: everything out of place."""
    count = 0

    def intercept(name: str, _: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
        if name != parts.layer:
            return None

        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            output = forward(*args, **kwargs)
            return _with_features(output, change) if count == parts.call else output

        return changed

    return private_copy(parts.model, intercept)(x)


def _with_features(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    leaves, spec = pytree.tree_flatten(output)
    position = _trace.feature_position(output)
    if position is not None:
        leaves[position] = change(leaves[position])
    return pytree.tree_unflatten(leaves, spec)


def run_model(model: nn.Module, x: Tensor) -> Any:
    """The model's own output for x, without letting its forward write to the model or to x."""
    return private_copy(model)(guarded(x))


def whole(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """The model as a function; a compilation, which cannot trace private copies, sees its two halves."""
    if not torch.compiler.is_dynamo_compiling():
        return lambda images: run_model(model, images)
    parts = prepare(model, None, x)
    return lambda images: run_head(parts, *run_trunk(parts, images))


def guarded(x: Tensor) -> Tensor:
    """A copy of x that a forward may write to."""
    return x.clone()


@contextlib.contextmanager
def recording(x: Tensor, create_graph: bool = False) -> Iterator[None]:
    """Record a graph where one is asked for or a transform is at work, and none otherwise."""
    wanted = create_graph or x.requires_grad or in_transform()
    leave_inference = contextlib.nullcontext()
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        leave_inference = torch.inference_mode(False)
        wanted = False
    with leave_inference, torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
        yield


def in_transform() -> bool:
    """True inside a torch.func transform, where x.requires_grad says nothing about what is differentiated."""
    return peek_interpreter_stack() is not None


# ---------------------------------------------------------------------------------------------------------
# Preparing a model, once
# ---------------------------------------------------------------------------------------------------------


def prepare(model: nn.Module, layer: Layer, x: Tensor) -> Parts:
    """The model ready to be run in two halves at the layer, after every check that needs no forward."""
    if torch.compiler.is_dynamo_compiling():
        key = _prepare_while_compiling(model, layer_of(layer), tuple(x.shape[1:]), x.dtype, x.device)
        name, call, cut = _COMPILING[key]
        return Parts(_unwrapped_while_compiling(model), name, call, cut, name)
    layer = layer_of(layer)
    checks.check_call(model, x)
    root = unwrap(model)
    plan = _plan(root, x)
    if all(len(shape) != x.ndim - 1 for shape in plan.calls):
        checks.check_model(root, x)
    if layer is None:
        layer = _default_name(root, _calls(plan, root, x))
    name, call = _resolve(root, layer, plan.names)
    count = _counts(_any_calls(plan)).get(name, 0)
    shown = name if call is None else f"{name}#{call}"
    if count == 0:
        raise _never_reached(shown, root)
    if call is not None and not 1 <= call <= count:
        names = ", ".join(f"{name}#{i + 1}" for i in range(count))
        raise ValueError(
            f"layer {shown!r}: {name!r} runs {count} time(s) in a forward; expected one of {names}"
        )
    return Parts(root, name, call or count, _cut(plan, name, call or count), shown)


def _prepare_while_compiling(
    model: nn.Module, layer: Layer, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> str:
    """The key under which a compilation, which cannot trace a tracer, finds the model prepared."""
    parts = prepare(model, layer, _made_up((1, *shape), dtype, device))
    if parts.cut is None:
        raise ValueError(
            f"layer {parts.name!r}: {type(parts.model).__name__} cannot be traced, so the call cannot be "
            "compiled; call it without torch.compile"
        )
    key = f"{id(parts.model)}/{id(parts.cut)}"
    if key not in _COMPILING:
        weakref.finalize(parts.model, _COMPILING.pop, key, None)
    _COMPILING[key] = (parts.layer, parts.call, parts.cut)
    return key


# What torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, for seconds.
_prepare_while_compiling.__dict__["_dynamo_marked_constant"] = True


def _unwrapped_while_compiling(model: nn.Module) -> nn.Module:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def traced(model: nn.Module, x: Tensor) -> _trace.Trace | None:
    """The model's verified trace, or None where it has none."""
    return _plan(model, x).trace


def _any_calls(plan: _Plan) -> tuple[Call, ...]:
    return next(iter(plan.calls.values()))


def _cut(plan: _Plan, name: str, call: int) -> _trace.Cut | None:
    if plan.trace is None or len(plan.trace.calls.get(name, ())) < call:
        return None
    node = plan.trace.calls[name][call - 1]
    if node is None:
        return None
    if (name, call) not in plan.cuts:
        plan.cuts[name, call] = _trace.cut(plan.trace, node)
    return plan.cuts[name, call]


def _plan(root: nn.Module, x: Tensor) -> _Plan:
    """What is remembered of the model, made anew where its structure has changed."""
    mark = fingerprint(root)
    reference, plan = _PLANS.get(id(root), (None, None))
    if plan is not None and reference is not None and reference() is root and plan.fingerprint == mark:
        return plan
    checks.check_model(root, x)
    plan = _new_plan(root, x, mark)
    if plan.trace is None and _has_wrapped_tensors(root):
        return plan  # under vmap over models a trace cannot be verified: another call may succeed
    key = id(root)
    _PLANS[key] = (weakref.ref(root, lambda _: _PLANS.pop(key, None)), plan)
    return plan


def _new_plan(root: nn.Module, x: Tensor, mark: tuple[Any, ...]) -> _Plan:
    sample = _sample(x)
    with checks.explained(root, x), _outside_transforms(root), torch.no_grad():
        calls, expected = _recorded(root, sample)
        traced = _trace.trace(root)
        if traced is not None:
            traced = _trace.audited(traced, root, sample, expected)
    return _Plan(mark, canonical_names(root), traced, {tuple(x.shape[1:]): calls}, {})


def _calls(plan: _Plan, root: nn.Module, x: Tensor) -> tuple[Call, ...]:
    shape = tuple(x.shape[1:])
    if shape not in plan.calls:
        checks.check_model(root, x)
        with checks.explained(root, x), _outside_transforms(root), torch.no_grad():
            plan.calls[shape], _ = _recorded(root, _sample(x))
    return plan.calls[shape]


def _recorded(root: nn.Module, x: Tensor) -> tuple[tuple[Call, ...], Any]:
    """Every module call of a forward, in the order in which they end, and the model's output."""
    calls: list[Call] = []

    def intercept(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        kind = type(module).__name__

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            calls.append(
                Call(name, _shape(output), kind, isinstance(module, _CONVOLUTIONS), "pool" in kind.lower())
            )
            return output

        return recorded

    output = private_copy(root, intercept)(x.clone())
    return tuple(calls), output


def _shape(output: Any) -> tuple[int, ...]:
    position = _trace.feature_position(output)
    return () if position is None else tuple(pytree.tree_leaves(output)[position].shape)


def _sample(x: Tensor) -> Tensor:
    """One image to try the model with: the first of x where its values can be read, else one made up."""
    if checks.is_readable(x):
        return x[:1].detach()
    return _made_up((1, *x.shape[1:]), x.dtype, x.device)


def _made_up(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with _outside_transforms():
        return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype, device=device).reshape(shape)


@contextlib.contextmanager
def _outside_transforms(root: nn.Module | None = None) -> Iterator[None]:
    """Compute plainly, whatever transform or tracing mode is at work around the call.

    A model whose own parameters a transform has wrapped can only run inside that transform.
    """
    if root is not None and _has_wrapped_tensors(root):
        yield
        return
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def _has_wrapped_tensors(root: nn.Module) -> bool:
    tensors = itertools.chain(root.parameters(), root.buffers())
    return any(is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _resolve(root: nn.Module, layer: str | nn.Module, names: dict[int, str]) -> tuple[str, int | None]:
    """The canonical name of a layer and which of its calls is meant (None: the last)."""
    if isinstance(layer, nn.Module):
        if id(unwrap(layer)) not in names:
            raise ValueError(
                f"layer={type(layer).__name__}(...) is not a module of this {type(root).__name__}; "
                "pass one of its own modules, or a name"
            )
        return names[id(unwrap(layer))], None
    if not isinstance(layer, str):
        raise TypeError(f"layer={layer!r} is a {type(layer).__name__}; expected a name, a module or None")
    path, marked, number = layer.partition("#")
    if marked and not number.isdecimal():
        raise ValueError(f"layer {layer!r}: expected a call number after '#', such as {path + '#1'!r}")
    found = _submodule(root, path)
    if found is None and isinstance(root, Bound):
        found = _submodule(root.model, path)  # a bound model's layers go by the names that they have in it
    if found is None:
        raise ValueError(_unknown_layer(root, path))
    return names[id(found)], int(number) if marked else None


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path; the names that wrappers add to the path may be there or not."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = unwrap(module)
        child = module._modules.get(part)
        if child is None and part not in ("module", "_orig_mod"):
            return None
        module = module if child is None else child
    return None if module is root or module is None else unwrap(module)


def _unknown_layer(root: nn.Module, path: str) -> str:
    names = [name for name, _ in root.named_modules() if name]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its top modules are {_top(root)}"
    return f"layer {path!r} is not in {type(root).__name__}; {hint} (xcam_fn.layers(model, x) lists them all)"


def _top(root: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in root.named_children()) or "none"


def _never_reached(name: str, root: nn.Module) -> ValueError:
    remedy = "; xcam_fn.layers(model, x) lists the layers that run"
    if isinstance(root, Bound):
        remedy += (
            ". fn has to call the model that it is handed, as `lambda net, x: net(x)` does, and not one that "
            "it finds in a variable outside"
        )
    return ValueError(f"layer {name!r} is in {type(root).__name__} but its forward never runs it{remedy}")
