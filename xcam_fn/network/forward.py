"""One forward: recorded as it runs, or while torch.compile is at work, through halves prepared for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network import trace
from xcam_fn.network.calls import run_model
from xcam_fn.network.halves import cut_at
from xcam_fn.network.passes import (
    Change,
    Pass,
    Score,
    Site,
    differentiable_again,
    pulled,
    recorded_pass,
)
from xcam_fn.network.places import ToSpatial
from xcam_fn.network.probe import made_up
from xcam_fn.network.target_layer import Layer
from xcam_fn.network.vjp import records_nothing
from xcam_fn.torch_state import mark_constant, outside_transforms


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
    """Run the model once, see `recorded_pass`, whether torch.compile is at work or not."""
    if torch.compiler.is_dynamo_compiling():
        return _compiling_pass(model, layer, x, to_spatial)
    return recorded_pass(model, layer, x, to_spatial, replace=replace, records=records, score=score)


class _Prepared:
    """The halves that compiled programs call, as attributes by the key that a program holds as a constant.

    Dynamo takes no function as a constant. An entry is made while a program is compiled and goes with its
    network; no other call reads it.
    """


def whole(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """The model as a function that records gradients to its input, and to its parameters where asked."""
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
        with differentiable_again(place is not None):  # tokens, made by attention
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
    """The key of a network's halves, found by a forward and a trace of it that dynamo does not see."""
    with outside_transforms():
        sample = made_up(torch.empty((1, *shape), dtype=dtype, device=device))
        checks.check_call(model, sample)
        found = recorded_pass(model, layer, sample, to_spatial)
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
