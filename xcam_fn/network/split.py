"""The model as functions: trunk and head at a layer, features, and their gradient."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from xcam_fn import checks
from xcam_fn.network import trace
from xcam_fn.network.attention import differentiable_twice
from xcam_fn.network.bound import Bound
from xcam_fn.network.copies import canonical_names, fingerprint, private_copy, unwrap
from xcam_fn.network.places import (
    Call,
    ToSpatial,
    are_maps,
    attention_positions,
    default_position,
    own_layout,
    pools,
    replaced,
    to_spatial_of,
)
from xcam_fn.targets import Classes, Target, resolve


class Shared:
    """A layer at which several methods explain one batch: what one of them computed, the next finds here.

    It is made for one call, handed down in the layer's place and gone with it, so that nothing outlives the
    call or is seen by another.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = unshared(layer)
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


class At(NamedTuple):
    """A layer, and what places its output as (B, K, *spatial).

    Attributes:
        layer: a name, a module of the model, or None for `default_layer`.
        to_spatial: the layer's output to (B, K, *spatial); it selects and arranges, and computes nothing.
    """

    layer: str | nn.Module | None
    to_spatial: ToSpatial


Layer = str | nn.Module | At | Shared | None


def at(layer: Layer, to_spatial: ToSpatial | None) -> Layer:
    """The layer with what places its output, for every function that takes a layer.

    Args:
        layer: a name, a module of the model, or None for `default_layer`.
        to_spatial: the layer's output, such as tokens (B, T, D), to (B, K, *spatial); None finds it.

    Raises:
        TypeError: `to_spatial` is not callable.
    """
    if to_spatial is None:
        return layer
    if not callable(to_spatial):
        raise TypeError(
            f"to_spatial is a {type(to_spatial).__name__}; expected a function from the layer's output to "
            "(B, K, H, W), such as lambda t: einops.rearrange(t[:, 1:], 'b (h w) d -> b d h w', h=14)"
        )
    if isinstance(layer, Shared):
        inner = layer.layer
        return layer.once(("at", Same(to_spatial)), lambda: Shared(at(inner, to_spatial)))
    return At(layer_of(layer), to_spatial)


def layer_of(layer: Layer) -> str | nn.Module | None:
    """The layer itself, also where it is shared or placed."""
    if isinstance(layer, Shared):
        return layer_of(layer.layer)
    return layer.layer if isinstance(layer, At) else layer


def unshared(layer: Layer) -> str | nn.Module | At | None:
    """The layer, with what places its output but shared with nobody."""
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


class _Plan(NamedTuple):
    """What is remembered of a model: valid for as long as its fingerprint is."""

    fingerprint: tuple[Any, ...]
    names: dict[int, str]  # by the id of the module
    trace: trace.Trace | None
    calls: dict[tuple[int, ...], tuple[Call, ...]]  # by the input's shape without its batch
    cuts: dict[tuple[str, int], trace.Cut]
    places: dict[tuple[int, tuple[int, ...]], ToSpatial | None]  # by the call and the input's shape
    defaults: dict[tuple[int, ...], str]  # the default layer, by the input's shape without its batch


class Parts(NamedTuple):
    """A model ready to be run in two halves, or in one pass with a value added to the layer's output."""

    model: nn.Module
    layer: str
    call: int
    cut: trace.Cut | None
    name: str
    to_spatial: ToSpatial | None
    axes: int  # of the input, its batch included

    @property
    def takes_any_batch(self) -> bool:
        """Whether the head runs on another batch than its trunk, given the residual of each row."""
        return self.cut is not None and self.cut.residual_is_empty


# Remembered plans, by the id of the model; the weak reference removes an entry with its model.
_PLANS: dict[int, tuple[weakref.ref[nn.Module], _Plan]] = {}
# What compiled calls look up by key: `(layer, call, cut, to_spatial)`, removed with its model.
_COMPILING: dict[str, tuple[str, int, trace.Cut, ToSpatial | None]] = {}
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def split(
    model: nn.Module, layer: Layer, x: Float[Tensor, "B C *size"], *, to_spatial: ToSpatial | None = None
) -> Split:
    """The model as two pure functions, cut at a layer's output.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name (`"layer4"`, `"layer4.2.relu#2"`), a module of the model, or None for `default_layer`.
        x: (B, C, *size), an input to find the layer with; only its shape matters.
        to_spatial: where the layer returns tokens (B, T, K) or channels last, the function that selects and
            arranges them as (B, K, *spatial); None finds it.

    Returns:
        `Split(trunk, head)`: `trunk(x) -> (features, residual)` and `head(features, residual) -> output`.
        Where the model can be traced the head runs what comes after the layer and nothing else; where it
        cannot, the head runs the model with the layer's output replaced.

    Raises:
        ValueError: the layer is not in the model, is never reached, or is ambiguous.
        TypeError: an argument is of the wrong kind.
    """
    parts = prepare(model, at(layer, to_spatial), x)
    return Split(
        trunk=lambda x: run_trunk(parts, x),
        head=lambda features, residual: run_head(parts, features, residual),
    )


def features(
    model: nn.Module, layer: Layer, x: Float[Tensor, "B C *size"], *, to_spatial: ToSpatial | None = None
) -> Tensor:
    """The layer's output for x, as the layer returned it (before anything changes it in place).

    Args:
        model: the network, in evaluation mode.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images.
        to_spatial: where the layer returns tokens (B, T, K) or channels last, the function that selects and
            arranges them as (B, K, *spatial); None finds it.

    Returns:
        (B, K, *spatial), detached unless x requires grad.

    Raises:
        ValueError: bad x, unknown layer, a layer without spatial maps, or a model in training mode.
        TypeError: an argument is of the wrong kind.
    """
    layer = at(layer, to_spatial)
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
    to_spatial: ToSpatial | None = None,
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
        to_spatial: where the layer returns tokens (B, T, K) or channels last, the function that selects and
            arranges them as (B, K, *spatial); None finds it.
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
    layer = at(layer, to_spatial)
    if not isinstance(layer, Shared):
        return _feature_and_grad(model, layer, x, cls, create_graph)
    key = ("feature_and_grad", Same(cls), create_graph)
    return layer.once(key, lambda: _feature_and_grad(model, layer, x, cls, create_graph))


def _feature_and_grad(
    model: nn.Module, layer: Layer, x: Tensor, cls: Classes, create_graph: bool
) -> FeatureAndGrad:
    parts = prepare(model, layer, x)
    scores_of = checked_scores(cls, x.shape[0])

    def score(output: Any) -> tuple[Tensor, Any]:
        return scores_of(output), output

    tokens = differentiable_twice if parts.to_spatial is not None else contextlib.nullcontext
    with recording(x, create_graph), checks.explained(model, x), tokens():
        if parts.cut is None:
            raw, own, scores, output = _in_one_pass(parts, guarded(x), score)
            found, grads = _placed(parts, raw), _placed(parts, own, classes=scores.ndim == 2)
            checks.check_features(found, x, parts.name)
        else:
            found, residual = trunk_of(layer, parts, x)
            with_aux: Any = torch.func.vjp(lambda a: score(run_head(parts, a, residual)), found, has_aux=True)
            scores, pullback, output = with_aux
            grads = pulled_back(pullback, scores)
    if parts.to_spatial is not None and checks.is_readable(x) and not grads.detach().any():
        _check_patches_have_a_say(parts, x, score)
    return FeatureAndGrad(found, grads, output)


def checked_scores(cls: Classes, batch: int) -> Callable[[Any], Tensor]:
    """The function from the model's output to a batch's scores, (B,) or (B, n), their shape checked."""
    target = resolve(cls)

    def scores_of(output: Any) -> Tensor:
        scores = target(output)
        checks.check_scores(scores, batch, many=isinstance(target, Target))
        return scores

    return scores_of


def _check_patches_have_a_say(parts: Parts, x: Tensor, score: Callable[[Any], tuple[Tensor, Any]]) -> None:
    """Raise where the score reads of the layer's tokens only those that stand for no place."""
    with torch.no_grad():
        raw, _ = _own_trunk(parts, guarded(x))
        taken = _placed(parts, torch.ones_like(raw)).numel()
    if taken == raw.numel():
        return
    with torch.no_grad():
        _, grads, _, _ = _in_one_pass(parts, guarded(x), score)
    if grads.any():
        raise ValueError(
            f"layer {parts.name!r}: the score reads its class token alone, so the gradient of every patch is "
            f"zero and there is no map; explain a layer before the last attention, such as "
            f"{default_layer(parts.model, x)!r} (layer=None)"
        )


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


class _OnePass(NamedTuple):
    """What one forward of the whole model tells: the layer's output as it is, its gradient, the rest."""

    features: Tensor
    grads: Tensor
    scores: Tensor
    output: Any


def _in_one_pass(parts: Parts, x: Tensor, score: Callable[[Any], tuple[Tensor, Any]]) -> _OnePass:
    """The layer's output and the gradient of a zero added to it, where the model cannot be cut in two."""
    if in_transform() or not checks.is_readable(x):
        return _in_one_transform(parts, x, score)
    wanted = torch.is_grad_enabled()
    seen: list[Tensor] = []

    def perturbed(value: Tensor) -> Tensor:
        zero = torch.zeros_like(value).requires_grad_()
        seen[:] = [value.clone(), zero]
        torch.set_grad_enabled(True)  # what comes before the layer is recorded only where it is asked for
        return value + zero

    with torch.set_grad_enabled(wanted):
        scores, output = score(_run_replaced(parts, x, perturbed))
        if not seen:
            raise _never_reached(parts.name, parts.model)
        found, zero = seen
        # One class after another: C++ functions such as roi_align cannot be vmapped.
        rows = scores.sum(0).reshape(-1) if scores.requires_grad else []
        grads = [
            torch.autograd.grad(
                row, zero, retain_graph=True, create_graph=wanted, allow_unused=True, materialize_grads=True
            )[0]
            for row in rows
        ]
    every = torch.stack(grads, 1) if grads else zero.new_zeros(len(x), scores[0].numel(), *zero.shape[1:])
    every = every if scores.ndim == 2 else every.squeeze(1)
    if not wanted:
        every, scores = every.detach(), scores.detach()
        output = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, output)
    return _OnePass(found, every, scores, output)


def _in_one_transform(parts: Parts, x: Tensor, score: Callable[[Any], tuple[Tensor, Any]]) -> _OnePass:
    """The same by torch.func, which other transforms go through."""

    def run(zero: Tensor) -> tuple[Tensor, tuple[Tensor, Any]]:
        seen: list[Tensor] = []

        def perturbed(value: Tensor) -> Tensor:
            seen.append(value.clone())
            return value + zero

        scores, output = score(_run_replaced(parts, x, perturbed))
        return scores, (seen[0], output)

    with torch.no_grad():
        shape_of = _own_trunk(parts, x)[0]
    with_aux: Any = torch.func.vjp(run, torch.zeros_like(shape_of), has_aux=True)
    scores, pullback, (found, output) = with_aux
    return _OnePass(found, pulled_back(pullback, scores), scores, output)


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
    ResNet-50: `layer4`, EfficientNet: `features`). In a transformer it is what the last attention reads, the
    norm before it (ViT: `encoder.layers.encoder_layer_11.ln_1`): after that attention a class token has all
    that the score knows, and no patch has a gradient.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), an input; only its shape matters.

    Raises:
        ValueError: the model runs neither a convolution with spatial maps nor an attention over patches.
        TypeError: an argument is of the wrong kind.
    """
    checks.check_call(model, x)
    root = unwrap(model)
    return _default_name(_plan(root, x), root, x)


def layers(model: nn.Module, x: Float[Tensor, "B C *size"]) -> dict[str, tuple[int, ...]]:
    """The layers with spatial maps that the model runs for x, in order, and their shape for one image.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), an input; only its shape matters.

    Returns:
        Names to shapes (1, K, *spatial), those of tokens as they are placed on the image; a module that runs
        several times is listed once per call, as `name#1`, `name#2`, ….

    Raises:
        ValueError: bad x or a model in training mode.
        TypeError: an argument is of the wrong kind.
    """
    checks.check_call(model, x)
    root = unwrap(model)
    plan = _plan(root, x)
    calls = _calls(plan, root, x)
    counts = _counts(calls)
    has_maps = are_maps(calls, tuple(x.shape[2:]))
    seen: dict[str, int] = {}
    listed: dict[str, tuple[int, ...]] = {}
    for i, call in enumerate(calls):
        seen[call.name] = number = seen.get(call.name, 0) + 1
        shape = _placed_shape(plan, root, i, x)
        if call.name and len(shape) == x.ndim and has_maps[i]:
            listed[f"{call.name}#{number}" if counts[call.name] > 1 else call.name] = shape
    return listed


def _default_name(plan: _Plan, root: nn.Module, x: Tensor) -> str:
    """The default layer, looked for once for each shape of image."""
    shape = tuple(x.shape[1:])
    if shape not in plan.defaults:
        plan.defaults[shape] = _found_default(plan, root, x)
    return plan.defaults[shape]


def _found_default(plan: _Plan, root: nn.Module, x: Tensor) -> str:
    calls = _calls(plan, root, x)

    def grid_of(position: int) -> tuple[int, ...] | None:
        shape = _placed_shape(plan, root, position, x)
        is_placed = bool(calls[position].name) and len(shape) == x.ndim and max(shape[2:]) > 1
        return shape[2:] if is_placed else None

    try:
        return calls[default_position(calls, tuple(x.shape[2:]), grid_of)].name
    except ValueError:
        raise ValueError(
            f"layer=None: {type(root).__name__} runs no convolution and no attention over patches, so there "
            "is no default layer; name the layer to explain"
        ) from None


def _placed_shape(plan: _Plan, root: nn.Module, position: int, x: Tensor) -> tuple[int, ...]:
    """The shape of a call's output for one image, placed on the image where it can be."""
    shape = _calls(plan, root, x)[position].shape
    place = _to_spatial(plan, root, position, tuple(x.shape[1:]))
    return shape if place is None else tuple(place(torch.empty(shape, device="meta")).shape)


def _to_spatial(plan: _Plan, root: nn.Module, position: int, image: tuple[int, ...]) -> ToSpatial | None:
    """What places a call's output, found once for each shape of image (C, *size) that has been recorded."""
    key = (position, image)
    if key not in plan.places:
        plan.places[key] = to_spatial_of(root, plan.calls[image], position, image[1:])
    return plan.places[key]


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
    """The layer's output, placed on the image, and the residual: what else the head reads.

    Where the output had to be placed, what it was as the layer returned it is part of the residual.
    """
    raw, residual = _own_trunk(parts, x)
    return (raw, residual) if parts.to_spatial is None else (_placed(parts, raw), (raw, residual))


def run_head(parts: Parts, features: Tensor, residual: Any) -> Any:
    """The model's output for a layer's output, placed on the image."""
    if parts.to_spatial is None:
        return _own_head(parts, features, residual)
    raw, own_residual = residual
    return _own_head(parts, replaced(parts.to_spatial, raw, features), own_residual)


def residual_rows(parts: Parts, residual: Any, rows: Tensor) -> Any:
    """The residual of other rows of the batch, for a head that `takes_any_batch`."""
    return residual if parts.to_spatial is None else (residual[0][rows], residual[1])


def _placed(parts: Parts, raw: Tensor, *, classes: bool = False) -> Tensor:
    """Values in the shape of the layer's output, (B, ...) or (B, n, ...), placed on the image."""
    if parts.to_spatial is None:
        return raw
    if classes:
        return torch.vmap(lambda values: _placed(parts, values), in_dims=1, out_dims=1)(raw)
    expected = "expected a function that selects and arranges it as (B, K, *spatial)"
    try:
        placed = parts.to_spatial(raw)
    except Exception as error:  # anything may go wrong in a user's function
        raise ValueError(
            f"to_spatial fails on what layer {parts.name!r} returns, shape "
            f"{tuple(raw.shape)}: {error}; {expected}"
        ) from error
    if placed.ndim != parts.axes or len(placed) != len(raw):
        raise ValueError(
            f"to_spatial makes shape {tuple(placed.shape)} of what layer {parts.name!r} returns, shape "
            f"{tuple(raw.shape)}; {expected}, with {parts.axes} axes as x has"
        )
    return placed


def _own_trunk(parts: Parts, x: Tensor) -> tuple[Tensor, Any]:
    """The layer's output as it returned it, and the residual."""
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


def _own_head(parts: Parts, features: Tensor, residual: Any) -> Any:
    """The model's output for a layer's output as it returned it."""
    if parts.cut is not None:
        return parts.cut.head(parts.model, features, *residual)
    return _run_replaced(parts, residual, lambda _: features.clone())


class _Reached(BaseException):
    """Ends a forward at the layer; not an Exception, so that no forward's own `except` swallows it."""


def _run_replaced(parts: Parts, x: Tensor, change: Callable[[Tensor], Tensor]) -> Any:
    """The model's output for x with the layer's output changed on its way."""

    def changed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return with_features(forward(*args, **kwargs), change)

    return run_changed(parts.model, x, {(parts.layer, parts.call): changed})


def with_features(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output with its features, the first floating-point tensor, changed."""
    if isinstance(output, Tensor):
        return change(output)
    leaves, spec = pytree.tree_flatten(output)
    position = trace.feature_position(output)
    if position is not None:
        leaves[position] = change(leaves[position])
    return pytree.tree_unflatten(leaves, spec)


def run_model(model: nn.Module, x: Tensor) -> Any:
    """The model's own output for x, without letting its forward write to the model or to x."""
    return private_copy(model)(guarded(x))


class ModuleCall(NamedTuple):
    """A module that a forward runs, which of its runs it is, and the shape of its output for one image."""

    name: str
    number: int
    module: nn.Module
    shape: tuple[int, ...]


def module_calls(model: nn.Module, x: Tensor) -> list[ModuleCall]:
    """Every run of every module in a forward of images like x, in the order in which they end."""
    root = unwrap(model)
    counts: dict[str, int] = {}
    found = []
    for call in _calls(_plan(root, x), root, x):
        counts[call.name] = number = counts.get(call.name, 0) + 1
        found.append(ModuleCall(call.name, number, unwrap(root.get_submodule(call.name)), call.shape))
    return found


def attention_blocks(model: nn.Module, x: Tensor) -> list[ModuleCall]:
    """The runs of a transformer's blocks, in order: those around one attention over all tokens each."""
    root = unwrap(model)
    calls = module_calls(model, x)
    return [calls[position] for position in attention_positions(_calls(_plan(root, x), root, x))]


def head_after(model: nn.Module, x: Tensor, block: ModuleCall) -> Callable[[Tensor], Any] | None:
    """The model from a block's own output on, where it reads nothing else and can be cut there."""
    parts = prepare(model, f"{block.name}#{block.number}", x)
    return (lambda tokens: _own_head(parts, tokens, ())) if parts.takes_any_batch else None


def place_patches(
    layer: Layer, model: nn.Module, x: Tensor, block: ModuleCall, values: Float[Tensor, "B n tokens"]
) -> Float[Tensor, "B n *spatial"]:
    """One value of each token of a block as maps, the tokens that stand for no place left out."""
    given = unshared(layer)
    name = f"{block.name}#{block.number}"
    parts = prepare(model, at(name, given.to_spatial if isinstance(given, At) else None), x)
    maps = _placed(parts, values.movedim(1, -1))
    checks.check_features(maps, x, block.name)
    return maps


def run_changed(model: nn.Module, x: Tensor, change: Mapping[tuple[str, int], Callable[..., Any]]) -> Any:
    """The model's output for x where runs of its modules are replaced, everything out of place.

    Args:
        model: the network; it is only read.
        x: (B, C, *size).
        change: `(name, number)` of a run to what runs in its place, `(forward, *args, **kwargs) -> output`.
    """
    names = {name for name, _ in change}
    counts: dict[str, int] = {}

    def intercept(name: str, _: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
        if name not in names:
            return None

        def changed(*args: Any, **kwargs: Any) -> Any:
            counts[name] = number = counts.get(name, 0) + 1
            run = change.get((name, number))
            return forward(*args, **kwargs) if run is None else run(forward, *args, **kwargs)

        return changed

    return private_copy(model, intercept)(guarded(x))


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
        key = _prepare_while_compiling(model, unshared(layer), tuple(x.shape[1:]), x.dtype, x.device)
        name, call, cut, place = _COMPILING[key]
        return Parts(_unwrapped_while_compiling(model), name, call, cut, name, place, x.ndim)
    layer = unshared(layer)
    given = layer.to_spatial if isinstance(layer, At) else None
    layer = layer_of(layer)
    checks.check_call(model, x)
    root = unwrap(model)
    plan = _plan(root, x)
    if all(len(shape) != x.ndim - 1 for shape in plan.calls):
        checks.check_model(root, x)
    if layer is None:
        layer = _default_name(plan, root, x)
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
    number = call or count
    place = given or _place_of(plan, root, name, number, x)
    return Parts(root, name, number, _cut(plan, name, number), shown, place, x.ndim)


def _place_of(plan: _Plan, root: nn.Module, name: str, number: int, x: Tensor) -> ToSpatial | None:
    """What places the output of a module's call; tokens alone are looked at anew for each size of image."""

    def position(calls: tuple[Call, ...]) -> int:
        return [i for i, call in enumerate(calls) if call.name == name][number - 1]

    known, calls = next(iter(plan.calls.items()))
    place = position(calls)
    if len(calls[place].shape) == x.ndim:
        return _to_spatial(plan, root, place, known)
    return _to_spatial(plan, root, position(_calls(plan, root, x)), tuple(x.shape[1:]))


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
    key = f"{id(parts.model)}/{id(parts.cut)}/{id(parts.to_spatial)}"
    if key not in _COMPILING:
        weakref.finalize(parts.model, _COMPILING.pop, key, None)
    _COMPILING[key] = (parts.layer, parts.call, parts.cut, parts.to_spatial)
    return key


# What torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, for seconds.
_prepare_while_compiling.__dict__["_dynamo_marked_constant"] = True


def _unwrapped_while_compiling(model: nn.Module) -> nn.Module:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def traced(model: nn.Module, x: Tensor) -> trace.Trace | None:
    """The model's verified trace, or None where it has none."""
    return _plan(model, x).trace


def _any_calls(plan: _Plan) -> tuple[Call, ...]:
    return next(iter(plan.calls.values()))


def _cut(plan: _Plan, name: str, call: int) -> trace.Cut | None:
    if plan.trace is None or len(plan.trace.calls.get(name, ())) < call:
        return None
    node = plan.trace.calls[name][call - 1]
    if node is None:
        return None
    if (name, call) not in plan.cuts:
        plan.cuts[name, call] = trace.cut(plan.trace, node)
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
        traced = trace.trace(root)
        if traced is not None:
            traced = trace.audited(traced, root, sample, expected)
    return _Plan(mark, canonical_names(root), traced, {tuple(x.shape[1:]): calls}, {}, {}, {})


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
            start = len(calls)
            output = forward(*args, **kwargs)
            shape = _shape(output)
            calls.append(
                Call(
                    name, shape, kind, isinstance(module, _CONVOLUTIONS), pools(module),
                    isinstance(module, nn.Sequential), own_layout(module, shape), start,
                    _count_of_tensors(output) == 1,
                )
            )  # fmt: skip
            return output

        return recorded

    output = private_copy(root, intercept)(x.clone())
    return tuple(calls), output


def _shape(output: Any) -> tuple[int, ...]:
    position = trace.feature_position(output)
    return () if position is None else tuple(pytree.tree_leaves(output)[position].shape)


def _count_of_tensors(output: Any) -> int:
    leaves = pytree.tree_leaves(output)
    return sum(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)


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
