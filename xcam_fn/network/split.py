"""The public names of the room: trunk and head at a layer, features, and their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.docstrings import documented
from xcam_fn.network.calls import leaves_of, module_calls
from xcam_fn.network.copies import unwrap
from xcam_fn.network.forward import forward_pass
from xcam_fn.network.halves import halves
from xcam_fn.network.passes import Pass, Score
from xcam_fn.network.places import ToSpatial, placed_shape
from xcam_fn.network.probe import Probe
from xcam_fn.network.target_layer import Layer, is_measured
from xcam_fn.network.vjp import recording
from xcam_fn.targets import Classes, Target, logit, resolve
from xcam_fn.targets.outputs import dense_logits


class Split(NamedTuple):
    """A model split at a layer into two pure functions, `head(*trunk(x)) == model(x)`.

    Attributes:
        trunk: x (B, C, *size) to the layer's output and the residual, everything else that the head reads.
        head: the layer's output and the residual to the model's output.
    """

    trunk: Callable[[Tensor], tuple[Tensor, Any]]
    head: Callable[[Tensor, Any], Any]


class FeatureAndGrad(NamedTuple):
    """Features, gradients and output.

    Attributes:
        features: A, the layer's output, (B, K, *spatial).
        grads: G = ∂s/∂A, (B, K, *spatial), or (B, n, K, *spatial) for n classes per image.
        output: the model's output.
    """

    features: Tensor
    grads: Tensor
    output: Any


def checked_pass(
    model: nn.Module, layer: Layer, x: Tensor, to_spatial: ToSpatial | None, score: Score | None = None
) -> Pass:
    """`forward_pass` with checked arguments."""
    checks.check_to_spatial(to_spatial)
    if not torch.compiler.is_dynamo_compiling():
        checks.check_call(model, x)
        checks.check_model(unwrap(model))
    return forward_pass(model, layer, x, to_spatial, records=score is not None, score=score)


@documented
def split(
    model: nn.Module, layer: Layer, x: Float[Tensor, "B C *size"], *, to_spatial: ToSpatial | None = None
) -> Split:
    """Split the model at a layer's output into two pure functions.

    Args:
        layer: a name (`"layer4"`, `"layer4.2.relu#2"`), a module of the model, or None for `default_layer`.
        x: (B, C, *size), example images.

    Returns:
        `Split(trunk, head)`: `trunk(x) -> (features, residual)` and `head(features, residual) -> output`.
        If the model can be traced, the head runs only what comes after the layer; otherwise it runs the
        whole model with the layer's output replaced. Both keep the model's current structure, and read its
        parameters when they are called.
    """
    x = checks.plain(x)
    with recording(x):
        found = halves(
            checked_pass(model, layer, x, to_spatial, default_score(layer)), x, differentiable=True
        )
    return Split(trunk=found.run_trunk, head=found.run_head)


@documented
def features(
    model: nn.Module, layer: Layer, x: Float[Tensor, "B C *size"], *, to_spatial: ToSpatial | None = None
) -> Tensor:
    """Return the layer's output for x, before any later in-place change.

    Returns:
        (B, K, *spatial), detached unless x requires grad.
    """
    x = checks.plain(x)
    with recording(x):
        return checked_pass(model, layer, x, to_spatial, default_score(layer)).features


@documented
def feature_and_grad(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    cls: Classes = None,
    *,
    to_spatial: ToSpatial | None = None,
    create_graph: bool = False,
) -> FeatureAndGrad:
    """Return the layer's features and the gradient of the score with respect to them.

    One forward pass of the model, and for each class a backward pass from the score to the layer.

    Returns:
        `FeatureAndGrad(features, grads, output)`.

    References:
        Selvaraju et al., Grad-CAM (arXiv:1610.02391).
    """
    x = checks.plain(x)
    checks.check_call(model, x)
    if not torch.compiler.is_compiling():
        check("create_graph", create_graph, bool)
    score = checked_scores(cls, x.shape[0])
    with recording(x, create_graph):
        found = checked_pass(model, layer, x, to_spatial, score)
        grads = found.gradient(score)
        return FeatureAndGrad(found.features, grads, found.output)


def checked_scores(cls: Classes, batch: int) -> Callable[[Any], Tensor]:
    """The function from the model's output to a batch's scores, (B,) or (B, n), with their shape checked."""
    target = resolve(cls)
    return lambda output: checks.scores_of(target, output, batch, many=isinstance(target, Target))


@documented
def default_layer(model: nn.Module, x: Float[Tensor, "B C *size"]) -> str:
    """Return the name of the layer that class activation maps are usually taken at.

    It is the last convolution's activation as the network goes on to use it: the last module run, before
    pooling or flattening, whose output has the last convolution's spatial size (VGG-19: `features.35`,
    ResNet-50: `layer4`, EfficientNet: `features`). In a transformer it is what the last attention reads, the
    norm before it (ViT: `encoder.layers.encoder_layer_11.ln_1`): after that attention a class token has all
    that the score knows, and no patch has a gradient.

    Raises:
        ValueError: the model runs neither a convolution with spatial maps nor an attention over patches.
    """
    x = checks.plain(x)
    with torch.no_grad():
        return checked_pass(model, None, x, None, default_score(None)).site.shown


def default_score(layer: Layer) -> Score | None:
    """The score that must have a gradient at a default layer, without a class: the predicted class's logit.

    If the network does not return class logits, it is the whole output.
    """

    def score(output: Any) -> Tensor:
        with contextlib.suppress(ValueError, TypeError):
            return logit(None)(output)
        with contextlib.suppress(ValueError, TypeError):
            output = dense_logits(output)
        parts = [leaf.square().sum() for leaf in leaves_of(output) if checks.holds_numbers(leaf)]
        if not parts:
            raise ValueError("layer=None: the model's output holds no floating-point numbers; name the layer")
        return torch.stack(parts).sum()[None]

    return score if layer is None else None


@documented
def layers(model: nn.Module, x: Float[Tensor, "B C *size"]) -> dict[str, tuple[int, ...]]:
    """Return the layers with spatial maps that the model runs for x, in order, with their shapes.

    Returns:
        Names to shapes for one image, (1, K, *spatial), of tokens after arranging them as maps; a module that
        runs several times is listed once per call, as `name#1`, `name#2`, ….
    """
    x = checks.plain(x)
    checks.check_call(model, x)
    checks.check_model(unwrap(model))
    with torch.no_grad():
        calls, probe = module_calls(unwrap(model), x), Probe(unwrap(model), x)
    last = {call.name: call.number for call in calls}
    listed: dict[str, tuple[int, ...]] = {}
    in_doubt = is_measured(unwrap(model), calls, probe)
    for i, call in enumerate(calls):
        shape = placed_shape(calls, i, probe, in_doubt=in_doubt) if call.name else ()
        if len(shape) == x.ndim and shape[:1] == (1,):
            listed[call.shown if last[call.name] > 1 else call.name] = shape
    return listed
