"""Runs one forward pass at a target layer: recorded, or under torch.compile through prepared halves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network import trace
from xcam_fn.network.bound import Bound
from xcam_fn.network.calls import Calls, Key, ModuleCall, features_of, outputs_agree, run_changed, run_model
from xcam_fn.network.copies import unwrap
from xcam_fn.network.halves import cut_at
from xcam_fn.network.passes import (
    Change,
    Pass,
    Passed,
    Score,
    Site,
    differentiable_again,
    pass_by_autograd,
    pass_by_transform,
    pass_unrecorded,
    pulled,
)
from xcam_fn.network.places import ToSpatial, is_settled, telling_path, to_spatial_of
from xcam_fn.network.probe import Probe, made_up
from xcam_fn.network.target_layer import Carrying, Found, Layer, find, is_in_doubt, is_turned, position_of
from xcam_fn.network.vjp import by_autograd, differentiated, records_nothing
from xcam_fn.torch_state import mark_constant, outside_transforms


class _Guess(NamedTuple):
    """Which call of which module a layer was, and whether locating its output needed all calls."""

    name: str
    number: int
    watch_all: bool


_TRIES = 4  # forwards until a guess is confirmed: two if the network does not change
_Guesses = dict[Found | None, _Guess]
# The call that each requested layer was in a network's last forward. An entry only saves a forward: the
# forward that uses it records its own calls, and runs again if they disagree.
_GUESSES: weakref.WeakKeyDictionary[nn.Module, _Guesses] = weakref.WeakKeyDictionary()


def share_guesses(copy: nn.Module, model: nn.Module) -> None:
    """Let a copy of a network start from what was found in the network, and the other way round."""
    _GUESSES[copy] = _GUESSES.setdefault(model, {})


def forward_pass(
    model: nn.Module,
    layer: Layer,
    x: Tensor,
    to_spatial: ToSpatial | None = None,
    *,
    replace: Change | None = None,
    records: bool = True,
    score: Score | None = None,
) -> Pass:
    """Run the model once, recording from the target layer on, or from the start if a graph is recorded.

    Args:
        model: the network; it is only read.
        layer: a name, a module of the model, or None for the default layer.
        x: (B, C, *size).
        to_spatial: arranges the layer's output on the image; None finds it.
        replace: maps the layer's own output to its replacement; None keeps it.
        records: whether gradients will be needed; else nothing is kept for them.
        score: the score that must have a gradient at a default layer; if it has none at the first candidate,
            the model runs again at the next candidate that has one.
    """
    if torch.compiler.is_dynamo_compiling():
        return _compiling_pass(model, layer, x, to_spatial)
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
    """Whether a score has a gradient at a layer; True if that raises, since not every method needs it."""
    assert found.pull is not None
    try:
        scores, own = found.pull(score)
        return bool(found.site.placed(own, classes=scores.ndim == 2).any())
    except checks.LostGradientError:
        return False
    except Exception:
        return True


def _carrying(root: nn.Module, x: Tensor, score: Score) -> set[Key]:
    """The calls of a forward that depend on x, and on which a score of the output depends."""
    seen: list[tuple[Key, Tensor]] = []

    def see(call: ModuleCall, output: Any) -> None:
        values = features_of(output)
        if values is not None and values.requires_grad:
            seen.append((call.key, values))

    with torch.enable_grad():
        scores = score(run_changed(root, x.detach().requires_grad_(), see=see, detached=True))
        if not seen or not scores.requires_grad:
            return set()
        keys, values = zip(*seen, strict=True)  # a checkpoint runs again, and is seen again, in the backward
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
    record = (pass_by_autograd if records else pass_unrecorded) if by_autograd(x) else pass_by_transform
    guesses = _GUESSES.setdefault(root, {})
    asked = None if layer is None else find(root, layer)
    guess = guesses.get(asked) or _first_guess(root, asked, x, probe)
    for _ in range(_TRIES):
        calls = Calls()
        site = Site(root, guess.name, guess.number, guess.name, None, size)
        path = telling_path(root, site.module, site.name)
        watched = None if guess.watch_all else _tells(site.name, path)
        found = record(site, x, replace, calls, watched)
        position = position_of(root, asked, calls, probe, carrying)
        call = calls[position]
        watch_all = guess.watch_all or not (to_spatial or is_settled(root, calls, position, size, path))
        seen = _Guess(call.name, call.number, watch_all)
        if seen == guess and found is not None:
            break
        guess = seen
    else:
        raise ValueError(
            f"layer {guess.name!r}: {type(root).__name__} runs different modules in each forward pass of "
            "the same images; name a layer that runs in every pass, such as 'layer#1' for its first call"
        )
    if carrying is None:
        guesses[asked] = guess
    is_call = asked is not None and asked[1] is not None
    in_doubt = is_in_doubt(root, calls, position, probe) and not (is_call and not isinstance(root, Bound))
    in_doubt = in_doubt or is_turned(calls, position)
    site = site._replace(shown=call.shown if is_call else call.name)
    try:
        place = to_spatial or to_spatial_of(calls, position, probe, in_doubt=in_doubt)
        return _pass_of(site._replace(to_spatial=place), calls, found, x)
    except ValueError as error:
        if _reads(site, x):
            raise
        raise ValueError(
            f"layer {site.shown!r} does not depend on the image, as in a text encoder: its output is the "
            "same for another image; choose a layer of the image encoder (layer=None finds one)"
        ) from error


def _reads(site: Site, x: Tensor) -> bool:
    """Whether a layer's output depends on the image, as far as that can be determined."""
    if not by_autograd(x):
        return True
    with torch.no_grad():
        one, other = (pass_unrecorded(site, images, None, [], None) for images in (x, 1 - 2 * x))
    return one is None or other is None or not outputs_agree(one[0], other[0])


def _tells(layer: str, path: Collection[str]) -> Callable[[str], bool]:
    """The modules that determine where a layer's output lies: its parents, itself, and some inside it."""
    outer = {"", layer, *(layer[:end] for end, letter in enumerate(layer) if letter == ".")}
    return lambda name: name in outer or name.rpartition(".")[0] in path


def _pass_of(site: Site, calls: list[ModuleCall], found: Passed, x: Tensor) -> Pass:
    own, output, pull = found
    placed = site.placed(own)
    checks.check_features(placed, x, site.shown)
    checks.check_finite(placed, f"layer {site.shown!r}: its output")
    return Pass(site, calls, own, placed, output, pull)


def _symbolic_pass(root: nn.Module, layer: Layer, x: Tensor, to_spatial: ToSpatial | None) -> Pass:
    """A pass with symbolic sizes: a forward with concrete sizes finds the layer and its layout."""
    with outside_transforms(), torch.no_grad():
        known = forward_pass(root, layer, made_up(x), to_spatial)
    found = pass_by_transform(known.site, x, None, [], lambda _: False)
    assert found is not None  # the concrete forward reached it
    return _pass_of(known.site, known.calls, found, x)


def _first_guess(root: nn.Module, asked: Found | None, x: Tensor, probe: Probe) -> _Guess:
    """Guess which call the layer is, in a network that was not seen before.

    The default layer is found on the first image, or on all if one is not enough, as for frames of one clip.
    """
    if asked is not None:
        return _Guess(asked[0], asked[1] or 1, watch_all=False)
    calls = Calls()
    with torch.no_grad():
        try:
            run_changed(root, x[:1], None, calls)
        except Exception:
            calls.clear()
            run_changed(root, x, None, calls)
    call = calls[position_of(root, None, calls, probe)]
    return _Guess(call.name, call.number, watch_all=True)


class _Prepared:
    """The halves that compiled programs call, as attributes; a program holds the attribute's name.

    Dynamo accepts no function as a constant. An entry is made while a program is compiled, and is freed with
    its network; no other call reads it.
    """


def whole(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """The model as a function that records gradients to its input, and if asked to its parameters."""
    if torch.compiler.is_dynamo_compiling():
        root, _, cut, _ = _halves_while_compiling(model, None, x, None)
        return lambda images: cut.head(root, *_flat(cut.trunk(root, images)))
    detached = records_nothing(x)
    return lambda images: run_model(model, images, detached=detached)


def _flat(trunk: tuple[Tensor, Any]) -> tuple[Any, ...]:
    return trunk[0], *trunk[1]


def _compiling_pass(model: nn.Module, layer: Layer, x: Tensor, to_spatial: ToSpatial | None) -> Pass:
    root, shown, cut, place = _halves_while_compiling(model, layer, x, to_spatial)
    site = Site(root, "", 0, shown, place, tuple(x.shape[2:]))
    own, residual = cut.trunk(root, x)

    def scores_at(zero: Tensor, score: Score) -> Tensor:
        with differentiable_again(place is not None):  # tokens come from attention
            return score(cut.head(root, own + zero, *residual))

    def pull(score: Score, *, twice: bool = False) -> tuple[Tensor, ...]:
        return pulled(scores_at, own, score, twice=twice)

    return Pass(site, [], own, site.placed(own), cut.head(root, own, *residual), pull)


def _halves_while_compiling(
    model: nn.Module, layer: Layer, x: Tensor, to_spatial: ToSpatial | None
) -> tuple[nn.Module, str, trace.Cut, ToSpatial | None]:
    key = _prepare_while_compiling(model, layer, to_spatial, tuple(x.shape[1:]), x.dtype, x.device)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model, *getattr(_Prepared, key)


def _prepare_while_compiling(
    model: nn.Module,
    layer: Layer,
    to_spatial: ToSpatial | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Return the key of a network's halves, after a forward and a trace that dynamo does not see."""
    with outside_transforms():
        sample = made_up(torch.empty((1, *shape), dtype=dtype, device=device))
        checks.check_call(model, sample)
        found = forward_pass(model, layer, sample, to_spatial)
        cut = cut_at(found.site, found.calls, sample, differentiable=True)
    root = found.site.root
    if cut is None:
        raise ValueError(
            f"layer {found.site.shown!r}: {type(root).__name__} cannot be traced, so the call cannot be "
            "compiled; call it without torch.compile"
        )
    key = f"halves_{id(root)}_{id(cut)}"
    weakref.finalize(root, delattr, _Prepared, key)
    setattr(_Prepared, key, (found.site.shown, cut, found.site.to_spatial))
    return key


mark_constant(_prepare_while_compiling)
