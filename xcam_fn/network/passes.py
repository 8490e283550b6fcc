"""One forward pass of a network, recorded from a target layer on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network.calls import ModuleCall, features_of, is_in_place, run_changed, with_features
from xcam_fn.network.copies import unwrap
from xcam_fn.network.modes import StepByStep
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.vjp import aligned, by_autograd, detached, gradient, pulled_back
from xcam_fn.torch_state import is_readable, is_wrapped

Score = Callable[[Any], Tensor]
Change = Callable[[Tensor], Tensor]
Watched = Callable[[str], bool] | None


class Site(NamedTuple):
    """A target layer in a network.

    Attributes:
        root: the network, unwrapped.
        name: the layer's name.
        number: which of its calls, from 1.
        shown: its name in messages.
        to_spatial: arranges its output as (B, K, *spatial); None if it already has that layout.
        size: the images' size in pixels.
    """

    root: nn.Module
    name: str
    number: int
    shown: str
    to_spatial: ToSpatial | None
    size: tuple[int, ...]

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return unwrap(self.root.get_submodule(self.name))

    def placed(self, own: Tensor, *, classes: bool = False) -> Tensor:
        """Arrange values in the shape of the layer's output, (B, ...) or (B, n, ...), on the image."""
        if self.to_spatial is None:
            return own
        if classes:
            return torch.stack([self.placed(one) for one in own.unbind(1)], 1)
        expected = "expected a function that rearranges it to (B, K, *spatial)"
        returned = f"the output of layer {self.shown!r}, shape {tuple(own.shape)}"
        try:
            placed = self.to_spatial(own)
        except Exception as error:  # anything may go wrong in a user's function
            raise ValueError(f"to_spatial fails on {returned}: {error}; {expected}") from error
        axes = len(self.size) + 2
        if not checks.holds_numbers(placed):
            raise TypeError(f"to_spatial returns {checks.kind_of(placed)} for {returned}; {expected}")
        if placed.ndim != axes or placed.shape[0] == 0 or own.shape[0] % placed.shape[0]:
            raise ValueError(
                f"to_spatial returns shape {tuple(placed.shape)} for {returned}; {expected}, with {axes} "
                "axes like x"
            )
        return placed

    def run(
        self,
        x: Tensor,
        change: Change,
        calls: list[ModuleCall] | None = None,
        watched: Watched = None,
        *,
        detached: bool = False,
    ) -> Any:
        """The network's output for x, with the layer's own output changed."""
        is_outside = by_autograd(x)
        in_place = is_outside and is_in_place(self.module)

        def changed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if in_place and args:  # callers may ignore its return value: its input must hold the result
                new = with_features(forward(args[0].clone(), *args[1:], **kwargs), change)
                unwritable = new.requires_grad and args[0]._is_view()  # torch refuses a view made unrecorded
                return new if unwritable else args[0].copy_(new)
            output = forward(*args, **kwargs)
            features = features_of(output)
            if features is None:
                raise checks.StructureError(
                    f"layer {self.shown!r} returns {checks.kind_of(output)}, not floating-point numbers; "
                    "choose another layer (xcam_fn.layers(model, x) lists them), or use rise"
                )
            if is_outside and is_wrapped(features):
                raise checks.StructureError(
                    f"layer {self.shown!r} runs inside torch.vmap, where a layer's output cannot be read; "
                    "choose a layer outside of it"
                )
            return with_features(output, change)

        return run_changed(
            self.root, x, {(self.name, self.number): changed}, calls, watched=watched, detached=detached
        )


class Pass(NamedTuple):
    """One forward of a network, recorded from the target layer on.

    Attributes:
        site: the target layer.
        calls: all calls of the forward.
        own: the layer's output, as the layer returns it.
        features: the same, arranged on the image, (B, K, *spatial).
        output: the network's output.
        pull: maps a score of the output to its values, (B,) or (B, n), their gradients with respect to the
            layer's own output and, with `twice`, the gradient of ⟨gradient, output⟩; None if nothing was
            recorded.
    """

    site: Site
    calls: list[ModuleCall]
    own: Tensor
    features: Tensor
    output: Any
    pull: _Pull | None

    def gradient(self, score: Score) -> Tensor:
        """The gradients of a score with respect to the features, (B, K, *spatial) or (B, n, K, *spatial).

        Raises:
            ValueError: the score depends only on tokens of the layer that have no position on the image.
        """
        assert self.pull is not None
        scores, own = self.pull(score)
        placed = self.site.placed(own, classes=scores.ndim == 2)
        checks.check_finite(placed, f"layer {self.site.shown!r}: the gradient of the score")
        tokens = self.site.to_spatial is not None and is_readable(own)
        if tokens and not placed.detach().any() and own.detach().any():
            raise ValueError(
                f"layer {self.site.shown!r}: only its class token affects the score, so the gradient of "
                "every patch is zero; choose a layer before the last attention (layer=None finds one)"
            )
        return placed

    def curvature(self, score: Score) -> tuple[Tensor, Tensor]:
        """The gradient of a score, and its second derivative times the features."""
        assert self.pull is not None
        scores, own, second = self.pull(score, twice=True)
        many = scores.ndim == 2
        return self.site.placed(own, classes=many), self.site.placed(second, classes=many)


_Pull = Callable[..., tuple[Tensor, ...]]
Passed = tuple[Tensor, Any, _Pull | None]


def pass_unrecorded(
    site: Site, x: Tensor, replace: Change | None, calls: list[ModuleCall], watched: Watched
) -> Passed | None:
    """Run one forward for the features and the output only."""
    seen: list[Tensor] = []

    def kept(value: Tensor) -> Tensor:
        value = value if replace is None else replace(value)
        seen[:] = [value.clone()]
        return value

    output = site.run(x, kept, calls, watched)
    return (seen[0], output, None) if seen else None


def pass_by_autograd(
    site: Site, x: Tensor, replace: Change | None, calls: list[ModuleCall], watched: Watched
) -> Passed | None:
    """Run one forward with a zero added to the layer's output, recording no more than asked for."""
    wanted = torch.is_grad_enabled()
    seen: list[Tensor] = []

    def added(value: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        zero = torch.zeros_like(value).requires_grad_()
        value = value if replace is None else replace(value)
        seen[:] = [value.clone(), zero]
        return value + zero

    with torch.set_grad_enabled(wanted), differentiable_again(wanted):  # recording begins at the layer
        output = site.run(x if wanted else x.detach(), added, calls, watched)
        left = bool(seen) and not torch.is_grad_enabled()
    if left and not wanted:  # the layer is in a region that switches recording: it ended with the region
        calls.clear()
        with torch.enable_grad():
            output = site.run(x.detach(), added, calls, watched, detached=True)
    if not seen:
        return None
    raw, zero = seen
    known: list[Any] = [None, ()]  # the last score asked for: the check of a default layer uses it

    def first(scores: Tensor, cotangent: Tensor, create_graph: bool) -> Tensor:
        found = gradient(scores, zero, cotangent, create_graph=create_graph)
        if found is None:
            raise checks.lost_gradient(f"layer {site.shown!r}")
        return found

    def pull(score: Score, *, twice: bool = False) -> tuple[Tensor, ...]:
        if known[0] is score and not twice:
            return known[1]
        with torch.enable_grad():
            scores = score(output)
            found = [pulled_back(lambda v: first(scores, v, wanted or twice), scores)]
            if twice:
                rows = found[0].unbind(1) if scores.ndim == 2 else [found[0]]
                second = [gradient(row, zero, raw, create_graph=wanted) for row in rows]
                second = [torch.zeros_like(zero) if one is None else one for one in second]
                found.append(torch.stack(second, 1) if scores.ndim == 2 else second[0])
        known[:] = score, (scores, *found) if wanted else detached((scores, *found))
        return known[1]

    return (raw, output, pull) if wanted else (*detached((raw, output)), pull)


def pass_by_transform(
    site: Site, x: Tensor, replace: Change | None, calls: list[ModuleCall], watched: Watched
) -> Passed | None:
    """Do the same with torch.func: one forward for the features, and one for each score."""
    with differentiable_again(True):
        found = pass_unrecorded(site, x, replace, calls, watched)
    if found is None:
        return None
    raw, output, _ = found

    def scores_at(zero: Tensor, score: Score) -> Tensor:
        with differentiable_again(True):
            return score(site.run(x, lambda value: (value if replace is None else replace(value)) + zero))

    return raw, output, lambda score, twice=False: pulled(scores_at, raw, score, twice=twice)


def pulled(
    scores_at: Callable[[Tensor, Score], Tensor], raw: Tensor, score: Score, *, twice: bool
) -> tuple[Tensor, ...]:
    """The scores, their gradients at zero and, with `twice`, those of ⟨gradient, raw⟩, with torch.func."""
    zero = torch.zeros_like(raw)

    def gradients(zero: Tensor) -> tuple[Tensor, Tensor]:
        with_pullback: Any = torch.func.vjp(lambda zero: aligned(scores_at(zero, score)), zero)
        scores, pullback = with_pullback
        return pulled_back(lambda v: pullback(v)[0], scores), scores

    if not twice:
        found, scores = gradients(zero)
        return scores, found
    # Reverse over reverse: forward mode shares one level among all threads of a process.
    with_aux: Any = torch.func.vjp(gradients, zero, has_aux=True)
    found, pullback, scores = with_aux
    if scores.ndim == 1:
        return scores, found, pullback(raw)[0]
    classes = torch.eye(found.shape[1]).to(raw).reshape(-1, 1, found.shape[1], *[1] * (raw.ndim - 1))
    return scores, found, torch.stack([pullback(one * raw[:, None])[0] for one in classes], 1)


def differentiable_again(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Compute attention in plain operations if the result may be differentiated again."""
    return StepByStep() if wanted else contextlib.nullcontext()
