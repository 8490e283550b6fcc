"""A network at a target layer: one forward of it, recorded from that layer on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network.attention import StepByStep
from xcam_fn.network.bound import Bound
from xcam_fn.network.calls import (
    Key,
    ModuleCall,
    features_of,
    is_in_place,
    outputs_agree,
    run_changed,
    with_features,
)
from xcam_fn.network.copies import unwrap
from xcam_fn.network.places import ToSpatial, is_settled, path_inward, to_spatial_of
from xcam_fn.network.probe import Probe, made_up
from xcam_fn.network.target_layer import Carrying, Found, Layer, find, is_in_doubt, is_within, position_of
from xcam_fn.network.vjp import by_autograd, detached, differentiated, gradient, pulled_back
from xcam_fn.torch_state import is_readable, is_wrapped, outside_transforms

Score = Callable[[Any], Tensor]
Change = Callable[[Tensor], Tensor]
Watched = Callable[[str], bool] | None


class _Guess(NamedTuple):
    """Which call of which module a layer was, and whether placing its output took all calls."""

    name: str
    number: int
    watch_all: bool


_TRIES = 4  # forwards until one agrees with what it was taken for: two where the network does not change
_Guesses = dict[Found | None, _Guess]
# What a layer was in the last forward of a network, by the layer as it was asked for. An entry saves a
# forward and decides nothing: the forward that uses it records its own calls, and runs again where they say
# otherwise.
_GUESSES: weakref.WeakKeyDictionary[nn.Module, _Guesses] = weakref.WeakKeyDictionary()


class Site(NamedTuple):
    """A target layer in a network.

    Attributes:
        root: the network, unwrapped.
        name: of the layer.
        number: which of its calls, from 1.
        shown: its name in messages.
        to_spatial: what places its output as (B, K, *spatial); None where it is so placed already.
        size: of the images, pixels.
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
        """Values in the shape of the layer's output, (B, ...) or (B, n, ...), placed on the image."""
        if self.to_spatial is None:
            return own
        if classes:
            return torch.stack([self.placed(one) for one in own.unbind(1)], 1)
        expected = "expected a function that selects and arranges it as (B, K, *spatial)"
        returned = f"what layer {self.shown!r} returns, shape {tuple(own.shape)}"
        try:
            placed = self.to_spatial(own)
        except Exception as error:  # anything may go wrong in a user's function
            raise ValueError(f"to_spatial fails on {returned}: {error}; {expected}") from error
        axes = len(self.size) + 2
        if not checks.holds_numbers(placed):
            raise TypeError(f"to_spatial returns {checks.kind_of(placed)} for {returned}; {expected}")
        if placed.ndim != axes or placed.shape[0] == 0 or own.shape[0] % placed.shape[0]:
            raise ValueError(
                f"to_spatial makes shape {tuple(placed.shape)} of {returned}; {expected}, with {axes} axes "
                "as x has"
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
        """The network's output for x with the layer's own output changed on its way."""
        is_outside = by_autograd(x)
        in_place = is_outside and is_in_place(self.module)

        def changed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if in_place and args:  # what it returns may be ignored: its input has to hold the result
                new = with_features(forward(args[0].clone(), *args[1:], **kwargs), change)
                unwritable = new.requires_grad and args[0]._is_view()  # made without recording: torch refuses
                return new if unwritable else args[0].copy_(new)
            output = forward(*args, **kwargs)
            features = features_of(output)
            if features is None:
                raise checks.StructureError(
                    f"layer {self.shown!r} returns {checks.kind_of(output)}, not floating-point numbers; "
                    "explain another layer (xcam_fn.layers(model, x) lists them), or use rise"
                )
            if is_outside and is_wrapped(features):
                raise checks.StructureError(
                    f"layer {self.shown!r} runs inside torch.vmap, where a layer's output cannot be read; "
                    "explain a layer outside of it"
                )
            return with_features(output, change)

        return run_changed(
            self.root, x, {(self.name, self.number): changed}, calls, watched=watched, detached=detached
        )


class Pass(NamedTuple):
    """One forward of a network, recorded from the target layer on.

    Attributes:
        site: the target layer.
        calls: all that the forward ran.
        own: the layer's output, as the layer returns it.
        features: the same, placed on the image, (B, K, *spatial).
        output: the network's.
        pull: a score of the output to its values, (B,) or (B, n), their gradients with respect to the layer's
            own output and, with `twice`, the gradient of ⟨gradient, output⟩; None where nothing was recorded.
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
            ValueError: the score reads of the layer's tokens only those that stand for no place.
        """
        assert self.pull is not None
        scores, own = self.pull(score)
        placed = self.site.placed(own, classes=scores.ndim == 2)
        checks.check_finite(placed, f"layer {self.site.shown!r}: the gradient of the score")
        tokens = self.site.to_spatial is not None and is_readable(own)
        if tokens and not placed.detach().any() and own.detach().any():
            raise ValueError(
                f"layer {self.site.shown!r}: the score reads its class token alone, so the gradient of every "
                "patch is zero and there is no map; explain a layer before the last attention (layer=None "
                "finds one)"
            )
        return placed

    def curvature(self, score: Score) -> tuple[Tensor, Tensor]:
        """The gradients of a score, and its second derivative times the features."""
        assert self.pull is not None
        scores, own, second = self.pull(score, twice=True)
        many = scores.ndim == 2
        return self.site.placed(own, classes=many), self.site.placed(second, classes=many)


def recorded_pass(
    model: nn.Module,
    layer: Layer,
    x: Tensor,
    to_spatial: ToSpatial | None = None,
    *,
    replace: Change | None = None,
    records: bool = True,
    score: Score | None = None,
) -> Pass:
    """Run the model once, recorded from the target layer on, and from the start where a graph is recorded.

    Args:
        model: the network; it is only read.
        layer: a name, a module of the model, or None for the default layer.
        x: (B, C, *size).
        to_spatial: what places the layer's output; None finds it.
        replace: the layer's own output to what takes its place; None leaves it.
        records: whether gradients are going to be asked for; else nothing is kept for them.
        score: what a default layer has to have a gradient of; where the first that comes into question has
            none, the model runs again at the next that has.
    """
    root = unwrap(model)
    if any(isinstance(length, torch.SymInt) for length in x.shape):
        return _symbolic_pass(root, layer, x, to_spatial)
    records, carrying = records or score is not None, None
    found = _pass_at(root, layer, x, to_spatial, replace, records, None)
    if layer is not None or score is None or found.pull is None or not by_autograd(x):
        return found
    first = found
    while not _carries(found, score):
        carrying = _carrying(root, x, score) if carrying is None else carrying
        carrying.discard((found.site.name, found.site.number))  # another layer may return the same tensor
        try:
            found = _pass_at(root, layer, x, to_spatial, replace, records, carrying)
        except checks.NoDefaultLayerError:
            return first
    return found


def _carries(found: Pass, score: Score) -> bool:
    """Whether a score has a gradient at a layer; True where it raises, as not every method asks for it."""
    assert found.pull is not None
    try:
        scores, own = found.pull(score)
        return bool(found.site.placed(own, classes=scores.ndim == 2).any())
    except checks.LostGradientError:
        return False
    except Exception:
        return True


def _carrying(root: nn.Module, x: Tensor, score: Score) -> set[Key]:
    """The calls of a forward that depend on x and that a score of the output depends on."""
    seen: list[tuple[Key, Tensor]] = []

    def see(call: ModuleCall, output: Any) -> None:
        values = features_of(output)
        if values is not None and values.requires_grad:
            seen.append((call.key, values))

    with torch.enable_grad():
        scores = score(run_changed(root, x.detach().requires_grad_(), see=see, detached=True))
        if not seen or not scores.requires_grad:
            return set()
        keys, values = zip(*seen, strict=True)  # a checkpoint runs, and is seen, again in the backward
        grads = differentiated(scores.sum(), values)
    return {key for key, grad in zip(keys, grads, strict=True) if grad is not None and grad.any()}


def _pass_at(
    root: nn.Module,
    layer: Layer,
    x: Tensor,
    to_spatial: ToSpatial | None,
    replace: Change | None,
    records: bool,
    carrying: Carrying,
) -> Pass:
    size, probe = tuple(x.shape[2:]), Probe(root, x)
    record = (_by_autograd if records else _unrecorded) if by_autograd(x) else _by_transform
    guesses = _GUESSES.setdefault(root, {})
    asked = None if layer is None else find(root, layer)
    guess = guesses.get(asked) or _first_guess(root, asked, x, probe)
    for _ in range(_TRIES):
        calls: list[ModuleCall] = []
        site = Site(root, guess.name, guess.number, guess.name, None, size)
        path = path_inward(site.module, site.name)
        watched = None if guess.watch_all else _tells(site.name, path)
        found = record(site, x, replace, calls, watched)
        position = position_of(root, asked, calls, probe, carrying)
        call = calls[position]
        watch_all = guess.watch_all or not (to_spatial or is_settled(calls, position, size, path))
        seen = _Guess(call.name, call.number, watch_all)
        if seen == guess and found is not None:
            break
        guess = seen
    else:
        raise ValueError(
            f"layer {guess.name!r}: {type(root).__name__} runs other modules at each forward of the same "
            "images; name a layer that runs in all of them, such as 'layer#1' for its first call"
        )
    if carrying is None:
        guesses[asked] = guess
    is_call = asked is not None and asked[1] is not None
    in_doubt = is_in_doubt(root, calls, position) and not (is_call and not isinstance(root, Bound))
    site = site._replace(shown=call.shown if is_call else call.name)
    try:
        place = to_spatial or to_spatial_of(calls, position, probe, in_doubt=in_doubt)
        return _pass_of(site._replace(to_spatial=place), calls, found, x)
    except ValueError as error:
        if _reads(site, x):
            raise
        raise ValueError(
            f"layer {site.shown!r} does not depend on the image, as a text's tower does not: it returns the "
            "same for another one; explain a layer of the image's tower (layer=None finds one)"
        ) from error


def _reads(site: Site, x: Tensor) -> bool:
    """Whether a layer returns something else for other images, as far as that can be found out."""
    if not by_autograd(x):
        return True
    with torch.no_grad():
        one, other = (_unrecorded(site, images, None, [], None) for images in (x, 1 - 2 * x))
    return one is None or other is None or not outputs_agree(one[0], other[0])


def _tells(layer: str, path: Collection[str]) -> Callable[[str], bool]:
    """Which modules tell where a layer's output lies: those that it is in, itself, and some in it."""
    return lambda name: is_within(layer, name) or name.rpartition(".")[0] in path


def _pass_of(site: Site, calls: list[ModuleCall], found: _Found, x: Tensor) -> Pass:
    own, output, pull = found
    placed = site.placed(own)
    checks.check_features(placed, x, site.shown)
    checks.check_finite(placed, f"layer {site.shown!r}: its output")
    return Pass(site, calls, own, placed, output, pull)


def _symbolic_pass(root: nn.Module, layer: Layer, x: Tensor, to_spatial: ToSpatial | None) -> Pass:
    """A pass whose sizes are symbols: the layer is found, and placed, by a forward of numbers."""
    with outside_transforms(), torch.no_grad():
        known = recorded_pass(root, layer, made_up(x), to_spatial)
    found = _by_transform(known.site, x, None, [], lambda _: False)
    assert found is not None  # the forward of numbers reached it
    return _pass_of(known.site, known.calls, found, x)


def _first_guess(root: nn.Module, asked: Found | None, x: Tensor, probe: Probe) -> _Guess:
    """Which call the layer may be, in a network that was not seen before.

    The default layer is that of the first image, or of all where one does not do, as of frames of one clip.
    """
    if asked is not None:
        return _Guess(asked[0], asked[1] or 1, watch_all=False)
    calls: list[ModuleCall] = []
    with torch.no_grad():
        try:
            run_changed(root, x[:1], None, calls)
        except Exception:
            calls.clear()
            run_changed(root, x, None, calls)
    call = calls[position_of(root, None, calls, probe)]
    return _Guess(call.name, call.number, watch_all=True)


_Pull = Callable[..., tuple[Tensor, ...]]
_Found = tuple[Tensor, Any, _Pull | None]


def _unrecorded(
    site: Site, x: Tensor, replace: Change | None, calls: list[ModuleCall], watched: Watched
) -> _Found | None:
    """One forward for the features and the output alone."""
    seen: list[Tensor] = []

    def kept(value: Tensor) -> Tensor:
        value = value if replace is None else replace(value)
        seen[:] = [value.clone()]
        return value

    output = site.run(x, kept, calls, watched)
    return (seen[0], output, None) if seen else None


def _by_autograd(
    site: Site, x: Tensor, replace: Change | None, calls: list[ModuleCall], watched: Watched
) -> _Found | None:
    """One forward with a zero added to the layer's output; the rest records only what is asked for."""
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
    if left and not wanted:  # the layer is in a region that switches recording, which ended with the region
        calls.clear()
        with torch.enable_grad():
            output = site.run(x.detach(), added, calls, watched, detached=True)
    if not seen:
        return None
    raw, zero = seen
    known: list[Any] = [None, ()]  # the score that was asked for last: a default layer is checked by it

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


def _by_transform(
    site: Site, x: Tensor, replace: Change | None, calls: list[ModuleCall], watched: Watched
) -> _Found | None:
    """The same by torch.func: a forward for the features, and one for each score that is asked for."""
    with differentiable_again(True):
        found = _unrecorded(site, x, replace, calls, watched)
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
    """The scores, their gradients at zero and, with `twice`, those of ⟨gradient, raw⟩, by torch.func."""
    zero = torch.zeros_like(raw)

    def gradients(zero: Tensor) -> tuple[Tensor, Tensor]:
        with_pullback: Any = torch.func.vjp(lambda zero: scores_at(zero, score), zero)
        scores, pullback = with_pullback
        return pulled_back(lambda v: pullback(v)[0], scores), scores

    if not twice:
        found, scores = gradients(zero)
        return scores, found
    # Reverse over reverse: forward mode has one level for all threads of a process.
    with_aux: Any = torch.func.vjp(gradients, zero, has_aux=True)
    found, pullback, scores = with_aux
    if scores.ndim == 1:
        return scores, found, pullback(raw)[0]
    classes = torch.eye(found.shape[1]).to(raw).reshape(-1, 1, found.shape[1], *[1] * (raw.ndim - 1))
    return scores, found, torch.stack([pullback(one * raw[:, None])[0] for one in classes], 1)


def differentiable_again(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Attention in plain operations where what is computed may be differentiated again."""
    return StepByStep() if wanted else contextlib.nullcontext()
