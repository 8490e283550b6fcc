"""A network's two halves at a target layer: by a trace of it, or by running all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network import trace
from xcam_fn.network.calls import (
    ModuleCall,
    is_in_place,
    keeps_rows_apart,
    leaves_of,
    outputs_agree,
    run_changed,
)
from xcam_fn.network.copies import is_quantized
from xcam_fn.network.passes import Pass, Site
from xcam_fn.network.places import replaced
from xcam_fn.network.probe import made_up
from xcam_fn.perturb import normal
from xcam_fn.torch_state import in_transform, is_readable, is_wrapped, outside_transforms


class Halves(NamedTuple):
    """A network cut at a target layer, `head(*trunk(x)) == model(x)`.

    Attributes:
        site: the target layer.
        trunk: x to the layer's own output and the residual, what else of the trunk the head reads.
        head: the layer's own output and the residual to the network's output.
        takes_any_batch: the head runs on any number of rows, as it reads nothing but them.
        is_traced: the head runs what follows the layer and nothing else.
    """

    site: Site
    trunk: Callable[[Tensor], tuple[Tensor, Any]]
    head: Callable[[Tensor, Any], Any]
    takes_any_batch: bool
    is_traced: bool

    def run_trunk(self, x: Tensor) -> tuple[Tensor, Any]:
        """The layer's output placed on the image, and the residual, what was dropped by placing included."""
        own, residual = self.trunk(x.clone())
        return (own, residual) if self.site.to_spatial is None else (self.site.placed(own), (own, residual))

    def run_head(self, features: Tensor, residual: Any) -> Any:
        """The network's output for features placed on the image."""
        if self.site.to_spatial is None:
            return self.head(features, residual)
        own, rest = residual
        return self.head(replaced(self.site.to_spatial, own, features), rest)

    def alone(self, own: Tensor, which: Tensor) -> Any:
        """The residual of a head that takes any batch, for rows of the layer's own output."""
        return () if self.site.to_spatial is None else (own[which], ())


def halves(found: Pass, x: Tensor, *, differentiable: bool = False) -> Halves:
    """The network cut at a pass's target layer: by a trace made for this call, else by running all of it.

    Args:
        found: of a forward of this network on images like x.
        x: (B, C, *size).
        differentiable: the halves are going to be differentiated; a trace needs the network's gradients.
    """
    site = found.site
    cut = cut_at(site, found.calls, x, differentiable=differentiable)
    if cut is not None:
        trunk, head = cut.trunk, cut.head
        any_batch = cut.residual_is_empty and len(found.own) == len(x)
        if any_batch and is_readable(found.own):
            any_batch = keeps_rows_apart(lambda a: head(site.root, a), found.own[:1].detach())
        return Halves(
            site,
            lambda x: trunk(site.root, x),
            lambda features, residual: head(site.root, features, *residual),
            takes_any_batch=any_batch,
            is_traced=True,
        )

    def trunk_by_replacing(x: Tensor) -> tuple[Tensor, Any]:
        seen: list[Tensor] = []
        site.run(x, lambda value: seen.append(value.clone()) or value)
        return seen[0], x

    def head_by_replacing(features: Tensor, x: Tensor) -> Any:
        if in_transform() and is_in_place(site.module):
            raise checks.StructureError(
                f"layer {site.shown!r} modifies its input in place, unsupported by torch.func; choose another"
            )
        return site.run(x, lambda _: features.clone())

    return Halves(site, trunk_by_replacing, head_by_replacing, takes_any_batch=False, is_traced=False)


def cut_at(
    site: Site, calls: list[ModuleCall], x: Tensor, *, differentiable: bool = False
) -> trace.Cut | None:
    """The network's trace cut at a target layer; None where it cannot be."""
    traced = traced_model(site.root, x, differentiable=differentiable)
    call = next(c for c in calls if c.key == (site.name, site.number))
    if traced is None or len(traced.calls.get(call.name, ())) < call.number:
        return None
    node = traced.calls[call.name][call.number - 1]
    return None if node is None else trace.cut(traced, node)


def traced_model(root: nn.Module, x: Tensor, *, differentiable: bool = False) -> trace.Trace | None:
    """The model's trace, made anew and compared with it on two images, or None where there is none.

    Args:
        root: the network; it is only read.
        x: (B, C, *size).
        differentiable: compare gradients too, which autograd functions of the user's own may define.
    """
    if is_wrapped(next(iter(root.parameters()), x.new_zeros(()))):
        return None  # under vmap over models a trace cannot be compared
    with outside_transforms(), torch.no_grad():
        sample = x[:1].detach() if is_readable(x) else made_up(x)
        other = sample.roll(1, -1) / 2
        found = None if any(map(is_quantized, root.modules())) else trace.trace(root)
        if found is None:  # quantized layers read whole numbers, and features are floats
            return None
        try:
            found = trace.audited(found, root, sample, run_changed(root, sample))
            if found is None or not outputs_agree(trace.run(found, root, other), run_changed(root, other)):
                return None
            if not differentiable:
                return found
            traced = _input_gradient(lambda x: trace.run(found, root, x), sample)
            own = _input_gradient(lambda x: run_changed(root, x), sample)
            return found if outputs_agree(traced, own) else None
        except Exception:  # one image may not do
            return None


def _input_gradient(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The gradient of the sum of all that a network returns, each value by a weight of its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        leaves = [leaf for leaf in leaves_of(run(x)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        weights = [normal(0, 0, tuple(leaf.shape), like=leaf) for leaf in leaves]
        (found,) = torch.autograd.grad(leaves, x, weights, allow_unused=True) if leaves else (None,)
    return torch.zeros_like(x) if found is None else found
